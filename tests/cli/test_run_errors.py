"""A run folder that is none, or is damaged: exit code 5, with its path, and nothing written into it."""

import shutil

import pytest

COMMANDS = ("evaluate", "sample", "report")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_run(vaelab, command, tmp_path, files):
    vaelab(command, tmp_path / "gone", "--quiet").refused(5, str(tmp_path / "gone"), "there is no run")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    vaelab(command, mine, "--quiet").refused(5, str(mine), "is not a run folder")
    vaelab(command, mine / "thesis.txt", "--quiet").refused(5, str(mine / "thesis.txt"))
    assert [path.name for path in mine.rglob("*")] == ["thesis.txt"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_study_is_no_run_and_names_its_runs(vaelab, command, study_folder):
    vaelab(command, study_folder, "--quiet").refused(5, "runs/kl-seed0, runs/no_kl-seed0")


DAMAGE = {
    "no weights": lambda run: (run / "model.safetensors").unlink(),
    "truncated weights": lambda run: (run / "model.safetensors").write_bytes(b"\x00" * 40),
    "damaged configuration": lambda run: (run / "config.json").write_text("{"),
    "newer format": lambda run: (run / "config.json").write_text('{"format": 99}'),
    "unknown class": lambda run: (run / "config.json").write_text(
        (run / "config.json").read_text().replace("nn.FourierMLP", "nn.NoSuchMLP")
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_run(vaelab, command, how, run_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    DAMAGE[how](run)
    before = sorted(path.name for path in run.rglob("*"))
    vaelab(command, run, "--quiet").refused(5, "NoSuchMLP" if how == "unknown class" else str(run))
    assert sorted(path.name for path in run.rglob("*")) == before
