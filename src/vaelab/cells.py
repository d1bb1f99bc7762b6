"""The jobs of a study: each cell's training and evaluation, the classifier that both arms share, figures and graphs.

A cell is one training and its evaluation. Cells share nothing but the data and the classifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaelab.crew import WITHIN, Desk, Job
from vaelab.errors import Interrupted, VaelabError
from vaelab.recipes import Recipe

if TYPE_CHECKING:
    import numpy as np

    from vaelab.evaluation import Evaluation
    from vaelab.explore.export import Graphs
    from vaelab.meter import Progress
    from vaelab.report.build import Arm, Drawn
    from vaelab.run import Run

IS_IMAGES = 100
"""Test images that a study importance-samples, beside the exact value for all."""
IS_SAMPLES = 1000
"""Importance samples for each of them."""
LATENT_IMAGES = 2000
"""Test images whose posteriors make a study's aggregate posterior."""


@dataclass(frozen=True)
class Task:
    """A cell that is to be there: what is trained, where, and what people call it ("with KL, seed 0")."""

    path: Path
    recipe: Recipe
    name: str


@dataclass(frozen=True)
class Reader:
    """The classifier that reads the samples, as it goes from process to process, and how well it reads."""

    weights: "dict[str, np.ndarray]"
    classes: int
    accuracy: float


def plan(tasks: Sequence[Task], *, reading: bool = True) -> list[Job]:
    """What makes the cells: n trainings, n evaluations, the classifier where samples are to be read, and n readings of them.

    The classifier comes after the evaluations, which need not wait for it: the process that is done first makes it.
    """
    n = len(tasks)
    jobs = [Job(task.name, train, (task,)) for task in tasks]
    jobs += [Job(task.name, evaluate, (task,), (i,)) for i, task in enumerate(tasks)]
    if reading:
        jobs.append(Job("the classifier", classify))
    shared = tuple(range(2 * n, len(jobs)))
    return jobs + [Job(task.name, read, (task,), (i, n + i, *shared)) for i, task in enumerate(tasks)]


def train(desk: Desk, task: Task) -> "Run":
    """The trained run of a cell: the one that is there, or a new one."""
    from vaelab.meter import text_of
    from vaelab.run import Run
    from vaelab.running import resume
    from vaelab.running import train as begin

    label = f"train {task.name}"
    begun = Run.open(task.path) if (task.path / "config.json").is_file() else None
    with desk.stage(label) as update:
        if begun is not None and begun.finished:
            update(1.0, "kept from before")
            return begun

        def show(p: "Progress") -> None:
            update(p.step / p.steps, p.text())

        try:
            if begun is None:
                run = begin(task.recipe, desk.data, task.path, device=desk.device, on_progress=show, stop=desk.stop)
            else:
                run = resume(begun, desk.data, on_progress=show, stop=desk.stop)
        except Interrupted as error:
            where = error.where.partition(";")[0]
            raise Interrupted(error.reason, f"{where} of {label}; {WITHIN}") from None
        update(1.0, f"{text_of(run.history()[-1]['test'])} (test)")
    return run


def classify(desk: Desk) -> Reader | None:
    """The classifier of the images; None without labels."""
    from vaelab.legibility import classifier_for

    with desk.stage("train the classifier that reads the samples") as update:

        def show(done: float) -> None:
            desk.go_on()
            update(done, "")

        model, accuracy = classifier_for(desk.data, on_progress=show)
        update(1.0, "no labels: skipped" if accuracy is None else f"test accuracy {accuracy:.2%}")
    if model is None or accuracy is None:
        return None
    return Reader({name: tensor.numpy() for name, tensor in model.state_dict().items()}, model.classes, accuracy)


def evaluate(desk: Desk, task: Task, run: "Run") -> "Evaluation":
    """The evaluation of a cell, all but what a classifier reads in its samples."""
    from vaelab import evaluation
    from vaelab.data.protocol import protocol

    desk.go_on()
    with desk.stage(f"evaluate {task.name}") as update:

        def show(label: str, done: float) -> None:
            desk.go_on()
            update(done, label)

        return evaluation.evaluate(
            run.model(desk.device), desk.data, protocol(task.recipe.protocol), k=IS_SAMPLES, is_images=IS_IMAGES, gap_images=0,
            latent_images=LATENT_IMAGES, on_progress=show,
        )  # fmt: skip


def read(desk: Desk, task: Task, run: "Run", found: "Evaluation", reader: Reader | None = None) -> "Evaluation":
    """The whole evaluation of a cell, which is saved in its run."""
    from vaelab import evaluation
    from vaelab.data.protocol import protocol
    from vaelab.evaluation.compare import save
    from vaelab.legibility import loaded

    desk.go_on()
    if reader is not None:
        with desk.stage(f"read samples {task.name}"):
            classifier = loaded(desk.data, reader.weights)
            model, by = run.model(desk.device), protocol(task.recipe.protocol)
            found = evaluation.with_samples(found, model, desk.data, by, classifier)
    desk.go_on()
    save(run, found)
    return found


def draw(
    desk: Desk, folder: Path, arms: "Sequence[Arm]", evaluated: bool, share: tuple[int, int], *found: Any
) -> "Drawn":
    """The figures that show evaluations, of the first run of each arm, or those that do not, or a share of them; see
    `report.build.draw`."""
    from vaelab.report import build

    runs, evaluations = found[: len(arms)], found[len(arms) :] or (None,) * len(arms)
    desk.go_on()
    part = f", {share[0] + 1} of {share[1]}" if share[1] > 1 else ""
    with desk.stage(f"figures of {'evaluations' if evaluated else 'runs'}{part}"):
        cells = [
            build.Cell(arm, run, run.model(desk.device), evaluation)
            for arm, run, evaluation in zip(arms, runs, evaluations, strict=True)
        ]
        return build.draw(folder, cells, desk.data, evaluated=evaluated, share=share)


def graphs(desk: Desk, *runs: "Run") -> "Graphs":
    """The graphs of runs for a page to explore; none where they cannot be made, then `write_explorer` says why."""
    desk.go_on()
    with desk.stage("graphs for the page to explore") as update:
        try:
            from vaelab.explore import export

            return export.graphs(runs, lambda done, text: (desk.go_on(), update(done, text))[1])
        except VaelabError as error:
            if isinstance(error, Interrupted):
                raise
            return {}
