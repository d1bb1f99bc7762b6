"""Ctrl-C and SIGTERM: the step is finished, the weights are saved, and the exit code says what happened."""

import contextlib
import os
import signal
import subprocess
import time

import pytest
import torch

from vaelab.cli.console import interruptible
from vaelab.errors import RunError
from vaelab.run import Run, locked


def until(condition, process, seconds=60.0):
    """Wait for a condition while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def trainings(program, tmp_path):
    """For each signal a training that has many epochs before it, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ("--data", "digits", "--epochs", "100000", "--hidden", "16", "--decoder", "16", "--out")
    processes = {
        number: subprocess.Popen(
            [program, "train", "mnist-2d", *options, str(tmp_path / number.name)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for number in CODES
    }  # fmt: skip
    yield processes
    for process in processes.values():
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_an_interrupted_training_is_saved(trainings, tmp_path):
    for number, process in trainings.items():
        metrics = tmp_path / number.name / "metrics.jsonl"
        until(lambda metrics=metrics: metrics.is_file() and metrics.read_text().count("\n"), process)
        process.send_signal(number)
    for number, process in trainings.items():
        printed, said = process.communicate(timeout=60)
        assert process.returncode == CODES[number]
        assert printed == "" and "Traceback" not in said
        assert f"error: interrupted by {number.name} after step" in said.splitlines()[-1]
        run = Run.open(tmp_path / number.name)
        assert not run.finished and len(run.history()) >= 1
        model = run.model()
        assert all(p.isfinite().all() for p in model.parameters())
        assert model.decode(torch.zeros(1, 1, 2)).mean.shape == (1, 1, 1, 8, 8)
        assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


@pytest.fixture
def study(program, tmp_path):
    """Starts a study of two processes and many epochs, with a process group of its own as a terminal gives it."""
    started = []

    def start(name):
        options = (
            "--epochs",
            "100000",
            "--hidden",
            "16",
            "--decoder",
            "16",
            "--workers",
            "2",
            "--quiet",
            "--out",
            name,
        )
        process = subprocess.Popen(
            [program, "study", "removing-kl", "--data", "digits", *options], cwd=tmp_path, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(process)
        runs = [tmp_path / name / "runs" / f"{arm}-seed0" for arm in ("kl", "no_kl")]
        until(lambda: all((run / "metrics.jsonl").is_file() for run in runs), process)
        return process, runs

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_ends_a_study_of_several_processes_with_one_message(study):
    process, runs = study("x")
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130 and printed == "" and said.count("\n") == 1
    assert said.startswith("error: interrupted by SIGINT after step ")
    assert said.endswith("; the same command goes on from there\n")
    for run in runs:
        assert len(list((run / "checkpoint").iterdir())) == 1
        with locked(run):
            assert not Run.open(run).finished


def test_the_processes_of_a_study_that_is_killed_let_go_of_their_runs(study):
    process, runs = study("x")
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    for run in runs:
        while True:
            try:
                with locked(run):
                    break
            except RunError:
                assert time.monotonic() < end, "waited too long"
                time.sleep(0.02)


def test_what_nohup_has_said_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received() is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with interruptible() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received() == "SIGHUP"
    finally:
        signal.signal(signal.SIGHUP, before)
