"""`vaelab train RECIPE`: train one model into a run folder."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from vaelab.cli import console
from vaelab.cli.console import Output
from vaelab.cli.fields import command_from
from vaelab.recipes import RECIPES, recipe

app = App(name="train", help="Train a recipe into a run folder.\n\nExample: `vaelab train mnist --latent-dim 10`")


def _body(name: str) -> Any:
    def body(
        *,
        out: Annotated[
            Path | None, Parameter(help="The run folder; by default runs/RECIPE-1, -2, … whichever is free.")
        ] = None,
        data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
        device: Annotated[str, Parameter(help="Where to train: cpu, cuda …")] = "cpu",
        output: Output = Output(),  # noqa: B008
        fields: dict[str, Any],
    ) -> None:
        recipe(name, **fields)  # out-of-range values end here, before data is fetched or torch imported
        import torch

        from vaelab.cli.common import absolute, check_device, load_data
        from vaelab.precision import choose
        from vaelab.training import Progress, train

        check_device(device)
        stages = console.Stages(output)
        data = load_data(fields["data"], data_dir, stages)
        path = out or _free(name)
        fields["data"] = absolute(fields["data"])
        if "images" in (RECIPES[name].__kwdefaults__ or {}):
            fields["images"] = len(data.train)
        resolved = recipe(name, data.shape, **fields)
        precision = choose(resolved.training.precision, torch.device(device))
        console.note(f"precision: {precision.name} ({precision.reason})", output)
        with stages(f"train {name}") as update, console.interruptible() as stop:

            def show(p: Progress) -> None:
                update(p.step / p.steps, p.text())

            run = train(resolved, data, path, device=device, on_progress=show, stop=stop)
        last = run.history()[-1]

        def show_result() -> None:
            rate, distortion = last["test"]["rate"], last["test"]["distortion"]
            what = "cross-entropy" if resolved.protocol == "grey" else "distortion"
            total = "" if rate is None else f" + rate {rate:.2f} = {distortion + rate:.2f}"
            console.text(
                f"test after {last['epoch']} epochs, {last['seconds']:.1f} s: {what} {distortion:.2f}{total} "
                f"nats per image (n = {len(data.test):,} images)"
            )
            console.text(f"run: {path}   next: vaelab report {path}")

        console.result({"run": str(path), **last}, output, show_result)

    return body


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
            doc=f"{_function.__doc__}\n\nExample: `vaelab train {_name} --epochs 5 --out runs/x`",
        ),
        name=_name,
    )
