"""Cells side by side: the numbers of one process, and nothing lost where one of several ends before its time."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from vaelab import crew
from vaelab.cells import Task, plan
from vaelab.checkpoint import Checkpoints
from vaelab.crew import Job, hired, perform
from vaelab.errors import Interrupted, RunError, WorkerDied
from vaelab.run import Run, locked, read_json
from vaelab.studies import recipes_of

ENDLESS = 100_000
SMALL = {"hidden": (16,), "decoder": (16,), "frequencies": 4}


@pytest.fixture
def tasks(digits, tmp_path):
    """Makes the two cells of a study."""

    def make(folder, epochs):
        recipes = recipes_of("removing-kl", digits, "digits", 1, 0, epochs=epochs, **SMALL)
        return [Task(tmp_path / folder / arm, recipe, arm) for arm, (recipe,) in recipes.items()]

    return make


@pytest.fixture
def side_by_side(digits, monkeypatch):
    """Works on tasks in two processes, and in none of them here; `when` is called once both are being trained."""

    def work(tasks, when=lambda: None, stage=unseen, reading=False):
        def stop():
            begun = all((task.path / "metrics.jsonl").is_file() for task in tasks)
            return when() if begun else None

        with monkeypatch.context() as patch, hired(2, len(tasks), "cpu") as staff:
            patch.setattr(crew, "_one_after_another", lambda *given: pytest.fail("a job of this process"))
            jobs = plan(tasks, reading=reading)
            return perform(jobs, digits, staff, device="cpu", stage=stage, stop=stop)[-len(tasks) :]

    return work


def here(tasks, digits, stop=lambda: None, reading=False):
    jobs = plan(tasks, reading=reading)
    return perform(jobs, digits, (), device="cpu", stage=unseen, stop=stop)[-len(tasks) :]


def unseen(label):
    return nullcontext(lambda done, text: None)


def owner(task):
    return read_json(task.path / "run.owner.json")["process"]


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def goes_on(task):
    """That a cell was stopped after a step, and can be continued: nobody holds it, and its last step is kept."""
    snapshot, refused = Checkpoints(task.path / "checkpoint").load()
    with locked(task.path):
        return snapshot is not None and snapshot.step > 0 and not refused and not Run(task.path).finished


def test_two_processes_give_the_numbers_of_one(tasks, side_by_side, digits):
    shown = []

    @contextmanager
    def stage(label):
        shown.append((label, "begun"))
        yield lambda done, text: None
        shown.append((label, "ended"))

    one, two = tasks("one", 3), tasks("two", 3)
    beside, alone = side_by_side(two, stage=stage, reading=True), here(one, digits, reading=True)
    assert alone[0].quantities["legible"].mean is not None
    for a, b, task, other in zip(alone, beside, one, two, strict=True):
        assert a.to_dict() == b.to_dict() and np.array_equal(a.codes, b.codes)
        assert (task.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()
        for name in ("evaluation.json", "evaluation.npz"):
            assert (other.path / name).is_file()
        assert read_json(task.path / "evaluation.json") == read_json(other.path / "evaluation.json")
        assert Run.open(other.path).environment()["threads"] == 1
    labels = {f"{what} {task.name}" for what in ("train", "evaluate", "read samples") for task in two}
    labels.add("train the classifier that reads the samples")
    assert sorted(shown) == sorted((label, what) for label in labels for what in ("begun", "ended"))


def test_workers_go_on_with_the_same_bits(tasks, side_by_side, digits):
    whole, broken = tasks("whole", 3), tasks("broken", 3)
    for steps, task in zip((3, 8), broken, strict=True):  # later ones may be one call, and more than are left
        asked = iter(range(1000))
        with pytest.raises(Interrupted):
            here([task], digits, lambda asked=asked, steps=steps: "SIGTERM" if next(asked) == steps else None)
        assert goes_on(task)
    here(whole, digits)
    side_by_side(broken)
    for a, b in zip(whole, broken, strict=True):
        assert len(Run.open(b.path).environment()["resumed"]) == 1
        assert (a.path / "model.safetensors").read_bytes() == (b.path / "model.safetensors").read_bytes()


def test_a_reason_to_stop_reaches_every_cell(tasks, side_by_side):
    both = tasks("stopped", ENDLESS)
    with pytest.raises(Interrupted, match=r"^interrupted by SIGHUP after step \d+ of \d+ of train (no_)?kl and after "
                       r"step \d+ of \d+ of train (no_)?kl; the same command goes on from there$") as caught:  # fmt: skip
        side_by_side(both, lambda: "SIGHUP")
    assert caught.value.exit_code == 129
    assert all(map(goes_on, both))


def test_a_worker_that_is_killed_is_named_and_the_others_are_kept(tasks, side_by_side):
    first, other = tasks("killed", ENDLESS)
    processes = []

    def kill():
        if not processes:
            processes.extend(map(owner, (first, other)))
            os.kill(processes[0], signal.SIGKILL)

    with pytest.raises(WorkerDied, match=r"process of kl has died \(killed by SIGKILL\).*the same command goes on"):
        side_by_side([first, other], kill)
    assert goes_on(other) and not any(map(alive, processes))
    with locked(first.path):
        pass


def test_a_cell_that_fails_is_told_once_and_the_others_are_kept(tasks, side_by_side):
    """Its folder is gone: it cannot be written, as on a disk that is full."""
    first, other = tasks("failing", ENDLESS)
    away = first.path.with_name("away")

    def fail():
        if not away.exists():
            first.path.rename(away)

    with pytest.raises(RunError, match=f"^cannot write to '{first.path}': No such file") as caught:
        side_by_side([first, other], fail)
    assert "Traceback" in caught.value.__notes__[0]  # for --debug
    assert goes_on(other)


def said(desk, what, *heard):
    """A job: what it was given, and what it was given of others. The first of all lasts until the third is done."""
    if what == "long":
        while not Path(desk.data).exists():
            time.sleep(0.01)
    if what == "third":
        Path(desk.data).touch()
    return what, *(word for word, *_ in heard)


def test_a_job_waits_for_those_it_needs_and_for_no_other(tmp_path):
    """With two workers: the third must be done while the first is not, after the second, which it needs."""
    wanted = [("long", ()), ("second", ()), ("third", (1,)), ("last", (0, 2))]
    jobs = [Job(name, said, (name,), needs) for name, needs in wanted]
    with hired(2, 4, "cpu") as staff:
        found = perform(jobs, str(tmp_path / "done"), staff, device="cpu", stage=unseen, stop=lambda: None)
    assert found == [("long",), ("second",), ("third", "second"), ("last", "long", "third")]


def found_there(desk):
    """A job: what it must not wait for and is not there; the threads of libraries that were imported before it began, and of
    torch; a variable of the environment."""
    from threadpoolctl import threadpool_info

    needed = ("vaelab.preload", "torch", "sklearn.mixture", "matplotlib.figure")
    threads = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    return (
        [name for name in needed if name not in sys.modules], threads, torch.get_num_threads(), os.environ.get("VAELAB_TRUST"),
    )  # fmt: skip


ASKED = """
import os, sys
sys.path.append({tests!r})
from test_workers import Job, found_there, hired, perform, unseen
if __name__ == "__main__":
    found = []
    for trust in ("one", "other"):
        os.environ["VAELAB_TRUST"] = trust
        with hired(2, 4, "cpu") as staff:
            jobs = [Job(str(i), found_there) for i in range(4)]
            found += perform(jobs, None, staff, device="cpu", stage=unseen, stop=lambda: None)
    assert os.environ["OMP_NUM_THREADS"] == "2" and "VAELAB_SERVER_OF" not in os.environ
    assert found == 4 * [([], {{1}}, 1, "one")] + 4 * [([], {{1}}, 1, "other")], found
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no fork server: each worker imports for itself")
def test_a_worker_has_its_libraries_from_the_start_and_they_its_number_of_threads(tmp_path):
    """And the environment of its own `hired`; whatever modules lie in the current folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "timeit.py").write_text("raise SystemExit('a file of the current folder')")
    (tmp_path / "script.py").write_text(ASKED.format(tests=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, tmp_path / "script.py"], cwd=tmp_path / "elsewhere", text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


LEAVING = """
import os, signal, sys, time
sys.path.insert(0, "slow")
from contextlib import nullcontext
from multiprocessing import forkserver
from vaelab.crew import Job, hired, perform
from vaelab.errors import Interrupted, WorkerDied

def kill():
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)

def attempt(stop):
    try:
        perform([Job("x", print)], None, staff, device="cpu", stage=lambda label: nullcontext(), stop=stop)
    except (Interrupted, WorkerDied) as error:
        print(type(error).__name__, "could not be started" in str(error))

with hired(2, 4, "cpu") as staff:
    if sys.argv[1] == "interrupted":
        attempt(lambda: "SIGINT")
    if sys.argv[1] == "killed":
        attempt(kill)
    while sys.argv[1] == "left" and not os.path.exists("importing"):
        time.sleep(0.05)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no fork server to wait for")
@pytest.mark.parametrize("how, said", [
    ("interrupted", "Interrupted False\n"), ("killed", "WorkerDied True\n"), ("left", ""),
])  # fmt: skip
def test_nobody_waits_for_a_server_that_still_imports(tmp_path, how, said):
    """It would do so for an hour; and whoever reads the output of a command would wait for it, if it lived on."""
    (tmp_path / "slow" / "sklearn").mkdir(parents=True)
    (tmp_path / "slow" / "sklearn" / "__init__.py").write_text(
        "import time; open('importing', 'w').close(); time.sleep(3600)"
    )
    done = subprocess.run([sys.executable, "-c", LEAVING, how], cwd=tmp_path, text=True, check=False, capture_output=True,
                          timeout=300)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, said), done.stderr


@pytest.mark.parametrize(("workers", "most", "device"), [(0, 6, "cpu"), (1, 6, "cpu"), (2, 1, "cpu"), (2, 6, "cuda")])
def test_nobody_is_hired_where_one_process_does(workers, most, device):
    with hired(workers, most, device) as staff:  # the tests have one core
        assert not staff


def test_a_number_of_workers_that_is_none(vaelab, tmp_path):
    vaelab("study", "removing-kl", "--data", "digits", "--workers", -1, "--out", tmp_path / "x", "--quiet").refused(
        2, "workers is -1: expected 1 or more, or 0"
    )
    assert not (tmp_path / "x").exists()


UNGUARDED = """
from pathlib import Path
from vaelab.data.datasets import Dataset, Images, load
from vaelab.studies import recipes_of, run_study
pixels = Images(load("digits").test.pixels)
data = Dataset("unlabelled", pixels, pixels, None, "")
recipes = recipes_of("removing-kl", data, "unlabelled", 1, 0, epochs=1, hidden=(8,), decoder=(8,), frequencies=2)
run_study("removing-kl", Path("out"), data, recipes, workers=2)
"""


def test_a_script_that_its_workers_would_run_again_is_told(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'call this under `if __name__ == "__main__":`, or with workers=1' in done.stderr
    assert "could not begin (exit code 1): what it said is above" in done.stderr
    assert not list(tmp_path.glob("out/runs/*"))
