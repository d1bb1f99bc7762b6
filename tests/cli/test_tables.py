"""Tables and pipes: one JSON document or one unwrapped table on stdout."""

import json
import subprocess

import pytest

from vaelab.data.datasets import NAMES
from vaelab.recipes import RECIPES
from vaelab.studies import STUDIES

COMMANDS = {"recipes": set(RECIPES), "studies": set(STUDIES), "data": set(NAMES)}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_list_as_json(vaelab, command):
    result = vaelab(command, "--json").ok()
    assert {row["name"] for row in json.loads(result.out)} == COMMANDS[command]
    assert result.err == ""


def test_recipes_as_json_hold_the_defaults(vaelab):
    rows = {row["name"]: row["fields"] for row in json.loads(vaelab("recipes", "--json").out)}
    assert rows["mnist"]["latent_dim"] == 20 and rows["mnist-2d"]["latent_dim"] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_in_a_pipe_is_not_wrapped(installed, command):
    """On a narrow terminal's COLUMNS too: a row is a line, with all its text, and no colours."""
    out = installed(command, COLUMNS="40").ok().out
    documents = json.loads(installed(command, "--json").ok().out)
    lines = out.splitlines()
    assert len(lines) == len(documents) + 2
    assert "\x1b" not in out and not [line for line in lines if line != line.rstrip()]
    for row in documents:
        (line,) = [line for line in lines if line.split()[0] == row["name"]]
        assert row.get("summary", row.get("source")) in line


def test_a_reader_that_leaves_is_no_error(program):
    process = subprocess.Popen([program, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()
    with process.stderr as stream:
        assert stream.read() == ""
    assert process.wait() == 0
