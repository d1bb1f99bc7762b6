"""Jobs that need one another, done here one after another or side by side in processes of their own.

Networks this small use several cores badly: two jobs side by side with one thread each take less time than one after the
other with two threads each (docs/results/lab.md). What a job computes depends on what it is given and on its number of
threads, not on the process it runs in.

The parent and a worker speak through one pipe. A worker says `ready` once torch is there, which takes 2 s, so it is hired before
anybody knows what there is to do, and begins when there is something. It is given its number of threads and the data, then one
job after another; it answers with progress (`begin`, `update`, `end`) and with `done` or `failed`. What the parent says while a
job is worked on is why to stop: the worker ends its step and saves, as a training in the parent would. A pipe that closes says
that the other side is gone. Signals are the parent's business, workers ignore them.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection as pipes
from multiprocessing import forkserver, resource_tracker
from typing import TYPE_CHECKING, Any

from vaelab.errors import ENDING, Interrupted, UsageError, VaelabError, WorkerDied

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext
    from multiprocessing.process import BaseProcess

    from vaelab.data.datasets import Dataset

Stage = Callable[[str], AbstractContextManager[Callable[[float, str], None]]]
"""Opens a line of progress: the label goes in, and what comes out is called with the fraction done and a text."""
Stop = Callable[[], str | None]
"""Says whether to stop, and why: the name of a signal."""

GRACE = 1.0
"""Seconds that a worker has to save what it does once its parent is gone."""
WITHIN = "the same command goes on from there"
BETWEEN = "between trainings; the trained runs are kept, and the same command goes on from them"


@dataclass(frozen=True)
class Desk:
    """What every job finds: the images, where to compute, and how it is heard and told to stop."""

    data: "Dataset"
    device: str
    stage: Stage
    stop: Stop

    def go_on(self) -> None:
        """Raises Interrupted where there is a reason to stop."""
        if reason := self.stop():
            raise Interrupted(reason, BETWEEN)


@dataclass(frozen=True)
class Job:
    """What one process does in one piece.

    Attributes:
        name: what people call what it works on ("with KL, seed 0").
        do: a function of a module, called with the desk, `given`, and what the jobs of `needs` returned.
        given: goes through a pipe, and so does what `do` returns: arrays may, tensors (as files in shared memory) should not.
        needs: places of other jobs, which come before it.
    """

    name: str
    do: Callable[..., Any]
    given: tuple[Any, ...] = ()
    needs: tuple[int, ...] = ()


def perform(
    jobs: Sequence[Job], data: "Dataset", staff: "Sequence[Worker]", *, device: str, stage: Stage, stop: Stop
) -> list[Any]:
    """Do all jobs, those that come first before others that could be done as well; what they returned, in their order.

    Args:
        jobs: what there is to do.
        data: the images.
        staff: from `hired`, for one call: each has its share of torch's threads. Nobody for this process.
        device: where to compute, here; workers are on the CPU.
        stage: shows progress.
        stop: asked between steps.

    Raises:
        WorkerDied: a process ended that should not have.
        Interrupted: `stop` gave a reason; what was trained is kept.
        VaelabError: a job failed; the others were stopped.
    """
    if staff:
        return _side_by_side(jobs, data, staff, stage, stop)
    return _one_after_another(jobs, Desk(data, device, stage, stop))


def check_workers(workers: int) -> None:
    """Raises UsageError for a number that is none, and in a script that one of its own workers imports."""
    if workers < 0:
        raise UsageError(f"workers is {workers}: expected 1 or more, or 0 for as many as there are cores")
    if workers != 1 and multiprocessing.current_process().name != "MainProcess":
        raise UsageError(
            "workers are not started by workers: they import the script that starts them, so call this under "
            '`if __name__ == "__main__":`, or with workers=1'
        )


def _one_after_another(jobs: Sequence[Job], desk: Desk) -> list[Any]:
    found: list[Any] = []
    for job in jobs:
        found.append(job.do(desk, *job.given, *(found[i] for i in job.needs)))
    return found


# --- the parent ---


@dataclass
class Worker:
    """A process, the pipe to it, its end of that, the line of progress that it fills, and what it works on."""

    process: "BaseProcess"
    pipe: "pipes.Connection[Any, Any]"
    other: "pipes.Connection[Any, Any]"
    line: ExitStack
    update: Callable[[float, str], None] = lambda done, text: None
    job: int | None = None
    ready: bool = False

    def begin(self) -> None:
        """Start the process, if it was not; for a fork server that still imports, this waits. Raises WorkerDied."""
        if self.process.pid is None:
            try:
                self.process.start()
            except (EOFError, OSError) as error:
                raise WorkerDied(
                    f"processes for the study's cells could not be started ({type(error).__name__}: {error}), of too little "
                    "memory perhaps: the same command goes on from what is there; with --workers 1, say"
                ) from None
            self.other.close()

    def say(self, message: Any) -> None:
        with suppress(OSError):  # it has ended, or died, which is heard next
            self.pipe.send(message)


@contextmanager
def hired(workers: int, most: int, device: str) -> Iterator[list[Worker]]:
    """Workers, who import torch while this process goes on; none where one process does.

    At the end they are killed: by then they have saved what they had, or there is no time to wait for it.

    Args:
        workers: how many; 0 for one a core.
        most: how many can be of use.
        device: where to compute; other than on the CPU everything is done in this process.
    """
    cores = _cores()
    count = min(workers or cores, most) if device.partition(":")[0] == "cpu" else 1
    with ExitStack() as stack:
        staff: list[Worker] = []
        if count > 1:
            threads = max(1, cores // count)
            context = _context(threads)
            staff += [stack.enter_context(_worker(context, threads)) for _ in range(count)]
            if context.get_start_method() == "spawn":  # whose start nobody waits for
                with _deaf():
                    for worker in staff:
                        worker.begin()
        yield staff


def _cores() -> int:
    """Threads that torch uses, or will: where it is not imported yet, which takes 2 s, nobody need wait for it."""
    if "torch" in sys.modules:
        import torch

        return torch.get_num_threads()
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        return max(1, int(given))
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def _worker(context: "SpawnContext | ForkServerContext", threads: int) -> Iterator[Worker]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, threads, dict(os.environ)))
    try:
        with ExitStack() as line:
            yield Worker(process, ours, theirs, line)
    finally:
        ours.close()
        theirs.close()
        if process.pid is not None:
            process.kill()
            process.join()


def _context(threads: int) -> "SpawnContext | ForkServerContext":
    """How workers are made; a server begins to import. On macOS what torch computes with does not survive a fork."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vaelab.preload"])  # heeded where no server runs yet
    found = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(
            filter(None, sys.path)
        ),  # where this process finds modules, so not in its folder:
        "PYTHONSAFEPATH": "1",
        "VAELAB_SERVER_OF": str(os.getpid()),  # see `vaelab.preload`
    }
    with _deaf([signal.SIGINT]), _said(found):  # it takes Ctrl-C, which all get, for its own while it imports
        forkserver.ensure_running()
    return context


@contextmanager
def _said(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment of what is started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _deaf(numbers: Sequence[signal.Signals] = ENDING) -> Iterator[None]:
    """Signals wait meanwhile, for this process; one that is started here never gets them (Ctrl-C is sent to all)."""
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # starting the first process would start it, which lets signals in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Ledger:
    """Which jobs wait, and what the others returned."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.waiting, self.found = jobs, list(range(len(jobs))), dict[int, Any]()

    def next(self) -> int | None:
        """The first job that waits for no other, which is taken off the list."""
        for place in self.waiting:
            if all(need in self.found for need in self.jobs[place].needs):
                self.waiting.remove(place)
                return place
        return None

    def order(self, place: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        job = self.jobs[place]
        return job.do, (*job.given, *(self.found[i] for i in job.needs))


def _side_by_side(jobs: Sequence[Job], data: "Dataset", staff: Sequence[Worker], stage: Stage, stop: Stop) -> list[Any]:
    import torch

    threads = max(1, torch.get_num_threads() // len(staff))  # which knows better than `_cores` what is a core
    ledger = _Ledger(jobs)
    failed: list[Exception] = []
    interrupted: list[Interrupted] = []
    reason: str | None = None

    def hear(worker: Worker) -> None:
        """Take one message of a worker."""
        kind: str
        content: Any
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            kind, content = "failed", _died(worker, jobs)
        except Exception as error:  # what it sent cannot be put together again here
            kind, content = "failed", RuntimeError(f"the answer of a process cannot be read: {error}")
        if kind == "begin":
            worker.update = worker.line.enter_context(stage(content))
        elif kind == "update":
            worker.update(*content)
        elif kind == "end":
            worker.line.close()
        elif kind == "failed":
            worker.line.__exit__(type(content), content, None)
            (interrupted if isinstance(content, Interrupted) else failed).append(content)
            worker.pipe.close()
        elif kind == "ready":
            worker.say((threads, data))
            worker.ready = True
        elif worker.job is not None:
            ledger.found[worker.job], worker.job = content, None

    def present() -> list[Worker]:
        return [worker for worker in staff if not worker.pipe.closed]

    _begin(staff, stop)
    while there := present():
        heard = pipes.wait([worker.pipe for worker in there], 0.1)
        for worker in there:
            if worker.pipe in heard:
                hear(worker)
        if reason is None and (reason := "SIGTERM" if failed else stop()):
            for worker in present():
                worker.say(reason)  # if it works on something
        for worker in present():
            if worker.job is None and (reason or not ledger.waiting):
                worker.pipe.close()  # it ends
            elif worker.job is None and worker.ready and (place := ledger.next()) is not None:
                worker.job = place
                worker.say(ledger.order(place))
    if failed:
        raise failed[0]
    within = [error.where.partition(";")[0] for error in interrupted if error.where != BETWEEN]
    if reason and within:
        raise Interrupted(reason, f"{' and '.join(within)}; {WITHIN}")
    if reason:
        raise Interrupted(reason, BETWEEN)
    return [ledger.found[i] for i in range(len(jobs))]


def _begin(staff: Sequence[Worker], stop: Stop) -> None:
    """Start all processes, and wait for that no longer than until there is a reason to stop."""
    failed: list[WorkerDied] = []

    def start() -> None:
        try:
            for worker in staff:
                worker.begin()
        except WorkerDied as error:
            failed.append(error)

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    while starting.is_alive():
        starting.join(0.1)
        if reason := stop():
            raise Interrupted(reason, BETWEEN)
    if failed:
        raise failed[0]


def _died(worker: Worker, jobs: Sequence[Job]) -> WorkerDied:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if worker.job is None:
        return WorkerDied(
            f"a process for the study's cells could not begin ({how}): what it said is above. It imports the script that starts "
            'it, which must be a file, and start it under `if __name__ == "__main__":`; or use workers=1'
        )
    guess = ", of too little memory perhaps" if -code == signal.SIGKILL else ""
    return WorkerDied(
        f"the process of {jobs[worker.job].name} has died ({how}){guess}: what it had saved is "
        "kept, and the same command goes on from there; with --workers 1, say, if memory is short"
    )


# --- the worker ---


def _work(pipe: "pipes.Connection[Any, Any]", threads: int, environment: Mapping[str, str]) -> None:
    """What a worker does: jobs, until its parent closes the pipe. Its global generators are in the state of its siblings'."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()  # a fork server may have another
    os.environ.update(environment)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by what is imported from here on
    threading.Thread(target=_outlive_no_parent, daemon=True).start()
    import torch

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
        if not isinstance(first := pipe.recv(), tuple):
            return  # why to stop, before there was anything to do
        threads, data = first
        torch.set_num_threads(threads)
        desk = Desk(data, "cpu", stage, stop)
        while isinstance(order := pipe.recv(), tuple):  # or why to stop, said while the last one was done
            do, given = order
            try:
                tell("done", do(desk, *given))
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
