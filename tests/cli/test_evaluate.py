"""`vaelab evaluate` and `vaelab compare` on runs of the digits."""

import json
import math
import shutil

import numpy as np
import pytest

from vaelab.run import code_hash

FEW = ("-k", "30", "--images", "12", "--samples", "60", "--gap-images", "4")


@pytest.fixture
def copied(run_folder, tmp_path):
    """A copy of the trained run that a test may change."""
    return shutil.copytree(run_folder, tmp_path / "copied")


@pytest.fixture
def other(copied, tmp_path):
    """The same run with other weights."""
    import safetensors.torch

    folder = shutil.copytree(copied, tmp_path / "other")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    key = next(name for name in sorted(weights) if name.startswith("likelihood") and name.endswith("bias"))
    weights[key] = weights[key] + 0.1
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def sampled(coarse, monkeypatch):
    """Few images for what `compare` evaluates by itself."""
    from vaelab import evaluation

    monkeypatch.setitem(evaluation.evaluate.__kwdefaults__, "is_images", 10)
    monkeypatch.setitem(evaluation.evaluate.__kwdefaults__, "gap_images", 2)


def test_numbers_are_kept_with_how_they_were_measured(vaelab, copied):
    printed = json.loads(vaelab("evaluate", copied, *FEW, "--json", "--quiet").ok().out)
    document = json.loads((copied / "evaluation.json").read_text())
    assert printed == {str(copied): document}
    assert document["code"] == code_hash() and document["seconds"] > 0
    described = document["protocol"]
    assert (described["importance_samples"], described["importance_sampled_images"]) == (30, 12)
    assert described["gap_images"] == 4 and described["proposal"] == "posterior"
    assert described["protocol"] == "dynamic" and described["test_draw_seed"] == 13126114
    q = document["quantities"]
    assert q["nll"]["mean"] > 0 and q["nll_is"]["n"] == 12 and q["nll_is_1"]["n"] == 12
    with np.load(copied / "evaluation.npz") as arrays:
        assert -arrays["log_px"].mean() == pytest.approx(q["nll"]["mean"], rel=1e-9)


def test_tables_curve_reasons_and_warnings(vaelab, copied):
    out = vaelab("evaluate", copied, *FEW, "--proposal", "widened", "--quiet").ok().out
    for part in ("exact -log p(x)", "of the encoder", "bits per dimension, exact", "effective sample size",
                 "the same images, by samples", "rate of each latent dimension"):  # fmt: skip
        assert part in out, part
    lines = [line.split() for line in out.splitlines()]
    curve = lines[lines.index(["the", "same", "images,", "by", "samples"]) + 1 :]
    assert [line[0] for line in curve if line and line[0] in ("1", "30")] == ["1", "30"]
    assert sum(line[:1] == ["Gap"] for line in lines) == 1


def test_a_section_without_numbers_is_one_line(vaelab, copied):
    config = json.loads((copied / "config.json").read_text())
    config["protocol"], config["model"]["likelihood"]["class"] = "grey", "likelihoods.GreyCrossEntropy"
    (copied / "config.json").write_text(json.dumps(config))
    out = vaelab("evaluate", copied, *FEW, "--quiet").ok().out
    assert "exact -log p(x)" not in out and "effective sample size" not in out
    assert "a cross-entropy on grey levels is not a likelihood" in out
    assert sum(line.split()[:1] == ["Likelihood"] for line in out.splitlines()) == 1


def test_what_cannot_be_trusted_is_said_at_the_end(vaelab, copied):
    document = json.loads(vaelab("evaluate", copied, "-k", "5", *FEW[2:], "--quiet", "--json").ok().out)[str(copied)]
    assert any("5 samples for each image are too few" in alarm for alarm in document["alarms"])
    out = vaelab("evaluate", copied, "-k", "5", *FEW[2:], "--quiet").ok().out
    assert out.rstrip().splitlines()[-1].startswith("warning: ")


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("-k", 0, 1), ("-k", -5, 1), ("--images", 0, 1), ("--samples", 0, 1), ("--gap-images", -1, 0)],
)
def test_a_number_below_the_least_is_refused_before_anything_is_loaded(vaelab, copied, option, value, least):
    (copied / "model.safetensors").unlink()
    result = vaelab("evaluate", copied, option, value, "--quiet")
    result.refused(2, f"{option} is {value}: expected an integer of {least} or more")


def test_other_wrong_arguments(vaelab, copied):
    vaelab("evaluate", copied, "-k", "1.5", "--quiet").refused(2, "1.5")
    vaelab("evaluate", copied, "--proposal", "wide", "--quiet").refused(2, "wide", "widened", "defensive")
    vaelab("evaluate", "--quiet").refused(2, "RUN")
    vaelab("compare", copied, "--quiet").refused(2, "1 run was given: expected two or more")
    assert not (copied / "evaluation.json").exists()


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_help_names_the_runs_once_and_by_place(vaelab, command):
    out = vaelab(command, "--help").ok().out
    assert "RUN" in out and "--RUN" not in out and "--empty" not in out
    assert f"Example: vaelab {command} runs/mnist-1" in out


def test_data_that_is_gone(vaelab, copied, other, tmp_path):
    for folder in (copied, other):
        config = json.loads((folder / "config.json").read_text())
        config["data"] = str(tmp_path / "gone.npz")
        (folder / "config.json").write_text(json.dumps(config))
    vaelab("evaluate", copied, "--quiet").refused(3, "gone.npz")
    vaelab("compare", copied, other, "--quiet").refused(3, "gone.npz")


def test_runs_are_compared_by_what_was_kept_and_evaluated_where_nothing_was(vaelab, copied, other, sampled):
    vaelab("evaluate", copied, *FEW, "--quiet").ok()
    before = (copied / "evaluation.npz").read_bytes()
    document = json.loads(vaelab("compare", copied, other, "--json", "--quiet").ok().out)
    assert (copied / "evaluation.npz").read_bytes() == before
    described = json.loads((other / "evaluation.json").read_text())["protocol"]
    assert (described["importance_samples"], described["importance_sampled_images"]) == (30, 12)
    assert document["first"] == str(copied)
    found = document["differences"][str(other)]
    values = {}
    for folder in (copied, other):
        with np.load(folder / "evaluation.npz") as arrays:
            values[folder] = -arrays["log_px"]
    d = values[other] - values[copied]
    assert found["nll"]["mean"] == pytest.approx(d.mean(), abs=1e-12)
    assert found["nll"]["se"] == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)), rel=1e-9)
    assert found["nll"]["low"] < found["nll"]["mean"] < found["nll"]["high"]
    assert found["nll"]["se"] < found["nll"]["unpaired_se"] / 3
    assert found["nll_is"]["n"] == 12 and found["elbo"]["n"] == len(d)

    out = vaelab("compare", copied, other, copied, "--quiet").ok().out
    assert f"{other} minus {copied}" in out and f"{copied} minus {copied}" in out
    assert "95 % interval" in out and "s.e. if unpaired" in out and "lower is better" in out


def test_runs_of_two_protocols_are_not_compared(vaelab, copied, other, sampled):
    config = json.loads((other / "config.json").read_text())
    config["protocol"] = "threshold"
    (other / "config.json").write_text(json.dumps(config))
    vaelab("compare", copied, other, "--quiet").refused(2, "cannot be paired", "dynamic", "threshold")
