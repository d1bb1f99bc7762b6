"""The cells of a study: each is one training and its evaluation, here or side by side in processes of their own.

Networks this small use several cores badly: two cells side by side with one thread each take less time than one after the
other with two threads each (docs/results/lab.md). Cells share nothing but the data and the classifier, and what one computes
depends on its recipe and its number of threads, not on the process it runs in.

The parent and a worker speak through one pipe. The worker says `ready`, is given what all cells share, then one `Task` after
another; it answers with progress (`begin`, `update`, `end`) and with `done` or `failed`. What the parent says while a cell is
worked on is why to stop: the worker ends its step and saves, as a training in the parent would. A pipe that closes says that
the other side is gone. Signals are the parent's business, workers ignore them.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection as pipes
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaelab.errors import ENDING, Interrupted, UsageError, VaelabError, WorkerDied
from vaelab.recipes import Recipe

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from vaelab.data.datasets import Dataset
    from vaelab.evaluation import Evaluation
    from vaelab.legibility import Classifier
    from vaelab.meter import Progress
    from vaelab.run import Run

Stage = Callable[[str], AbstractContextManager[Callable[[float, str], None]]]
"""Opens a line of progress: the label goes in, and what comes out is called with the fraction done and a text."""
Stop = Callable[[], str | None]
"""Says whether to stop, and why: the name of a signal."""

IS_IMAGES = 100
"""Test images that a study importance-samples, beside the exact value for all."""
IS_SAMPLES = 1000
"""Importance samples for each of them."""
LATENT_IMAGES = 2000
"""Test images whose posteriors make a study's aggregate posterior."""
GRACE = 1.0
"""Seconds that a worker has to save what it does once its parent is gone."""
WITHIN = "the same command goes on from there"
BETWEEN = "between trainings; the trained runs are kept, and the same command goes on from them"


@dataclass(frozen=True)
class Task:
    """A cell that is to be there: what is trained, where, and what people call it ("with KL, seed 0")."""

    path: Path
    recipe: Recipe
    name: str


def measured(
    tasks: Sequence[Task],
    data: "Dataset",
    classifier: "Classifier | None",
    *,
    device: str,
    workers: int,
    stage: Stage,
    stop: Stop,
) -> "list[Evaluation]":
    """Train, or go on with, and evaluate every cell; the evaluations, in the order of the tasks, are saved in their runs.

    Args:
        tasks: the cells.
        data: the images.
        classifier: see `vaelab.evaluation.evaluate`.
        device: where to train; other than on the CPU one cell after another, in this process.
        workers: processes at most, each with its share of torch's threads; 1 for this process, 0 for one a thread.
        stage: shows progress.
        stop: asked after each step.

    Raises:
        WorkerDied: a process ended that should not have.
        Interrupted: `stop` gave a reason; what was trained is kept.
        VaelabError: a cell failed; the others were stopped, and are kept.
    """
    import torch

    cores = torch.get_num_threads()
    workers = min(workers or cores, len(tasks)) if torch.device(device).type == "cpu" else 1
    if workers == 1:
        return [_cell(task, data, classifier, device, stage, stop) for task in tasks]
    return _side_by_side(tasks, data, classifier, workers, max(1, cores // workers), stage, stop)


def check_workers(workers: int) -> None:
    """Raises UsageError for a number that is none, and in a script that one of its own workers imports."""
    if workers < 0:
        raise UsageError(f"workers is {workers}: expected 1 or more, or 0 for as many as there are cores")
    if workers != 1 and multiprocessing.current_process().name != "MainProcess":
        raise UsageError(
            "workers are not started by workers: they import the script that starts them, so call this under "
            '`if __name__ == "__main__":`, or with workers=1'
        )


def go_on(stop: Stop) -> None:
    """Raises Interrupted where there is a reason to stop."""
    if reason := stop():
        raise Interrupted(reason, BETWEEN)


def _cell(
    task: Task, data: "Dataset", classifier: "Classifier | None", device: str, stage: Stage, stop: Stop
) -> "Evaluation":
    """One cell, in this process."""
    from vaelab.data.protocol import protocol
    from vaelab.evaluation import evaluate
    from vaelab.evaluation.compare import save

    run = _trained(task, data, device, stage, stop)
    with stage(f"evaluate {task.name}") as update:

        def show(label: str, done: float) -> None:
            go_on(stop)
            update(done, label)

        evaluation = evaluate(
            run.model(device), data, protocol(task.recipe.protocol), classifier=classifier, k=IS_SAMPLES,
            is_images=IS_IMAGES, gap_images=0, latent_images=LATENT_IMAGES, on_progress=show,
        )  # fmt: skip
    go_on(stop)
    save(run, evaluation)
    return evaluation


def _trained(task: Task, data: "Dataset", device: str, stage: Stage, stop: Stop) -> "Run":
    """The trained run of a cell: the one that is there, or a new one."""
    from vaelab.meter import text_of
    from vaelab.run import Run
    from vaelab.running import resume, train

    label = f"train {task.name}"
    begun = Run.open(task.path) if (task.path / "config.json").is_file() else None
    with stage(label) as update:
        if begun is not None and begun.finished:
            update(1.0, "kept from before")
            return begun

        def show(p: "Progress") -> None:
            update(p.step / p.steps, p.text())

        try:
            if begun is None:
                run = train(task.recipe, data, task.path, device=device, on_progress=show, stop=stop)
            else:
                run = resume(begun, data, on_progress=show, stop=stop)
        except Interrupted as error:
            where = error.where.partition(";")[0]
            raise Interrupted(error.reason, f"{where} of {label}; {WITHIN}") from None
        update(1.0, f"{text_of(run.history()[-1]['test'])} (test)")
    return run


# --- the parent ---


@dataclass
class _Worker:
    """A process, the pipe to it, the line of progress that it fills, and what it works on."""

    process: "BaseProcess"
    pipe: "pipes.Connection[Any, Any]"
    line: ExitStack
    update: Callable[[float, str], None] = lambda done, text: None
    task: int | None = None

    def say(self, message: Any) -> None:
        with suppress(OSError):  # it has ended, or died, which is heard next
            self.pipe.send(message)


def _side_by_side(
    tasks: Sequence[Task],
    data: "Dataset",
    classifier: "Classifier | None",
    workers: int,
    threads: int,
    stage: Stage,
    stop: Stop,
) -> "list[Evaluation]":
    waiting, found = list(range(len(tasks))), dict[int, "Evaluation"]()
    failed: list[Exception] = []
    interrupted: list[Interrupted] = []
    reason: str | None = None

    def hear(worker: _Worker) -> None:
        """Take one message of a worker, and give it something to do where it has nothing."""
        kind: str
        content: Any
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            kind, content = "failed", _died(worker, tasks)
        if kind == "begin":
            worker.update = worker.line.enter_context(stage(content))
        elif kind == "update":
            worker.update(*content)
        elif kind == "end":
            worker.line.close()
        elif kind == "failed":
            worker.line.__exit__(type(content), content, None)
            if isinstance(content, Interrupted):
                interrupted.append(content)
            else:
                failed.append(content)
            worker.pipe.close()
        elif kind == "ready":
            worker.say((data, _plain(classifier)))
        elif worker.task is not None:
            found[worker.task] = content
        if kind in ("ready", "done"):
            worker.task = waiting.pop(0) if waiting and not reason else None
            if worker.task is None:
                worker.pipe.close()  # it ends
            else:
                worker.say(tasks[worker.task])

    with ExitStack() as stack:
        staff = [stack.enter_context(_hired(threads)) for _ in range(workers)]
        while staff := [worker for worker in staff if not worker.pipe.closed]:
            ready = pipes.wait([worker.pipe for worker in staff], 0.1)
            for worker in staff:
                if worker.pipe in ready:
                    hear(worker)
            if reason is None and (reason := "SIGTERM" if failed else stop()):
                for worker in staff:
                    if worker.task is None:
                        worker.pipe.close()  # it has not begun
                    else:
                        worker.say(reason)
    if failed:
        raise failed[0]
    within = [error.where.partition(";")[0] for error in interrupted if error.where != BETWEEN]
    if reason and within:
        raise Interrupted(reason, f"{' and '.join(within)}; {WITHIN}")
    go_on(lambda: reason)
    return [found[i] for i in range(len(tasks))]


@contextmanager
def _hired(threads: int) -> Iterator[_Worker]:
    """A worker, killed at the end: by then it has saved what it had, or there is no time to wait for it."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, threads))
    with _deaf():
        process.start()
    theirs.close()
    try:
        with ExitStack() as line:
            yield _Worker(process, ours, line)
    finally:
        ours.close()
        process.kill()
        process.join()


@contextmanager
def _deaf() -> Iterator[None]:
    """Signals wait meanwhile, for this process; one that is started here never gets them (Ctrl-C is sent to all)."""
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # starting the first process would start it, which lets signals in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _died(worker: _Worker, tasks: Sequence[Task]) -> WorkerDied:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if worker.task is None:
        return WorkerDied(f"a process for the study's cells could not begin ({how}): what it said is above")
    return WorkerDied(
        f"the process of {tasks[worker.task].name} has died ({how}), of too little memory perhaps: what it had saved is "
        "kept, and the same command goes on from there; with --workers 1, say, if memory is short"
    )


def _plain(classifier: "Classifier | None") -> dict[str, Any] | None:
    """A classifier's weights as arrays: torch would send its tensors as files in shared memory, which may be small."""
    return None if classifier is None else {name: t.numpy() for name, t in classifier.state_dict().items()}


# --- the worker ---


def _work(pipe: "pipes.Connection[Any, Any]", threads: int) -> None:
    """What a worker does: cells, until its parent closes the pipe."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by what is imported from here on
    threading.Thread(target=_outlive_no_parent, daemon=True).start()
    import torch

    from vaelab.legibility import loaded

    torch.set_num_threads(threads)
    said: list[str] = []

    def tell(kind: str, content: Any = None) -> None:
        with suppress(OSError):  # nobody hears
            pipe.send((kind, content))

    def stop() -> str | None:
        if not said and pipe.poll():
            try:
                said.append(pipe.recv())
            except (EOFError, OSError):
                said.append("SIGHUP")
        return said[0] if said else None

    @contextmanager
    def stage(label: str) -> Iterator[Callable[[float, str], None]]:
        tell("begin", label)
        yield lambda done, text: tell("update", (done, text))
        tell("end")

    with suppress(EOFError, OSError):
        tell("ready")
        data, weights = pipe.recv()
        classifier = None if weights is None else loaded(data, weights)
        while isinstance(task := pipe.recv(), Task):  # or why to stop, said while the last one was done
            try:
                tell("done", _cell(task, data, classifier, "cpu", stage, stop))
            except Exception as error:
                # only our own errors are known to survive the pipe
                sent = error if isinstance(error, VaelabError) else RuntimeError(f"{type(error).__name__}: {error}")
                sent.add_note(traceback.format_exc())
                tell("failed", sent)


def _outlive_no_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(GRACE)
        os._exit(1)
