"""The page of a study: its arms side by side, beside the report."""

import json
import sys

import pytest

from vaelab import studies
from vaelab.errors import DataError
from vaelab.explore import runtime as runtime_module


@pytest.fixture
def study(vaelab, tmp_path, monkeypatch, runtime, ungraphed):
    """Calls a study whose report is written in no time; the runtime is the small one."""
    runs = {}

    def run_study(name, out, data, recipes, **how):
        from vaelab.running import train

        for arm, (recipe, *_) in recipes.items():
            path = out / "runs" / f"{arm}-seed{recipe.seed}"
            runs[arm] = path if path.exists() else train(recipe, data, path).path
        row = {"key": "elbo", "section": "Bound", "label": "ELBO", "unit": "nats", "decimals": 2}
        values = {"elbo": {"kl": {"mean": -1.0, "n": 1}}}
        return {"arms": [{"key": "kl", "label": "with KL"}], "metrics": [row], "values": values, "observations": []}

    monkeypatch.setattr(studies, "run_study", run_study)
    monkeypatch.setattr(runtime_module, "load", lambda data_dir, progress: runtime)

    def call():
        return vaelab("study", "removing-kl", "--data", "digits", "--epochs", "1", "--hidden", "8", "--decoder", "8",
                      "--frequencies", "2", "--seed", "3", "--out", tmp_path / "lab", "--quiet").ok().out  # fmt: skip

    return call


def test_a_study_writes_its_arms_side_by_side(study, tmp_path):
    page = tmp_path / "lab" / "explorer.html"
    assert f"explorer: {page}" in study()
    _, _, text = page.read_text().partition('id="vaelab-manifest">')
    manifest = json.loads(text.partition("</script>")[0])
    assert [(run["label"], run["run"]) for run in manifest["runs"]] == [
        ("with KL", "kl-seed3"), ("without KL", "no_kl-seed3"),
    ]  # fmt: skip
    assert manifest["title"] == "Removing the KL term, digits"


def test_a_study_without_the_extra_says_what_to_install(study, tmp_path, monkeypatch):
    study()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    out = study()
    assert "no explorer.html" in out and "pip install 'vaelab[explore]'" in out
    assert not (tmp_path / "lab" / "explorer.html").exists()


def test_a_study_whose_page_has_no_runtime_is_no_failure(study, tmp_path, monkeypatch):
    def unreachable(data_dir, progress):
        raise DataError("d3: not found, and no source gave it")

    monkeypatch.setattr(runtime_module, "load", unreachable)
    assert "no explorer.html: d3: not found" in study()
    assert [path.name for path in (tmp_path / "lab").iterdir()] == ["runs"]
