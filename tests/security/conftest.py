"""What the security tests share: a small run folder, and a marker that hostile files would make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vaelab.recipes import recipe
from vaelab.registry import build
from vaelab.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run folder with a model, as training would leave it; nothing is trained."""
    chosen = recipe("mnist-2d", (1, 8, 8), hidden=(8,), decoder=(8,), frequencies=3, epochs=1)
    made = Run.create(tmp_path / "run", chosen)
    made.save_model(build(chosen.model))
    return made


@pytest.fixture
def change(run: Run) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """Changes the run's configuration by a function of the document."""

    def apply(edit: Callable[[dict[str, Any]], object]) -> None:
        document = json.loads(run.config.read_text())
        edit(document)
        run.config.write_text(json.dumps(document))

    return apply


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that a payload makes; there is none yet."""
    return tmp_path / "executed"


@pytest.fixture
def payload(marker: Path) -> Payload:
    return Payload(marker)
