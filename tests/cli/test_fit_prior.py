"""`vaelab fit-prior`: a complete new run, or one message and nothing left behind."""

import json
import shutil

import pytest

from vaelab.fitted import KINDS

QUICK = ("--components", "2", "--layers", "1", "--steps", "20")


@pytest.fixture(scope="module")
def fitted_run(run_folder, tmp_path_factory):
    """A run of the tests' model with a mixture for a prior."""
    from vaelab.cli import run as run_command

    path = tmp_path_factory.mktemp("fitted") / "run"
    assert run_command(["fit-prior", str(run_folder), *QUICK, "--out", str(path), "--quiet"]) == 0
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_a_run_that_can_be_sampled(vaelab, run_folder, tmp_path, kind, files):
    before = files(run_folder)
    out = tmp_path / "new"
    found = json.loads(
        vaelab("fit-prior", run_folder, "--kind", kind, *QUICK, "--out", out, "--json", "--quiet").ok().out
    )
    assert found["run"] == str(out) and found["kind"] == kind
    assert (found["gain"] is None) == (kind == "second-stage")
    assert ("no density" in found["reason"]) == (kind == "second-stage")
    vaelab("sample", out, "-n", "4", "--quiet").ok()
    assert files(run_folder) == before


def test_the_gain_is_said_and_where_the_run_is(vaelab, run_folder, tmp_path):
    done = vaelab("fit-prior", run_folder, "--kind", "gaussian", "--out", tmp_path / "new").ok()
    assert "the bound gains " in done.out and "nats per test image (n = 360" in done.out
    assert str(tmp_path / "new") in done.out
    assert "fit gaussian" in done.err and "fit gaussian" not in done.out


def test_the_new_run_stands_beside_the_old_one(vaelab, fitted_run):
    vaelab("fit-prior", fitted_run, "--kind", "gaussian", "--quiet").ok()
    beside = fitted_run.with_name("run-gaussian")
    environment = json.loads((beside / "env.json").read_text())
    assert environment["fitted_from"] == str(fitted_run)
    assert environment["fitted_kind"] == "gaussian" and environment["fitted_codes"] == "1437"


def test_the_same_seed_gives_the_same_weights(vaelab, run_folder, fitted_run, tmp_path):
    vaelab("fit-prior", run_folder, *QUICK, "--out", tmp_path / "same", "--quiet").ok()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (fitted_run / "model.safetensors").read_bytes()


def test_the_new_run_is_evaluated_with_its_own_prior(vaelab, run_folder, fitted_run, tmp_path, coarse):
    first, found = tmp_path / "first", {}
    shutil.copytree(run_folder, first)
    for run in (first, fitted_run):
        document = vaelab("evaluate", run, "-k", "20", "--is-images", "20", "--samples", "100", "--json", "--quiet")
        found[run] = next(iter(json.loads(document.ok().out).values()))["quantities"]
    old, new = found[first], found[fitted_run]
    assert new["nll"]["mean"] < old["nll"]["mean"]
    assert new["distortion"]["mean"] == pytest.approx(old["distortion"]["mean"], abs=1e-6)
    assert new["aggregate_kl"]["mean"] < old["aggregate_kl"]["mean"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--kind", "gausian"), 2, "did you mean 'gaussian'"),
        (("--components", "0"), 2, "components is 0"),
        (("--components", "1.5"), 2, "unable to convert"),
        (("--components", "900"), 2, "too few for 900 full covariances"),
    ],
)
def test_bad_arguments_leave_nothing_behind(vaelab, run_folder, tmp_path, arguments, code, message):
    vaelab("fit-prior", run_folder, *arguments, "--out", tmp_path / "new", "--quiet").refused(code, message)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_refused(vaelab, run_folder, tmp_path, files):
    (tmp_path / "thesis.txt").write_text("years of work")
    vaelab("fit-prior", run_folder, "--out", tmp_path, "--quiet").refused(2, str(tmp_path), "not empty")
    assert list(files(tmp_path)) == ["thesis.txt"]


def test_a_folder_that_is_no_run(vaelab, tmp_path):
    vaelab("fit-prior", tmp_path / "gone", "--quiet").refused(5, str(tmp_path / "gone"), "there is no run")
    assert list(tmp_path.iterdir()) == []
