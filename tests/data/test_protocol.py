"""Protocols: what each makes of bytes, test draws that never move, and the data sets of fixed draws."""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vaelab.data import datasets, store
from vaelab.data.datasets import catalogue, load
from vaelab.data.protocol import PROTOCOLS, check, protocol
from vaelab.errors import DataError, UsageError
from vaelab.rng import stream

RAMP = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
BITS = np.random.default_rng(0).integers(0, 2, (6, 1, 5, 4), dtype=np.uint8) * np.uint8(255)


def batch(name, pixels=RAMP, seed=0):
    return protocol(name).training_batch(torch.from_numpy(pixels), stream(seed, "noise"))


# --- what each protocol makes of bytes ---


def test_measures_and_offsets():
    rows = {name: (p.measure, p.redrawn, p.bits_offset) for name, p in PROTOCOLS.items()}
    assert rows == {
        "dynamic": ("binary", True, 0.0),
        "threshold": ("binary", False, 0.0),
        "static": ("binary", False, 0.0),
        "levels": ("levels256", False, 0.0),
        "dequantised": ("continuous", True, 8.0),
        "grey": ("grey", False, None),
    }


@pytest.mark.parametrize("name", ["levels", "grey"])
def test_levels_are_bytes_over_255(name):
    expected = torch.arange(256).reshape(1, 1, 16, 16) / 255
    assert torch.equal(batch(name), expected) and torch.equal(protocol(name).test_set(RAMP), expected)
    assert torch.equal((batch(name) * 255).round(), torch.from_numpy(RAMP).float())


def test_threshold_is_at_one_half():
    assert batch("threshold").flatten().tolist() == [0.0] * 128 + [1.0] * 128


def test_dequantised_pixels_stay_in_their_bin_below_one_and_fill_it():
    pixels = np.repeat(RAMP, 2000, 0)
    for x in (batch("dequantised", pixels), protocol("dequantised").test_set(pixels)):
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() < 1
        u = x.double() * 256 - torch.from_numpy(pixels)
        assert u.min() >= 0 and u.max() < 1
        assert torch.equal((x * 256).floor(), torch.from_numpy(pixels).float())
        assert abs(u.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel()) + 2**-17
        assert (u.mean((0, 1)) - 0.5).abs().max() < 4.5 * math.sqrt(1 / 12 / 2000)
        share = torch.histc(u, 64, 0, 1) / u.numel()
        assert (share - 1 / 64).abs().max() < 5 * math.sqrt(1 / 64 / u.numel())


def test_the_ends_of_the_noise_do_not_leave_the_bin():
    from vaelab.data.protocol import _spread

    pixels = torch.tensor([0, 0, 255, 255], dtype=torch.uint8)
    noise = torch.tensor([-(2**15), 2**15 - 1, -(2**15), 2**15 - 1], dtype=torch.int16)
    expected = [0, (1 - 2**-16) / 256, 255 / 256, 1 - 2**-24]
    assert _spread(pixels, noise).double().tolist() == expected


def test_words_are_splitmix64s():
    """The values that implementations of it are checked with, for the seed 1234567."""
    from vaelab.data.protocol import _words

    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert _words(1234567, 5).tolist() == expected


def test_dynamic_bits_have_the_grey_level_as_probability():
    pixels = np.repeat(RAMP, 20_000, 0)
    for x in (batch("dynamic", pixels), protocol("dynamic").test_set(pixels)):
        assert set(x.unique().tolist()) == {0.0, 1.0}
        p = torch.from_numpy(RAMP).float() / 255
        assert ((x.mean(0) - p[0]).abs() <= 4.5 * (p * (1 - p) / 20_000).sqrt()[0] + 2**-15).all()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_training_is_redrawn_where_it_says_so_and_the_test_draw_never_moves(name):
    pixels = BITS if name == "static" else np.repeat(RAMP, 2, 0)
    assert torch.equal(batch(name, pixels, 0), batch(name, pixels, 0))
    assert torch.equal(batch(name, pixels, 0), batch(name, pixels, 1)) != protocol(name).redrawn
    first = protocol(name).test_set(pixels)
    torch.manual_seed(7)
    np.random.seed(7)
    batch(name, pixels, 3)
    assert torch.equal(first, protocol(name).test_set(pixels))
    assert first.dtype == torch.float32 and first.shape == pixels.shape


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dynamic", "e82ef3e352bd9ba4"), ("dequantised", "40d483eb86bd6786")],
)  # fmt: skip
def test_the_test_draw_is_this_one(name, expected):
    """The digest of the draw: results are compared on it, so no version may change it."""
    x = protocol(name).test_set(np.repeat(RAMP, 4, 0)).numpy()
    assert hashlib.sha256(x.tobytes()).hexdigest()[:16] == expected


def test_static_and_threshold_leave_bits_alone_and_dynamic_never_moves_the_test_bits():
    expected = torch.from_numpy(BITS).float() / 255
    for name in ("static", "threshold"):
        assert torch.equal(batch(name, BITS), expected) and torch.equal(protocol(name).test_set(BITS), expected)
    assert torch.equal(protocol("dynamic").test_set(BITS), expected)


def test_static_is_refused_on_grey_pixels():
    for look in (protocol("static").test_set, protocol("static").check_pixels):
        with pytest.raises(UsageError, match=r"must be bits.*mnist-static, or --protocol dynamic"):
            look(RAMP)
    for name in PROTOCOLS:
        protocol(name).check_pixels(BITS)
        if name != "static":
            protocol(name).check_pixels(RAMP)


def test_a_density_on_dequantised_pixels_bounds_the_probability_of_levels():
    """Jensen: E_u log p(x) - log 256 <= log P(level), equal for a density that is constant in each bin."""
    from vaelab.pixels import Gaussian

    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for centre, scale in ((0.3, 0.1), (0.3, 0.002), (0.303, 0.002)):
        level = 77
        cdf = torch.distributions.Normal(centre, scale).cdf
        exact = math.log(cdf(torch.tensor((level + 1) / 256.0, dtype=torch.float64))
                         - cdf(torch.tensor(level / 256.0, dtype=torch.float64)))  # fmt: skip
        px = Gaussian(torch.full((1, 1, 1), centre, dtype=torch.float64), torch.tensor(scale).double().log(), 1)
        log_p = px.log_prob(((level + u) / 256)[:, None, None]).mean().item()
        bits = -log_p / math.log(2) + (protocol("dequantised").bits_offset or 0.0)
        gap = bits - -exact / math.log(2)
        assert 0 < gap < (1e-3 if scale == 0.1 else 1.0)


def test_an_unknown_protocol_is_told():
    with pytest.raises(UsageError, match="did you mean 'dequantised'"):
        protocol("dequantized")


def test_a_users_own_likelihood_on_no_measure_is_told():
    class Strange(torch.nn.Module):
        measures = ("spherical",)

    with pytest.raises(UsageError, match=r"defined on spherical: choose --protocol \(none fits\), or the likelihood"):
        check(protocol("levels"), Strange())


# --- data sets that are put by hand ---


def text_of(bits: np.ndarray) -> bytes:
    """Rows of bits as they were published: "0 1 0 ...", a line an image."""
    out = np.full((len(bits), 2 * bits.shape[1]), ord(" "), np.uint8)
    out[:, ::2] = bits + ord("0")
    out[:, -1] = ord("\n")
    return out.tobytes()


def bundle_of(folder: Path, name: str) -> store.Bundle:
    files = [store.File(f.name, hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_size)
             for f in sorted(folder.iterdir(), key=lambda f: "test" in f.name)]  # fmt: skip
    return store.Bundle(name, tuple(files), ())


@pytest.fixture
def tiny_static(tmp_path, monkeypatch, cache):
    """Five training and three test images in both formats, in place of the published ones: bits by part."""
    bits = {part: np.random.default_rng(n).integers(0, 2, (n, 784), dtype=np.uint8) for part, n in
            (("train", 5), ("valid", 4), ("test", 3))}  # fmt: skip
    for kind in ("packed", "text"):
        (tmp_path / kind).mkdir()
    for part in ("train", "test"):
        np.savez(tmp_path / "packed" / f"binarized_mnist_{part}_packed.npz", x=np.packbits(bits[part], axis=1))
        (tmp_path / "text" / f"binarized_mnist_{part}.amat").write_bytes(text_of(bits[part]))
    monkeypatch.setattr(datasets, "STATIC", bundle_of(tmp_path / "packed", "mnist-static"))
    monkeypatch.setattr(datasets, "STATIC_TEXT", bundle_of(tmp_path / "text", "mnist-static"))
    np.savez(tmp_path / "packed" / "binarized_mnist_valid_packed.npz", x=np.packbits(bits["valid"], axis=1))
    return bits


@pytest.mark.parametrize("kind", ["packed", "text"])
def test_the_static_draw_is_read_from_either_format_and_never_the_validation_part(tiny_static, tmp_path, kind):
    data = load("mnist-static", tmp_path / kind)
    for part, images in (("train", data.train), ("test", data.test)):
        assert images.labels is None and images.pixels.shape == (len(tiny_static[part]), 1, 28, 28)
        assert np.array_equal(images.pixels.reshape(-1, 784), tiny_static[part] * 255)
    assert data.classes is None and "validation part is not read" in data.notes[1]
    assert str(tmp_path / kind) in data.source
    assert np.array_equal(protocol("static").test_set(data.test.pixels).reshape(-1, 784), tiny_static["test"])
    row = {r["name"]: r for r in catalogue(tmp_path / kind)}["mnist-static"]
    assert row["present"] and row["where"] == str(tmp_path / kind)


@pytest.mark.parametrize("name", ["mnist-static", "freyfaces"])
def test_what_cannot_be_fetched_says_where_it_comes_from(cache, tmp_path, name):
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    bundle = {"mnist-static": datasets.STATIC, "freyfaces": datasets.FREY}[name]
    hint = {"mnist-static": "binarized_mnist_test.amat", "freyfaces": "frey_rawface.mat"}[name]
    for part in (
        *(file.name for file in bundle.files),
        str(tmp_path),
        "--data-dir or VAELAB_DATA",
        hint,
        "cannot be fetched",
    ):
        assert part in message
    row = {r["name"]: r for r in catalogue(tmp_path)}[name]
    assert (row["present"], row["where"]) == (False, None)


@pytest.mark.parametrize("name", ["mnist-static", "freyfaces"])
def test_a_damaged_file_put_by_hand_is_told(cache, tmp_path, name):
    bundle = {"mnist-static": datasets.STATIC, "freyfaces": datasets.FREY}[name]
    for file in bundle.files:
        (tmp_path / file.name).write_bytes(b"damaged")
    with pytest.raises(DataError, match="fails its checksum") as caught:
        load(name, tmp_path)
    assert "cannot be fetched" not in str(caught.value)


def test_frey_faces_are_split_in_three_and_one_is_left_out(cache, tmp_path, monkeypatch):
    rows = np.random.default_rng(0).integers(0, 256, (1965, 560), dtype=np.uint8)
    folder = tmp_path / "frey"
    folder.mkdir()
    np.savez(folder / "freyfaces.npz", x=rows)
    monkeypatch.setattr(datasets, "FREY", bundle_of(folder, "freyfaces"))
    data, again = load("freyfaces", folder), load("freyfaces", folder)
    assert (data.shape, len(data.train), len(data.test), data.classes) == ((1, 28, 20), 1565, 200, None)
    assert data.fingerprint == again.fingerprint
    place = {row.tobytes(): i for i, row in enumerate(rows)}
    train, test = ([place[image.tobytes()] for image in part.pixels] for part in (data.train, data.test))
    assert train == sorted(train) and test == sorted(test) and not set(train) & set(test)
    assert 800 < np.mean(test) < 1160 and any("seed 1" in note and "200 left out" in note for note in data.notes)


PUBLISHED = {
    "train": (50_000, "db28b1a6ae0fe70cbd3da91acf46e477"),
    "test": (10_000, "14e41ae11040adba6ab8cb291eda0dd8"),
}
VALIDATION = "bf37822a04e94123630de6a7dfd9c9ef"


def hand_put(name: str) -> Path | None:
    """The folder of VAELAB_DATA, if it holds that data set."""
    folder = os.environ.get("VAELAB_DATA")
    return Path(folder) if folder and (Path(folder) / name).is_dir() else None


def test_the_published_files_are_these():
    """Of the sizes and the MD5 of the text of Larochelle & Murray; without the files, of what is expected of them."""
    sizes = {file.name: file.size for file in datasets.STATIC_TEXT.files}
    assert sizes == {f"binarized_mnist_{part}.amat": 1568 * n for part, (n, _) in PUBLISHED.items()}
    folder = hand_put("mnist-static")
    if folder is not None:
        data = load("mnist-static", folder)
        for part, images in (("train", data.train), ("test", data.test)):
            count, digest = PUBLISHED[part]
            text = text_of((images.pixels // 255).reshape(-1, 784))
            assert len(images) == count and hashlib.md5(text).hexdigest() == digest != VALIDATION
            (file,) = [f for f in datasets.STATIC_TEXT.files if part in f.name]
            assert hashlib.sha256(text).hexdigest() == file.sha256
        assert data.fingerprint == "b826bd1b1180888a"
    folder = hand_put("freyfaces")
    if folder is not None:
        assert load("freyfaces", folder).fingerprint == "dd1c3f7bea7c2c82"
