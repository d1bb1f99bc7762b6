"""The explorer's page in a real Chromium, on models that are trained here on the 8x8 digits in a second each.

A test sees what a reader sees: gestures go through the browser's own mouse, keyboard and touch, and what the page shows is
compared with what torch makes of the same inputs. No page may log an error, nor ask for anything that it does not hold.
"""

import base64
import functools
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from vaelab.data.datasets import Dataset, Images
from vaelab.distributions import Distribution, closed_form_kl
from vaelab.explore import bundle, pack, runtime
from vaelab.models.vae import VAE
from vaelab.recipes import recipe
from vaelab.run import Run
from vaelab.running import train

LAUNCH = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
          "--disable-component-update", "--disable-sync"]  # fmt: skip
WIDE, NARROW = (1280, 720), (360, 740)
INSIDE = ("file:", "blob:", "data:")
SEEDED = """let state = 1; Math.random = () => {
  state ^= state << 13; state ^= state >>> 17; state ^= state << 5; return (state >>> 0) / 2 ** 32;
};"""
"""The same numbers at every visit (Marsaglia, "Xorshift RNGs", 2003), so that what a test finds it finds again."""

LAB = {"hidden": (64, 64), "decoder": (64, 64), "frequencies": 16}
ANY = {"hidden": (64,), "protocol": "threshold"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "with KL": ("mnist-2d", LAB),
    "without KL": ("mnist-2d", LAB | {"beta": 0.0}),
    "six": ("vae", ANY | {"latent_dim": 6}),
    "label": ("vae", ANY | {"latent_dim": 2, "classes": 10, "protocol": "levels", "posterior": "Laplace"}),
    "point": ("vae", ANY | {"latent_dim": 2, "posterior": "Delta", "objective": "ELBO(beta=0)"}),
    "flow": ("vae", ANY | {"latent_dim": 2, "posterior": "Planar(layers=2)"}),
    "tilted": ("vae", ANY | {"latent_dim": 3, "posterior": "FullGaussian"}),
    "coloured": ("vae", ANY | {"latent_dim": 2, "protocol": "dequantised", "likelihood": "Gaussian"}),
    "twenty": ("vae", ANY | {"latent_dim": 20}),
    "twenty again": ("vae", ANY | {"latent_dim": 20, "seed": 1}),
    "grey line": ("mnist", {"latent_dim": 1, "hidden": (64,)}),
}
"""What the runs of these tests are called, with recipe and fields."""
SILENCED = [1, 4]
"""Dimensions of the run "six" whose posterior is made to be the prior, whatever the image."""


@pytest.fixture(scope="session")
def data_of(digits: Dataset) -> Callable[[str], Dataset]:
    """The data of a run by its name: the digits, or digits of three channels and twelve classes."""

    def painted(images: Images) -> Images:
        assert images.labels is not None
        labels = np.where(np.arange(len(images)) % 2, images.labels, images.labels + 10 * (images.labels < 2))
        shares = np.stack([labels % 3 + 1, labels % 4 + 1, labels % 5 + 1], 1) / (3, 4, 5)
        pixels = np.rint(images.pixels * shares[:, :, None, None]).astype(np.uint8)
        return Images(pixels, labels.astype(images.labels.dtype))

    names = (*(digits.classes or ()), "zero in another colour", "one in another colour")
    coloured = Dataset("coloured", painted(digits.train), painted(digits.test), names, "")
    return lambda name: coloured if name == "coloured" else digits


@pytest.fixture(scope="session")
def run_of(data_of: Callable[[str], Dataset], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A trained run by its name in `RUNS`; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def trained(name: str) -> Run:
        (chosen, fields), data = RUNS[name], data_of(name)
        resolved = recipe(chosen, data.shape, data=data.name, epochs=30, batch_size=64, **fields)
        run = train(resolved, data, folder / name.replace(" ", "-"))
        if name == "six":
            model = run.model()
            head = model.posterior.head
            with torch.no_grad():
                for parameter in (head.weight, head.bias):
                    parameter.view(2, 6, -1)[:, SILENCED] = 0  # mean 0, log sigma 0
            run.save_model(model)
        return run

    return trained


@pytest.fixture(scope="session")
def bundle_of(run_of: Callable[[str], Run], data_of: Callable[[str], Dataset]) -> Callable[..., bundle.Bundle]:
    """The bundle of one run or two, by their names."""
    return functools.cache(
        lambda *names: bundle.build([bundle.Exhibit(name, run_of(name)) for name in names], data_of(names[0]))
    )


@pytest.fixture(scope="session")
def parts() -> runtime.Runtime:
    return runtime.load()


@pytest.fixture(scope="session")
def page_of(
    bundle_of: Callable[..., bundle.Bundle], parts: runtime.Runtime, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The single-file page of one run or two, by their names; tests must not change it."""
    folder = tmp_path_factory.mktemp("pages")
    return functools.cache(
        lambda *names: pack.write_single(folder / f"{'-'.join(names).replace(' ', '-')}.html", bundle_of(*names), parts)
    )


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: VAELAB_ARTIFACTS, or pytest's folder."""
    path = Path(os.environ.get("VAELAB_ARTIFACTS") or tmp_path_factory.mktemp("screenshots"))
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = os.environ.get("VAELAB_CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.fail("these tests need Chromium: apt-get install chromium, or name one in VAELAB_CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=LAUNCH)
        yield started
        started.close()


@dataclass
class View:
    """A page that is open, and what it logged and asked for."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def ask(self, expression: str, *arguments: Any) -> Any:
        """What `window.__vaelab` says: `expression` names one of its members, `arguments` those of a call."""
        call = f"v.{expression}" if not arguments else f"v.{expression}(...a)"
        return self.page.evaluate(f"([a]) => {{ const v = window.__vaelab; return {call}; }}", [list(arguments)])

    def until(self, expression: str) -> None:
        """Waits for an expression to hold: by asking, since the page's policy forbids what Playwright's own waiting evaluates."""
        for _ in range(600):
            if self.page.evaluate(f"Boolean({expression})"):
                return
            self.page.wait_for_timeout(25)
        raise TimeoutError(
            f"the page did not come to {expression}; it says: {self.page.locator('body').inner_text()[:300]}"
        )

    def settle(self) -> "View":
        """Waits until the page has decoded and written all that its state asks for."""
        self.page.wait_for_timeout(50)
        self.until("window.__vaelab.settled()")
        return self

    def pixel(self, z: list[float], run: int = 0) -> tuple[float, float]:
        """Where in the window a code lies on a run's map."""
        box = self.page.locator(".over").nth(run).bounding_box()
        assert box is not None
        x, y = self.ask("pixel", run, z)
        return box["x"] + x, box["y"] + y

    def hover(self, z: list[float], run: int = 0) -> list[float]:
        """Moves the pointer over a code, and returns the z that the page then shows."""
        self.page.mouse.move(*self.pixel(z, run))
        self.settle()
        return self.ask("state()")["z"]

    def canvas(self, selector: str, colours: bool = False) -> np.ndarray:
        """The red channel of a canvas, (H, W) bytes; or red, green and blue, (H, W, 3)."""
        picture = self.page.locator(selector).first.evaluate("(canvas) => canvas.toDataURL()")
        with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
            return np.array(image)[:, :, :3] if colours else np.array(image)[:, :, 0]

    def decoded(self, run: int = 0) -> np.ndarray:
        """The mean that is shown at z, (P,)."""
        return np.array(self.ask("decodings()")[run]["means"][0], np.float32)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., View]]:
    """Opens a page and waits until it is ready; at the end, none may have logged an error or asked for anything outside."""
    views: list[tuple[View, str]] = []
    contexts = []

    def open_page(
        address: Path | str,
        *,
        size: tuple[int, int] = WIDE,
        scheme: Literal["light", "dark"] = "light",
        state: str = "c=0",
        touch: bool = False,
        ready: bool = True,
        before: str = "",
    ) -> View:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            has_touch=touch,
        )
        contexts.append(context)
        view = View(context.new_page())
        for script in (SEEDED, before):
            view.page.add_init_script(script)
        view.page.on("console", lambda m: view.errors.append(m.text) if m.type in ("error", "warning") else None)
        view.page.on("pageerror", lambda error: view.errors.append(str(error)))
        view.page.on("request", lambda request: view.requests.append(request.url))
        start = address.as_uri() if isinstance(address, Path) else address
        views.append((view, start))
        view.page.goto(f"{start}#{state}" if state and "#" not in start else start)
        if ready:
            view.until("window.__vaelab && (window.__vaelab.ready || window.__vaelab.error)")
            assert view.ask("error") is None
            assert view.ask("selfTest") == []
            view.settle()
        return view

    yield open_page
    for context in contexts:
        context.close()
    for view, start in views:
        assert view.errors == []
        origin = start.rpartition("/")[0]
        assert [url for url in view.requests if not url.startswith((*INSIDE, origin))] == []


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is served."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass(frozen=True)
class ByTorch:
    """What torch makes of a model's inputs."""

    model: VAE

    def mean(self, z: list[float], c: int | None = None) -> np.ndarray:
        """E[x|z] (P,)."""
        with torch.no_grad():
            return self.model.decode(torch.tensor([[z]]), self._label(c)).mean.flatten().numpy()

    def log_px(self, z: list[list[float]], x: np.ndarray, c: int | None = None) -> np.ndarray:
        """log p(x|z) (B,) in nats of one image (C, H, W) at codes (B, D)."""
        with torch.no_grad():
            images = torch.from_numpy(x).float().expand(len(z), *x.shape)
            labels = None if c is None else torch.full((len(z),), c)
            return self.model.decode(torch.tensor([z]), labels).log_prob(images)[0].numpy()

    def kl(self, x: np.ndarray, c: int | None = None) -> np.ndarray:
        """KL(q(z|x) || p(z)) in nats (D,) of one image (C, H, W)."""
        with torch.no_grad():
            found = closed_form_kl(self.posterior(x, c), self.model.latent_prior(self._label(c)))
        if found is None:
            raise ValueError("this posterior has no closed form against this prior")
        return found[0].numpy()

    def posterior(self, x: np.ndarray, c: int | None = None) -> Distribution:
        """q(z|x) of one image (C, H, W)."""
        with torch.no_grad():
            return self.model.encode(torch.from_numpy(x).float().unsqueeze(0), self._label(c))

    @staticmethod
    def _label(c: int | None) -> torch.Tensor | None:
        return None if c is None else torch.tensor([c])


@pytest.fixture(scope="session")
def torch_of(run_of: Callable[[str], Run]) -> Callable[[str], ByTorch]:
    """A run's model, asked directly, by its name in `RUNS`."""
    return functools.cache(lambda name: ByTorch(run_of(name).model()))
