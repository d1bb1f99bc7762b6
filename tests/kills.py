"""Kill a training at random moments, resume it, and compare it with one that nobody disturbed.

    python tests/kills.py --kills 200

A process trains the 8x8 digits with a checkpoint after each step, so that most of its time goes into writing them, and
gets SIGKILL at a random moment. Another resumes, and is killed in turn, until one of them finishes; then weights and
records are compared bit for bit, and the next training begins, with other settings.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from vaelab.data.datasets import load
from vaelab.recipes import Recipe, recipe
from vaelab.run import Run
from vaelab.running import resume, train

SETTINGS = (
    {"optimiser": "adam", "precision": "float32", "average": 0.9},
    {"optimiser": "muon", "precision": "bfloat16", "clip": 1.0},
    {"optimiser": "adam", "precision": "bfloat16", "schedule": "one-cycle"},
)


def chosen(i: int) -> Recipe:
    return recipe("mnist-2d", (1, 8, 8), data="digits", hidden=(32, 32), decoder=(32, 32), frequencies=4, epochs=6,
                  batch_size=128, seed=i, **SETTINGS[i % len(SETTINGS)])  # fmt: skip


def begin_or_resume(path: Path, wanted: Recipe) -> None:
    """In a process of its own."""
    data = load("digits")
    if (path / "config.json").is_file():
        resume(Run.open(path), data, keep_every=0.0)
    else:  # killed before the folder was a run
        train(wanted, data, path, keep_every=0.0)


def killed(path: Path, wanted: Recipe, seconds: float) -> bool:
    """Whether a process that trains was killed after so many seconds; else it has finished."""
    child = os.fork()
    if child == 0:
        try:
            begin_or_resume(path, wanted)
        except BaseException as error:  # whatever it is, it is the finding
            print(f"{path}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return _ended(child, status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return _ended(child, os.waitpid(child, 0)[1])


def _ended(child: int, status: int) -> bool:
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit(f"process {child} failed: see above")
    return False


def differ(one: Run, other: Run) -> bool:
    a, b = one.model().state_dict(), other.model().state_dict()
    records = [
        [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in run.history()]
        for run in (one, other)
    ]
    return a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a) or records[0] != records[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill trainings at random moments and resume them.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    moments, kills, runs, writing, different = random.Random(arguments.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while kills < arguments.kills:
            wanted, path = chosen(runs), Path(folder) / f"killed-{runs}"
            begin = time.monotonic()
            undisturbed = train(wanted, load("digits"), Path(folder) / f"undisturbed-{runs}", keep_every=0.0)
            whole = time.monotonic() - begin
            before: set[Path] = set()
            while killed(path, wanted, moments.uniform(0, 0.6 * whole)):
                kills += 1
                left = set(path.rglob(".*.tmp"))
                writing += bool(left - before)
                before = left
            wrong = differ(undisturbed, Run.open(path)) or (path / "checkpoint").exists()
            different += wrong
            runs += 1
            print(f"run {runs}: {kills} kills so far{', DIFFERENT' if wrong else ''}", flush=True)
    print(f"{kills} kills ({writing} inside a write) in {runs} trainings: {different} differ from the undisturbed one")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
