"""Ctrl-C and SIGTERM: the step is finished, the weights are saved, and the exit code says what happened."""

import os
import signal
import subprocess
import time

import pytest
import torch

from vaelab.run import Run


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
