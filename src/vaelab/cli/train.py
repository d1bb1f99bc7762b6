"""`vaelab train RECIPE`: train one model into a run folder; `vaelab train --resume RUN`: go on with one."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from vaelab.cli import console
from vaelab.cli.console import Output
from vaelab.cli.fields import command_from
from vaelab.recipes import RECIPES, recipe
from vaelab.run import CHECKPOINT_EVERY

if TYPE_CHECKING:
    from vaelab.data.datasets import Dataset
    from vaelab.run import Run

app = App(
    name="train",
    help="Train a recipe into a run folder, or go on with a training that was interrupted.\n\n"
    "Examples: vaelab train mnist --latent-dim 10, vaelab train --resume runs/mnist-1",
)

OnNonfinite = Literal["stop", "skip"]
Every = Annotated[
    float, Parameter(name="--checkpoint-every", help="Seconds between checkpoints; 0 for one after each step.")
]


@app.default
def resume(
    *unknown: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    resume: Annotated[Path | None, Parameter(help="The run folder of a training that was interrupted.")] = None,
    on_nonfinite: Annotated[
        OnNonfinite | None, Parameter(help="From here on, at a step whose loss or gradient is not finite.")
    ] = None,
    checkpoint_every: Every = CHECKPOINT_EVERY,
    data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Go on with a training that was interrupted: the same bits as if it had not been.

    Example: vaelab train --resume runs/mnist-1
    """
    from vaelab.errors import UsageError, unknown_name
    from vaelab.run import Run

    if unknown and resume is not None:
        raise UsageError(
            f"--resume goes on with the recipe of its run and takes no other: leave out '{unknown[0]}', or train into a new folder"
        )
    if unknown and not unknown[0].startswith("-"):
        raise unknown_name("recipe", unknown[0], RECIPES)
    if unknown:
        raise UsageError(f"unknown option '{unknown[0]}': see `vaelab train --help`")
    if resume is None:
        raise UsageError(f"name a recipe ({', '.join(RECIPES)}), or --resume RUN: vaelab train mnist")
    _check_every(checkpoint_every)
    run = Run.open(resume)
    from vaelab.cli.common import check_device, data_of
    from vaelab.run import environment
    from vaelab.running import resume as go_on

    check_device(run.environment().get("device", "cpu"))
    begun, now = run.environment(), environment()
    other = [f"{name} {begun.get(name)}, now {now[name]}" for name in ("code", "torch", "threads")
             if begun.get(name) != now[name]]  # fmt: skip
    if begun and other:
        console.note(f"{resume} was begun with {'; '.join(other)}: the bits may differ", output)
    stages = console.Stages(output)
    data = data_of(run, data_dir, stages)
    with stages(f"train {run.recipe().name}") as update, console.interruptible() as stop:
        go_on(
            run, data, on_nonfinite=on_nonfinite, stop=stop, keep_every=checkpoint_every,
            on_progress=lambda p: update(p.step / p.steps, p.text()),
            tell=lambda sentence: console.note(sentence, output),
            warn=lambda sentence: console.note(f"warning: {sentence}", Output()),
        )  # fmt: skip
    _show(run, data, output)


def _body(name: str) -> Any:
    def body(
        *,
        out: Annotated[
            Path | None, Parameter(help="The run folder; by default runs/RECIPE-1, -2, … whichever is free.")
        ] = None,
        data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
        device: Annotated[str, Parameter(help="Where to train: cpu, cuda …")] = "cpu",
        on_nonfinite: Annotated[
            OnNonfinite, Parameter(help="At a step whose loss or gradient is not finite: stop, or skip the step.")
        ] = "stop",
        checkpoint_every: Every = CHECKPOINT_EVERY,
        output: Output = Output(),  # noqa: B008
        fields: dict[str, Any],
    ) -> None:
        _check_every(checkpoint_every)
        recipe(name, **fields)  # out-of-range values end here, before data is fetched or torch imported
        from vaelab import native

        native.ahead()
        from vaelab.cli.common import absolute, check_device, load_data

        check_device(device)
        stages = console.Stages(output)
        data = load_data(fields["data"], data_dir, stages)
        from vaelab.heap import importing

        with importing():
            import torch

            from vaelab.precision import choose
            from vaelab.running import train

        path = out or _free(name)
        fields["data"] = absolute(fields["data"])
        if "images" in (RECIPES[name].__kwdefaults__ or {}):
            fields["images"] = len(data.train)
        resolved = recipe(name, data.shape, **fields)
        resolved = replace(resolved, training=replace(resolved.training, on_nonfinite=on_nonfinite))
        precision = choose(resolved.training.precision, torch.device(device))
        console.note(f"precision: {precision.name} ({precision.reason})", output)
        with stages(f"train {name}") as update, console.interruptible() as stop:
            run = train(
                resolved, data, path, device=device, stop=stop, keep_every=checkpoint_every,
                on_progress=lambda p: update(p.step / p.steps, p.text()),
            )  # fmt: skip
        _show(run, data, output)

    return body


def _show(run: "Run", data: "Dataset", output: Output) -> None:
    last, path = run.history()[-1], shlex.quote(str(run.path))

    def show() -> None:
        rate, distortion = last["test"]["rate"], last["test"]["distortion"]
        what = "cross-entropy" if run.recipe().protocol == "grey" else "distortion"
        epochs = f"{last['epoch']} epoch{'' if last['epoch'] == 1 else 's'}"
        total = "" if rate is None else f" + rate {rate:z.2f} = {distortion + rate:.2f}"
        console.text(
            f"test after {epochs}, {last['seconds']:.1f} s: {what} {distortion:.2f}{total} "
            f"nats per image (n = {len(data.test):,} images)"
        )
        if last.get("skipped_steps"):
            console.text(f"{last['skipped_steps']:,} of {last['step']:,} steps were not finite and were skipped")
        console.text(f"run: {path}   next: vaelab report {path}")

    console.result({"run": str(run.path), **last}, output, show)


def _check_every(seconds: float) -> None:
    from vaelab.errors import UsageError

    if not seconds >= 0:
        raise UsageError(f"--checkpoint-every is {seconds}: expected seconds, 0 or more")


def _free(name: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


for _name, _function in RECIPES.items():
    app.command(
        command_from(
            _function,
            _body(_name),
            without=("images",),
            doc=f"{(_function.__doc__ or '').replace('`', '')}\n\nExample: vaelab train {_name} --epochs 5 --out runs/x",
        ),
        name=_name,
    )
