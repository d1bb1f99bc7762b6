"""`vaelab study removing-kl`: the folder that a student hands in."""

import json
import math
import shutil
from pathlib import Path

import pytest

from vaelab.run import Run

FIGURES = ("reconstruction", "generation", "generation_no_kl", "latent_space", "latent_space_no_kl",
           "latent_space_comparison", "manifold", "training")  # fmt: skip
QUANTITIES = ("elbo", "rate", "distortion", "nll", "nll_error", "nll_is", "code_mean", "code_std", "sigma",
              "outside_prior", "knn_accuracy", "legible", "class_entropy", "legible_fitted")  # fmt: skip
TINY = ("study", "removing-kl", "--data", "digits", "--epochs", "1", "--hidden", "16", "--decoder", "16",
        "--frequencies", "4", "--quiet")  # fmt: skip


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.fixture
def copied(study_folder, tmp_path):
    return Path(shutil.copytree(study_folder, tmp_path / "study"))


def test_every_file_is_there(study_folder):
    for name in FIGURES:
        picture = (study_folder / "images" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 2000, name
    for arm, beta in (("kl", 1.0), ("no_kl", 0.0)):
        run = Run.open(study_folder / "runs" / f"{arm}-seed0")
        assert run.finished and run.recipe().objective["beta"] == beta
        assert (run.path / "evaluation.json").is_file()
    assert {path.name for path in study_folder.iterdir()} == {
        "images", "runs", "report.html", "report.json", "study.json",
        "run.lock",
    }  # fmt: skip
    assert not [path for path in study_folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def test_the_arms_differ_in_beta_alone(study_folder):
    one, other = (Run.open(study_folder / "runs" / f"{arm}-seed0").recipe().to_dict() for arm in ("kl", "no_kl"))
    assert one.pop("objective") != other.pop("objective")
    assert one == other


def test_the_report_holds_every_quantity_of_both_arms_with_its_n(study_folder):
    report = report_of(study_folder)
    assert report["n_seeds"] == 1 and [arm["key"] for arm in report["arms"]] == ["kl", "no_kl"]
    for name in QUANTITIES:
        for arm in ("kl", "no_kl"):
            value = report["values"][name][arm]
            assert math.isfinite(value["mean"]) and value["n"] == 1, name
    assert report["protocol"]["classifier_test_accuracy"] > 0.9


def test_the_numbers_are_those_of_the_runs(study_folder):
    report = report_of(study_folder)
    for arm in ("kl", "no_kl"):
        evaluation = json.loads((study_folder / "runs" / f"{arm}-seed0" / "evaluation.json").read_text())
        for name, quantity in evaluation["quantities"].items():
            if not name.startswith("rate_dim_"):  # one for each dimension: in evaluation.json only
                assert report["values"][name][arm]["mean"] == quantity["mean"]


def test_the_page_is_one_file_with_every_figure(study_folder):
    page = (study_folder / "report.html").read_text()
    report = report_of(study_folder)
    assert page.count("data:image/png;base64,") == len(report["figures"]) >= len(FIGURES)
    assert "<script" not in page and "http://" not in page
    assert {f"images/{name}.png" for name in FIGURES} <= {figure["file"] for figure in report["figures"]}
    assert len(report["observations"]) == 7 and all("(n = 1)" in o["text"] for o in report["observations"])


def test_a_second_call_keeps_the_cells(vaelab, study_command, copied, files, undrawn):
    before = files(copied / "runs")
    result = vaelab(*study_command, "--out", copied).ok()
    assert result.err.count("kept from before") == 2
    after = files(copied / "runs")
    for name in before:
        if not name.endswith("evaluation.json"):
            assert after[name] == before[name], name
    assert "ELBO" in result.out and f"report: {copied / 'report.html'}" in result.out
    assert result.out.count("\n- ") == 7


def test_a_cell_that_was_not_finished_is_trained_again(vaelab, study_command, copied, undrawn):
    (copied / "runs" / "kl-seed0" / "model.safetensors").unlink()
    result = vaelab(*study_command, "--out", copied).ok()
    assert result.err.count("kept from before") == 1
    assert Run.open(copied / "runs" / "kl-seed0").finished


@pytest.mark.parametrize("more", [("--lr", "0.01"), ("--seeds", "2"), ("--latent-dim", "1")])
def test_other_settings_are_refused_and_nothing_is_touched(vaelab, study_command, copied, files, more):
    before = files(copied)
    vaelab(*study_command, *more, "--out", copied, "--quiet").refused(2, str(copied), "other settings", "--overwrite")
    assert files(copied) == before


def test_overwrite_replaces(vaelab, copied, undrawn):
    vaelab(*TINY, "--overwrite", "--out", copied).ok()
    assert Run.open(copied / "runs" / "kl-seed0").recipe().training.epochs == 1
    assert report_of(copied)["protocol"]["epochs"] == 1


def test_overwrite_takes_nothing_away_before_it_can_go_on(vaelab, copied, files, undrawn):
    """A file of the user's beside the report: either the study is replaced beside it, or nothing is removed."""
    (copied / "notes.txt").write_text("mine")
    before = files(copied)
    if vaelab(*TINY, "--overwrite", "--out", copied).code:
        assert files(copied) == before
    assert (copied / "notes.txt").read_text() == "mine"


def test_two_seeds_give_a_standard_error(vaelab, tmp_path, undrawn):
    result = vaelab(*TINY, "--seeds", "2", "--seed", "5", "--out", tmp_path / "x", "--json").ok()
    report = json.loads(result.out)
    assert report == report_of(tmp_path / "x")
    assert report["n_seeds"] == 2
    for arm in ("kl", "no_kl"):
        value = report["values"]["elbo"][arm]
        one, other = value["values"]
        assert value["n"] == 2 and one != other
        assert value["mean"] == pytest.approx((one + other) / 2)
        assert value["se"] == pytest.approx(abs(one - other) / 2)  # s / sqrt(2), s = |a - b| / sqrt(2)
    assert sorted(path.name for path in (tmp_path / "x" / "runs").iterdir()) == [
        "kl-seed5", "kl-seed6", "no_kl-seed5", "no_kl-seed6",
    ]  # fmt: skip
    page = (tmp_path / "x" / "report.html").read_text()
    assert "(n = 2)" in page and "±" in page
    assert all("(n = 2)" in o["text"] for o in report["observations"])


@pytest.mark.parametrize("dim", [1, 3])
def test_other_latent_dimensions(vaelab, tmp_path, coarse, dim):
    out = vaelab(*TINY, "--latent-dim", dim, "--out", tmp_path / "x").ok().out
    report = report_of(tmp_path / "x")
    assert (report["values"]["nll"]["kl"]["mean"] is not None) is (dim == 1)
    assert ("n/a" in out) is (dim == 3)
    assert (tmp_path / "x" / "images" / "manifold.png").is_file() is (dim == 3)
    assert (tmp_path / "x" / "images" / "latent_space_comparison.png").is_file()


def test_grey_levels(vaelab, tmp_path, coarse):
    """The study of the classic example's objective: a cross-entropy, and no likelihood."""
    out = vaelab(*TINY, "--protocol", "grey", "--out", tmp_path / "x").ok().out
    assert "cross-entropy + KL" in out
    assert report_of(tmp_path / "x")["values"]["nll"]["kl"]["mean"] is None
