"""vaelab's own loop on the same network: `fit` as users call it, one epoch at a time."""

import time
from collections.abc import Callable
from typing import Any

import torch

from vaelab.data.datasets import Dataset, load
from vaelab.data.protocol import protocol
from vaelab.recipes import Recipe, recipe
from vaelab.registry import build
from vaelab.training import fit, initial_model


class Ours:
    """`epoch()` trains one pass and returns its seconds, evaluation left out; `whole()` with it."""

    def __init__(self, seed: int = 0, precision: str = "auto", name: str = "mnist", **fields: Any) -> None:
        self.data: Dataset = load("mnist")
        values = {"batch_size": 128, "lr": 1e-3, "schedule": "constant", "clip": 0.0, **fields}
        self.recipe: Recipe = recipe(name, self.data.shape, precision=precision, seed=seed, **values)
        self.model = initial_model(self.recipe, self.data)
        self.curve: list[float] = []
        self.tested: list[float] = []

    def epoch(self) -> float:
        return self._fit()[0]

    def whole(self) -> float:
        return self._fit()[1]

    def _fit(self) -> tuple[float, float]:
        """Each call is a training of one epoch with an optimiser of its own, which costs a few milliseconds."""
        from dataclasses import replace

        r = self.recipe
        start = time.perf_counter()
        (record,) = fit(
            self.model, build(r.objective), self.data, protocol(r.protocol), replace(r.training, epochs=1),
            seed=r.seed + 1000 * len(self.curve),
        )  # fmt: skip
        self.curve.append(record["train"]["rate"] + record["train"]["distortion"])
        self.tested.append(record["test"]["rate"] + record["test"]["distortion"])
        return record["seconds"], time.perf_counter() - start


def curve(epochs: int, seed: int, precision: str) -> list[float]:
    """Training values of the epochs of one whole run, nats an image."""
    data = load("mnist")
    r = recipe("mnist", data.shape, precision=precision, seed=seed, epochs=epochs, batch_size=128, lr=1e-3,
               schedule="constant", clip=0.0)  # fmt: skip
    records = fit(initial_model(r, data), build(r.objective), data, protocol(r.protocol), r.training, seed=seed)
    return [record["train"]["rate"] + record["train"]["distortion"] for record in records]


def time_to(target: float, seed: int, on_value: Callable[[float, float], None] = lambda seconds, value: None) -> float:
    """Seconds until `mnist-fast` has a test value of `target` nats or less, everything in `fit` included; inf if never."""
    torch.manual_seed(seed)
    data = load("mnist")
    r = recipe("mnist-fast", data.shape, seed=seed)
    start, reached = time.perf_counter(), [float("inf")]

    def look(record: dict[str, Any]) -> None:
        seconds, value = time.perf_counter() - start, record["test"]["rate"] + record["test"]["distortion"]
        on_value(seconds, value)
        if value <= target:
            reached[0] = min(reached[0], seconds)

    fit(initial_model(r, data), build(r.objective), data, protocol(r.protocol), r.training, seed=seed, on_epoch=look)
    return reached[0]
