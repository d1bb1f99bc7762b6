"""`vaelab compare RUN RUN...`: pair runs image by image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vaelab.cli import console
from vaelab.cli.console import Output

if TYPE_CHECKING:
    from vaelab.evaluation.compare import Difference, PerImage
    from vaelab.run import Run

LABELS = {"nll": "exact -log p(x)", "nll_is": "importance-sampled -log p(x)", "elbo": "ELBO"}
TAKEN = {
    "k": "importance_samples", "is_images": "importance_sampled_images", "proposal": "proposal",
    "precision": "importance_precision", "samples": "prior_samples", "seed": "seed",
}  # fmt: skip
"""Settings that a run without numbers takes over from one that has them: arguments of `evaluate`, entries of its protocol."""


def compare(
    runs: Annotated[
        tuple[Path, ...], Parameter(name="RUN", help="Run folders: the others are compared with the first.")
    ],
    /,
    *,
    seed: Annotated[int, Parameter(converter=console.whole, help="Seed of the bootstrap.")] = 0,
    data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Compare runs image by image: differences, their standard errors and bootstrap intervals.

    Example: vaelab compare runs/mnist-1 runs/mnist-2
    """
    from vaelab.cli.common import open_run
    from vaelab.errors import UsageError

    if len(runs) < 2:
        raise UsageError(f"{len(runs) or 'no'} run was given: expected two or more, vaelab compare RUN RUN")
    opened = [open_run(path, output) for path in runs]
    asked = [(run.recipe().data, run.recipe().protocol) for run in opened]
    for path, other in zip(runs, asked, strict=True):  # before anything is evaluated
        if other != asked[0]:
            raise UsageError(
                f"'{path}' is of {' and '.join(other)}, '{runs[0]}' of {' and '.join(asked[0])}, and cannot be paired: "
                "compare runs of one data set and one protocol"
            )

    from vaelab.evaluation.compare import compare as pair

    measured = _measured(opened, data_dir, console.Stages(output))
    first, *others = zip(runs, measured, strict=True)
    found = {str(path): pair(first[1], arrays, seed=seed) for path, arrays in others}
    document = {
        "first": str(first[0]),
        "differences": {path: {key: d.to_dict() for key, d in each.items()} for path, each in found.items()},
    }
    console.result(document, output, lambda: _show(str(first[0]), found))


def _measured(runs: "list[Run]", data_dir: Path | None, stages: console.Stages) -> "list[PerImage]":
    """What `evaluate` kept in each run; runs without it are evaluated as the first that has it was."""
    from vaelab.cli.evaluate import measure_and_keep
    from vaelab.evaluation.compare import PerImage, load

    kept = [load(run) for run in runs]
    known = next((one.protocol for one in kept if one is not None), {})
    settings = {name: known[key] for name, key in TAKEN.items() if key in known}
    measured = []
    for run, one in zip(runs, kept, strict=True):
        if one is None:
            evaluation, _ = measure_and_keep(run, settings, data_dir, stages)
            one = PerImage(evaluation.protocol, evaluation.per_image)
        measured.append(one)
    return measured


def _show(first: str, found: "dict[str, dict[str, Difference]]") -> None:
    for path, differences in found.items():
        rows = [["quantity, nats", "difference", "s.e.", "95 % interval", "n", "s.e. if unpaired"]]
        reasons = []
        for key, d in differences.items():
            if d.mean is None:
                reasons.append(d.reason)
                rows.append([LABELS[key], f"n/a [{len(reasons)}]", "", "", "", ""])
            elif d.se is None or d.low is None or d.high is None or d.unpaired_se is None:
                rows.append([LABELS[key], f"{d.mean:+,.3f}", "", "", f"{d.n:,}", ""])
            else:
                interval = f"{d.low:+,.3f} to {d.high:+,.3f}"
                rows.append(
                    [LABELS[key], f"{d.mean:+,.3f}", f"{d.se:,.3f}", interval, f"{d.n:,}", f"{d.unpaired_se:,.3f}"]
                )
        console.text(f"{path} minus {first}")
        console.table(rows)
        for i, reason in enumerate(reasons, 1):
            console.text(f"[{i}] {reason}")
    console.text("-log p(x): lower is better; ELBO: higher. The intervals are over test images, not over trainings.")
