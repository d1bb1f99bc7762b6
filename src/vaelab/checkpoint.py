"""Checkpoints: all that the next step depends on, so that a resumed training has the bits of an uninterrupted one.

    float32 masters of the weights, averaged weights, moments and counts of the optimiser      `Optimiser.state`
    buffers of the model, and weights that are not trained                                     `snapshot`
    torch's global generator (a user's network may draw from it)
    the step, the records of the epochs before, the sums of this one, how many steps were skipped

The order of images and all noise are functions of the seed and of the step (`vaelab.rng`): nothing of them is kept.

A checkpoint is one file of safetensors, checkpoint/STEP-SHA256.safetensors, written under a temporary name, flushed and
renamed; its name holds the checksum of its content, so that a file is whole or is not used. The last two are kept: where
the newest is damaged, the one before it serves. Both are removed when the training is finished.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vaelab import strict_json, weights
from vaelab.errors import RunError
from vaelab.run import flush_folder, replacing

KEPT = 2
_DIGITS = 16


@dataclass(frozen=True)
class Snapshot:
    """A training between two steps.

    Attributes:
        step: steps that were made.
        seconds: of training.
        history: the records of the epochs that were finished.
        meter: of the epoch that was not, see `Meter.state`.
        skipped: steps that were left out since they were not finite.
        optimiser: see `Optimiser.state`.
        model: buffers, and parameters that are not trained, by name.
        generators: the states of torch's global ones, by device.
        of: digests of the recipe and of the data, by which a changed one is noticed.
    """

    step: int
    seconds: float
    history: list[dict[str, Any]]
    meter: dict[str, Any]
    skipped: int
    optimiser: dict[str, Tensor]
    model: dict[str, Tensor]
    generators: dict[str, Tensor]
    of: dict[str, str] = field(default_factory=dict)


def untrained(model: nn.Module) -> dict[str, Tensor]:
    """The model's buffers, and the parameters that training does not change, by name."""
    frozen = {name: p.data for name, p in model.named_parameters() if not p.requires_grad}
    return {**dict(model.named_buffers()), **frozen}


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, snapshot: Snapshot) -> None:
        """Write one, then remove all but the last two. Raises OSError where it cannot be written.

        Those of later steps go as well: they were damaged, or the training would have gone on from them.
        """
        data = _to_bytes(snapshot)
        digest = hashlib.sha256(data).hexdigest()[:_DIGITS]
        if not self.folder.is_dir():
            self.folder.mkdir()
            flush_folder(self.folder.parent)
        path = self.folder / f"{snapshot.step:09d}-{digest}.safetensors"
        with replacing(path) as temporary:
            temporary.write_bytes(data)
        paths = self._paths()
        for other in (*paths[: paths.index(path)], *paths[paths.index(path) + KEPT :]):
            other.unlink(missing_ok=True)

    def load(self) -> tuple[Snapshot | None, list[str]]:
        """The newest one that is whole, if any; and of each newer one a sentence that says why it is not used."""
        refused = []
        for path in self._paths():
            try:
                return _from_file(path), refused
            except RunError as error:
                refused.append(f"{error}; the checkpoint before it is used")
        return None, refused

    def remove(self) -> None:
        """Remove all of them, and what was being written."""
        if self.folder.is_dir():
            for path in [*self._paths(), *self.folder.glob(".*.tmp")]:
                path.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _paths(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("[0-9]*-*.safetensors"), reverse=True) if self.folder.is_dir() else []


def _to_bytes(snapshot: Snapshot) -> bytes:
    facts = {name: getattr(snapshot, name) for name in ("step", "seconds", "history", "meter", "skipped", "of")}
    text = json.dumps(facts, allow_nan=False).encode()
    tensors = {"facts": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    kinds = {"optimiser": snapshot.optimiser, "model": snapshot.model, "generator": snapshot.generators}
    for kind, found in kinds.items():
        # clones: a file of safetensors holds no two names for one memory
        tensors |= {
            f"{kind}/{name}": tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()
        }
    return safetensors.torch.save(tensors)


def _from_file(path: Path) -> Snapshot:
    """Raises RunError where the file is damaged."""
    named = path.stem.rpartition("-")[2]
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]
    except OSError as error:
        raise RunError(f"'{path}' cannot be read: {error.strerror or error}") from None
    if found != named:
        raise RunError(f"'{path}' is damaged (its checksum begins with {found}, its name says {named[:40]!a})")
    tensors = weights.load_weights(path)
    try:
        facts = strict_json.parse(tensors.pop("facts").numpy().tobytes(), path)
        return Snapshot(
            **_checked(facts, path), optimiser=_of("optimiser/", tensors), model=_of("model/", tensors),
            generators=_of("generator/", tensors),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise RunError(f"'{path}' is not a checkpoint of this version: {error}") from None


def _checked(facts: Any, path: Path) -> dict[str, Any]:
    kinds = {"step": int, "seconds": float, "history": list, "meter": dict, "skipped": int, "of": dict}
    if not isinstance(facts, dict) or {name: type(value) for name, value in facts.items()} != kinds:
        raise RunError(f"'{path}' is not a checkpoint of this version: its facts are {ascii(facts)[:80]}")
    return facts


def _of(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
