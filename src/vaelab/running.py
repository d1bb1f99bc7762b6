"""A recipe trained into a run folder, and gone on with where it was interrupted."""

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from vaelab import weights
from vaelab.checkpoint import Checkpoints, Snapshot
from vaelab.data.datasets import Dataset
from vaelab.data.protocol import protocol as protocol_named
from vaelab.errors import DataError, Interrupted, NonFiniteStep, RunError
from vaelab.meter import Progress
from vaelab.precision import choose
from vaelab.recipes import Recipe
from vaelab.registry import build
from vaelab.run import CHECKPOINT_EVERY, Run, claim_folder, locked, said
from vaelab.training import Record, check_recipe, fit, initial_model


def train(
    recipe: Recipe,
    data: Dataset,
    path: Path,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], str | None] = lambda: None,
    keep_every: float = CHECKPOINT_EVERY,
) -> Run:
    """Train a recipe into a new run folder; same seed, same machine, same threads: same bits.

    An interrupted training saves the weights it has and a checkpoint, and raises; `resume` goes on. Arguments and errors
    as in `fit`, and UsageError where the folder cannot be made, RunError where it cannot be written or another process
    trains in it.
    """
    check_recipe(recipe, data)
    precision = choose(recipe.training.precision, torch.device(device))
    claim_folder(path)  # before a lock is left in what may be somebody else's
    with locked(path):
        run = Run.create(
            path, recipe, device=str(device), data_fingerprint=data.fingerprint, data_source=data.source,
            precision=precision.name, precision_reason=precision.reason,
        )  # fmt: skip
        _fit_into(run, recipe, data, device, on_progress, stop, keep_every, None)
    return run


def resume(
    run: Run,
    data: Dataset,
    *,
    on_nonfinite: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], str | None] = lambda: None,
    keep_every: float = CHECKPOINT_EVERY,
    tell: Callable[[str], None] = lambda sentence: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Run:
    """Go on with a training that was interrupted, by whatever: the same bits as if it had not been.

    Args:
        run: its folder; a finished one is left as it is.
        data: what it was trained on.
        on_nonfinite: `stop` or `skip` from here on; as it was if None.
        on_progress: see `fit`.
        stop: see `fit`.
        keep_every: seconds between checkpoints.
        tell: is given what a user may want to know: from where it goes on.
        warn: is given what a user should know: which checkpoints are damaged.

    Raises:
        RunError: another process trains in it; it cannot be written; its checkpoint is of another configuration or data;
            it has weights and no checkpoint.
        DataError: other data than it was begun with.
    """
    checkpoints = Checkpoints(run.path / "checkpoint")
    environment_ = run.environment()
    if data.fingerprint != environment_.get("data_fingerprint", data.fingerprint):
        raise DataError(f"'{run.path}' was trained on other data: bring back the data of then, or train again")
    with locked(run.path):
        if _finished(run):
            weights.header(run.weights)  # or says that they are damaged
            checkpoints.remove()
            tell(f"'{run.path}' is finished: all {run.recipe().training.epochs} epochs were trained")
            return run
        recipe = run.recipe()
        if on_nonfinite is not None:
            recipe = replace(recipe, training=replace(recipe.training, on_nonfinite=on_nonfinite))
        snapshot, refused = checkpoints.load()
        for sentence in refused:
            warn(sentence)
        of = _digests(recipe, data)
        if snapshot is not None and snapshot.of != of:
            changed = " and ".join(name for name, digest in of.items() if snapshot.of.get(name) != digest)
            raise RunError(
                f"the {changed} of '{run.path}' changed since its checkpoint was written: bring back what it was begun with, "
                "or train again into another folder"
            )
        if snapshot is None and not refused and run.weights.is_file():
            raise RunError(
                f"'{run.path}' holds weights and no checkpoint to go on from: it was finished, and its records or its "
                "configuration were changed, or it was not made by vaelab train; it is left as it is"
            )
        tell("there is no checkpoint: from the first step" if snapshot is None else f"from step {snapshot.step}")
        device, precision = environment_.get("device", "cpu"), environment_.get("precision", recipe.training.precision)
        with said(run.path):
            run.weights.unlink(missing_ok=True)  # those of the moment when it was interrupted
            for left in run.path.rglob(".*.tmp"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
            run.configure(recipe)
            run.note_resumed(0 if snapshot is None else snapshot.step)
            run.rewrite_history([] if snapshot is None else snapshot.history)
        # what `auto` chose then, also on a processor where it would choose otherwise now
        as_begun = replace(recipe, training=replace(recipe.training, precision=precision))
        _fit_into(run, as_begun, data, device, on_progress, stop, keep_every, snapshot)
    return run


def _finished(run: Run) -> bool:
    """Whether it is; records that are damaged are made again from a checkpoint, if there is one."""
    try:
        return run.finished
    except RunError:
        return False


def _digests(recipe: Recipe, data: Dataset) -> dict[str, str]:
    """Of what must not change between two parts of a training; what is done at steps that are not finite may."""
    same = replace(recipe, training=replace(recipe.training, on_nonfinite="stop"))
    text = json.dumps(same.to_dict(), sort_keys=True)
    return {"configuration": hashlib.sha256(text.encode()).hexdigest()[:16], "data": data.fingerprint}


def _fit_into(
    run: Run,
    recipe: Recipe,
    data: Dataset,
    device: torch.device | str,
    on_progress: Callable[[Progress], None],
    stop: Callable[[], str | None],
    keep_every: float,
    start: Snapshot | None,
) -> None:
    model, checkpoints = initial_model(recipe, data), Checkpoints(run.path / "checkpoint")
    goes_on = f"; go on with vaelab train --resume {shlex.quote(str(run.path))}"

    def append(record: Record) -> None:
        with said(run.path):
            run.append(record)

    def keep(snapshot: Snapshot) -> None:
        with said(run.path):
            checkpoints.save(replace(snapshot, of=of))

    of = _digests(run.recipe(), data)
    try:
        fit(
            model, build(recipe.objective), data, protocol_named(recipe.protocol), recipe.training, seed=recipe.seed,
            device=device, on_progress=on_progress, on_epoch=append, stop=stop, keep=keep, keep_every=keep_every,
            start=start,
        )  # fmt: skip
    except Interrupted as error:
        with said(run.path):
            run.save_model(model)
        raise Interrupted(error.reason, error.where + goes_on) from None
    except NonFiniteStep as error:
        raise NonFiniteStep(f"{error}{goes_on} --on-nonfinite skip") from None
    with said(run.path):
        run.save_model(model)
        checkpoints.remove()
