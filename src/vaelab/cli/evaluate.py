"""`vaelab evaluate RUN...`: measure runs on their test images."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vaelab.cli import console
from vaelab.cli.console import Output


def evaluate(
    runs: Annotated[tuple[Path, ...], Parameter(name="RUN", help="Run folders.")],
    *,
    k: Annotated[
        int, Parameter(converter=console.whole, name=["-k", "--k"], help="Importance samples for each image.")
    ] = 1000,
    is_images: Annotated[
        int, Parameter(converter=console.whole, help="How many test images are importance-sampled.")
    ] = 500,
    samples: Annotated[
        int, Parameter(converter=console.whole, help="Prior samples that the classifier reads.")
    ] = 10_000,
    seed: Annotated[int, Parameter(converter=console.whole, help="Seed of posterior and prior samples.")] = 0,
    data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Measure runs on their test images, and keep the numbers in the run folder.

    Example: `vaelab evaluate runs/mnist-1 -k 5000`
    """
    from vaelab.cli.common import data_of, open_run
    from vaelab.data.protocol import protocol
    from vaelab.errors import UsageError
    from vaelab.evaluation import evaluate as measure
    from vaelab.legibility import classifier_for
    from vaelab.report.metrics import METRICS
    from vaelab.run import write_json

    if not runs:
        raise UsageError("no run was given: vaelab evaluate RUN")
    stages = console.Stages(output)
    documents = {}
    for run in [open_run(path, output) for path in runs]:
        model, data = run.model(), data_of(run, data_dir, stages)
        with stages("train the classifier that reads the samples") as update:
            classifier, _ = classifier_for(data, on_progress=lambda done: update(done, ""))
        with stages(f"evaluate {run.path}") as update:
            found = measure(
                model, data, protocol(run.recipe().protocol), classifier=classifier, k=k, is_images=is_images,
                samples=samples, seed=seed, on_progress=lambda label, done: update(done, label),
            )  # fmt: skip
        write_json(run.path / "evaluation.json", found.to_dict())
        documents[str(run.path)] = found

    def show() -> None:
        for path, found in documents.items():
            rows = [["quantity", "unit", "mean", "s.e.", "n"]]
            reasons: list[str] = []
            for row in METRICS:
                q = found.quantities.get(row["key"])
                if q is None:
                    continue
                if q.mean is None:
                    if q.reason not in reasons:
                        reasons.append(q.reason)
                    rows.append([row["label"], row["unit"], f"n/a [{reasons.index(q.reason) + 1}]", "", ""])
                else:
                    form = f",.{row['decimals']}f"
                    se = "" if q.se is None else f"{q.se:{form}}"
                    rows.append([row["label"], row["unit"], f"{q.mean:{form}}", se, f"{q.n:,}"])
            console.table(rows, title=path)
            for i, reason in enumerate(reasons, 1):
                console.text(f"[{i}] {reason}")

    console.result({path: found.to_dict() for path, found in documents.items()}, output, show)
