"""Two packings of one page: a single file to mail, and a folder to host.

    single    everything in one HTML file: style, modules and scripts as text, each piece gzipped and base64-encoded in a
              <script type="application/octet-stream">. Of float32 all first bytes stand first, then all second ones, and
              so on: gzip finds more in exponents that stand together (9 % less of the lab's weights). A page that was
              opened by double click may fetch nothing, not even the file beside it, but it can read itself: so nothing
              is fetched
    folder    index.html, its modules, manifest.json and the pieces as plain files beside it, at relative addresses

The page's modules import one another by the names "vaelab/NAME", which an import map resolves: to data: addresses in the
single file, to ./page/NAME.js in the folder. `page/index.html` has three places to fill, for style, import map and pieces.

The same bundle gives the same bytes: gzip is told no time, and everything is in a fixed order.
"""

import base64
import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from vaelab.errors import UsageError
from vaelab.explore.bundle import Bundle
from vaelab.explore.runtime import Runtime, packed
from vaelab.run import replacing

PLACES = ("<!--vaelab:style-->", "<!--vaelab:importmap-->", "<!--vaelab:pieces-->")
"""What `page/index.html` holds, once each."""
PAGES = (".html", ".htm")
"""What the name of a single file ends in."""


def single(bundle: Bundle, runtime: Runtime) -> bytes:
    """The page as one HTML file."""
    page = _page()
    modules = {
        f"vaelab/{name.removesuffix('.js')}": f"data:text/javascript;base64,{_base64(page[name])}"
        for name in _modules(page)
    }
    pieces = {**bundle.pieces, **runtime.pieces}
    scripts = [
        f"<!--\n{page['licences.txt'].decode()}-->",
        f'<script type="application/json" id="vaelab-manifest">{_json_in_html(_manifest(bundle, pieces))}</script>',
        *(
            f'<script type="application/octet-stream" id="piece:{name}" data-planes="{_planes(name)}">'
            f"{runtime.packed.get(name) or packed(_apart(content, _planes(name)))}</script>"
            for name, content in pieces.items()
        ),
        f"<script>{_script_in_html(runtime.d3)}</script>",
    ]
    return _filled(page, f"<style>\n{page['style.css'].decode()}</style>", modules, scripts)


def folder(bundle: Bundle, runtime: Runtime) -> dict[str, bytes]:
    """The page as files, by their paths in the folder."""
    page = _page()
    modules = {f"vaelab/{name.removesuffix('.js')}": f"./page/{name}" for name in _modules(page)}
    pieces = {**bundle.pieces, **runtime.pieces}
    scripts = ['<script src="d3.min.js"></script>']
    return {
        "index.html": _filled(page, '<link rel="stylesheet" href="page/style.css">', modules, scripts),
        "manifest.json": (json.dumps(_manifest(bundle, pieces), indent=1, allow_nan=False) + "\n").encode(),
        "d3.min.js": runtime.d3,
        "licences.txt": page["licences.txt"],
        **{f"page/{name}": page[name] for name in ("style.css", *_modules(page))},
        **pieces,
    }


def write_single(path: Path, bundle: Bundle, runtime: Runtime) -> Path:
    """Write the page as one file, over what is there; returns its path.

    Raises:
        UsageError: a path that is no .html file, or cannot be written.
    """
    check_single(path)
    content = single(bundle, runtime)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def write_folder(path: Path, bundle: Bundle, runtime: Runtime) -> Path:
    """Write the page as a folder, in place of an explorer that is there; returns the path of its index.html.

    The files are written into a new folder beside it, which then takes its place.

    Raises:
        UsageError: the folder holds something else, or cannot be written.
    """
    check_folder(path)
    files = folder(bundle, runtime)
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    old = beside.with_suffix(".old")
    try:
        for name, content in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_bytes(content)
        if path.exists():
            path.rename(old)
        beside.rename(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return path / "index.html"


def check_single(path: Path) -> None:
    """Refuse a path that no page can be written to, before the work. Raises UsageError."""
    if path.is_dir():
        raise UsageError(
            f"'{path}' is a folder: give the name of a file that ends in .html, or --folder to write a folder"
        )
    if path.suffix.lower() not in PAGES:
        raise UsageError(f"'{path}' is no name for a page: expected one that ends in .html")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"the folder '{path.resolve().parent}' does not exist: make it, or choose another path")
    _try(path.resolve().parent)


def check_folder(path: Path) -> None:
    """Refuse a folder that holds something other than an explorer, before the work. Raises UsageError."""
    if path.suffix.lower() in PAGES or (path.exists() and not path.is_dir()):
        raise UsageError(f"'{path}' is the name of a file: give a folder, or --export to write one file")
    if path.is_dir() and any(path.iterdir()) and not (path / "manifest.json").is_file():
        raise UsageError(f"'{path}' exists, is not empty and is no explorer: choose another folder, or remove it")
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    _try(parent)


def _try(folder: Path) -> None:
    """Raises UsageError where no file can be made in a folder."""
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write to '{path}': {error.strerror or error}; choose another place, with --export or --folder"
    )


def _page() -> dict[str, bytes]:
    """The files of `page/`, in the order of their names, and the licences of what it runs on."""
    here = resources.files("vaelab.explore")
    files = {
        file.name: file.read_bytes()
        for file in (here / "page").iterdir()
        if file.name.endswith((".html", ".css", ".js"))
    }
    return dict(sorted(files.items())) | {"licences.txt": (here / "licences.txt").read_bytes()}


def _modules(page: Mapping[str, bytes]) -> list[str]:
    return [name for name in page if name.endswith(".js")]


def _manifest(bundle: Bundle, pieces: Mapping[str, bytes]) -> dict[str, object]:
    """The bundle's manifest with the length and the SHA-256 of every piece, and a fingerprint over all."""
    listed = {n: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in pieces.items()}
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:12]
    return {**bundle.manifest, "fingerprint": digest, "pieces": listed}


def _filled(page: Mapping[str, bytes], style: str, modules: Mapping[str, str], scripts: list[str]) -> bytes:
    document = page["index.html"].decode()
    imports = f'<script type="importmap">{_json_in_html({"imports": modules})}</script>'
    for place, content in zip(PLACES, (style, imports, "\n".join(scripts)), strict=True):
        before, _, after = document.partition(place)
        document = before + content + after
    return document.encode()


def _planes(name: str) -> int:
    """Bytes of a number in a piece: 4 where it holds float32."""
    return 4 if name.endswith((".onnx", ".f32")) else 1


def _apart(content: bytes, planes: int) -> bytes:
    """All first bytes of numbers of that many bytes, then all second ones, and so on."""
    return b"".join(content[i::planes] for i in range(planes))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _json_in_html(value: object) -> str:
    """JSON that holds no "<", so that nothing in it can end the script it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _script_in_html(script: bytes) -> str:
    """A script that does not end early: "</script" can stand in its strings only, where "\\/" is "/"."""
    return script.decode().replace("</script", "<\\/script")
