"""The run folder: everything one training left, and nothing that executes.

    config.json         the resolved recipe, rebuilt through the closed registry (`vaelab.registry`)
    env.json            versions, device, threads, hash of the code, the command
    metrics.jsonl       one record an epoch
    model.safetensors   the weights
    evaluation.json     what `vaelab evaluate` measured
    report/             what `vaelab report` drew

Every file is written under a temporary name, flushed, and renamed; only metrics.jsonl grows by a line at a time, and a
last line that was cut off is left out when it is read.
"""

import hashlib
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaelab import __version__
from vaelab.errors import RunError, UsageError, VaelabError
from vaelab.recipes import Recipe
from vaelab.registry import build, foreign_classes

if TYPE_CHECKING:
    import torch

    from vaelab.models.vae import VAE

FORMAT = 1
"""Version of the run folder's layout; a newer one is refused."""


@dataclass(frozen=True)
class Run:
    """A run folder on disk."""

    path: Path

    @classmethod
    def create(cls, path: Path, recipe: Recipe, **facts: str) -> "Run":
        """Make a new run folder; `facts` join env.json. Raises UsageError where it cannot be made or is not empty."""
        claim_folder(path)
        run = cls(path)
        write_json(run.config, {"format": FORMAT, **recipe.to_dict()})
        write_json(path / "env.json", {**environment(), "foreign_classes": foreign_classes(recipe.model), **facts})
        return run

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """An existing run. Raises RunError where the folder is none."""
        run = cls(Path(path))
        if not run.path.is_dir():
            raise RunError(f"there is no run at '{path}': expected the folder that `vaelab train` wrote")
        if not run.config.is_file():
            inside = [p.parent.name for p in sorted(run.path.glob("runs/*/config.json"))]
            hint = f"; the runs of this study are {', '.join('runs/' + name for name in inside)}" if inside else ""
            raise RunError(f"'{path}' is not a run folder (it has no config.json){hint}")
        run.recipe()
        return run

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def finished(self) -> bool:
        """Whether all epochs were trained and the weights were saved."""
        return self.weights.is_file() and len(self.history()) == self.recipe().training.epochs

    def recipe(self) -> Recipe:
        """The resolved recipe. Raises RunError for a file that is not one, or of a newer version."""
        data = read_json(self.config)
        if not isinstance(data, dict) or "format" not in data:
            raise RunError(f"'{self.config}' is not a run's configuration")
        version = data.pop("format")
        if version != FORMAT:
            raise RunError(
                f"'{self.path}' has format {version} and this version of vaelab reads {FORMAT}: install a newer vaelab"
            )
        try:
            return Recipe.from_dict(data)
        except (VaelabError, TypeError, AttributeError) as error:
            raise RunError(f"'{self.config}' is damaged or of another version: {error}") from None

    def model(self, device: "torch.device | str" = "cpu") -> "VAE":
        """The trained model, in evaluation mode. Raises RunError where it is missing or does not fit."""
        import safetensors.torch
        import torch
        from safetensors import SafetensorError

        if not self.weights.is_file():
            raise RunError(f"'{self.path}' has no model.safetensors: its training has not finished")
        try:
            with torch.random.fork_rng(devices=[]):  # building draws first weights: not from the user's generator
                model = build(self.recipe().model)
        except (VaelabError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"the model in '{self.config}' cannot be built: {error}") from None
        try:
            safetensors.torch.load_model(model, str(self.weights))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise RunError(f"'{self.weights}' does not hold this run's model: {str(error).splitlines()[0]}") from None
        return model.to(device).eval()

    def save_model(self, model: Any) -> None:
        import safetensors.torch

        with replacing(self.weights) as temporary:
            safetensors.torch.save_model(model, str(temporary))

    def append(self, record: dict[str, Any]) -> None:
        """Add one record to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl. Raises RunError for a line that is not JSON."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        try:
            whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
            return [json.loads(line) for line in whole.splitlines() if line]
        except ValueError as error:
            raise RunError(f"'{path}' is damaged: {error}") from None

    def environment(self) -> dict[str, Any]:
        path = self.path / "env.json"
        return read_json(path) if path.is_file() else {}


def claim_folder(path: Path) -> None:
    """Make a folder that is empty. Raises UsageError where it exists with something in it, or cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UsageError(f"'{path}' exists and is not empty: choose another --out, or remove it")
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise UsageError(f"'{path}' is a file: choose a folder for --out") from None
    except OSError as error:
        raise UsageError(f"cannot write to '{path}': {error.strerror or error}; choose another --out") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, flushed to disk, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors leaves 0600
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON. Raises RunError with the file's name where that fails."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"'{path}' cannot be read: {error}") from None


@cache
def code_hash() -> str:
    """Twelve hex digits over the library's own sources: runs with the same hash were made by the same code."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for source in sorted(root.rglob("*.py")):
        digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, Any]:
    """Versions, processor and threads, the hash of the code, and the command."""
    import numpy
    import torch

    return {
        "vaelab": __version__,
        "code": code_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "command": shlex.join(["vaelab", *sys.argv[1:]]),
    }
