"""What the page runs on, from npm packages by name: onnxruntime for the browser, and d3.

    onnxruntime-web 1.30.0    executes the graphs in WebAssembly           73 kB of JavaScript, 14.2 MB of wasm    MIT
    d3 7.9.2                  zoom, contours and scales                    281 kB                                  ISC

They go the way of all data (`vaelab.data.store`): looked for in `--data-dir`, VAELAB_DATA and the cache, else fetched once
with `npm pack`; each file is verified by its SHA-256 whenever it is read, and none of a package's scripts is run. Of
onnxruntime-web only the build for one thread and no GPU is taken: threads need headers that a file opened by double click
does not have, and for a 28x28 picture a GPU is slower to reach than the wasm takes.
"""

import atexit
import base64
import gzip
import importlib.util
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vaelab.data.store import Bundle, File, NpmPackage, Progress, obtain, stop_fetching
from vaelab.errors import DataError

ONNXRUNTIME = Bundle(
    "onnxruntime-web",
    (
        File("ort.wasm.bundle.min.mjs", "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90", 73_054),
        File(
            "ort-wasm-simd-threaded.wasm",
            "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
            14_239_897,
        ),
    ),
    (NpmPackage("onnxruntime-web", "1.30.0", "dist"),),
)
D3 = Bundle(
    "d3",
    (File("d3.min.js", "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1", 280_622),),
    (NpmPackage("d3", "7.9.2", "dist"),),
)


@dataclass(frozen=True)
class Runtime:
    """The files that the page runs on.

    Attributes:
        pieces: what the page loads as a piece: `ort.mjs`, a module, and `ort.wasm`.
        d3: a classic script that defines `d3`.
    """

    pieces: dict[str, bytes]
    d3: bytes

    @cached_property
    def packed(self) -> dict[str, str]:
        """The pieces as text, see `packed`: 1.3 s of a core."""
        return {name: packed(content) for name, content in self.pieces.items()}


LEVEL = 6
"""Of gzip: level 9 makes the lab's page 0.4 % smaller and takes 2.3 times as long (3.5 s of a core on a busy machine)."""


def packed(content: bytes) -> str:
    """Bytes gzipped and as base64."""
    return base64.b64encode(gzip.compress(content, LEVEL, mtime=0)).decode("ascii")


NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""Packages without which there is no page."""
GRACE = 5.0
"""Seconds that a fetch has to tidy up when the process ends."""


class Ahead(threading.Thread):
    """Fetches and packs the runtime while something else is computed; `found` is None where it could not be had.

    Where the packages for ONNX are missing, there will be no page and nothing is fetched.
    """

    def __init__(self, data_dir: str | Path | None = None) -> None:
        super().__init__(daemon=True)
        self.data_dir, self.found = data_dir, None

    found: Runtime | None

    def run(self) -> None:
        with suppress(Exception):  # `load` says it again where somebody waits for it
            if all(importlib.util.find_spec(name) for name in NEEDED):
                found = load(self.data_dir, None)
                assert found.packed
                self.found = found


def fetch_ahead(data_dir: str | Path | None = None) -> Ahead:
    """Begin to fetch what is missing, see `Ahead`."""
    thread = Ahead(data_dir)

    def end() -> None:
        stop_fetching()
        thread.join(GRACE)

    thread.start()
    atexit.register(end)  # a process that ends before it leaves no npm and no folder behind
    return thread


def load(data_dir: str | Path | None = None, progress: Progress | None = None) -> Runtime:
    """The runtime, from where it is or else fetched once; arguments as in `vaelab.data.store.obtain`.

    Raises:
        DataError: it is nowhere and cannot be fetched, or a file fails its checksum.
    """
    try:
        ort, d3 = (obtain(bundle, data_dir, progress) for bundle in (ONNXRUNTIME, D3))
    except DataError as error:
        raise DataError(
            f"{error}\nThe explorer's page runs on these files. They are fetched once, by npm, which comes with Node.js: "
            "install it, or put the files there by hand."
        ) from None
    module, wasm = (bytes(ort[file.name].data) for file in ONNXRUNTIME.files)
    return Runtime({"ort.mjs": module, "ort.wasm": wasm}, bytes(d3["d3.min.js"].data))
