"""Mutations: a valid input with a few things changed, from a generator of random numbers and nothing else.

Three kinds, since a parser has layers. Changed bytes test the outermost one, and seldom get past it: a checksum or a
length is wrong. So a container (gzip, zip, the header of a weights file) is also opened, changed inside and closed again,
with its checksums and lengths right; and a document (JSON) is changed as a tree, so that it is still JSON.
"""

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
           1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1)  # fmt: skip
"""Integers at the edges of what fits."""

DEEP = {"<deep 60>": 60, "<deep 70>": 70, "<deep 3000>": 3000}
RAW = {"<NaN>": "NaN", "<-Infinity>": "-Infinity", "<1e999>": "1e999", "<60 digits>": "9" * 60, "<6000 digits>": "1" * 6000,
       "<surrogate>": '"\\ud800"', "<escape>": '"\\u001b[2J"', "<zero>": '"\\u0000"'}  # fmt: skip
"""Texts that stand for what a tree of Python's cannot hold."""

VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "a" * 2000, "ü", "../../x", "os:system", "subprocess:Popen", "torch.nn:Linear", [], {}, [[]],
    [1, "a"], ["abc", 10**9], {"class": "nn.MLP"}, {"class": 3}, {"class": "os:system", "command": "true"}, 0.5, -0.0, 1e308,
    -1e-308, 10**39, *NUMBERS, *DEEP, *RAW,
)  # fmt: skip


def of_bytes(data: bytes, rng: Random, corpus: Sequence[bytes] = ()) -> bytes:
    """One to eight changes of bytes: bits, numbers at the edges, pieces cut, doubled, put in, or taken from others."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 2, 4, 8, 16, 64, max(1, len(changed) // 2)))
        match rng.randrange(9):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.randrange(256)
            case 2 | 3:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(NUMBERS) % (1 << 8 * width)
                changed[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 1, 2, 10))
            case 6:
                changed[at:at] = rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
            case 7 if corpus:
                other = rng.choice(corpus)
                start = rng.randrange(len(other) + 1)
                changed[at : at + length] = other[start : start + length]
            case _:
                changed[:] = _digits(changed, rng) if rng.random() < 0.8 else changed[:at]
    return bytes(changed)


def _digits(data: bytearray, rng: Random) -> bytes:
    """One number that stands there in digits becomes another."""
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return bytes(data)
    one = rng.choice(found)
    return bytes(data[: one.start()]) + str(rng.choice(NUMBERS)).encode() + bytes(data[one.end() :])


def of_json(data: bytes, rng: Random, corpus: Sequence[bytes] = ()) -> bytes:
    """A document changed as a tree: values replaced, taken out, renamed, moved, put in twice."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(document))
        if not places:
            break
        inside, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[rng.choice((f"{key}x", "class", "", "format", "<escape>"))] = inside.pop(key)
            case 2:
                other, name = rng.choice(places)
                inside[key] = deepcopy(other[name]) if name in _keys(other) else None
            case 3 if isinstance(inside, list):
                inside[key:key] = [deepcopy(inside[key]) for _ in range(rng.choice((1, 2, 100)))]
            case _:
                inside[key] = deepcopy(rng.choice(VALUES))  # a shared list would grow from input to input
    text = json.dumps(document, indent=rng.choice((None, 2)))
    for name, depth in DEEP.items():
        text = text.replace(f'"{name}"', rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    changed = text.encode()
    return of_bytes(changed, rng, corpus) if rng.random() < 0.2 else changed


def _places(value: Any) -> Any:
    for key in _keys(value):
        yield value, key
        yield from _places(value[key])


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def of_lines(data: bytes, rng: Random, corpus: Sequence[bytes] = ()) -> bytes:
    """One line of a file of records changed as a tree; or the bytes of the file."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    if rng.random() < 0.3 or not lines[at].endswith(b"}"):  # the last line of one was cut off
        return of_bytes(data, rng, corpus)
    lines[at] = of_json(lines[at], rng).replace(b"\n", rng.choice((b"", b"\n")))
    return b"\n".join(lines) + rng.choice((b"\n", b""))


def inside_gzip(change: Callable[..., bytes]) -> Callable[..., bytes]:
    """Half of the time the content is changed and packed again; else the bytes of the archive."""

    def apply(data: bytes, rng: Random, corpus: Sequence[bytes] = ()) -> bytes:
        if rng.random() < 0.5:
            return of_bytes(data, rng, corpus)
        changed = change(gzip.decompress(data), rng, [gzip.decompress(one) for one in corpus])
        return gzip.compress(changed, rng.choice((0, 1, 9)), mtime=0)

    return apply


def inside_zip(data: bytes, rng: Random, corpus: Sequence[bytes] = ()) -> bytes:
    """Two times in three members are changed and packed again, stored or deflated; else the bytes of the archive."""
    if rng.random() < 1 / 3:
        return of_bytes(data, rng, corpus)
    stream = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", kind) as new:
        unlucky = rng.choice(old.namelist())
        for name in old.namelist():
            content = of_bytes(old.read(name), rng) if name == unlucky else old.read(name)
            info = zipfile.ZipInfo(
                name if rng.random() < 0.95 else rng.choice((f"{name}x", "../x.npy", "\x1b.npy", "x.npy"))
            )
            info.compress_type = kind
            new.writestr(info, content)
    return stream.getvalue()


def inside_header(data: bytes, rng: Random, corpus: Sequence[bytes] = ()) -> bytes:
    """Two times in three the header of a weights file is changed as a tree, and its length put right; else bytes."""
    if rng.random() < 1 / 3:
        return of_bytes(data, rng, corpus)
    length = int.from_bytes(data[:8], "little")
    header = of_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
