"""The command line, called in this process or as the installed program; one trained run and one study for all."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vaelab import studies
from vaelab.cli import run as run_command
from vaelab.explore import runtime

TINY = ("--data", "digits", "--epochs", "1", "--hidden", "16")
STUDY = ("study", "removing-kl", "--data", "digits", "--epochs", "2", "--hidden", "16", "16",
         "--decoder", "16", "16", "--frequencies", "8")  # fmt: skip
DRAWN = ("reconstruction", "training", "latent_space_comparison", "latent_space_no_kl", "generation_no_kl",
         "generation_no_kl_fitted")  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of the tests' own: the classifier of the digits is trained once into it."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("VAELAB_CACHE", str(path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("COLUMNS", raising=False)
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # networks this small are several times slower on two threads
        yield path
        torch.set_num_threads(before)


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
        """One line on stderr that holds each part, and nothing else anywhere."""
        assert (self.code, self.out) == (code, ""), self
        assert self.err.startswith("error: ") and self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err and "defect of vaelab" not in self.err
        assert not [part for part in parts if part not in self.err], (self.err, parts)


@pytest.fixture
def vaelab(capsys):
    """Calls a command in this process."""

    def call(*arguments) -> Result:
        capsys.readouterr()
        code = run_command([str(a) for a in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def program():
    """Path of the installed program."""
    return str(Path(sys.executable).with_name("vaelab"))


@pytest.fixture
def installed(program):
    """Calls the installed program."""

    def call(*arguments, **variables) -> Result:
        environment = {**os.environ, **variables}
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=environment)
        return Result(done.returncode, done.stdout, done.stderr)

    return call


def _no_page(*where, **how) -> str:
    return "explorer left out"  # see tests/explore


@pytest.fixture(autouse=True)
def _studies_without_their_page(monkeypatch):
    monkeypatch.setattr(studies, "write_explorer", _no_page)
    monkeypatch.setattr(runtime, "fetch_ahead", lambda data_dir: None)


def _quietly(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "write_explorer", _no_page)
        patch.setattr(runtime, "fetch_ahead", lambda data_dir: None)
        assert run_command([*arguments, "--quiet"]) == 0


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, cache) -> Path:
    """A run of `mnist-2d` on the digits, whose codes are not the prior's; tests must not change it."""
    path = tmp_path_factory.mktemp("trained") / "run"
    _quietly("train", "mnist-2d", *TINY, "--decoder", "16", "--batch-size", "32", "--beta", "0.1", "--out", str(path))
    return path


@pytest.fixture(scope="session")
def study_command() -> tuple[str, ...]:
    """What `study_folder` was made with."""
    return STUDY


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory, cache) -> Path:
    """A study on the digits with two hidden layers of 16 and 2 epochs; tests must not change it."""
    path = tmp_path_factory.mktemp("studied") / "study"
    with pytest.MonkeyPatch.context() as patch:
        _fewer_samples(patch)
        _quietly(*STUDY, "--out", str(path))
    return path


def _fewer_samples(patch: pytest.MonkeyPatch) -> None:
    """A twentieth of the samples, and figures at a quarter of their resolution."""
    from vaelab import evaluation
    from vaelab.report import figures

    patch.setattr(figures.save, "__defaults__", (40,))
    patch.setitem(evaluation.evaluate.__kwdefaults__, "k", 50)
    patch.setitem(evaluation.evaluate.__kwdefaults__, "samples", 500)


@pytest.fixture
def coarse(monkeypatch):
    """Few samples and small figures: for tests of what surrounds them."""
    _fewer_samples(monkeypatch)


@pytest.fixture
def undrawn(coarse, monkeypatch):
    """Few samples, and every figure of the study a single point."""
    from PIL import Image

    from vaelab.report import build

    def draw(folder, cells, data, **more):
        (folder / "images").mkdir(exist_ok=True)
        for name in DRAWN:
            Image.new("L", (1, 1)).save(folder / "images" / f"{name}.png")
        return [{"file": f"images/{name}.png", "title": name} for name in DRAWN]

    monkeypatch.setattr(build, "draw", draw)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def files():
    return content
