"""Weights on disk: safetensors, with every claim of the header checked before anything is believed.

A safetensors file is eight bytes that give the length n of a header (little-endian), n bytes of JSON, and the numbers
of all tensors, one after the other. The header says for each tensor its name, its dtype, its shape, and where its numbers
begin and end, counted from the end of the header. Nothing in it can be run, which is why it is used here; a pickle
(what `torch.save` writes) is a program.

It can still lie. So before the library's own reader sees a file, `header` checks that

    n           is no more than the file and `HEADER_LIMIT` hold
    the JSON    keeps the rules of `vaelab.strict_json`, and has no field besides those of the format
    a dtype     is one of `DTYPES`
    a shape     has as many numbers as there are bytes between the tensor's offsets
    offsets     follow one another without a gap and without an overlap, from 0 to the end of the file

and for all else there is a `RunError` that names the file. What is read then takes the memory that the file has bytes.

Tensors that share memory (a model that uses one matrix twice) are kept once by `save_model`, and `load_model` puts them
back; `save_weights` refuses them, since a dictionary of tensors does not say what is shared.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaelab import strict_json
from vaelab.errors import RunError, UsageError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

HEADER_LIMIT = 16 << 20
"""Bytes of the header's JSON: 100,000 tensors and more."""
LONGEST_NAME = 1000
MOST_AXES = 16
DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "I16": ("int16", 2), "I32": ("int32", 4),
    "I64": ("int64", 8), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8),
}  # fmt: skip
"""The dtypes that are read and written: torch's name, and the bytes of one number."""

_ADVICE = "copy the run again, or train it again"


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor: its dtype, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, every claim of its header checked. Takes memory for the header alone.

    Raises:
        RunError: missing, unreadable, not safetensors, or a header whose claims differ from the file.
    """
    try:
        if not path.is_file():
            raise RunError(f"'{path}' cannot be read: it is missing, or is not a file; {_ADVICE}")
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise RunError(
                    f"'{path}' is not a whole safetensors file: its header claims {length:,} bytes, and the file has "
                    f"{max(size - 8, 0):,} after its first eight (at most {HEADER_LIMIT:,} are read); {_ADVICE}"
                )
            data = file.read(length)
    except OSError as error:
        raise RunError(f"'{path}' cannot be read: {error.strerror or error}; check the path and its rights") from None
    document = strict_json.parse(data, path)
    if not isinstance(document, dict):
        raise _damaged(path, f"its header is a {type(document).__name__}, not an object")
    metadata = document.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise _damaged(path, "its metadata are not text")
    found = {name: _entry(path, name, value) for name, value in document.items()}
    at = 0
    for name, entry in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise _damaged(path, f"'{name}' begins at byte {entry.begin:,}, where {at:,} was expected")
        at = entry.end
    if at != size - 8 - length:
        raise _damaged(path, f"its tensors take {at:,} bytes, and {size - 8 - length:,} are there")
    return found


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not _is_name(name):
        raise _damaged(path, f"a tensor's name is {name[:40]!a} ({len(name):,} characters)")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"'{name}' is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"'{name}' has the dtype {ascii(dtype)[:40]}, expected one of {', '.join(DTYPES)}")
    if not (_counts(shape) and len(shape) <= MOST_AXES):
        raise _damaged(path, f"'{name}' has the shape {ascii(shape)[:40]}, expected at most {MOST_AXES} sizes")
    if not (_counts(offsets) and len(offsets) == 2):
        raise _damaged(path, f"'{name}' has the offsets {ascii(offsets)[:40]}, expected two counts of bytes")
    entry = Entry(dtype, tuple(shape), *offsets)
    if entry.numbers * DTYPES[dtype][1] != entry.end - entry.begin:
        raise _damaged(
            path, f"'{name}' claims {entry.numbers:,} numbers of {dtype} in {entry.end - entry.begin:,} bytes"
        )
    return entry


def _is_name(name: str) -> bool:
    return name.isprintable() and 0 < len(name) <= LONGEST_NAME


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def numbers(path: Path) -> int:
    """How many numbers a file holds, from its checked header: what a model built for it may take."""
    return sum(entry.numbers for entry in header(path).values())


def load_weights(path: Path) -> "dict[str, Tensor]":
    """The tensors of a file by name. Raises RunError, see `header`."""
    import safetensors.torch
    from safetensors import SafetensorError

    header(path)
    try:
        return safetensors.torch.load_file(str(path))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(path, one_line(error)) from None


def save_weights(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write tensors by name. The caller names a temporary path and renames it, see `vaelab.run.replacing`.

    Raises:
        UsageError: tensors that share memory, a dtype that is not read here, or a name that is none.
    """
    import safetensors.torch

    written = {f"torch.{name}" for name, _ in DTYPES.values()}
    for name, tensor in tensors.items():
        if not _is_name(name) or name == "__metadata__":
            raise UsageError(f"a tensor cannot be named {name[:40]!a}: choose letters, digits and dots")
        if str(tensor.dtype) not in written:
            raise UsageError(f"'{name}' is {tensor.dtype}, expected one of {', '.join(sorted(written))}: convert it")
    try:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"these tensors cannot be written: {one_line(error)}") from None


def save_model(path: Path, model: "nn.Module") -> None:
    """Write a model's parameters and buffers, those that share memory once. The caller renames, as for `save_weights`.

    Raises:
        OSError: the file cannot be written.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        safetensors.torch.save_model(model, str(path))
    except SafetensorError as error:  # which hides the system's own
        raise OSError(one_line(error)) from None


def load_model(path: Path, model: "nn.Module") -> None:
    """Put a file's weights into a model that was built for them, in place.

    Raises:
        RunError: see `header`; or the file holds other names, shapes or dtypes than the model.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    found, own = header(path), model.state_dict()
    for name, entry in found.items():
        if name not in own:
            raise _misfit(path, f"it holds '{name}', which the model does not have")
        there, here = (DTYPES[entry.dtype][0], entry.shape), (str(own[name].dtype)[6:], tuple(own[name].shape))
        if there != here:
            raise _misfit(path, f"'{name}' is {there[0]} {there[1]}, and {here[0]} {here[1]} in the model")
    try:
        safetensors.torch.load_model(model, str(path))
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise _misfit(path, one_line(error)) from None


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(f"'{path}' is damaged: {reason}; {_ADVICE}")


def _misfit(path: Path, reason: str) -> RunError:
    return RunError(f"'{path}' does not hold this run's model: {reason}; {_ADVICE}")
