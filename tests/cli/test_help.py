"""Help: an example in each command's, and no torch behind any of it."""

import json
import os
import subprocess
import sys

import pytest

COMMANDS = [
    (), ("study",), ("study", "removing-kl"), ("train",), ("train", "mnist"), ("train", "mnist-2d"), ("evaluate",),
    ("sample",), ("report",), ("explore",), ("export",), ("recipes",), ("studies",), ("data",),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example(vaelab, command):
    result = vaelab(*command, "--help").ok()
    assert f"Example: vaelab {' '.join(command)}".strip() in result.out
    assert "Usage: vaelab" in result.out and result.err == ""


def test_help_of_a_recipe_offers_every_field_with_its_default(vaelab):
    from vaelab.recipes import RECIPES

    for name, function in RECIPES.items():
        out = vaelab("train", name, "--help").out
        offered = set(function.__kwdefaults__) - {"images"}  # the number of training images is the data's
        assert not [field for field in offered if f"--{field.replace('_', '-')}" not in out]
        assert f"[default: {function.__kwdefaults__['lr']}]" in " ".join(out.replace("│", " ").split())


def test_neither_help_nor_a_wrong_value_imports_torch():
    """In a fresh interpreter, for every command that need not compute."""
    source = f"""
import json, sys, contextlib, io
from vaelab.cli import run
heavy = {{}}
for command in {[list(c) for c in COMMANDS]!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        code = run([*command, "--help"])
    heavy[" ".join(command)] = [code, [m for m in ("torch", "sklearn", "matplotlib", "scipy") if m in sys.modules]]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    codes = [run(["recipes"]), run(["studies"]), run(["data"]), run(["train", "mnist", "--lr", "nan"])]
heavy["tables"] = [max(codes[:3]), [m for m in ("torch", "sklearn", "matplotlib") if m in sys.modules]]
heavy["wrong"] = [codes[3] - 2, []]
print(json.dumps(heavy))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) == len(COMMANDS) + 2
    assert found == {command: [0, []] for command in found}


def test_the_installed_program_answers(installed):
    import vaelab

    assert "vaelab study removing-kl" in installed("--help").ok().out
    assert installed("--version").ok().out.strip() == vaelab.__version__
    failed = installed("train", "mnits")
    assert (failed.code, failed.out) == (2, "") and "did you mean 'mnist'?" in failed.err


@pytest.mark.parametrize("command", [["--help"], ["train", "mnist", "--help"], ["--version"], ["recipes"]])
def test_a_reader_that_has_gone_is_no_error(command):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "vaelab", *command], stdout=nobody, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_command_that_does_not_exist_is_told_of_some_that_do(vaelab):
    vaelab("nonsense").refused(2, 'Unknown command "nonsense". Available commands: study, train, ')
    assert " and others; see `vaelab --help`" in vaelab("nonsense").err
