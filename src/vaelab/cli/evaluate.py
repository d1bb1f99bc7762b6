"""`vaelab evaluate RUN...`: measure runs on their test images."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from vaelab.cli import console
from vaelab.cli.console import Output

if TYPE_CHECKING:
    from vaelab.evaluation import Evaluation
    from vaelab.run import Run

Whole = Parameter(converter=console.whole)
LEAST = {"-k": 1, "--images": 1, "--samples": 1, "--gap-images": 0}


def evaluate(
    runs: Annotated[tuple[Path, ...], Parameter(name="RUN", help="Run folders.")],
    /,
    *,
    k: Annotated[int, Whole, Parameter(name=["-k", "--k"], help="Importance samples for each image.")] = 5000,
    images: Annotated[
        int,
        Whole,
        Parameter(name=["--images", "--is-images"], help="How many test images are importance-sampled, evenly spaced."),
    ] = 1000,
    proposal: Annotated[
        Literal["posterior", "widened", "defensive"],
        Parameter(help="Where importance samples are drawn: the encoder's posterior, that 1.5 times as wide, or that "
                  "mixed with the prior."),
    ] = "posterior",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Parameter(help="In which importance samples are decoded; bfloat16 is faster, and for Bernoulli pixels only. With float32 "
                  "the decoder of quadrature has all its bits, too."),
    ] = "auto",
    gap_images: Annotated[int, Whole, Parameter(help="For how many images the bound's gap is split; 0 for none.")] = 100,
    samples: Annotated[int, Whole, Parameter(help="Prior samples that the classifier reads.")] = 10_000,
    seed: Annotated[int, Whole, Parameter(help="Seed of posterior and prior samples.")] = 0,
    data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
    output: Output = Output(),  # noqa: B008
) -> None:  # fmt: skip
    """Measure runs on their test images, and keep the numbers in the run folder.

    Example: vaelab evaluate runs/mnist-1 -k 5000
    """
    from vaelab.cli.common import open_run
    from vaelab.errors import UsageError

    if not runs:
        raise UsageError("no run was given: vaelab evaluate RUN")
    for option, value in {"-k": k, "--images": images, "--samples": samples, "--gap-images": gap_images}.items():
        if value < LEAST[option]:
            raise UsageError(f"{option} is {value}: expected an integer of {LEAST[option]} or more")
    stages = console.Stages(output)
    settings = {
        "k": k,
        "is_images": images,
        "proposal": proposal,
        "precision": precision,
        "gap_images": gap_images,
        "samples": samples,
    }
    found = {
        str(run.path): measure_and_keep(run, {**settings, "seed": seed}, data_dir, stages)
        for run in [open_run(path, output) for path in runs]
    }

    def show() -> None:
        for path, (evaluation, _) in found.items():
            _show(path, evaluation)

    console.result({path: document for path, (_, document) in found.items()}, output, show)


def measure_and_keep(
    run: "Run", settings: Mapping[str, Any], data_dir: Path | None, stages: console.Stages
) -> tuple["Evaluation", dict[str, Any]]:
    """Evaluate a run on its own data, and keep the numbers in its folder; returns them and their document."""
    from vaelab.cli.common import data_of
    from vaelab.data.protocol import protocol
    from vaelab.evaluation import evaluate as measure
    from vaelab.evaluation.compare import save
    from vaelab.legibility import classifier_for

    model, data = run.model(), data_of(run, data_dir, stages)
    with stages("train the classifier that reads the samples") as update:
        classifier, _ = classifier_for(data, on_progress=lambda done: update(done, ""))
    start = time.perf_counter()
    with stages(f"evaluate {run.path}") as update:
        evaluation = measure(
            model, data, protocol(run.recipe().protocol), classifier=classifier, **settings,
            on_progress=lambda label, done: update(done, label),
        )  # fmt: skip
    return evaluation, save(run, evaluation, seconds=round(time.perf_counter() - start, 1))


def _show(path: str, evaluation: "Evaluation") -> None:
    """Tables of all quantities, the reasons where there are none, and what cannot be trusted."""
    rows = [["section", "quantity", "unit", "mean", "s.e.", "n"]]
    reasons: list[str] = []
    for section, label, unit, mean, se, n, reason in _rows(evaluation):
        if reason and reason not in reasons:
            reasons.append(reason)
        shown = f"n/a [{reasons.index(reason) + 1}]" if reason else mean
        rows.append(["" if section in (row[0] for row in rows) else section, label, unit, shown, se, n])
    console.text(path)
    console.table(rows)
    for i, reason in enumerate(reasons, 1):
        console.text(f"[{i}] {reason}")
    curve = _curve(evaluation)
    if curve:
        console.table([["K", "importance-sampled -log p(x)", "s.e."], *curve], title="the same images, by samples")
    rates = [
        (key, q.mean) for key, q in evaluation.quantities.items() if key.startswith("rate_dim_") and q.mean is not None
    ]
    if rates:
        shown = "  ".join(
            f"{key.removeprefix('rate_dim_')}: {mean:z.2f}" for key, mean in sorted(rates, key=lambda r: -r[1])
        )
        console.text(f"rate of each latent dimension, nats: {shown}")
    for alarm in evaluation.alarms:
        console.text(f"warning: {alarm}")


def _rows(evaluation: "Evaluation") -> Iterator[tuple[str, str, str, str, str, str, str]]:
    """Section, label, unit, mean, s.e., n and reason of each row; a whole section without numbers is one row."""
    from vaelab.report.metrics import METRICS

    found = evaluation.quantities
    told: set[str] = set()
    for row in METRICS:
        section, q = row["section"], found.get(row["key"])
        if q is None or section in told or row["key"].removeprefix("nll_is_").isdigit():  # the curve has its own table
            continue
        others = [found[r["key"]] for r in METRICS if r["section"] == section and r["key"] in found]
        if len(others) > 1 and all(other.mean is None and other.reason == q.reason for other in others):
            told.add(section)
            yield section, "", "", "", "", "", q.reason
        elif q.mean is None:
            yield section, row["label"], row["unit"], "", "", "", q.reason
        else:
            form = f",.{row['decimals']}f"
            se = "" if q.se is None else f"{q.se:{form}}"
            yield section, row["label"], row["unit"], f"{q.mean:{form}}", se, f"{q.n:,}", ""


def _curve(evaluation: "Evaluation") -> list[list[str]]:
    """Rows K, mean and s.e. of the importance-sampled estimate."""
    found = evaluation.quantities
    sizes = sorted(int(key.removeprefix("nll_is_")) for key in found if key.removeprefix("nll_is_").isdigit())
    points = [(size, found[f"nll_is_{size}"]) for size in sizes]
    points.append((evaluation.protocol["importance_samples"], found["nll_is"]))
    return [
        [f"{k:,}", f"{q.mean:,.2f}", f"{q.se:,.2f}" if q.se is not None else ""]
        for k, q in points
        if q.mean is not None
    ]
