"""The run folder: everything one training left, and nothing that executes.

    config.json         the resolved recipe, rebuilt through the closed registry (`vaelab.registry`)
    env.json            versions, device, threads, hash of the code, the command
    metrics.jsonl       one record an epoch
    model.safetensors   the weights
    checkpoint/         what a training that was interrupted goes on from (`vaelab.checkpoint`)
    evaluation.json     what `vaelab evaluate` measured
    report/             what `vaelab report` drew
    run.lock            held by the process that trains

Every file is written under a temporary name, flushed, and renamed; only metrics.jsonl grows by a line at a time, and a
last line that was cut off is left out when it is read. Formats:

    1    no checkpoints, records without clipped and skipped steps
    2    this one
"""

import hashlib
import os
import platform
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaelab import __version__, strict_json
from vaelab.errors import RunError, UsageError, VaelabError
from vaelab.recipes import Recipe
from vaelab.registry import build, foreign_classes, limit_for

if TYPE_CHECKING:
    import torch

    from vaelab.models.vae import VAE

FORMAT = 2
"""Version of the run folder's layout: a newer one is refused, an older one is read."""
LOCK, OWNER = "run.lock", "run.owner.json"
CHECKPOINT_EVERY = 30.0
"""Seconds of training between two checkpoints."""


@dataclass(frozen=True)
class Run:
    """A run folder on disk."""

    path: Path

    @classmethod
    def create(cls, path: Path, recipe: Recipe, **facts: str) -> "Run":
        """Make a new run folder; `facts` join env.json. Raises UsageError where it cannot be made or is not empty."""
        claim_folder(path)
        run = cls(path)
        with said(path):  # the configuration last: with it the folder is a run
            write_json(path / "env.json", {**environment(), "foreign_classes": foreign_classes(recipe.model), **facts})
            run.configure(recipe)
        return run

    def configure(self, recipe: Recipe) -> None:
        """Write the resolved recipe."""
        write_json(self.config, {"format": FORMAT, **recipe.to_dict()})

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

    @property
    def interrupted(self) -> str:
        """After how many epochs the weights were saved, where training did not go to its end; else nothing."""
        epochs, wanted = len(self.history()), self.recipe().training.epochs
        if not self.weights.is_file() or epochs >= wanted:
            return ""
        return f"training was interrupted after {epochs} of {wanted} epochs; these are the weights of that moment"

    def recipe(self) -> Recipe:
        """The resolved recipe. Raises RunError for a file that is not one, or of a newer version."""
        data = read_json(self.config)
        if not isinstance(data, dict) or "format" not in data:
            raise RunError(f"'{self.config}' is not a run's configuration")
        version = data.pop("format")
        if type(version) is not int or not 1 <= version <= FORMAT:
            raise RunError(
                f"'{self.path}' has format {ascii(version)[:40]} and this version of vaelab reads 1 to {FORMAT}: "
                "install a newer vaelab"
            )
        try:
            return Recipe.from_dict(data)
        except (VaelabError, TypeError, AttributeError) as error:
            raise RunError(f"'{self.config}' is damaged or of another version: {error}") from None

    def model(self, device: "torch.device | str" = "cpu") -> "VAE":
        """The trained model, in evaluation mode. Raises RunError where it is missing or does not fit."""
        import torch

        from vaelab import weights

        if not self.weights.is_file():
            raise RunError(f"'{self.path}' has no model.safetensors: its training has not finished")
        limit = limit_for(weights.numbers(self.weights))
        try:
            with torch.random.fork_rng(devices=[]):  # building draws first weights: not from the user's generator
                model = build(self.recipe().model, limit=limit)
        except (VaelabError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"the model in '{self.config}' cannot be built: {error}") from None
        weights.load_model(self.weights, model)
        return model.to(device).eval()

    def save_model(self, model: Any) -> None:
        from vaelab import weights

        with replacing(self.weights) as temporary:
            weights.save_model(temporary, model)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record to metrics.jsonl, and see it on the disk."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(strict_json.text_of(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rewrite_history(self, history: list[dict[str, Any]]) -> None:
        """Leave these records alone in metrics.jsonl."""
        with replacing(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(strict_json.text_of(r) + "\n" for r in history), encoding="utf-8")

    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl. Raises RunError for a line that is not JSON."""
        path = self.path / "metrics.jsonl"
        return strict_json.read_lines(path) if path.is_file() else []

    def note_resumed(self, step: int) -> None:
        """Add to env.json by what the training goes on from a step."""
        now = environment()
        entry = {"step": step, **{name: now[name] for name in ("vaelab", "code", "torch", "threads", "command")}}
        found = self.environment() or now
        write_json(self.path / "env.json", {**found, "resumed": [*found.get("resumed", []), entry]})

    def environment(self) -> dict[str, Any]:
        """What env.json says; nothing where it is missing. Raises RunError where it is damaged."""
        path = self.path / "env.json"
        found = read_json(path) if path.is_file() else {}
        if not isinstance(found, dict) or not (
            isinstance(found.get("device", ""), str) and isinstance(found.get("resumed", []), list)
        ):
            raise RunError(f"'{path}' is damaged: it is not what vaelab writes; restore it from a copy, or remove it")
        return found


def claim_folder(path: Path) -> None:
    """Make a folder that is empty. Raises UsageError where it exists with something in it, or cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        begun = not (path / "config.json").is_file()  # a process that was killed before the folder was a run
        ours = (LOCK, OWNER, "env.json") if begun else (LOCK, OWNER)
        if any(inside.name not in ours and not (begun and _temporary(inside)) for inside in path.iterdir()):
            goes_on = f"continue it with vaelab train --resume {shlex.quote(str(path))}, "
            raise UsageError(
                f"'{path}' exists and is not empty: {goes_on if (path / 'config.json').is_file() else ''}"
                "choose another --out, or remove it"
            )
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise UsageError(f"'{path}' is a file: choose a folder for --out") from None
    except OSError as error:
        raise UsageError(f"cannot write to '{path}': {error.strerror or error}; choose another --out") from None


def _temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a run folder alone. The system lets go of the lock of a process that has died, however it died.

    Raises:
        RunError: another process holds it, which is named.
        UsageError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        try:
            owner = strict_json.read(path / OWNER)
            who = f"process {owner['process']} on {owner['host']}, since {owner['since']}"
        except (RunError, TypeError, KeyError):  # it is writing it just now
            who = "another process"
        raise RunError(f"'{path}' is being trained by {who}: wait for it, or stop it") from None
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"'{path}' is a file: choose a folder for --out") from None
    except OSError as error:
        raise UsageError(f"cannot write to '{path}': {error.strerror or error}; choose another --out") from None
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with said(path):
            write_json(path / OWNER, {"process": os.getpid(), "host": socket.gethostname(), "since": now})
        yield
    finally:
        (path / OWNER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def said(path: Path) -> Iterator[None]:
    """A disk that is full, read-only or over its quota is an error of the run, in one sentence. Raises RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to '{path}': {error.strerror or error}; what was whole is kept: make room, then go on with "
            f"vaelab train --resume {shlex.quote(str(path))}"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, flushed to disk, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # safetensors leaves 0600
        temporary.replace(path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def flush_folder(path: Path) -> None:
    """See a folder's names on the disk, as a rename left them; where folders cannot be opened (Windows) the system does."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(strict_json.text_of(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON. Raises RunError with the file's name where that fails."""
    return strict_json.read(path)


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
