"""Bytes and files into arrays: IDX, .npz, folders of images. No network, no torch.

A data file is somebody else's bytes, so nothing in it is believed. The rule throughout: read the header, work out how
many bytes it claims, compare with the bytes that are there, and only then allocate. A header of sixteen bytes can claim
10^18 pixels, and a gzip file of one megabyte can hold a thousand; both are refused for the price of reading the header,
or of the limit. Where the bytes are packed, the claim is compared with the most that so many bytes can hold: deflate makes
at most 1,032 of one (`DEFLATE`), and a picture that claims more than `PACKED` pixels a byte is not decoded.

Nothing is run. A pickle inside an .npz is a program: it is never loaded (`allow_pickle=False`, and arrays of objects are
refused from their header). A picture is opened as one of `FORMATS`, whatever its name says: Pillow would give an
EPS file, which is a program in PostScript, to Ghostscript.

The formats
    IDX     the format of MNIST (LeCun, Cortes and Burges 1998): two zero bytes, a type code, the rank, the sizes as
            big-endian 32-bit integers, then the values, last index fastest. Here: unsigned bytes only, gzip or plain.
    .npz    a zip of arrays (numpy.lib.format); images as bytes, as floats in [0, 1] or as booleans.
    images  BMP, GIF, JPEG, PNG, PPM, TIFF and WebP, 8-bit grey or RGB, all of one size.

Every failure is a `DataError`: what was given, what was expected, what to do.
Shapes: N images, C channels (1 grey, 3 RGB), H rows, W columns.
"""

import gzip
import io
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vaelab.errors import DataError, one_line

LIMIT = 8 << 30  # bytes of decompressed data that one file may hold
MOST_ARRAYS = 1000  # in one .npz
DEFLATE = 1032  # bytes that one byte of deflate or gzip can hold at most
PACKED = 4096  # bytes of pixels that one byte of a picture is believed to hold, beyond `SMALL`
SMALL = 16 << 20  # bytes of pixels of a picture that are decoded whatever its file's size
EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
LARGEST = 256 << 20  # bytes of a picture's file
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names

_CHUNK = 1 << 20
_NPY_HEADER = (
    1000  # bytes: numpy writes 118 for numbers, and reads more with a parser of Python, which nesting can crash
)
_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK"})


# --- IDX ---


def read_bytes(path: Path, limit: int = LIMIT) -> bytearray:
    """The content of a file, decompressed when it is gzip (told from its first two bytes, not from its name).

    Args:
        path: the file.
        limit: refuse more decompressed bytes than this; no more than `limit` + 1 MiB is ever held.

    Raises:
        DataError: unreadable, damaged or truncated gzip, or more than `limit` bytes.
    """
    data = bytearray()
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if packed else file
            while chunk := stream.read(_CHUNK):
                data += chunk
                if len(data) > limit:
                    raise DataError(
                        f"{path}: holds more than {limit:,} bytes, the most expected here; not read further"
                    )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged or truncated gzip ({error}); fetch or copy the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from error
    return data


def parse_idx(data: bytes | bytearray, rank: int, what: str | Path) -> np.ndarray:
    """An IDX file of unsigned bytes, as a writable uint8 array of `rank` dimensions.

    Args:
        data: the decompressed bytes. A bytearray is shared with the result, bytes are copied.
        rank: 3 for images (N, H, W), 1 for labels (N,).
        what: the name that error messages give it.

    Raises:
        DataError: not IDX, another value type, another rank, or sizes that differ from the bytes present.
    """
    start = 4 + 4 * rank
    if len(data) < 4 or data[0] or data[1]:
        raise DataError(
            f"{what}: not an IDX file: starts with {bytes(data[:4]).hex(' ') or 'nothing'}, expected 00 00 08 0{rank}; "
            "give the published IDX file, plain or gzip"
        )
    if data[2] != 0x08:
        raise DataError(
            f"{what}: IDX values of type 0x{data[2]:02x}, expected unsigned bytes (0x08); convert them, or save an .npz"
        )
    if data[3] != rank:
        raise DataError(
            f"{what}: IDX of rank {data[3]}, expected rank {rank} ({'labels' if rank == 1 else 'images'}); "
            "are the images and the labels swapped?"
        )
    if len(data) < start:
        raise DataError(
            f"{what}: IDX header of {len(data)} bytes, expected {start}; the file is cut short, copy it again"
        )
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if math.prod(shape) != len(data) - start:  # Python integers: no overflow, and nothing allocated yet
        raise DataError(
            f"{what}: the IDX header claims {' x '.join(map(str, shape))} = {math.prod(shape):,} bytes, "
            f"{len(data) - start:,} are there; the file is damaged, copy or fetch it again"
        )
    if math.prod(max(size, 1) for size in shape) >= 1 << 63:  # no pixels, but sizes that no array can have
        raise DataError(
            f"{what}: the IDX header claims {' x '.join(map(str, shape))}; the file is damaged, copy it again"
        )
    array = np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    return array if array.flags.writeable else array.copy()


def read_idx(path: Path, rank: int, limit: int = LIMIT) -> np.ndarray:
    """`parse_idx` of a file, plain or gzip. Raises DataError as `read_bytes` and `parse_idx` do."""
    return parse_idx(read_bytes(path, limit), rank, path)


# --- .npz ---


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in an .npz, without reading them. Raises DataError when it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:  # zipfile raises half a dozen unrelated classes on hostile bytes
        raise _bad_npz(path, error) from error
    if len(names) > MOST_ARRAYS:
        raise DataError(
            f"{path}: holds {len(names):,} arrays, at most {MOST_ARRAYS:,} are expected: np.stack the images"
        )
    if strange := [name for name in names if not name.isprintable() or len(name) > 100]:
        raise DataError(f"{path}: an array is named {strange[0][:40]!a}; name it with letters, and save again")
    return names


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz. Nothing is unpickled.

    Raises:
        DataError: not an .npz, a name that is not there, an object or structured array, a header that claims another
            size than the bytes present, more than `LIMIT` bytes in all, or a failed CRC.
    """
    arrays: dict[str, np.ndarray] = {}
    wanted = list(names)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if absent := [name for name in wanted if name not in members]:
                raise DataError(f"{path}: has no array '{absent[0]}'; expected {', '.join(wanted)}: save it again")
            total = sum(members[name].file_size for name in wanted)
            if total > LIMIT:
                shown = ", ".join(f"'{name}'" for name in wanted)
                raise DataError(f"{path}: {shown} hold {total:,} bytes, at most {LIMIT:,} are read; store bytes")
            for name in wanted:
                _check_member(path, name, archive, members[name])
                with archive.open(members[name]) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False, max_header_size=_NPY_HEADER)
    except DataError:
        raise
    except Exception as error:
        raise _bad_npz(path, error) from error
    return arrays


def _check_member(path: Path, name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{path}: array '{name}' is packed in a way that numpy.savez_compressed does not; use that")
    packed = min(info.compress_size, path.stat().st_size)
    if info.file_size > packed * (DEFLATE if info.compress_type else 1) + 64:
        raise DataError(
            f"{path}: array '{name}' claims {info.file_size:,} bytes, which cannot be packed into {packed:,}; the file is "
            "damaged, save it again"
        )
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream, max_header_size=_NPY_HEADER)
        offset = stream.tell()
    if dtype.hasobject or dtype.names or dtype.subdtype or not dtype.itemsize:
        raise DataError(
            f"{path}: array '{name}' holds Python objects or records (dtype {str(dtype)[:60]}), which are never loaded; "
            "expected numbers: save np.stack(images).astype('uint8')"
        )
    if math.prod(shape) * dtype.itemsize != info.file_size - offset or min(shape, default=0) < 0:
        raise DataError(
            f"{path}: array '{name}' claims shape {shape} of {dtype}, {math.prod(shape) * dtype.itemsize:,} bytes, but "
            f"{info.file_size - offset:,} are there; the file is damaged, save it again"
        )


def _bad_npz(path: Path, error: Exception) -> DataError:
    if isinstance(error, OSError):
        return DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights")
    return DataError(
        f"{path}: not a readable .npz ({type(error).__name__}: {one_line(error, 200)}); "
        "expected what numpy.savez or savez_compressed writes: save it again"
    )


def as_images(array: np.ndarray, what: str) -> tuple[np.ndarray, str | None]:
    """Images in any accepted layout and value type, as bytes.

    Args:
        array: (N, H, W), (N, H, W, C), (N, C, H, W) with C 1 or 3, or (N, D) with D a perfect square; uint8, bool, or
            floats in [0, 1].
        what: the name that error messages give it.

    Returns:
        uint8 (N, C, H, W), contiguous; and what was done to the values, if anything was.

    Raises:
        DataError: another shape, another type, NaN or infinity, values outside [0, 1], no images.
    """
    shaped = _as_nchw(array, what)
    if shaped.dtype == np.uint8:
        return np.ascontiguousarray(shaped), None
    if shaped.dtype == np.bool_:
        return np.ascontiguousarray(shaped * np.uint8(255)), "boolean images were stored as 0 and 255"
    if shaped.dtype.kind != "f":
        raise DataError(
            f"{what}: images of type {shaped.dtype}, expected uint8 (0 to 255), bool, or floats in [0, 1]; "
            "convert them: images.astype('uint8')"
        )
    pixels = np.empty(shaped.shape, np.uint8)
    worst = 0.0
    step = max(1, _CHUNK // math.prod(shaped.shape[1:]))  # in blocks: a float64 copy would be 8 times the result
    for i in range(0, len(shaped), step):
        block = shaped[i : i + step].astype(np.float64)
        if not np.isfinite(block).all():
            bad = i + int(np.flatnonzero(~np.isfinite(block).all(axis=(1, 2, 3)))[0])
            raise DataError(f"{what}: NaN or infinity in image {bad}; expected numbers in [0, 1]: remove or mend it")
        if block.min() < -1e-6 or block.max() > 1 + 1e-6:
            raise DataError(
                f"{what}: float images from {block.min():g} to {block.max():g}, expected [0, 1]; "
                "divide by 255, or map [-1, 1] with (x + 1) / 2, or save uint8"
            )
        levels = np.rint(block * 255)
        worst = max(worst, float(np.abs(block * 255 - levels).max()))
        pixels[i : i + step] = np.clip(levels, 0, 255)
    if worst < 1e-3:  # bytes that somebody divided by 255 in float32 come back exactly
        return pixels, "float images in [0, 1] were multiples of 1/255, and were stored as those bytes"
    return pixels, "float images in [0, 1] were rounded to 256 levels"


def _as_nchw(array: np.ndarray, what: str) -> np.ndarray:
    shape = array.shape
    if array.size == 0:
        raise DataError(f"{what}: no images (shape {shape}); expected at least one image of at least one pixel")
    if array.ndim == 2:
        side = math.isqrt(shape[1])
        if side * side != shape[1]:
            raise DataError(
                f"{what}: {shape[0]} rows of {shape[1]} pixels, which is no square image; "
                "reshape them to (N, H, W) or (N, C, H, W) and save again"
            )
        return array.reshape(shape[0], 1, side, side)
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and last:
            raise DataError(
                f"{what}: shape {shape} reads both as (N, C, H, W) and as (N, H, W, C); make W wider than 3"
            )
        if first:
            return array
        if last:
            return array.transpose(0, 3, 1, 2)
    raise DataError(
        f"{what}: images of shape {shape}, expected (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 (grey) or 3 "
        "(RGB), or (N, D) with D a perfect square; reshape them and save again"
    )


def as_labels(array: np.ndarray, count: int, what: str) -> np.ndarray:
    """Class labels as int64 (N,), none negative. (N, 1) is accepted.

    Raises:
        DataError: another type or shape, a length that is not `count`, or a negative label.
    """
    flat = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.ndim != 1:
        raise DataError(
            f"{what}: labels of shape {array.shape}, expected ({count},): one class number per image; "
            "for one-hot rows save labels.argmax(1)"
        )
    if flat.dtype.kind not in "iu":
        raise DataError(
            f"{what}: labels of type {flat.dtype}, expected integers from 0; number the classes: "
            "np.unique(labels, return_inverse=True)[1]"
        )
    if len(flat) != count:
        raise DataError(
            f"{what}: {len(flat):,} labels for {count:,} images; expected one per image: save them together"
        )
    if len(flat) and (flat.min() < 0 or flat.max() > np.iinfo(np.int64).max):
        raise DataError(
            f"{what}: labels from {flat.min()} to {flat.max()}, expected integers from 0; number the classes"
        )
    return flat.astype(np.int64)


# --- images in folders ---


def image_paths(folder: Path) -> list[Path]:
    """The image files under a folder, at any depth, in one order on every system; hidden ones are left out.

    Raises:
        DataError: there is none.
    """
    found = []
    for root, folders, files in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if is_image(name)]
    if not found:
        raise DataError(
            f"{folder}: no image in this folder; expected files ending in {', '.join(sorted(EXTENSIONS))}: "
            "add some, or remove the folder"
        )
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _cannot_list(error: OSError) -> None:  # os.walk passes over such folders without a word
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); mend its rights, or remove it") from error


def is_image(name: str) -> bool:
    """Whether a file name is one that a folder of images is expected to hold."""
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


def read_images(paths: Sequence[Path]) -> np.ndarray:
    """Image files of one size, as uint8 (N, C, H, W): C is 1 when all are grey, else 3 (grey ones are repeated).

    Headers are read first, so that a stray size is told before anything is decoded.

    Raises:
        DataError: with the path of the image that cannot be read, is too large (Pillow's decompression-bomb limit),
            has another size than the first, moves, is not 8-bit grey or RGB, or is see-through.
    """
    from PIL import Image  # 30 ms: only where images are read

    colour = False
    size: tuple[int, int] = (0, 0)
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow finds odd in metadata does not concern the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                with Image.open(_content(path), formats=FORMATS) as image:
                    mode, here = image.mode, image.size
                    _check_claim(path, here, len(image.getbands()))
                    frames = getattr(image, "n_frames", 1)
            except DataError:
                raise
            except Exception as error:  # each format's plug-in raises its own classes
                raise _unreadable(path, error) from error
        size = size if size != (0, 0) else here
        if here != size:
            raise DataError(
                f"{path}: {here[0]} x {here[1]} pixels, but {paths[0]} is {size[0]} x {size[1]}; the images of one "
                "data set must have one size: crop or resize them first (Pillow: image.resize((width, height)))"
            )
        if mode not in _GREY_MODES | _COLOUR_MODES or frames > 1:
            given = f"{frames} frames" if frames > 1 else f"pixel mode {mode}"
            raise DataError(f"{path}: {given}; expected one 8-bit grey or RGB picture: convert it first")
        colour = colour or mode in _COLOUR_MODES
    channels = 3 if colour else 1
    if len(paths) * channels * math.prod(size) > LIMIT:
        raise DataError(
            f"{paths[0].parent}: {len(paths):,} images of {size[0]} x {size[1]} pixels need more than {LIMIT:,} bytes; "
            "make them smaller"
        )
    pixels = np.empty((len(paths), size[1], size[0], channels), np.uint8)
    for i, path in enumerate(paths):
        pixels[i] = _decode(path, "RGB" if colour else "L").reshape(pixels.shape[1:])
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _content(path: Path) -> io.BytesIO:
    """A picture's bytes in memory: where a chunk claims gigabytes, a read from a file asks for them, and one from here not."""
    if not path.is_file():  # a pipe under the name of a file would be waited for
        raise DataError(f"{path}: not a readable image (missing, or not a file); replace or remove it")
    if (size := path.stat().st_size) > LARGEST:
        raise DataError(f"{path}: a picture of {size:,} bytes, at most {LARGEST:,} are read; make it smaller")
    return io.BytesIO(path.read_bytes())


def _check_claim(path: Path, size: tuple[int, int], bands: int) -> None:
    claimed, there = math.prod(size) * bands, path.stat().st_size
    if claimed > max(SMALL, PACKED * there):
        raise DataError(
            f"{path}: claims {size[0]} x {size[1]} pixels in {there:,} bytes, too many pixels to be opened safely; save it "
            "again as PNG, or make it smaller"
        )


def _decode(path: Path, mode: str) -> np.ndarray:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(_content(path), formats=FORMATS) as image:
                alpha = image.mode in {"LA", "PA", "RGBA"} or "transparency" in image.info
                alpha = alpha and image.convert("RGBA").getchannel("A").getextrema()[0] != 255
                pixels = np.asarray(image.convert(mode))
        except DataError:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error
    if alpha:
        raise DataError(f"{path}: parts of it are see-through; expected grey or RGB: lay it on a background first")
    return pixels


def _unreadable(path: Path, error: Exception) -> DataError:
    if type(error).__name__.startswith("DecompressionBomb"):
        return DataError(
            f"{path}: too many pixels to be opened safely ({one_line(error, 200)}); make the image smaller"
        )
    return DataError(
        f"{path}: not a readable image ({type(error).__name__}: {one_line(error, 200)}); replace or remove it"
    )
