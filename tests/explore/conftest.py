"""Small composed models and run folders that nobody had to train, the command line, and a runtime of a few bytes."""

import warnings
from dataclasses import dataclass

import pytest
import torch

from vaelab import likelihoods, posteriors, priors
from vaelab.cli import run as run_command
from vaelab.data.datasets import Dataset, Images
from vaelab.explore import export
from vaelab.explore.graph import Graph
from vaelab.explore.runtime import Runtime
from vaelab.models.vae import VAE
from vaelab.nn import MLP, ConvDecoder, ConvEncoder, FourierMLP, WithLabel
from vaelab.recipes import Recipe, Training
from vaelab.registry import to_spec
from vaelab.run import Run


def compose(posterior="Gaussian", likelihood="Bernoulli", prior=None, *, dim=2, classes=0, conv=False, **options):
    """A VAE on (1, 8, 8) images with fixed weights; options are the likelihood's."""
    member = getattr(likelihoods, likelihood)
    shape = member.outputs((1, 8, 8), **{k: v for k, v in options.items() if k in ("scale", "components")})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zuko's, where it is first imported
        torch.manual_seed(1)
        if conv:
            encoder = ConvEncoder((1 + classes, 8, 8), (4, 8), 16)
            decoder = ConvDecoder((dim + classes,), (8, 4), shape, residual=True)
        else:
            encoder = MLP((64 + classes,) if classes else (1, 8, 8), (), (16,), "tanh", out_activation=True)
            decoder = FourierMLP((dim + classes,), (16,), shape, frequencies=8)
        if classes:
            encoder, decoder = WithLabel(encoder, classes), WithLabel(decoder, classes)
        chosen = priors.StandardNormal(dim) if prior is None else prior()
        q = getattr(posteriors, posterior)(16, dim)
        model = VAE(encoder, q, chosen, member(decoder, **options))
        with torch.no_grad():  # a fresh head gives almost the same posterior for all images
            for parameter in q.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def model():
    return compose


@pytest.fixture(scope="session")
def few(digits) -> Dataset:
    """200 training and 60 test images of the digits."""
    parts = [Images(p.pixels[:n], p.labels[:n]) for p, n in ((digits.train, 200), (digits.test, 60))]
    return Dataset("digits", *parts, digits.classes, digits.source)


@pytest.fixture
def run_of(tmp_path, few):
    """Makes a run folder of a model, as if it had been trained on `few`."""

    def make(model: VAE, name: str = "run", protocol: str = "dynamic", data: Dataset | None = None) -> Run:
        recipe = Recipe(
            "vae", "digits", protocol, to_spec(model), {"class": "objectives.ELBO", "beta": 1.0}, Training(epochs=1)
        )
        run = Run.create(tmp_path / name, recipe, data_fingerprint=(data or few).fingerprint)
        run.append({"epoch": 1})
        run.save_model(model)
        return run

    return make


@pytest.fixture
def ungraphed(monkeypatch):
    """No graphs, which take a second each: for tests of what surrounds them."""

    def graph(model, about, like):
        return Graph(b"graph", (), (), 0.0)

    monkeypatch.setattr(export, "encoder", graph)
    monkeypatch.setattr(export, "scorer", graph)


@pytest.fixture
def runtime() -> Runtime:
    """Not the real one: that is for the tests in a browser."""
    return Runtime({"ort.mjs": b"export default 0", "ort.wasm": bytes(range(256))}, b"var d3 = '</script><!--';")


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    def ok(self) -> "Result":
        assert self.code == 0, self.err
        return self

    def refused(self, code: int, *parts: str) -> None:
        """One line on stderr that holds each part, and nothing on stdout."""
        assert (self.code, self.out) == (code, ""), self
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        assert not [part for part in parts if part not in self.err], (self.err, parts)


@pytest.fixture
def vaelab(capsys):
    """Calls a command in this process."""

    def call(*arguments) -> Result:
        capsys.readouterr()
        code = run_command([str(a) for a in arguments])
        return Result(code, *capsys.readouterr())

    return call
