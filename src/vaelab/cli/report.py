"""`vaelab report RUN`: figures and a page for one run."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vaelab.cli import console
from vaelab.cli.console import Output


def report(
    run: Annotated[Path, Parameter(name="RUN", help="A run folder.")],
    *,
    out: Annotated[Path | None, Parameter(help="Folder of the report; by default RUN/report.")] = None,
    data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Evaluate one run, draw its figures, and write a self-contained page.

    Example: vaelab report runs/mnist-1
    """
    from vaelab.cli.common import data_of, open_run
    from vaelab.data.protocol import protocol
    from vaelab.evaluation import evaluate
    from vaelab.evaluation.compare import save
    from vaelab.legibility import classifier_for
    from vaelab.report import build
    from vaelab.report.page import text_table
    from vaelab.run import claim_folder

    opened = open_run(run, output)
    folder = out or run / "report"
    stages = console.Stages(output)
    model, data = opened.model(), data_of(opened, data_dir, stages)
    if not (folder / "report.json").is_file() or (folder / "study.json").exists():
        claim_folder(folder)
    with stages("train the classifier that reads the samples") as update:
        classifier, accuracy = classifier_for(data, on_progress=lambda done: update(done, ""))
    with stages(f"evaluate {run}") as update:
        recipe = opened.recipe()
        evaluation = evaluate(
            model, data, protocol(recipe.protocol), classifier=classifier, k=1000, is_images=200, gap_images=50,
            on_progress=lambda label, done: update(done, label),
        )  # fmt: skip
    save(opened, evaluation)
    with stages("figures and report"):
        arm = build.Arm("run", recipe.name, f"{recipe.data}, {recipe.protocol}")
        cells = [build.Cell(arm, opened, model, evaluation)]
        drawn = build.together(build.draw(folder, cells, data))
        written = build.write(
            folder, f"Run {run.resolve().name}", f"Recipe {recipe.name} on {recipe.data}, protocol {recipe.protocol}.",
            [arm], cells, drawn, [],
            {"classifier_test_accuracy": accuracy, "data_source": data.source, "data_fingerprint": data.fingerprint},
        )  # fmt: skip

    def show() -> None:
        console.table(text_table(written))
        console.text(f"report: {folder / 'report.html'}")

    console.result(written, output, show)
