"""JSON that somebody else wrote: one sentence where it is not what it should be, and no surprise later.

The standard reader takes more than the standard (RFC 8259) and more than a program can bear: NaN and Infinity, numbers
that become infinite, a key twice (the last one wins, so that two readers see two documents), integers of any length,
brackets nested until the interpreter gives up, halves of surrogate pairs that fail when they are printed, and control
characters that make a terminal do things when they are. Here each of them is a `RunError`:

    size        at most `LIMIT` bytes (metrics.jsonl: `LINES_LIMIT`), looked at before anything is read
    depth       at most `DEPTH` brackets within brackets; a recipe needs nine
    integers    at most `DIGITS` digits
    numbers     finite
    keys        each once
    text        UTF-8, without control characters but for tab, line feed and carriage return

`text_of` writes, and holds what it writes to the same rules: what was written can be read.
"""

import json
import math
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from vaelab.errors import RunError, UsageError

LIMIT = 16 << 20
"""Bytes of one document."""
LINES_LIMIT = 256 << 20
"""Bytes of one file of records, a line each."""
DEPTH = 64
DIGITS = 40

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_ADVICE = "restore it from a copy, or make it again"


class _Refused(ValueError):
    """What is wrong with a document; never leaves this module."""


def parse(data: bytes | bytearray, what: str | Path) -> Any:
    """The value of a JSON document.

    Args:
        data: its bytes.
        what: the name that error messages give it.

    Raises:
        RunError: not JSON, or JSON that breaks one of the rules above.
    """
    try:
        return _value(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"'{what}' is damaged: {_reason(error)}; {_ADVICE}") from None


def read(path: Path, limit: int = LIMIT) -> Any:
    """`parse` of a file of at most `limit` bytes. Raises RunError, also where it is missing or too large."""
    return parse(read_bytes(path, limit), path)


def read_lines(path: Path, limit: int = LINES_LIMIT) -> list[dict[str, Any]]:
    """The records of a file that grows by a line at a time, each an object.

    A last line without its end was cut off while it was written, and is left out.

    Raises:
        RunError: the file is missing or too large; a line that is not an object in JSON.
    """
    records = []
    for number, line in enumerate(read_bytes(path, limit).split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            record = _value(line)
            if not isinstance(record, dict):
                raise _Refused(f"a value of type {type(record).__name__} where an object was expected")
        except (ValueError, RecursionError) as error:
            raise RunError(f"'{path}' is damaged: line {number}: {_reason(error)}; {_ADVICE}") from None
        records.append(record)
    return records


def text_of(value: Any, indent: int | None = None) -> str:
    """A value as JSON that `parse` reads back.

    Raises:
        UsageError: text with control characters or half a surrogate pair, an integer or a depth beyond the limits.
        ValueError: a number that is not finite.
    """
    text = json.dumps(value, indent=indent, allow_nan=False)
    try:
        _value(text.encode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"this cannot be written to a run folder: {_reason(error)}; change it") from None
    return text


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises RunError."""
    try:
        if not path.is_file():  # a pipe under the name of a file would be waited for
            raise RunError(f"'{path}' cannot be read: it is missing, or is not a file; {_ADVICE}")
        with path.open("rb") as file:
            # a read takes the memory it is asked for before it knows the file's size
            data = file.read(min(path.stat().st_size, limit) + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise RunError(f"'{path}' cannot be read: {reason}; check the path and its rights") from None
    if len(data) > limit:
        raise RunError(f"'{path}' holds more than {limit:,} bytes, the most expected here; {_ADVICE}")
    return data


def _value(data: bytes | bytearray) -> Any:
    text = data.decode("utf-8")
    value = json.loads(
        text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_number
    )
    for inner, depth in _parts(value):
        if depth > DEPTH:
            raise _Refused(f"brackets nested more than {DEPTH} deep")
        if isinstance(inner, str) and (found := _UNPRINTABLE.search(inner)):
            raise _Refused(f"text with the character U+{ord(found[0]):04X}, which is no text")
    return value


def _parts(value: Any) -> Iterator[tuple[Any, int]]:
    """Every value and key inside a value, with how many brackets are round it."""
    opened: list[Iterator[Any]] = [iter([value])]  # one for each bracket that is open: little memory, no recursion
    while opened:
        for inner in opened[-1]:
            yield inner, len(opened) - 1
            if isinstance(inner, dict | list):
                opened.append(chain(inner, inner.values()) if isinstance(inner, dict) else iter(inner))
                break
        else:
            opened.pop()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"the key {_shown(twice)} stands there twice")
    return value


def _constant(name: str) -> NoReturn:
    raise _Refused(f"{name}, which is not a number of JSON")


def _integer(digits: str) -> int:
    if (count := len(digits.lstrip("-"))) > DIGITS:
        raise _Refused(f"an integer of {count:,} digits, where at most {DIGITS} are expected")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {_shown(text)}, which is too large")
    return value


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"brackets nested more than {DEPTH} deep"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text at byte {error.start:,}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {error.lineno:,}, column {error.colno:,} ({error.msg})"
    return str(error)
