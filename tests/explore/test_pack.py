"""Both packings of one page, the command that writes them, and what the page runs on."""

import base64
import gzip
import hashlib
import json
import sys
import webbrowser
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vaelab.data import datasets, store
from vaelab.errors import DataError
from vaelab.explore import pack
from vaelab.explore import runtime as runtime_module
from vaelab.explore.bundle import Bundle

PAGE = Path(pack.__file__).with_name("page")


class Scripts(HTMLParser):
    """The scripts and styles of a page as a browser would find them: (attributes, text)."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.found: list[tuple[dict, str]] = []
        self.inside = False
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.inside = tag in ("script", "style")
        if self.inside:
            self.found.append((dict(attrs) | {"tag": tag}, ""))

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            attributes, text = self.found[-1]
            self.found[-1] = (attributes, text + data)


@pytest.fixture
def some() -> Bundle:
    manifest = {"format": 1, "title": "</script><script>alert(1)</script><!--", "runs": []}
    return Bundle(manifest, {"test.u8": bytes(1000), "a/encoder.onnx": b"\x08\x0a<!-- </script>"})


def test_a_single_file_holds_everything(some, runtime):
    page = pack.single(some, runtime)
    assert page == pack.single(some, runtime)
    scripts = Scripts(page).found
    by_id = {attributes.get("id"): text for attributes, text in scripts}
    manifest = json.loads(by_id["vaelab-manifest"])
    assert manifest["title"] == some.manifest["title"]
    pieces = {**some.pieces, **runtime.pieces}
    assert set(manifest["pieces"]) == set(pieces)
    for name, content in pieces.items():
        packed = base64.b64decode(by_id[f"piece:{name}"])
        apart = b"".join(content[i::4] for i in range(4)) if name == "a/encoder.onnx" else content
        assert gzip.decompress(packed) == apart and packed[4:8] == bytes(4)  # no time in its header
        assert manifest["pieces"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert [text for attributes, text in scripts if text.startswith("var d3")] == ["var d3 = '<\\/script><!--';"]
    (imports,) = [json.loads(text)["imports"] for attributes, text in scripts if attributes.get("type") == "importmap"]
    assert set(imports) == {f"vaelab/{path.stem}" for path in PAGE.glob("*.js")}
    for name, address in imports.items():
        kind, _, content = address.partition(",")
        assert kind == "data:text/javascript;base64"
        assert base64.b64decode(content) == (PAGE / f"{name.removeprefix('vaelab/')}.js").read_bytes()
    assert (PAGE / "style.css").read_text() in [text.removeprefix("\n") for _, text in scripts]
    assert not [attributes for attributes, _ in scripts if "src" in attributes]
    assert b"Permission is hereby granted" in page and b"Mike Bostock" in page


def test_a_folder_holds_the_same_as_files(some, runtime):
    files = pack.folder(some, runtime)
    manifest = json.loads(files["manifest.json"])
    for name in manifest["pieces"]:
        assert files[name] == {**some.pieces, **runtime.pieces}[name]
    scripts = Scripts(files["index.html"]).found
    (imports,) = [json.loads(text)["imports"] for attributes, text in scripts if attributes.get("type") == "importmap"]
    assert {f"./{name}" for name in files if name.endswith(".js") and name != "d3.min.js"} == set(imports.values())
    assert [attributes["src"] for attributes, _ in scripts if "src" in attributes] == ["d3.min.js"]
    assert b'href="page/style.css"' in files["index.html"] and "page/style.css" in files
    single = Scripts(pack.single(some, runtime)).found
    assert json.loads({a.get("id"): t for a, t in single}["vaelab-manifest"]) == manifest


def test_the_fingerprint_depends_on_every_piece(some, runtime):
    def fingerprint(bundle):
        return json.loads(pack.folder(bundle, runtime)["manifest.json"])["fingerprint"]

    first = fingerprint(some)
    assert len(first) == 12 and first == fingerprint(some)
    for name in some.pieces:
        assert fingerprint(Bundle(some.manifest, {**some.pieces, name: some.pieces[name] + b"x"})) != first


def test_a_folder_takes_the_place_of_an_explorer_and_of_nothing_else(some, runtime, tmp_path):
    target = tmp_path / "site" / "explorer"
    assert pack.write_folder(target, some, runtime) == target / "index.html"
    assert (target / "a" / "encoder.onnx").read_bytes() == some.pieces["a/encoder.onnx"]
    pack.write_folder(target, Bundle(some.manifest, {"test.u8": b"x"}), runtime)
    assert not (target / "a").exists() and (target / "test.u8").read_bytes() == b"x"
    assert [path.name for path in target.parent.iterdir()] == ["explorer"]
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years of work")
    with pytest.raises(pack.UsageError, match="is no explorer: choose another folder"):
        pack.write_folder(thesis, some, runtime)
    assert [path.name for path in thesis.iterdir()] == ["thesis.txt"]


def test_a_write_that_fails_leaves_what_was_there(some, runtime, tmp_path, monkeypatch):
    target = tmp_path / "explorer"
    pack.write_folder(target, some, runtime)
    before = sorted(path.name for path in target.iterdir())

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for write, path in ((pack.write_folder, target), (pack.write_single, tmp_path / "x.html")):
        with pytest.raises(pack.UsageError, match="No space left on device; choose another place"):
            write(path, some, runtime)
    assert sorted(path.name for path in target.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["explorer"]


# --- the command ---


@pytest.fixture
def opened(monkeypatch, runtime, ungraphed):
    """The addresses that were opened in a browser; the runtime is the small one."""
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: addresses.append(address) or True)
    monkeypatch.setattr(runtime_module, "load", lambda data_dir, progress: runtime)
    return addresses


@pytest.fixture
def run(run_of, model, digits):
    return run_of(model("Delta"), data=digits).path


def test_explore_writes_the_page_and_opens_it(vaelab, run, opened):
    result = vaelab("explore", run).ok()
    assert f"explorer: {run / 'explorer.html'}" in result.out and "not evaluated" in result.out
    assert opened == [(run / "explorer.html").as_uri()]
    assert b"vaelab-manifest" in (run / "explorer.html").read_bytes()
    assert "write the page: done" in result.err


def test_explore_writes_where_it_is_told_and_opens_nothing(vaelab, run, opened, tmp_path):
    told = json.loads(vaelab("explore", run, run, "--export", tmp_path / "x.html", "--json", "--quiet").ok().out)
    assert told["file"] == str(tmp_path / "x.html") and told["opened"] is False
    vaelab("explore", run, "--folder", tmp_path / "site", "--quiet").ok()
    assert (tmp_path / "site" / "manifest.json").is_file() and (tmp_path / "x.html").is_file()
    assert opened == [] and not (run / "explorer.html").exists()


def test_explore_says_where_the_page_is_when_no_browser_opens(vaelab, run, opened, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    assert "no browser could be opened" in vaelab("explore", run, "--quiet").ok().out


def test_bad_input_of_explore_is_refused_before_any_work(
    vaelab, run, run_of, model, digits, opened, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets, "load", lambda *what: pytest.fail("data was loaded"))
    vaelab("explore", "--quiet").refused(2, "RUN requires an argument")
    vaelab("explore", tmp_path / "gone", "--quiet").refused(5, "there is no run")
    vaelab("explore", run, run, run, "--quiet").refused(2, "one run, or two side by side")
    vaelab("explore", run, "--export", tmp_path / "x.html", "--folder", tmp_path / "x", "--quiet").refused(
        2, "choose one"
    )
    vaelab("explore", run, "--export", tmp_path / "x.pdf", "--quiet").refused(2, "ends in .html")
    vaelab("explore", run, "--export", tmp_path / "none" / "x.html", "--quiet").refused(2, "does not exist")
    vaelab("explore", run, "--export", tmp_path, "--quiet").refused(2, f"'{tmp_path}' is a folder", "--folder")
    vaelab("explore", run, "--folder", run, "--quiet").refused(2, "is no explorer")
    vaelab("explore", run, "--folder", tmp_path / "x.html", "--quiet").refused(2, "is the name of a file", "--export")
    grey = run_of(model(likelihood="GreyCrossEntropy"), "grey", protocol="grey", data=digits).path
    vaelab("explore", run, grey, "--quiet").refused(2, "'dynamic'", "'grey'", "a page of its own")
    (run / "model.safetensors").unlink()
    vaelab("explore", run, "--quiet").refused(5, "has not finished")
    assert opened == [] and not list(tmp_path.rglob("*.html"))


# --- the runtime ---


def test_the_runtime_is_found_where_data_is_and_checked(tmp_path, monkeypatch):
    contents = {"ort.wasm.bundle.min.mjs": b"module", "ort-wasm-simd-threaded.wasm": b"wasm", "d3.min.js": b"d3"}
    for name in ("ONNXRUNTIME", "D3"):
        real = getattr(runtime_module, name)
        files = tuple(
            store.File(f.name, hashlib.sha256(contents[f.name]).hexdigest(), len(contents[f.name])) for f in real.files
        )
        monkeypatch.setattr(runtime_module, name, store.Bundle(real.name, files, ()))
        (tmp_path / real.name).mkdir()
        for file in files:
            (tmp_path / real.name / file.name).write_bytes(contents[file.name])
    found = runtime_module.load(tmp_path)
    assert found == runtime_module.Runtime({"ort.mjs": b"module", "ort.wasm": b"wasm"}, b"d3")
    (tmp_path / "d3" / "d3.min.js").write_bytes(b"dd")
    with pytest.raises(DataError, match="fails its checksum"):
        runtime_module.load(tmp_path)


def test_a_runtime_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VAELAB_DATA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError) as caught:
        runtime_module.load()
    for part in ("onnxruntime-web 1.30.0: the npm command is not there", "--data-dir or VAELAB_DATA", "Node.js"):
        assert part in str(caught.value)


@pytest.mark.parametrize("packages", [True, False])
def test_the_runtime_is_fetched_ahead_where_there_will_be_a_page(monkeypatch, packages):
    asked = []

    def load(data_dir, progress):
        asked.append(data_dir)
        raise DataError("not to be had")  # said by who asks afterwards

    monkeypatch.setattr(runtime_module, "load", load)
    if not packages:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    runtime_module.fetch_ahead("here").join()
    assert asked == ["here"] * packages


@pytest.mark.network
def test_the_runtime_arrives_on_a_machine_that_has_nothing(tmp_path, monkeypatch):
    """As on a user's machine: an empty cache, no folder named. Fails where npm cannot reach its packages."""
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VAELAB_DATA", raising=False)
    found = runtime_module.load()
    assert found.pieces["ort.wasm"].startswith(b"\0asm") and b"https://d3js.org" in found.d3[:100]
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.*")) == [
        "d3.min.js", "ort-wasm-simd-threaded.wasm", "ort.wasm.bundle.min.mjs",
    ]  # fmt: skip


def test_the_runtimes_versions_are_pinned():
    assert [bundle.sources[0].label for bundle in (runtime_module.ONNXRUNTIME, runtime_module.D3)] == [
        "npm package onnxruntime-web 1.30.0",
        "npm package d3 7.9.2",
    ]
