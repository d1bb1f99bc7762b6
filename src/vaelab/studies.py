"""Studies: one question, several arms, several seeds, one report.

    removing-kl     the same two-dimensional model with the KL term (beta = 1) and without it (beta = 0)

A study folder holds `study.json` (its settings), `runs/<arm>-seed<N>/` (complete run folders), the report, and the arms side
by side in one page to explore. Cells that are there already, made by the same code from the same settings, are kept: an
interrupted study goes on where it was.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaelab import cells
from vaelab.cells import Task
from vaelab.crew import Job, Stage, Stop, Worker, check_workers, hired, perform
from vaelab.errors import UsageError, unknown_name
from vaelab.recipes import Recipe, recipe

if TYPE_CHECKING:
    from vaelab.data.datasets import Dataset
    from vaelab.data.store import Progress as Fetching
    from vaelab.explore.export import Graphs
    from vaelab.explore.runtime import Ahead

PAGE = "explorer.html"
"""The page of `write_explorer`."""
MIN_STEPS = 2500
"""Small data sets get enough epochs for this many steps, unless the epochs are given."""


@dataclass(frozen=True)
class Study:
    """A named comparison.

    Attributes:
        title: of its report and page.
        summary: a sentence for the table of studies.
        recipe: whose fields the command line offers.
        arms: key -> (label, description, fields of the recipe that set the arm apart).
    """

    title: str
    summary: str
    recipe: str
    arms: Mapping[str, tuple[str, str, Mapping[str, Any]]]


STUDIES: dict[str, Study] = {
    "removing-kl": Study(
        "Removing the KL term",
        "a two-dimensional VAE with the KL term and without it: latent space, samples, exact likelihood",
        "mnist-2d",
        {
            "kl": ("with KL", "beta = 1", {"beta": 1.0}),
            "no_kl": ("without KL", "beta = 0", {"beta": 0.0}),
        },
    )
}


def study(name: str) -> Study:
    """The study called `name`. Raises UsageError for an unknown one."""
    if name not in STUDIES:
        raise unknown_name("study", name, STUDIES)
    return STUDIES[name]


def recipes_of(
    name: str, data: "Dataset", data_name: str, seeds: int, seed: int, **fields: Any
) -> dict[str, list[Recipe]]:
    """The recipes of a study: arm -> one for each seed, `seed`, `seed` + 1, …

    Raises:
        UsageError: a field out of range, or no seeds.
    """
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}: expected an integer of 1 or more")
    chosen = study(name)
    fields = {key: value for key, value in fields.items() if value is not None}
    if "epochs" not in fields:
        default = recipe(chosen.recipe, data.shape, **fields).training
        per_epoch = math.ceil(len(data.train) / default.batch_size)
        fields["epochs"] = max(default.epochs, math.ceil(MIN_STEPS / per_epoch))
    return {
        arm: [
            recipe(chosen.recipe, data.shape, **{**fields, **changes, "data": data_name, "seed": seed + i})
            for i in range(seeds)
        ]
        for arm, (_, _, changes) in chosen.arms.items()
    }


def run_study(
    name: str,
    folder: Path,
    data: "Dataset",
    recipes: Mapping[str, list[Recipe]],
    *,
    overwrite: bool = False,
    device: str = "cpu",
    workers: int = 1,
    staff: Sequence[Worker] | None = None,
    ahead: "Graphs | None" = None,
    stage: Stage = lambda label: nullcontext(lambda done, text: None),
    stop: Stop = lambda: None,
) -> dict[str, Any]:
    """Train, evaluate, draw and report; returns the report (see `vaelab.report.page`).

    Args:
        name: of the study.
        folder: its output; cells found there are kept if they fit.
        data: the images.
        recipes: from `recipes_of`.
        overwrite: remove what an earlier study left in the folder.
        device: where to train.
        workers: processes that work side by side, see `vaelab.crew`; 0 for as many as torch has threads. They import the
            script that calls this, so that other than with 1 it must be called under `if __name__ == "__main__":`.
        staff: workers that are hired already, in place of `workers`, see `vaelab.crew.hired`.
        ahead: is filled with the graphs of the runs of the first seed, where several processes work: one of them would have
            nothing to do while another trains the classifier. For `write_explorer`.
        stage: shows progress.
        stop: asked after each training step, see `vaelab.training.fit`.

    Raises:
        UsageError: the folder holds something else, or a study with other settings; see `vaelab.cells.check_workers`.
        WorkerDied: a worker was killed; what was trained is kept.
    """
    from vaelab.run import locked
    from vaelab.training import check_recipe

    check_workers(workers)
    settings = {"study": name, "recipes": {arm: [r.to_dict() for r in rs] for arm, rs in recipes.items()}}
    settings["data_fingerprint"] = data.fingerprint
    for seeds in recipes.values():
        check_recipe(seeds[0], data)
    _claim(folder, settings, overwrite)
    with locked(folder), ExitStack() as stack:
        if staff is None:
            staff = stack.enter_context(hired(workers, sum(map(len, recipes.values())), device))
        return _measured(name, folder, data, recipes, device, staff, ahead, stage, stop)


def _measured(
    name: str,
    folder: Path,
    data: "Dataset",
    recipes: Mapping[str, list[Recipe]],
    device: str,
    staff: Sequence[Worker],
    ahead: "Graphs | None",
    stage: Stage,
    stop: Stop,
) -> dict[str, Any]:
    """Train and evaluate what is not there yet, and report."""
    from vaelab.report import build, observations
    from vaelab.report.build import Arm, Cell

    chosen = study(name)
    arms = [Arm(key, label, description) for key, (label, description, _) in chosen.arms.items()]
    wanted = [(arm, r) for seeds in zip(*(recipes[arm.key] for arm in arms), strict=True)
              for arm, r in zip(arms, seeds, strict=True)]  # fmt: skip
    tasks = [Task(folder / "runs" / f"{arm.key}-seed{r.seed}", r, f"{arm.label}, seed {r.seed}") for arm, r in wanted]
    jobs = cells.plan(tasks)
    shown = tuple(range(len(arms)))  # the trainings of the first seed, and their evaluations
    evaluated = tuple(range(2 * len(tasks) + 1, len(jobs)))
    graphs = len(jobs)
    if staff and ahead is not None:
        jobs.append(Job("the page to explore", cells.graphs, (), shown))
    figures = len(jobs)
    jobs.append(Job("the figures", cells.draw, (folder, arms, False, (0, 1)), shown))
    shares = min(len(staff), 2) or 1  # they come last, when nothing else is left for the other processes
    jobs += [Job("the figures", cells.draw, (folder, arms, True, (i, shares)), (*shown, *evaluated[: len(arms)]))
             for i in range(shares)]  # fmt: skip
    found = perform(jobs, data, staff, device=device, stage=stage, stop=stop)
    if ahead is not None and figures > graphs:
        ahead |= found[graphs]
    reader: cells.Reader | None = found[2 * len(tasks)]
    with stage("report") as update:
        made = [
            Cell(arm, run, run.model(device), found[place])
            for (arm, _), run, place in zip(wanted, found, evaluated, strict=False)
        ]
        values = build.aggregate(made)
        described = found[evaluated[0]].protocol
        observed = observations.removing_kl(
            values, len(recipes["kl"]), described["importance_samples"], described["importance_sampled_images"],
            0 if reader is None else reader.classes,
        )  # fmt: skip
        update(0.5, "")
        return build.write(
            folder, chosen.title,
            "The same autoencoder, trained with the KL term of the ELBO and without it: what happens to the codes, to the "
            "samples of the prior, and to the likelihood.",
            arms, made, build.together(*found[figures:]), observed,
            {"classifier_test_accuracy": None if reader is None else reader.accuracy, "data_source": data.source,
             "notes": "; ".join(data.notes) or None, "data_fingerprint": data.fingerprint},
            values,
        )  # fmt: skip


def write_explorer(
    name: str,
    folder: Path,
    data: "Dataset",
    seed: int = 0,
    *,
    ahead: "Graphs | None" = None,
    fetched: "Ahead | None" = None,
    data_dir: Path | None = None,
    fetching: "Fetching | None" = None,
    stage: Stage = lambda label: nullcontext(lambda done, text: None),
) -> str:
    """Write `PAGE`, the arms of a study side by side, beside its report; a page that cannot be made is no failure.

    Args:
        name: of the study.
        folder: of the study, after `run_study`.
        data: the images.
        seed: of the runs that are shown.
        ahead: graphs that `run_study` has made; what is missing is made here.
        fetched: the page's runtime on its way, see `vaelab.explore.runtime.fetch_ahead`.
        data_dir: where the page's runtime is looked for first.
        fetching: shows the progress of fetching it, see `vaelab.data.store`.
        stage: shows progress.

    Returns:
        Nothing, or why there is no page and what to do.
    """
    from vaelab.errors import VaelabError
    from vaelab.run import Run

    (folder / PAGE).unlink(missing_ok=True)  # of earlier runs
    with stage("explorer") as update:
        try:
            from vaelab.explore import bundle, pack, runtime
            from vaelab.explore.graph import require

            if not ahead:
                require()
            if fetched is not None:
                fetched.join()
            running = (fetched and fetched.found) or runtime.load(data_dir, fetching)
            chosen = study(name)
            exhibits = [
                bundle.Exhibit(label, Run.open(folder / "runs" / f"{arm}-seed{seed}"))
                for arm, (label, _, _) in chosen.arms.items()
            ]
            made = bundle.build(
                exhibits,
                data,
                title=f"{chosen.title}, {data.name}",
                ahead=ahead,
                on_progress=lambda done, text: update(0.9 * done, text),
            )
            pack.write_single(folder / PAGE, made, running)
        except VaelabError as error:
            update(1.0, "left out")
            return f"no {PAGE}: {error}"
        update(1.0, "")
    return ""


def _claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the study's folder, or accept the one that is there."""
    import shutil

    from vaelab.run import claim_folder, code_hash, read_json, write_json

    marker = folder / "study.json"
    written = {"format": 1, "code": code_hash(), **settings}
    if marker.is_file():
        if read_json(marker) == written:
            return
        if not overwrite:
            raise UsageError(
                f"'{folder}' holds a study with other settings or of another version of the code: choose another --out, "
                "or --overwrite to replace it"
            )
        for part in ("study.json", "report.json", "report.html", PAGE):
            (folder / part).unlink(missing_ok=True)
        for part in ("images", "runs"):
            shutil.rmtree(folder / part, ignore_errors=True)
    else:
        claim_folder(folder)
    write_json(marker, written)
