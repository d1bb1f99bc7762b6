"""A run folder gives back what was put in, and says which file is at fault where it cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from vaelab.data.datasets import load
from vaelab.data.protocol import protocol
from vaelab.errors import RunError, UsageError
from vaelab.recipes import recipe
from vaelab.rng import stream
from vaelab.run import FORMAT, Run, read_json, replacing, write_json
from vaelab.running import train
from vaelab.training import test_metrics as measured


@pytest.fixture
def run(few, tmp_path) -> Run:
    chosen = recipe("mnist-2d", few.shape, hidden=(8,), decoder=(8,), frequencies=3, epochs=1, batch_size=100)
    return train(chosen, few, tmp_path / "run")


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_loaded_model_decodes_and_encodes_as_the_saved_one(few, tmp_path):
    from vaelab.registry import build
    from vaelab.training import fit, initial_model

    chosen = recipe("mnist-2d", few.shape, hidden=(8,), decoder=(8,), frequencies=3, epochs=1, batch_size=100)
    model = initial_model(chosen)
    fit(model, build(chosen.objective), few, protocol("dynamic"), chosen.training)
    run = Run.create(tmp_path / "run", chosen)
    run.save_model(model)
    loaded = Run.open(run.path).model()
    z, x = torch.randn(1, 9, 2, generator=stream(0, "test")), protocol("dynamic").test_set(few.test.pixels)
    assert torch.equal(loaded.decode(z).logits, model.decode(z).logits)
    assert torch.equal(loaded.encode(x).mean, model.encode(x).mean)
    assert not loaded.training
    assert Run.open(run.path).recipe().to_dict() == json.loads(json.dumps(chosen.to_dict()))


def test_opening_a_run_leaves_the_global_generator_alone(run):
    before = torch.get_rng_state()
    Run.open(run.path).model()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(RunError, match="there is no run at"):
        Run.open(tmp_path / "gone")
    with pytest.raises(RunError, match="is not a run folder") as caught:
        Run.open(tmp_path)
    assert str(tmp_path) in str(caught.value) and caught.value.exit_code == 5


def test_a_study_folder_names_its_runs(run, tmp_path):
    (tmp_path / "study" / "runs").mkdir(parents=True)
    run.path.rename(tmp_path / "study" / "runs" / "kl-seed0")
    with pytest.raises(RunError, match="runs/kl-seed0"):
        Run.open(tmp_path / "study")


DAMAGE = {
    "not json": lambda text: "{",
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "no format": lambda text: text.replace('"format"', '"fromat"'),
    "no model": lambda text: text.replace('"model"', '"modle"'),
    "no training": lambda text: text.replace('"training"', '"trainign"'),
    "an unknown training field": lambda text: text.replace('"epochs"', '"epoch"'),
    "epochs of a wrong type": lambda text: text.replace('"epochs": 1', '"epochs": "one"'),
    "epochs out of range": lambda text: text.replace('"epochs": 1', '"epochs": 0'),
    "an unknown protocol": lambda text: text.replace('"dynamic"', '"dinamyc"'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_configuration_is_an_error_that_names_it(run, how):
    text = run.config.read_text()
    run.config.write_text(DAMAGE[how](text))
    assert run.config.read_text() != text
    with pytest.raises(RunError) as caught:
        Run.open(run.path)
    assert str(run.path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"nn.MLP"', '"nn.MPL"'), ('"posteriors.Gaussian"', '"no_such_module:Gaussian"'), ('"silu"', '"sliu"'),
     ('"dim": 2', '"dim": 3'), ('"frequencies": 3', '"frequency": 3')],
)  # fmt: skip
def test_a_model_that_cannot_be_built_is_an_error_of_the_run(run, old, new):
    text = run.config.read_text()
    run.config.write_text(text.replace(old, new, 1))
    assert run.config.read_text() != text
    with pytest.raises(RunError):
        Run.open(run.path).model()


def test_a_last_line_that_was_cut_off_is_left_out(run):
    """What a kill in the middle of a write leaves."""
    before, path = run.history(), run.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"epoch": 2, "st')
    assert before and run.history() == before


def test_damaged_metrics_name_the_file(run):
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"epoch": 2, "st\n{"epoch": 3}\n')
    with pytest.raises(RunError, match="damaged") as caught:
        run.history()
    assert str(path) in str(caught.value)


def test_truncated_weights_name_the_file(run):
    content = run.weights.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\0" * 100):
        run.weights.write_bytes(damaged)
        with pytest.raises(RunError) as caught:
            run.model()
        assert str(run.weights) in str(caught.value)


def test_the_weights_of_another_model_are_refused(run, few, tmp_path):
    chosen = recipe("mnist-2d", few.shape, hidden=(9,), decoder=(8,), frequencies=3, epochs=1, batch_size=100)
    other = train(chosen, few, tmp_path / "other")
    run.weights.write_bytes(other.weights.read_bytes())
    with pytest.raises(RunError, match="does not hold this run's model") as caught:
        run.model()
    assert str(run.weights) in str(caught.value)


def test_missing_weights_are_told(run):
    run.weights.unlink()
    assert not run.finished
    with pytest.raises(RunError, match=r"has no model\.safetensors"):
        run.model()


def test_a_folder_that_is_not_empty_is_refused_and_untouched(run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is not empty"):
        Run.create(mine, run.recipe())
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [("thesis.txt", "years of work")]


def test_a_folder_under_a_file_cannot_be_made(run, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="choose"):
            Run.create(path, run.recipe())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary != path
        raise RuntimeError("half way")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"new": float("nan")})
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"]
    assert read_json(path) == {"old": 1}


def test_a_write_that_succeeds_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    for value in (1, 2):
        write_json(path, value)
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"] and read_json(path) == 2


# --- older formats ---

RUNS = Path(__file__).parent.parent / "runs"


def test_there_is_a_run_of_each_older_format():
    assert sorted(path.name for path in RUNS.iterdir()) == [f"format-{n}" for n in range(1, FORMAT)]


@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.iterdir()))
def test_a_run_of_an_older_format_is_read(name):
    """Its model gives the numbers that its own training wrote down."""
    run, data = Run.open(RUNS / name), load("digits")
    assert run.finished
    recipe_, last = run.recipe(), run.history()[-1]
    assert recipe_.training.on_nonfinite == "stop"
    found = measured(run.model(), protocol(recipe_.protocol).test_set(data.test.pixels), None, recipe_.seed)
    assert found == pytest.approx(last["test"], rel=1e-5)


@pytest.mark.parametrize("version", [FORMAT + 1, 0, "2", 1.5, None])
def test_a_newer_format_is_refused(tmp_path, version):
    shutil.copytree(RUNS / "format-1", tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "format": version}))
    with pytest.raises(RunError, match=rf"has format .* reads 1 to {FORMAT}: install a newer vaelab"):
        Run.open(tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", '{"device": 3}', "{"])
def test_a_damaged_environment_is_an_error_that_names_it(run, text):
    (run.path / "env.json").write_text(text)
    with pytest.raises(RunError, match=r"env\.json' is damaged"):
        run.environment()
