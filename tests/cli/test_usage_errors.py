"""Wrong names and values: exit code 2, one line on stderr, nothing on stdout, nothing written."""

import pytest

from vaelab.run import Run

NAMES = [
    (("trian", "mnist"), 'Did you mean "train"'),
    (("train", "mnits"), "unknown recipe 'mnits': did you mean 'mnist'?"),
    (("study", "removing-lk"), 'Did you mean "removing-kl"'),
    (("train", "mnist", "--latnt-dim", "3"), "Did you mean --latent-dim"),
    (("study", "removing-kl", "--sed", "3"), "Did you mean --seed"),
    (("train", "mnist", "--data", "digts"), "unknown data 'digts': did you mean 'digits'?"),
    (("study", "removing-kl", "--data", "mnst"), "did you mean 'mnist'?"),
    (("train", "mnist", "--protocol", "dynmic"), "unknown protocol 'dynmic': did you mean 'dynamic'?"),
    (("train", "mnist", "--optimiser", "adm"), "did you mean 'adam'?"),
    (("train", "mnist", "--schedule", "cosin"), "did you mean 'cosine'?"),
    (("train", "mnist", "--precision", "float23"), "did you mean 'float32'?"),
    (("train", "mnist", "--data", "digits", "--activation", "rellu"), "did you mean 'relu'?"),
]
VALUES = [
    ("--latent-dim", "0", "latent_dim is 0: expected an integer of 1 or more"),
    ("--epochs", "0", "epochs is 0"),
    ("--epochs", "many", 'Invalid value for --epochs: unable to convert "many" into int'),
    ("--lr", "nan", "lr is nan"),
    ("--lr", "0", "lr is 0.0"),
    ("--lr", "fast", "Invalid value for --lr"),
    ("--batch-size", "0", "batch_size is 0"),
    ("--batch-size", "-5", "batch_size is -5"),
    ("--k", "0", "k is 0"),
    ("--clip", "-1", "clip is -1.0"),
    ("--clip", "nan", "clip is nan"),
    ("--average", "1", "average is 1.0"),
    ("--hidden", "0", "hidden is 0"),
    ("--seed", "-1", "seed is -1"),
    ("--device", "nowhere", "device 'nowhere' cannot be used"),
]


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path, monkeypatch):
    """Each test starts in an empty folder and must leave it empty."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert [path.name for path in here.rglob("*")] == []


@pytest.mark.parametrize(("arguments", "message"), NAMES, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_an_unknown_name_offers_the_nearest(vaelab, arguments, message):
    vaelab(*arguments, "--quiet").refused(2, message)


@pytest.mark.parametrize(("option", "value", "message"), VALUES)
@pytest.mark.parametrize("command", ["train mnist-2d", "study removing-kl"])
def test_a_value_of_the_wrong_type_or_out_of_range(vaelab, command, option, value, message):
    vaelab(*command.split(), "--data", "digits", option, value, "--out", "x").refused(2, message)


def test_half_an_epoch_is_not_rounded(vaelab):
    result = vaelab("train", "mnist", "--data", "digits", "--epochs", "1.5", "--hidden", "16", "--out", "x", "--quiet")
    result.refused(2, "Invalid value for --epochs")


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_negative_beta(vaelab, value):
    vaelab("train", "mnist", "--data", "digits", "--beta", value, "--out", "x").refused(2, f"beta is {float(value)}")


def test_beta_is_what_the_study_changes_and_no_option_of_it(vaelab):
    vaelab("study", "removing-kl", "--data", "digits", "--beta", "2").refused(2, "Unknown option")


def test_no_seeds(vaelab):
    vaelab("study", "removing-kl", "--data", "digits", "--seeds", "0", "--quiet").refused(2, "seeds is 0")


@pytest.mark.parametrize("command", ["train mnist-2d", "study removing-kl"])
def test_a_batch_larger_than_the_data(vaelab, command):
    result = vaelab(*command.split(), "--data", "digits", "--batch-size", "5000", "--out", "x", "--quiet")
    result.refused(2, "batch_size is 5000 and there are 1437 training images")


@pytest.mark.parametrize("command", ["train mnist-2d", "study removing-kl"])
def test_an_unknown_activation(vaelab, command):
    result = vaelab(*command.split(), "--data", "digits", "--activation", "sliu", "--out", "x", "--quiet")
    result.refused(2, "did you mean 'silu'?")


def test_a_missing_argument(vaelab):
    for command in ("evaluate", "sample", "report"):
        vaelab(command).refused(2, "RUN", f"see `vaelab {command} --help`")


@pytest.mark.parametrize("command", ["train mnist-2d", "study removing-kl"])
class TestOutputFolder:
    """An output folder that is not ours, or cannot be made."""

    def test_one_that_holds_something_else_is_left_as_it_is(self, vaelab, command, tmp_path, files):
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.txt").write_text("years of work")
        for more in ([], ["--overwrite"]) if command.startswith("study") else ([],):
            result = vaelab(*command.split(), "--data", "digits", "--out", mine, "--quiet", *more)
            result.refused(2, str(mine), "not empty", "--out")
            assert files(mine) == {"thesis.txt": b"years of work"}

    def test_a_file(self, vaelab, command, tmp_path):
        (tmp_path / "file").write_text("x")
        result = vaelab(*command.split(), "--data", "digits", "--out", tmp_path / "file", "--quiet")
        result.refused(2, str(tmp_path / "file"), "is a file")
        assert (tmp_path / "file").read_text() == "x"

    def test_under_a_file(self, vaelab, command, tmp_path):
        (tmp_path / "file").write_text("x")
        result = vaelab(*command.split(), "--data", "digits", "--out", tmp_path / "file" / "x", "--quiet")
        result.refused(2, str(tmp_path / "file" / "x"), "--out")


def test_where_samples_cannot_be_written(vaelab, run_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    vaelab("sample", run_folder, "--out", tmp_path / "file" / "x.png").refused(2, str(tmp_path / "file"))
    vaelab("sample", run_folder, "--out", tmp_path / "gone" / "x.png").refused(2, "gone", "does not exist")
    vaelab("sample", run_folder, "--out", tmp_path / "x.jpg").refused(2, ".png")
    for n in ("0", "-3", "10001"):
        vaelab("sample", run_folder, "-n", n).refused(2, f"n is {n}")
    assert Run.open(run_folder).finished


def test_no_samples_to_evaluate_with(vaelab, run_folder):
    for option in ("-k", "--is-images", "--samples"):
        vaelab("evaluate", run_folder, option, "0", "--quiet").refused(2, "is 0: expected an integer of 1 or more")
    assert not (run_folder / "evaluation.json").exists()


def test_a_report_never_replaces_another_folder(vaelab, run_folder, tmp_path, files):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    vaelab("report", run_folder, "--out", mine, "--quiet").refused(2, str(mine), "not empty")
    assert files(mine) == {"thesis.txt": b"years of work"}
