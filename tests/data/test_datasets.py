"""Names, folders and .npz files into data sets."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaelab.data import datasets
from vaelab.data.datasets import Dataset, Images, catalogue, load
from vaelab.errors import DataError, UsageError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (24, 5, 4), dtype=np.uint8)
Y = np.repeat(np.arange(3), 8)


def refused(call, *parts: str, kind: type = DataError) -> None:
    """A call must raise this error, and the message must name each part."""
    with pytest.raises(kind) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# --- names ---


def test_mnist(mnist_folder, cache):
    mnist = load("mnist", mnist_folder)
    assert (mnist.name, mnist.shape, mnist.classes) == ("mnist", (1, 28, 28), tuple("0123456789"))
    assert (len(mnist.train), len(mnist.test)) == (60000, 10000)
    for part in (mnist.train, mnist.test):
        assert part.pixels.dtype == np.uint8 and part.pixels.shape[1:] == (1, 28, 28) and part.pixels.flags.writeable
        assert part.labels is not None and part.labels.dtype == np.int64
    assert mnist.train.pixels.mean() / 255 == pytest.approx(0.1307, abs=5e-5)  # the constants of every MNIST tutorial
    assert mnist.train.pixels.std() / 255 == pytest.approx(0.3081, abs=5e-5)
    assert mnist.train.labels is not None and mnist.train.labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert mnist.test.labels is not None and mnist.test.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert mnist.fingerprint == "79d77bbcddfaff3e"
    assert str(mnist_folder) in mnist.source and "verified" in mnist.source
    assert not cache.exists()


def test_digits():
    digits = load("digits")
    assert (digits.name, digits.shape, digits.classes) == ("digits", (1, 8, 8), tuple("0123456789"))
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert sorted(set(np.unique(digits.train.pixels).tolist())) == [round(v * 255 / 16) for v in range(17)]
    assert digits.train.labels is not None and digits.test.labels is not None
    whole = np.bincount(digits.train.labels) + np.bincount(digits.test.labels)
    assert np.abs(np.bincount(digits.test.labels) - whole * 360 / 1797).max() < 1
    assert digits.fingerprint == "396083d8804d0810"  # the draw is part of the contract: results are compared on it
    assert any("360" in note for note in digits.notes)


def test_digits_are_split_not_copied():
    from sklearn.datasets import load_digits

    digits = load("digits")
    rows = np.concatenate([digits.train.pixels, digits.test.pixels]).reshape(1797, 64).tolist()
    images = np.asarray(load_digits().images)  # type: ignore[attr-defined]
    assert sorted(rows) == sorted(np.rint(images * 255 / 16).astype(int).reshape(1797, 64).tolist())


def test_unknown_names_and_missing_paths(tmp_path):
    refused(lambda: load("mnst"), "'mnst'", "did you mean 'mnist'", "folder of images", ".npz", kind=UsageError)
    refused(lambda: load(""), ", ".join(datasets.NAMES), kind=UsageError)
    for name in (str(tmp_path / "gone"), "gone.npz", "./gone", "gone/deeper"):
        refused(lambda name=name: load(name), str(Path(name)), "no such file or folder", "correct the path")
    refused(lambda: load("~no-such-user-here/x"), "~no-such-user-here/x", "correct it")
    refused(lambda: load("x" * 5000), "cannot be read as a path")
    (tmp_path / "x.csv").write_text("1,2,3")
    refused(lambda: load(str(tmp_path / "x.csv")), "x.csv", "savez_compressed")


def test_a_missing_data_dir_is_told(tmp_path):
    refused(lambda: load("mnist", tmp_path / "gone"), "gone", "correct the path")


def test_importing_the_data_layer_is_cheap():
    code = (
        "import sys, vaelab.data.datasets; "
        "print([m for m in ('torch', 'sklearn', 'PIL', 'urllib.request', 'platformdirs') if m in sys.modules])"
    )
    source = str(Path(datasets.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"], capture_output=True
    )
    assert done.stdout.decode().strip() == "[]", done.stderr.decode()


def test_loading_does_not_import_torch(tmp_path):
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    code = f"from vaelab.data.datasets import load; load('digits'); load({str(tmp_path / 'd.npz')!r}); "
    source = str(Path(datasets.__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {source!r}); {code} print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.stdout.decode().strip() == "False", done.stderr.decode()


def test_catalogue_agrees_with_what_is_loaded(mnist_folder, cache):
    rows = {row["name"]: row for row in catalogue(mnist_folder)}
    assert sorted(rows) == list(datasets.NAMES)
    here = {name: row for name, row in rows.items() if row["present"]}
    assert {"digits", "mnist"} <= set(here)
    for name, row in here.items():
        data = load(name, mnist_folder)
        assert (row["train"], row["test"], row["shape"]) == (len(data.train), len(data.test), data.shape)
        assert row["classes"] == (data.classes and len(data.classes))
    assert all(row["licence"] and row["source"] for row in rows.values())
    assert rows["mnist"]["where"] == str(mnist_folder / "mnist")


def test_catalogue_fetches_nothing_and_never_fails(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("VAELAB_DATA", str(tmp_path / "gone"))
    row = next(row for row in catalogue() if row["name"] == "mnist")
    assert (row["present"], row["where"]) == (False, None)
    assert not cache.exists()


# --- .npz ---


def save(tmp_path: Path, **arrays: np.ndarray) -> str:
    np.savez(tmp_path / "my.npz", **arrays)
    return str(tmp_path / "my.npz")


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train", "train_labels", "test", "test_labels"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_npz_with_a_test_part(tmp_path, keys, labelled):
    arrays = dict(zip(keys, (X[:20], Y[:20], X[20:], Y[20:]), strict=True))
    if not labelled:
        del arrays[keys[1]], arrays[keys[3]]
    data = load(save(tmp_path, **arrays))
    np.testing.assert_array_equal(data.train.pixels, X[:20, None])
    np.testing.assert_array_equal(data.test.pixels, X[20:, None])
    assert (data.name, data.shape, data.notes) == ("my", (1, 5, 4), ())
    assert str(tmp_path / "my.npz") in data.source
    if labelled:
        assert data.train.labels is not None and data.train.labels.tolist() == Y[:20].tolist()
        assert data.test.labels is not None and data.test.labels.tolist() == Y[20:].tolist()
        assert data.classes == ("0", "1", "2")
    else:
        assert data.train.labels is None and data.test.labels is None and data.classes is None


@pytest.mark.parametrize("images", ["images", "x", "data", "x_train", "train"])
@pytest.mark.parametrize("labelled", [True, False])
def test_npz_without_a_test_part_gives_a_sixth(tmp_path, images, labelled):
    names = {"x_train": "y_train", "train": "train_labels"}
    arrays = {images: X} | ({names.get(images, "labels"): Y} if labelled else {})
    data = load(save(tmp_path, **arrays))
    assert (len(data.train), len(data.test)) == (20, 4)
    every = np.concatenate([data.train.pixels, data.test.pixels])[:, 0]
    assert sorted(every.tolist()) == sorted(X.tolist())
    assert any("no test part" in note and "4 of 24" in note for note in data.notes)
    again = load(save(tmp_path, **arrays))
    assert again.fingerprint == data.fingerprint
    if labelled:
        assert data.test.labels is not None and sorted(np.bincount(data.test.labels).tolist()) == [1, 1, 2]
        pairs = {image.tobytes(): label for image, label in zip(X, Y, strict=True)}
        for part in (data.train, data.test):
            assert part.labels is not None
            assert [pairs[image.tobytes()] for image in part.pixels] == part.labels.tolist()


def test_floats_and_booleans_are_said_in_the_notes(tmp_path):
    floats = load(save(tmp_path, x_train=X / 300, x_test=X[:2] / 300))
    assert floats.notes == ("float images in [0, 1] were rounded to 256 levels",)
    bits = load(save(tmp_path, x_train=X > 99, x_test=X[:2] > 99))
    np.testing.assert_array_equal(bits.train.pixels[:, 0], (X > 99) * 255)
    assert "boolean" in bits.notes[0]


def test_bytes_of_0_and_1_are_bits(tmp_path):
    bits = load(save(tmp_path, x_train=(X > 99).astype(np.uint8), x_test=np.zeros((2, 5, 4), np.uint8)))
    np.testing.assert_array_equal(bits.train.pixels[:, 0], (X > 99) * 255)
    assert not bits.test.pixels.any() and "0 and 1" in bits.notes[0]
    dark = load(save(tmp_path, x_train=np.ones((3, 5, 4), np.uint8), x_test=np.full((1, 5, 4), 2, np.uint8)))
    assert dark.train.pixels.max() == 1 and dark.notes == ()
    faint = load(save(tmp_path, x_train=np.full((3, 5, 4), 1 / 255), x_test=np.zeros((1, 5, 4))))
    assert faint.train.pixels.max() == 1


def test_arrays_that_are_not_read_are_said(tmp_path):
    data = load(save(tmp_path, x_train=X, x_test=X[:2], val_images=X, about=np.array("hello")))
    assert data.notes == ("arrays that were not read: about, val_images",)


BAD_NPZ = {
    "nothing": ({}, ["(none)", "x_train"]),
    "other names": ({"pixels": X, "target": Y}, ["pixels, target", "name them so"]),
    "two that could be": ({"x": X, "images": X}, ["x, images", "one of these sets"]),
    "x with x_test": ({"x": X, "x_test": X}, ["x, x_test", "one of these sets"]),
    "x_train with labels": ({"x_train": X, "labels": Y}, ["x_train, labels", "one of these sets"]),
    "two labels": ({"x": X, "labels": Y, "y": Y}, ["one of these sets"]),
    "only a test part": ({"x_test": X}, ["x_test", "one of these sets"]),
    "no images": ({"x": X[:0]}, ["array 'x'", "no images"]),
    "labels too short": ({"x": X, "y": Y[:23]}, ["array 'y'", "23 labels for 24 images"]),
    "test labels too long": (
        {"x_train": X, "y_train": Y, "x_test": X[:2], "y_test": Y[:3]},
        ["array 'y_test'", "3 labels for 2 images"],
    ),
    "labels for train only": ({"x_train": X, "y_train": Y, "x_test": X}, ["one part only", "'y_test'"]),
    "labels for test only": ({"x_train": X, "x_test": X, "y_test": Y}, ["one part only", "'y_train'"]),
    "test labels alone": ({"x_train": X, "y_train": Y, "y_test": Y}, ["'y_test' without 'x_test'"]),
    "another test shape": ({"x_train": X, "x_test": X[:, :4]}, ["(1, 5, 4)", "(1, 4, 4)", "crop or resize"]),
    "NaN": ({"x": np.full((9, 2, 2), np.nan)}, ["array 'x'", "NaN"]),
    "NaN in the test part": ({"x_train": X, "x_test": np.full((9, 5, 4), np.nan)}, ["array 'x_test'", "NaN"]),
    "range": ({"x": X.astype(np.float32)}, ["array 'x'", "divide by 255"]),
    "dtype": ({"x": X.astype(int)}, ["array 'x'", "int64"]),
    "rank": ({"x": X.ravel()}, ["array 'x'", "(480,)"]),
    "no square": ({"x": X.reshape(24, 20)}, ["array 'x'", "24 rows of 20 pixels", "reshape"]),
    "two images": ({"x": X[:2]}, ["too few", "2 in all", "at least 2"]),
    "one to train on": ({"x_train": X[:1], "x_test": X}, ["too few", "1 to train on and 24"]),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_are_refused(tmp_path, case):
    arrays, parts = BAD_NPZ[case]
    path = save(tmp_path, **arrays)
    refused(lambda: load(path), path, *parts)


def test_object_arrays_are_refused(tmp_path):
    objects = np.empty(3, object)
    objects[:] = [X[0], X[1], None]
    np.savez(tmp_path / "o.npz", x=objects, allow_pickle=True)
    refused(lambda: load(str(tmp_path / "o.npz")), "o.npz", "Python objects")


def test_three_images_are_enough(tmp_path):
    data = load(save(tmp_path, x=X[:3]))
    assert (len(data.train), len(data.test)) == (2, 1)


# --- the split ---


@pytest.mark.parametrize("count", [3, 6, 7, 100, 1797])
def test_split_is_a_partition_in_order(count):
    labels = RNG.integers(0, 5, count)
    for given in (None, labels):
        train, test = datasets._split(count, max(1, count // 6), given)
        assert len(test) == max(1, count // 6)
        assert sorted([*train, *test]) == list(range(count))
        assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()


def test_split_shares_differ_by_less_than_one_and_keep_rare_classes_to_train_on():
    labels = np.repeat(np.arange(6), [1, 2, 3, 60, 601, 333])
    train, test = datasets._split(1000, 166, labels)
    sizes = np.bincount(labels)
    got = np.bincount(labels[test], minlength=6)
    assert np.abs(got - sizes * 166 / 1000).max() < 1
    assert (np.bincount(labels[train], minlength=6) > 0).all()


def test_split_never_takes_the_only_image_of_a_class():
    labels = np.array([*range(10), *[10] * 12])  # its share of 3 is 1.6, and no other class can give one
    train, test = datasets._split(22, 3, labels)
    assert labels[test].tolist() == [10, 10, 10] and set(labels[train]) == set(range(11))


def test_split_with_as_many_classes_as_images_is_still_a_sixth():
    train, test = datasets._split(12, 2, np.arange(12))
    assert (len(train), len(test)) == (10, 2)


def test_split_is_not_simply_the_head_or_the_tail():
    _, test = datasets._split(600, 100, None)
    assert 200 < test.mean() < 400 and np.diff(test).max() > 2


# --- folders ---


def draw(root: Path, **counts: int) -> Path:
    """Grey 4 x 3 pictures: COUNT of them in each folder named (with __ for /), each of its own grey."""
    value = 0
    for folder, count in counts.items():
        for i in range(count):
            path = root / folder.replace("__", "/") / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            value += 1
            Image.fromarray(np.full((4, 3), value, np.uint8)).save(path)
    return root


def test_folder_of_classes(tmp_path):
    data = load(str(draw(tmp_path / "pets", dog=6, cat=6)))
    assert (data.name, data.shape, data.classes) == ("pets", (1, 4, 3), ("cat", "dog"))
    assert (len(data.train), len(data.test)) == (10, 2)
    for part in (data.train, data.test):
        grey = part.pixels[:, 0, 0, 0]
        assert part.labels is not None
        assert part.labels.tolist() == [0 if value > 6 else 1 for value in grey]  # dogs were drawn first
    assert any("no test part" in note for note in data.notes)


def test_folder_with_train_and_test(tmp_path):
    root = draw(tmp_path / "d", train__a=3, train__b=2, train__c=1, test__a=1, test__c=2, val__a=1)
    data = load(str(root))
    assert data.classes == ("a", "b", "c")
    assert data.train.labels is not None and data.train.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.test.labels is not None and data.test.labels.tolist() == [0, 2, 2]  # b has none: c is still 2
    assert data.train.pixels[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert data.test.pixels[:, 0, 0, 0].tolist() == [7, 8, 9]
    assert data.notes == ("val was left out: only train and test are read",)


def test_folder_with_train_only(tmp_path):
    data = load(str(draw(tmp_path, train__a=6, train__b=6)))
    assert data.classes == ("a", "b") and (len(data.train), len(data.test)) == (10, 2)


def test_folder_without_classes(tmp_path):
    for counts in ({".": 6}, {"train": 5, "test": 1}):
        data = load(str(draw(tmp_path / str(len(counts)), **counts)))
        assert data.classes is None and data.train.labels is None and data.test.labels is None
        assert (len(data.train), len(data.test)) == (5, 1)


def test_train_may_be_a_class_among_others(tmp_path):
    assert load(str(draw(tmp_path, train=3, plane=3))).classes == ("plane", "train")


def test_folder_in_colour(tmp_path):
    draw(tmp_path, a=3, b=3)
    Image.fromarray(np.full((4, 3, 3), (1, 2, 3), np.uint8)).save(tmp_path / "b" / "z.png")
    assert load(str(tmp_path)).shape == (3, 4, 3)


def test_hidden_things_are_not_classes(tmp_path):
    draw(tmp_path, a=6, **{".git": 1})
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert load(str(tmp_path)).classes == ("a",)


BAD_FOLDERS = {
    "empty": ({}, [], ["no image", "add some"]),
    "an empty class": ({"a": 3}, ["b"], ["/b", "no image", "remove the folder"]),
    "loose images": ({"a": 3, ".": 1}, [], ["both images (00.png) and folders (a)", "move"]),
    "two images": ({"a": 1, "b": 1}, [], ["too few", "2 in all"]),
    "one to train on": ({"train__a": 1, "test__a": 1}, [], ["too few", "1 to train on and 1"]),
    "an unknown class": ({"train__a": 3, "test__z": 1}, [], ["/test", "z not in", "same classes"]),
    "classes in train only": ({"train__a": 3, "test": 1}, [], ["images outside any class", "same classes"]),
    "split beside classes": ({"train": 3, "test": 1, "cats": 2}, [], ["beside cats", "rename"]),
    "no train": ({"test__a": 3}, [], ["test but no train/", "add it"]),
    "an empty test": ({"train__a": 3}, ["test"], ["/test", "no image"]),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused(tmp_path, case):
    counts, empty, parts = BAD_FOLDERS[case]
    root = draw(tmp_path / "d", **counts)
    for name in ("", *empty):
        (root / name).mkdir(exist_ok=True, parents=True)
    refused(lambda: load(str(root)), str(root), *parts)


def test_bad_pictures_in_a_folder_are_named(tmp_path):
    draw(tmp_path, a=3, b=3)
    bad = tmp_path / "b" / "01.png"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(bad)
    refused(lambda: load(str(tmp_path)), str(bad), "4 x 4", "crop or resize")
    bad.write_bytes(b"hello")
    refused(lambda: load(str(tmp_path)), str(bad), "not a readable image")


# --- the fingerprint ---


def test_fingerprint_sees_every_pixel_label_and_shape():
    def made(x=X, y: np.ndarray | None = Y, test=X[:2], test_y: np.ndarray | None = Y[:2]) -> str:
        return Dataset("d", Images(x[:, None], y), Images(test[:, None], test_y), None, "here").fingerprint

    other = X.copy()
    other[-1, -1, -1] ^= 1
    labels = Y.copy()
    labels[-1] += 1
    prints = [
        made(),
        made(x=other),
        made(y=labels),
        made(y=None),
        made(test=other[-2:]),
        made(test=X[-2:]),
        made(test_y=labels[-2:]),
        made(test_y=None),
        made(x=X.reshape(24, 4, 5), test=X[:2].reshape(2, 4, 5)),
        made(x=X[::-1]),
        made(x=X[:23], y=Y[:23]),
    ]
    assert len(set(prints)) == len(prints)
    assert made() == made() and len(made()) == 16
    # bytes that move from one part to the other are seen
    assert made(x=X[:20], y=None, test=X[20:], test_y=None) != made(x=X[:19], y=None, test=X[19:], test_y=None)


def test_fingerprint_is_computed_once():
    data = Dataset("d", Images(X[:, None].copy()), Images(X[:2, None]), None, "here")
    before = data.fingerprint
    data.train.pixels[:] = 0
    assert data.fingerprint == before
