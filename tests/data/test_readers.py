"""Formats read as if a stranger had made them: what is given back, and the message for each thing that is wrong."""

import gzip
import io
import os
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaelab.data import readers
from vaelab.errors import DataError


def idx(shape: tuple[int, ...], body: bytes, code: int = 0x08) -> bytes:
    """An IDX file with this header and this body, whether they agree or not."""
    return bytes([0, 0, code, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + body


def refused(call, *parts: str) -> str:
    """The message of the DataError that a call must raise; it names each part."""
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert all(part in text for part in parts), text
    return text


# --- IDX ---


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_plain_or_gzip(tmp_path, pack):
    expected = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "images").write_bytes(pack(idx((2, 3, 4), expected.tobytes())))
    array = readers.read_idx(tmp_path / "images", 3)
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, expected)
    array[0, 0, 0] = 9  # writable: torch.from_numpy warns of arrays that are not


def test_idx_from_bytes_is_writable_too():
    assert readers.parse_idx(idx((3,), b"abc"), 1, "labels").flags.writeable


BAD_IDX = {
    "empty": (b"", 1, ["not an IDX file", "starts with nothing", "00 00 08 01"]),
    "text": (b"label,pixel\n", 1, ["not an IDX file", "6c 61 62 65"]),
    "zip": (b"PK\x03\x04....", 1, ["not an IDX file"]),
    "float values": (idx((1,), bytes(4), code=0x0D), 1, ["0x0d", "unsigned bytes", "convert"]),
    "images for labels": (idx((1, 2, 2), bytes(4)), 1, ["rank 3", "expected rank 1 (labels)", "swapped?"]),
    "labels for images": (idx((4,), bytes(4)), 3, ["rank 1", "expected rank 3 (images)", "swapped?"]),
    "header cut": (idx((4, 2, 2), b"")[:9], 3, ["9 bytes, expected 16", "copy it again"]),
    "body cut": (idx((4, 2, 2), bytes(15)), 3, ["4 x 2 x 2 = 16 bytes", "15 are there", "again"]),
    "body too long": (idx((4, 2, 2), bytes(17)), 3, ["16 bytes", "17 are there"]),
    "claims 2^96 pixels": (idx((0xFFFFFFFF,) * 3, bytes(16)), 3, ["79,228,162,458,924,105,385,300,197,375", "16 are"]),
    "no pixels, but 2^64 sizes": (idx((0, 0xFFFFFFFF, 0xFFFFFFFF), b""), 3, ["claims 0 x 4294967295", "copy it again"]),
    "claims 2^64 pixels": (idx((1 << 31, 1 << 31, 4), b""), 3, ["18,446,744,073,709,551,616", "0 are"]),  # 0 in int64
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_is_refused(tmp_path, case):
    data, rank, parts = BAD_IDX[case]
    path = tmp_path / "some-idx"
    path.write_bytes(data)
    refused(lambda: readers.read_idx(path, rank), str(path), *parts)


@pytest.mark.parametrize("harm", ["cut", "bits", "header"])
def test_damaged_gzip_is_refused(tmp_path, harm):
    data = bytearray(gzip.compress(idx((1000,), np.random.default_rng(0).bytes(1000))))
    if harm == "cut":
        data = data[:-300]
    elif harm == "bits":
        data[400] ^= 0xFF
        data[401] ^= 0xFF
    else:
        data[2] = 99
    (tmp_path / "x.gz").write_bytes(data)
    refused(lambda: readers.read_idx(tmp_path / "x.gz", 1), "x.gz", "damaged or truncated gzip", "again")


def test_a_gzip_bomb_costs_its_limit_and_no_more(tmp_path):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(200 << 20)))
    tracemalloc.start()
    try:
        refused(lambda: readers.read_bytes(tmp_path / "bomb.gz", 4 << 20), "bomb.gz", "more than 4,194,304 bytes")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_plain_bytes_have_a_limit_too_and_exactly_the_limit_passes(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100))
    assert len(readers.read_bytes(tmp_path / "x", 100)) == 100
    refused(lambda: readers.read_bytes(tmp_path / "x", 99), str(tmp_path / "x"), "more than 99 bytes")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    refused(lambda: readers.read_bytes(tmp_path / "gone"), str(tmp_path / "gone"), "No such file", "check the path")
    refused(lambda: readers.read_bytes(tmp_path), str(tmp_path), "directory")


# --- .npz ---


def header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_npz_gives_the_named_arrays(tmp_path):
    np.savez_compressed(tmp_path / "d.npz", x=np.arange(6).reshape(2, 3), y=np.asfortranarray(np.ones((2, 2))))
    assert readers.npz_names(tmp_path / "d.npz") == ["x", "y"]
    arrays = readers.read_npz(tmp_path / "d.npz", ["x", "y"])
    np.testing.assert_array_equal(arrays["x"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(arrays["y"], np.ones((2, 2)))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_an_npz_is_not_executed(tmp_path, monkeypatch):
    objects = np.empty(1, object)
    objects[0] = Payload(tmp_path / "executed")
    np.savez(tmp_path / "evil.npz", x=objects, allow_pickle=True)
    refused(lambda: readers.read_npz(tmp_path / "evil.npz", ["x"]), "evil.npz", "'x'", "Python objects", "np.stack")
    monkeypatch.setattr(readers, "_check_member", lambda *_: None)  # the second line of defence holds alone
    refused(lambda: readers.read_npz(tmp_path / "evil.npz", ["x"]), "evil.npz", "not a readable .npz")
    assert not (tmp_path / "executed").exists()
    with np.load(tmp_path / "evil.npz", allow_pickle=True) as arrays:  # the payload does work
        arrays["x"]
    assert (tmp_path / "executed").exists()


BAD_NPZ = {
    "claims too much": (header((1 << 40, 28, 28)) + bytes(9), ["claims shape", "862,017,116,176,384", "9 are there"]),
    "overflows int64": (header((1 << 32, 1 << 32)), ["18,446,744,073,709,551,616", "0 are there"]),
    "cut": (header((10, 2, 2)) + bytes(39), ["40 bytes", "39 are there", "save it again"]),
    "negative": (header((-1, 2, 2)) + bytes(4), ["claims shape"]),
    "not an array": (b"hello", ["not a readable .npz", "save it again"]),
    "header is code": (
        b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').abort()".ljust(31) + b"\n",
        ["not a readable"],
    ),
    "header of 60 kB": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b"(" * 60000, ["not a readable .npz"]),
    "unknown version": (b"\x93NUMPY\x09\x00\x10\x00" + bytes(16), ["not a readable .npz"]),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_arrays_in_an_npz_are_refused(tmp_path, case):
    data, parts = BAD_NPZ[case]
    path = npz(tmp_path / "d.npz", x=data)
    refused(lambda: readers.read_npz(path, ["x"]), str(path), *parts)


SUBARRAY = "{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (1,), }"
ODD = {
    "values of no bytes": (header((1 << 60,), "|S0"), ["never loaded"]),
    "arrays in an array": (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(SUBARRAY)) + SUBARRAY.encode() + bytes(8), ["never loaded"],
    ),
    "two negative sizes": (header((-2, -3)) + bytes(6), ["claims shape (-2, -3)", "save it again"]),
    "a deep header": (b"\x93NUMPY\x02\x00" + struct.pack("<I", 5000) + b"-" * 5000, ["not a readable .npz"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_arrays_in_an_npz_are_refused(tmp_path, case):
    data, parts = ODD[case]
    path = npz(tmp_path / "d.npz", x=data)
    refused(lambda: readers.read_npz(path, ["x"]), str(path), *parts)


def test_a_claim_that_cannot_be_packed_costs_no_memory(tmp_path):
    """The zip's own directory claims a gigabyte, and the array's header the same."""
    size = 1 << 30
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header((size,)) + bytes(1000))
        told = archive.infolist()[0]
        told.file_size = len(header((size,))) + size
    tracemalloc.start()
    try:
        refused(lambda: readers.read_npz(path, ["x"]), "d.npz", "'x'", "1,073,741,", "cannot be packed into")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_arrays_packed_otherwise_too_many_or_strangely_named_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x.npy", header((1,)) + b"1")
    refused(lambda: readers.read_npz(path, ["x"]), "d.npz", "packed in a way", "savez_compressed")
    for name, shown in {"\x1b[2J": "'\\x1b[2J'", "a" * 101: "'aaaa", "two\nlines": "'two\\nlines'"}.items():
        npz(path, **{name: header((1,)) + b"1"})
        refused(lambda: readers.npz_names(path), "d.npz", shown, "save again")
    monkeypatch.setattr(readers, "MOST_ARRAYS", 2)
    one = header((1,)) + b"1"
    assert readers.npz_names(npz(path, a=one, b=one)) == ["a", "b"]
    refused(lambda: readers.npz_names(npz(path, a=one, b=one, c=one)), "d.npz", "3 arrays, at most 2", "np.stack")
    refused(lambda: readers.read_npz(npz(path, a=one), ["b"]), "d.npz", "no array 'b'")


def test_the_limit_holds_for_all_arrays_together(tmp_path, monkeypatch):
    np.savez(tmp_path / "d.npz", x=np.zeros(500, np.uint8), y=np.zeros(500, np.uint8))
    monkeypatch.setattr(readers, "LIMIT", 1000)
    assert len(readers.read_npz(tmp_path / "d.npz", ["x"])) == 1
    refused(lambda: readers.read_npz(tmp_path / "d.npz", ["x", "y"]), "'x', 'y' hold 1,256 bytes, at most 1,000")


def test_records_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros(2, [("a", "<i4"), ("b", "<f8")]))
    refused(lambda: readers.read_npz(tmp_path / "d.npz", ["x"]), "records", "expected numbers")


def test_an_array_beyond_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LIMIT", 1000)
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((2, 500), np.uint8))
    refused(lambda: readers.read_npz(tmp_path / "d.npz", ["x"]), "d.npz", "'x'", "at most 1,000")


def test_damaged_zips_are_refused(tmp_path):
    np.savez(tmp_path / "good.npz", x=np.arange(1000))
    data = (tmp_path / "good.npz").read_bytes()
    flipped = bytearray(data)
    flipped[3000] ^= 0xFF
    for name, content in {"half": data[: len(data) // 2], "text": b"hello", "empty": b"", "flipped": flipped}.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        refused(
            lambda path=path: readers.read_npz(path, readers.npz_names(path)), str(path), "not a readable .npz", "save"
        )
    refused(lambda: readers.npz_names(tmp_path / "gone.npz"), "gone.npz", "check the path")


# --- pixels and labels ---


BYTES = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 6), dtype=np.uint8)  # (N, C, H, W)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (BYTES, BYTES),
        (BYTES.transpose(0, 2, 3, 1), BYTES),
        (BYTES[:, :1], BYTES[:, :1]),
        (BYTES[:, 0, :, :, None], BYTES[:, :1]),
        (BYTES[:, 0], BYTES[:, :1]),
        (BYTES[:, 0, :4], BYTES[:, :1, :4]),
        (BYTES[:, 0].reshape(5, 36), BYTES[:, :1]),
    ],
    ids=["NCHW", "NHWC", "N1HW", "NHW1", "NHW", "NHW oblong", "ND"],
)
def test_layouts(given, expected):
    pixels, note = readers.as_images(given, "x")
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and note is None
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
def test_bytes_divided_by_255_come_back(kind):
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    pixels, note = readers.as_images((every / 255).astype(kind), "x")
    np.testing.assert_array_equal(pixels[:, 0], every)
    assert note is not None and ("rounded" if kind is np.float16 else "were multiples of 1/255") in note


def test_other_floats_are_rounded_and_said_to_be(monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 8)  # several blocks
    given = np.random.default_rng(0).random((7, 2, 2))
    pixels, note = readers.as_images(given, "x")
    assert np.abs(pixels[:, 0] / 255 - given).max() <= 0.5 / 255 + 1e-12
    assert note == "float images in [0, 1] were rounded to 256 levels"


def test_booleans_are_black_and_white():
    pixels, note = readers.as_images(np.array([[[True, False]]]), "x")
    assert pixels.tolist() == [[[[255, 0]]]] and note is not None and "boolean" in note


def spoilt(value: float) -> np.ndarray:
    array = np.full((4, 2, 2), 0.5)
    array[2, 1, 0] = value
    return array


BAD_IMAGES = {
    "none": (np.zeros((0, 28, 28), np.uint8), ["no images", "(0, 28, 28)"]),
    "no pixels": (np.zeros((3, 0, 28), np.uint8), ["no images"]),
    "rank 0": (np.array(7, np.uint8), ["shape ()", "reshape"]),
    "rank 1": (np.zeros(784, np.uint8), ["shape (784,)", "reshape"]),
    "rank 5": (np.zeros((1, 1, 1, 2, 2), np.uint8), ["shape (1, 1, 1, 2, 2)", "reshape"]),
    "no square": (np.zeros((10, 560), np.uint8), ["10 rows of 560 pixels", "reshape them to (N, H, W)"]),
    "four channels": (np.zeros((2, 8, 8, 4), np.uint8), ["(2, 8, 8, 4)", "C 1 (grey) or 3"]),
    "either layout": (np.zeros((2, 3, 8, 3), np.uint8), ["reads both as"]),
    "NaN": (spoilt(np.nan), ["NaN or infinity in image 2", "mend"]),
    "inf": (spoilt(np.inf), ["NaN or infinity in image 2"]),
    "minus inf": (spoilt(-np.inf), ["NaN or infinity in image 2"]),
    "floats to 255": (np.full((2, 2, 2), 255.0), ["from 255 to 255", "divide by 255"]),
    "floats to -1": (spoilt(-1), ["from -1 to 0.5", "(x + 1) / 2"]),
    "integers": (np.zeros((2, 2, 2), np.int64), ["int64", "astype('uint8')"]),
    "signed bytes": (np.zeros((2, 2, 2), np.int8), ["int8", "uint8 (0 to 255)"]),
    "complex": (np.zeros((2, 2, 2), complex), ["complex128"]),
    "text": (np.full((2, 2, 2), "a"), ["<U1"]),
    "dates": (np.zeros((2, 2, 2), "datetime64[s]"), ["datetime64[s]"]),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(case):
    array, parts = BAD_IMAGES[case]
    refused(lambda: readers.as_images(array, "my.npz: array 'x'"), "my.npz: array 'x'", *parts)


def test_bad_pixels_in_a_later_block_name_the_right_image(monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 4)
    refused(lambda: readers.as_images(spoilt(np.nan), "x"), "image 2")
    refused(lambda: readers.as_images(spoilt(1.5), "x"), "to 1.5")


@pytest.mark.parametrize(
    "given", [np.array([3, 0, 2], np.uint8), np.array([[3], [0], [2]]), np.array([3, 0, 2], ">i2")]
)
def test_labels_become_int64(given):
    labels = readers.as_labels(given, 3, "y")
    assert labels.dtype == np.int64 and labels.tolist() == [3, 0, 2]


BAD_LABELS = {
    "too few": (np.zeros(2, int), ["2 labels for 3 images", "one per image"]),
    "too many": (np.zeros(4, int), ["4 labels for 3 images"]),
    "one-hot": (np.eye(3, dtype=int), ["(3, 3)", "argmax(1)"]),
    "floats": (np.zeros(3), ["float64", "number the classes"]),
    "text": (np.array(["a", "b", "c"]), ["<U1", "return_inverse"]),
    "negative": (np.array([0, -1, 1]), ["from -1 to 1", "integers from 0"]),
    "beyond int64": (np.array([0, 1, 1 << 63], np.uint64), ["9223372036854775808"]),
    "scalar": (np.array(1), ["shape ()"]),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_refused(case):
    array, parts = BAD_LABELS[case]
    refused(lambda: readers.as_labels(array, 3, "my.npz: array 'y'"), "my.npz: array 'y'", *parts)


# --- pictures ---


def picture(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def test_grey_pictures(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    paths = [picture(tmp_path / name, grey) for name in ("a.png", "b.bmp", "c.pgm", "d.tif")]
    pixels = readers.read_images(paths)
    assert pixels.shape == (4, 1, 3, 4) and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, np.broadcast_to(grey, (4, 1, 3, 4)))


def test_colour_pictures_and_grey_ones_among_them(tmp_path):
    colour = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    grey = np.full((3, 4), 7, np.uint8)
    opaque = np.dstack([colour, np.full((3, 4), 255, np.uint8)])
    paths = [
        picture(tmp_path / "a.png", grey),
        picture(tmp_path / "b.png", colour),
        picture(tmp_path / "c.png", opaque),
    ]
    pixels = readers.read_images(paths)
    np.testing.assert_array_equal(pixels[0], np.full((3, 3, 4), 7))
    np.testing.assert_array_equal(pixels[1], colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(pixels[2], colour.transpose(2, 0, 1))


def test_a_palette_is_looked_up(tmp_path):
    colour = np.zeros((2, 2, 3), np.uint8)
    colour[0, 0] = (255, 0, 0)
    path = tmp_path / "p.png"
    Image.fromarray(colour).quantize(2).save(path)
    np.testing.assert_array_equal(readers.read_images([path])[0], colour.transpose(2, 0, 1))


def good_and(tmp_path: Path, name: str) -> tuple[Path, Path]:
    return picture(tmp_path / "0-good.png", np.zeros((8, 8), np.uint8)), tmp_path / name


def test_an_unreadable_picture_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    whole = picture(tmp_path / "whole.png", noise).read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 0xFF
    contents = {
        "text": b"hello",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "header": whole[:20],
        "flipped": flipped,
    }
    for name, content in contents.items():
        good, bad = good_and(tmp_path, f"{name}.png")
        bad.write_bytes(content)
        refused(
            lambda paths=(good, bad): readers.read_images(paths), str(bad), "not a readable image", "replace or remove"
        )
    refused(lambda: readers.read_images([tmp_path / "gone.png"]), "gone.png", "not a readable image")


@pytest.mark.parametrize("limit", [40, 60])  # Pillow raises beyond twice its limit, and only warns beyond it
def test_a_decompression_bomb_is_an_error(tmp_path, monkeypatch, limit):
    path = picture(tmp_path / "large.png", np.zeros((10, 10), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    refused(lambda: readers.read_images([path]), str(path), "too many pixels", "smaller")


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file of grey pixels that claims a size, with this data."""
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", data or zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    size = struct.pack(">I", len(data) if length is None else length)
    return size + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_real_bomb_is_refused_from_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(60000, 60000))
    refused(lambda: readers.read_images([tmp_path / "bomb.png"]), "bomb.png", "too many pixels")


def test_a_claim_within_the_limit_of_pillow_costs_no_memory(tmp_path):
    """81 million pixels in 74 bytes; and a chunk that claims two gigabytes, of which Pillow asks for the rest."""
    (tmp_path / "bomb.png").write_bytes(png(9000, 9000))
    pixels = zlib.compress(bytes(72))
    whole = png(8, 8, pixels)
    (tmp_path / "chunk.png").write_bytes(whole[:33] + chunk(b"IDAT", pixels, length=(1 << 31) - 1) + bytes(70_000))
    tracemalloc.start()
    try:
        refused(
            lambda: readers.read_images([tmp_path / "bomb.png"]), "bomb.png", "claims 9000 x 9000 pixels in 74 bytes"
        )
        assert readers.read_images([tmp_path / "chunk.png"]).shape == (1, 1, 8, 8)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    (tmp_path / "whole.png").write_bytes(whole)
    assert readers.read_images([tmp_path / "whole.png"]).shape == (1, 1, 8, 8)


def test_a_pipe_or_a_huge_file_is_no_picture(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for somebody who writes
    refused(lambda: readers.read_images([tmp_path / "pipe.png"]), "pipe.png", "not a file", "remove")
    monkeypatch.setattr(readers, "LARGEST", 100)
    picture(tmp_path / "x.png", np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8))
    refused(lambda: readers.read_images([tmp_path / "x.png"]), "x.png", "at most 100", "smaller")


def test_other_formats_than_those_named_are_not_opened(tmp_path):
    for kind in ("PCX", "TGA", "ICNS", "PDF"):
        path = tmp_path / f"{kind}.png"
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path, kind)
        refused(lambda path=path: readers.read_images([path]), path.name, "not a readable image")


def test_another_size_is_told_with_both_paths(tmp_path):
    good, bad = good_and(tmp_path, "bad.png")
    picture(bad, np.zeros((9, 7), np.uint8))
    refused(lambda: readers.read_images([good, bad]), f"{bad}: 7 x 9", f"{good} is 8 x 8", "crop or resize")


def test_pictures_that_are_not_plain_are_refused(tmp_path):
    good, _ = good_and(tmp_path, "")
    deep = picture(tmp_path / "deep.png", np.zeros((8, 8), np.uint16))
    refused(lambda: readers.read_images([good, deep]), str(deep), "pixel mode I;16", "convert it")
    moving = tmp_path / "moving.gif"
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (0, 99)]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    refused(lambda: readers.read_images([good, moving]), str(moving), "2 frames", "convert it")
    clear = picture(tmp_path / "clear.png", np.full((8, 8, 4), 9, np.uint8))
    refused(lambda: readers.read_images([good, clear]), str(clear), "see-through", "background")


def test_too_many_pictures_for_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LIMIT", 100)
    good, _ = good_and(tmp_path, "")
    assert readers.read_images([good]).shape == (1, 1, 8, 8)
    refused(lambda: readers.read_images([good, good]), str(tmp_path), "more than 100 bytes", "smaller")


def test_image_paths_are_ordered_deep_and_visible(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.png", ".hidden.png", ".git/x.png", "b/notes.txt", "b/c/d.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in readers.image_paths(tmp_path)]
    assert found == ["a.png", "b/1.jpg", "b/2.PNG", "b/c/d.webp"]


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    refused(lambda: readers.image_paths(tmp_path), str(tmp_path), "no image", ".png", "add some")


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path):
    refused(lambda: readers.image_paths(tmp_path / "gone"), "gone", "cannot be listed")
