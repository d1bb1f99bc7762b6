"""Training, evaluating, drawing and reporting a run from the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from vaelab.run import Run

TINY = ("--data", "digits", "--epochs", "1", "--hidden", "16")


@pytest.fixture
def copied(run_folder, tmp_path):
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def strict(text):
    """The one JSON document that a text is, without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_fields_reach_the_run(vaelab, tmp_path):
    options = ("--latent-dim", 3, "--beta", 0.5, "--lr", 0.01, "--activation", "gelu", "--seed", 4, "--average", 0.9)
    result = vaelab("train", "mnist", *TINY, *options, "--out", tmp_path / "x").ok()
    recipe = Run.open(tmp_path / "x").recipe()
    assert recipe.model["posterior"]["dim"] == 3 and recipe.model["encoder"]["activation"] == "gelu"
    assert recipe.objective["beta"] == 0.5 and recipe.seed == 4
    assert (recipe.training.lr, recipe.training.average, recipe.training.epochs) == (0.01, 0.9, 1)
    assert "cross-entropy" in result.out and f"vaelab report {tmp_path / 'x'}" in result.out
    assert "precision:" in result.err and "train mnist: done" in result.err


def test_without_a_name_the_next_free_one_is_taken(vaelab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        vaelab("train", "mnist-2d", *TINY, "--decoder", 16, "--quiet").ok()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mnist-2d-1", "mnist-2d-2"]


def test_the_printed_numbers_are_those_of_the_run(vaelab, tmp_path):
    out = vaelab("train", "mnist-2d", *TINY, "--decoder", 16, "--out", tmp_path / "x").ok().out
    test = Run.open(tmp_path / "x").history()[-1]["test"]
    assert f"distortion {test['distortion']:.2f} + rate {test['rate']:.2f}" in out


def test_quiet_says_nothing_on_stderr(vaelab, tmp_path):
    assert vaelab("train", "mnist-2d", *TINY, "--decoder", 16, "--out", tmp_path / "x", "--quiet").ok().err == ""


def test_train_as_json(vaelab, tmp_path):
    document = strict(vaelab("train", "mnist-2d", *TINY, "--decoder", 16, "--out", tmp_path / "x", "--json").ok().out)
    assert document["run"] == str(tmp_path / "x")
    assert {key: document[key] for key in document if key != "run"} == Run.open(tmp_path / "x").history()[-1]


def test_a_diverging_training_ends_with_code_4(vaelab, tmp_path):
    result = vaelab("train", "mnist-2d", *TINY, "--decoder", 16, "--lr", "1e30", "--schedule", "constant", "--clip", 0,
                    "--out", tmp_path / "x", "--quiet")  # fmt: skip
    result.refused(4, "the loss of step", "--lr")


def test_divergence_in_the_last_step_ends_with_code_4_too(vaelab, tmp_path):
    result = vaelab("train", "mnist-2d", *TINY, "--decoder", 16, "--lr", "1e30", "--schedule", "constant", "--clip", 0,
                    "--batch-size", 1437, "--out", tmp_path / "x", "--quiet")  # fmt: skip
    result.refused(4, "--lr")


QUICK = ("-k", 20, "--is-images", 30, "--samples", 200, "--quiet")


def test_evaluate_as_a_table_and_as_json(vaelab, copied):
    table = vaelab("evaluate", copied, *QUICK).ok().out
    assert (copied / "evaluation.json").is_file()
    document = strict(vaelab("evaluate", copied, *QUICK, "--json").ok().out)
    assert document == {str(copied): strict((copied / "evaluation.json").read_text())}
    quantities = document[str(copied)]["quantities"]
    row = next(line for line in table.splitlines() if "ELBO" in line.split())
    assert f"{quantities['elbo']['mean']:.2f}" in row and row.rstrip().endswith("360")
    assert "exact -log p(x)" in table
    legible = next(line for line in table.splitlines() if "legible samples of the prior" in line)
    assert f"{quantities['legible']['mean']:.3f}" in legible


def test_evaluate_several_runs(vaelab, copied, tmp_path):
    other = shutil.copytree(copied, tmp_path / "other")
    assert set(strict(vaelab("evaluate", copied, other, *QUICK, "--json").ok().out)) == {str(copied), str(other)}


def test_what_is_not_available_has_its_reason_under_the_table(vaelab, tmp_path):
    vaelab("train", "mnist", *TINY, "--out", tmp_path / "grey", "--quiet").ok()
    out = vaelab("evaluate", tmp_path / "grey", *QUICK).ok().out
    assert "n/a [1]" in out and "[1] a cross-entropy on grey levels is not a likelihood" in out
    assert "cross-entropy + KL" in out


@pytest.mark.parametrize("command", [("sample", "-n", 4), ("evaluate", *QUICK)], ids=lambda command: command[0])
def test_no_command_moves_the_global_generator(vaelab, copied, command):
    vaelab("evaluate", copied, *QUICK).ok()  # the classifier is in the cache from here on
    before = torch.get_rng_state()
    vaelab(command[0], copied, *command[1:]).ok()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("more", [(), ("--pixels",)])
def test_sample_draws_a_picture(vaelab, copied, tmp_path, more):
    document = strict(vaelab("sample", copied, "-n", 6, "--out", tmp_path / "s.png", "--json", *more).ok().out)
    assert document["file"] == str(tmp_path / "s.png") and document["n"] == 6
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_the_seed_of_samples_moves_them_and_nothing_else_does(vaelab, copied):
    pictures = []
    for seed in (0, 0, 1):
        vaelab("sample", copied, "-n", 4, "--seed", seed).ok()
        pictures.append((copied / "samples.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("recipe", ["mnist-2d", "mnist"])
def test_report_of_a_run(vaelab, tmp_path, coarse, recipe):
    """Of binary pixels and two dimensions, and of grey levels and three: where most quantities are n/a."""
    run, more = tmp_path / "x", ("--decoder", 16) if recipe == "mnist-2d" else ("--latent-dim", 3)
    vaelab("train", recipe, *TINY, *more, "--out", run, "--quiet").ok()
    document = strict(vaelab("report", run, "--json", "--quiet").ok().out)
    assert document["arms"][0]["label"] == recipe
    page = (run / "report" / "report.html").read_text()
    assert "data:image/png;base64," in page and "http://" not in page
    for figure in document["figures"]:
        assert (run / "report" / figure["file"]).read_bytes().startswith(b"\x89PNG")
    again = vaelab("report", run, "--quiet").ok().out
    assert f"report: {run / 'report' / 'report.html'}" in again
