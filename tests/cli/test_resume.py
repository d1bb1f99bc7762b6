"""`vaelab train --resume`: after a signal, a full disk, beside a living training, and asked for wrongly."""

import os
import signal
import subprocess

import pytest
import torch

from vaelab.run import Run, locked

FIELDS = ("--data", "digits", "--hidden", 16, "--decoder", 16, "--frequencies", 4, "--batch-size", 64)


@pytest.fixture
def training(program, tmp_path):
    """Starts a training in a process of its own."""
    started = []

    def start(name, *options):
        arguments = [program, "train", "mnist-2d", *map(str, FIELDS), *map(str, options), "--out", str(tmp_path / name)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def begun(path, process):
    """Waits for the first record of a training."""
    while not (path / "metrics.jsonl").is_file():
        assert process.poll() is None, process.stderr.read()


def same_weights(one, other):
    a, b = Run.open(one).model().state_dict(), Run.open(other).model().state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_signal_names_the_command_that_resumes_and_it_gives_the_same_bits(vaelab, training, tmp_path):
    process = training("broken", "--epochs", 60)
    begun(tmp_path / "broken", process)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 143 and printed == ""
    last = said.splitlines()[-1]
    assert last.endswith(f"; go on with vaelab train --resume {tmp_path / 'broken'}")
    done = vaelab("train", "--resume", tmp_path / "broken").ok()
    assert f"run: {tmp_path / 'broken'}" in done.out and "from step" in done.err
    vaelab("train", "mnist-2d", *FIELDS, "--epochs", 60, "--out", tmp_path / "whole", "--quiet").ok()
    assert same_weights(tmp_path / "broken", tmp_path / "whole")
    again = vaelab("train", "--resume", tmp_path / "broken").ok()
    assert "is finished: all 60 epochs were trained" in again.err and again.out == done.out


def test_a_second_process_is_refused_and_told_of_the_first(vaelab, training, tmp_path):
    process = training("busy", "--epochs", 100_000)
    begun(tmp_path / "busy", process)
    vaelab("train", "--resume", tmp_path / "busy", "--quiet").refused(
        5, f"is being trained by process {process.pid} on "
    )
    process.kill()
    process.communicate()
    assert (tmp_path / "busy" / "run.owner.json").is_file()  # left behind, and no lock
    with locked(tmp_path / "busy"):
        pass


def test_a_second_signal_leaves_at_once_and_nothing_is_lost(vaelab, training, tmp_path):
    process = training("twice", "--epochs", 60, "--checkpoint-every", 0)
    begun(tmp_path / "twice", process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, 143) and "Traceback" not in said
    vaelab("train", "--resume", tmp_path / "twice", "--quiet").ok()
    vaelab("train", "mnist-2d", *FIELDS, "--epochs", 60, "--out", tmp_path / "whole", "--quiet").ok()
    assert same_weights(tmp_path / "twice", tmp_path / "whole")


def test_a_full_disk_is_one_message_and_the_last_whole_checkpoint_is_kept(vaelab, program, training, tmp_path):
    """A limit on the size of files: the configuration fits, a checkpoint does not."""
    process = training("full", "--epochs", 60)
    begun(tmp_path / "full", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    kept = sorted(path.name for path in (tmp_path / "full" / "checkpoint").iterdir())
    assert len(kept) == 1
    command = f"ulimit -f 32; exec {program} train --resume {tmp_path / 'full'} --checkpoint-every 0 --quiet"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 5 and done.stdout == "", done.stderr
    assert done.stderr.startswith("error: cannot write to ") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and f"vaelab train --resume {tmp_path / 'full'}" in done.stderr
    assert sorted(path.name for path in (tmp_path / "full" / "checkpoint").iterdir()) == kept
    vaelab("train", "--resume", tmp_path / "full", "--quiet").ok()
    vaelab("train", "mnist-2d", *FIELDS, "--epochs", 60, "--out", tmp_path / "whole", "--quiet").ok()
    assert same_weights(tmp_path / "full", tmp_path / "whole")


def test_what_cannot_be_resumed_is_refused(vaelab, tmp_path):
    vaelab("train").refused(2, "name a recipe (mnist,", "or --resume RUN")
    vaelab("train", "mnits", "--epochs", 3).refused(2, "unknown recipe 'mnits': did you mean 'mnist'?")
    vaelab("train", "--epochs", 3).refused(2, "unknown option '--epochs'")
    vaelab("train", "--resume", tmp_path / "none").refused(5, "there is no run at")
    vaelab("train", "--resume", tmp_path).refused(5, "is not a run folder")
    vaelab("train", "--resume", tmp_path, "--checkpoint-every", -1).refused(2, "--checkpoint-every is -1.0")
    vaelab("train", "mnist", *FIELDS[:2], "--checkpoint-every", -1).refused(2, "--checkpoint-every is -1.0")
    vaelab("train", "--resume", tmp_path, "--on-nonfinite", "hide").refused(2, "hide")


def test_a_run_is_not_begun_anew_over_another(vaelab, run_folder):
    vaelab("train", "mnist-2d", *FIELDS, "--out", run_folder, "--quiet").refused(
        2, "is not empty", f"continue it with vaelab train --resume {run_folder}"
    )
