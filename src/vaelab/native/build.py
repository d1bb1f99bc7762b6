"""Compiling the kernels, keeping them, loading them."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from vaelab.data.store import cache_dir
from vaelab.errors import UsageError

HERE = Path(__file__).parent
# those that take longest to compile first
SOURCES = (
    "convolution.c",
    "linear.c",
    "exact.c",
    "shares.c",
    "step.c",
    "scoring.c",
    "adam.c",
    "images.c",
    "pixels.c",
    "start.c",
)
FLAGS = ("-O2", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math")
WITHOUT_TILES = ("-mno-amx-bf16",)
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 120
"""A compiler that takes longer is given up."""
MAKING = "making-"
"""Begins the names of folders beside the kernels in which they are made."""

_pointer, _long, _int, _double = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_double
SIGNATURES: dict[str, tuple[type, ...]] = {
    "linear_forward": (*[_pointer] * 4, *[_long] * 3, _pointer, _int),
    "linear_backward": (*[_pointer] * 6, *[_long] * 3, _pointer, _int),
    "convolution": (_pointer, _int, *[_pointer] * 5, _int),
    "convolution_weights": (*[_pointer] * 5, _int),
    "convolution_bias": (*[_pointer] * 2, *[_long] * 3, _int),
    "convolution_room": (*[_pointer] * 2,),
    "batch": (*[_pointer] * 2, _long, ctypes.c_uint64, _pointer, *[_long] * 2, _int),
    "bernoulli": (*[_pointer] * 4, *[_long] * 3, _int),
    "pack_rows": (*[_pointer] * 2, *[_long] * 2, _int),
    "score_codes": (*[_pointer] * 4, _long, *[_pointer] * 3, _long, _pointer, _int),
    "pack_images": (*[_pointer] * 2, *[_long] * 2, _int),
    "shares": (*[_pointer] * 4, _long, _int, *[_pointer] * 8, *[_long] * 5, _pointer, _int),
    "vaelab_tiles": (),
    "log_sums": (*[_pointer] * 2, *[_long] * 2, _int),
    "elbo_steps": (_pointer, _long, _pointer, *[_long] * 2, *[_pointer] * 4, _double, _double, _pointer, _double, _int),
    "adam": (*[_pointer] * 6, _long, _pointer, _int, _int),
    "squares": (*[_pointer] * 2, *[_long] * 2, _int),
}
RESULTS: dict[str, type] = {"squares": _double, "vaelab_tiles": _int, "elbo_steps": _long}


class _Unavailable(Exception):
    """Why there are no kernels, in words."""


def library() -> ctypes.CDLL | None:
    """The kernels, compiled or found in the cache at the first call; None where there are none."""
    return _found()[0]


def reason() -> str:
    """What the kernels run on, or why there are none."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    asked = os.environ.get("VAELAB_KERNELS") or "auto"  # empty is unset
    if asked not in ("auto", "torch"):
        raise UsageError(f"VAELAB_KERNELS is {asked!r}: expected auto or torch")
    try:
        if asked == "torch":
            raise _Unavailable("VAELAB_KERNELS asks for torch's")
        able = abilities()
        tiles = "amx_bf16" in able
        try:
            return load(tiles), f"vaelab's own kernels ({'tiles' if tiles else 'AVX-512'})"
        except _Unavailable:
            if not tiles:
                raise
            return load(False), "vaelab's own kernels (AVX-512: the system does not give the tiles)"
    except _Unavailable as why:
        return None, f"torch's kernels ({why})"


def version() -> str:
    """Names what computes: the kernels' file, or torch's version."""
    if (found := library()) is not None:
        return _name(bool(found.vaelab_tiles()))
    import torch

    return f"torch {torch.__version__}"


def abilities() -> list[str]:
    """Those of the processor that the kernels are compiled for. Raises where it lacks what they need."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise _Unavailable("vaelab's own are for Linux on x86-64")
    try:
        told = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        raise _Unavailable("the system does not say what the processor can do") from None
    able = sorted(set(told.partition(":")[2].split()))
    if "avx512_bf16" not in able:
        raise _Unavailable("vaelab's own need a processor with avx512_bf16")
    return able


@cache
def load(tiles: bool) -> ctypes.CDLL:
    """The kernels with or without tile registers. Raises where they cannot be compiled or used."""
    name = _name(tiles)
    with suppress(
        OSError
    ):  # a cache that cannot be written: the kernels are then compiled for this process only, below
        if (kept := _kept(name)) is not None:
            if (there := _there(kept)) is not None:
                return there
            with _alone(kept.parent):  # the workers of a study all want them at once
                if (there := _there(kept)) is not None:
                    return there
                _compile(tiles, kept)
                return _open(kept)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _compile(tiles, Path(folder) / name)
            return _open(Path(folder) / name)
    except OSError as error:
        raise _Unavailable(f"vaelab's own cannot be loaded ({error})") from None


def ahead() -> None:
    """Begin to compile, in a process of its own, what `library` will wait for: while this one imports torch, say."""
    with suppress(_Unavailable, OSError):
        if (kept := _wanted()) is not None and not kept.is_file():
            nowhere = subprocess.DEVNULL
            # found where this process found it, and nothing in the current folder
            places = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-P", "-c", "from vaelab.native import build; build.keep()"]
            beside = subprocess.Popen(command, env=places, stdin=nowhere, stdout=nowhere, stderr=nowhere)
            threading.Thread(target=beside.wait, daemon=True).start()
            _beside.append(beside)


_beside: list[subprocess.Popen[bytes]] = []
"""Processes that compile; they end by themselves."""


def keep() -> None:
    """Compile what `library` will want, where it can be kept and is not. It needs no torch."""
    with suppress(_Unavailable, OSError):
        if (kept := _wanted()) is not None:
            with _alone(kept.parent):
                if not kept.is_file():
                    _compile("amx_bf16" in abilities(), kept)


def _wanted() -> Path | None:
    """Where the kernels of this processor are kept, or will be; None where nothing can be kept, or torch's are asked for."""
    return _kept(_name("amx_bf16" in abilities())) if os.environ.get("VAELAB_KERNELS", "auto") in ("", "auto") else None


def _flags(tiles: bool) -> tuple[str, ...]:
    return FLAGS if tiles else (*FLAGS, *WITHOUT_TILES)


def _name(tiles: bool) -> str:
    """Holds the checksum of sources, flags and processor."""
    digest = hashlib.sha256(repr((_flags(tiles), abilities())).encode())
    for path in sorted(HERE.glob("*.[ch]")):
        digest.update(path.read_bytes())
    return f"kernels-{digest.hexdigest()[:24]}.so"


def _kept(name: str) -> Path | None:
    """The place in the cache of what is called `name`; None where others could write there. Raises OSError."""
    folder = cache_dir() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / name if _own(folder) and _own(folder.parent, 0o002) else None


def _there(kept: Path) -> ctypes.CDLL | None:
    """What is kept, if it is there and whole."""
    if kept.is_file() and _own(kept):
        with suppress(OSError):  # a damaged file
            return _open(kept)
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    import fcntl  # which Windows does not have; nor are there kernels for it

    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _own(path: Path, others: int = 0o022) -> bool:
    """Whether only this user can have written it: what is loaded runs, and a cache may be shared."""
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & others


def _compile(tiles: bool, to: Path) -> None:
    compiler = shlex.split(os.environ.get("CC", "")) or [*filter(shutil.which, COMPILERS)][:1]
    if not compiler:
        raise _Unavailable(f"there is no C compiler ({', '.join(COMPILERS)})")
    for left in to.parent.glob(f"{MAKING}*"):  # by a compiler that was killed
        if time.time() - left.stat().st_mtime > 2 * SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=MAKING, dir=to.parent) as folder:
        objects = [f"{folder}/{name}.o" for name in SOURCES]
        commands = [[*compiler, *_flags(tiles), "-c", str(HERE / name), "-o", made]
                    for name, made in zip(SOURCES, objects, strict=True)]  # fmt: skip
        with ThreadPoolExecutor(os.cpu_count()) as side_by_side:
            list(side_by_side.map(_run, commands))
        # without -fopenmp here: the threads are those of the OpenMP that torch has loaded, not a second set beside them
        _run([*compiler, "-shared", *objects, "-lm", "-o", f"{folder}/made.so"])
        made = Path(f"{folder}/made.so")
        made.chmod(0o700)  # see `_own`
        made.replace(to)


def _run(command: Sequence[str]) -> None:
    """Raises where the compiler does not do it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"the C compiler does not answer ({error})") from None
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()
        raise _Unavailable(f"the C compiler does not take vaelab's own ({said[0][:200]})")


def _open(path: Path) -> ctypes.CDLL:
    import torch  # noqa: F401 - whose OpenMP they use

    opened = ctypes.CDLL(str(path))
    if opened.vaelab_begin() != 0:
        raise _Unavailable("the system does not give the processor's tile registers")
    for name, arguments in SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = arguments, RESULTS.get(name)
    return opened
