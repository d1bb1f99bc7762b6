"""What is seen of training while it runs: means over the epoch so far, and when to show them."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaelab.errors import NoDensity
from vaelab.recipes import Training
from vaelab.trace import Trace


def text_of(metrics: Mapping[str, float | None]) -> str:
    """Rate and distortion in one line, for people."""
    rate, distortion = metrics["rate"], metrics["distortion"]
    return f"rate {'n/a' if rate is None else f'{rate:z.2f}'}  distortion {distortion:.2f} nats"


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows; rate and distortion in nats per image, means over the epoch so far."""

    epoch: int
    epochs: int
    step: int
    steps: int
    rate: float | None
    distortion: float
    images_per_second: float
    seconds_left: float
    skipped: int = 0

    def text(self) -> str:
        """One line for a progress bar."""
        metrics = text_of({"rate": self.rate, "distortion": self.distortion})
        skipped = f"  {self.skipped} steps skipped" if self.skipped else ""
        return f"epoch {self.epoch}/{self.epochs}  {metrics}  {self.images_per_second:,.0f} images/s{skipped}"


@dataclass(frozen=True)
class Pass:
    """What one pass over a batch came to.

    Attributes:
        loss: what was differentiated, or NaN where nothing was.
        rate: sum over images, in nats; None where the posterior has no density.
        distortion: the same.
        images: how many.
        gradient_norm: of the gradient, where the pass has set it rather than added to it; else None.
        updated: whether the pass has updated the weights, too.
    """

    loss: float
    rate: float | None
    distortion: float
    images: int
    gradient_norm: float | None = None
    updated: bool = False

    @classmethod
    def of(cls, trace: Trace, loss: Tensor | None = None) -> "Pass":
        """Of a trace, and of what an objective made of it: one transfer from the device."""
        distortion = trace.distortion.detach()
        try:
            rate = trace.rate.detach().sum()
        except NoDensity:
            rate = None
        told = [distortion.sum(), *(t.detach() for t in (loss, rate) if t is not None)]
        total, *rest = torch.stack([t.double() for t in told]).tolist()
        value = math.nan if loss is None else rest.pop(0)
        return cls(value, None if rate is None else rest[0], total, len(distortion))


class Meter:
    """Sums of rate and distortion with their counts, so that unequal batches average rightly; in float64."""

    def __init__(self, interval: float = 0.2) -> None:
        self.rate, self.distortion = 0.0, 0.0
        self.has_rate = True
        self.count, self.interval, self.last = 0, interval, time.perf_counter()
        self.steps, self.norm_sum, self.norm_max, self.clipped = 0, 0.0, 0.0, 0

    def add(self, passed: Pass, gradient_norm: float = 0.0, clip: float = 0.0) -> None:
        self.has_rate &= passed.rate is not None
        self.rate, self.distortion = self.rate + (passed.rate or 0.0), self.distortion + passed.distortion
        self.count += passed.images
        self.steps += 1
        self.norm_sum, self.norm_max = self.norm_sum + gradient_norm, max(self.norm_max, gradient_norm)
        self.clipped += 0 < clip < gradient_norm

    def means(self) -> tuple[float | None, float]:
        return (self.rate / self.count if self.has_rate else None), self.distortion / self.count

    def gradient(self) -> dict[str, float]:
        """Of the gradient's norm before clipping: mean and largest over the steps, and the share that was clipped."""
        steps = max(1, self.steps)
        return {"mean": self.norm_sum / steps, "max": self.norm_max, "clipped": self.clipped / steps}

    def due(self) -> bool:
        now = time.perf_counter()
        if now - self.last < self.interval:
            return False
        self.last = now
        return True

    def progress(self, epoch: int, training: Training, step: int, steps: int, seconds: float, skipped: int) -> Progress:
        rate, distortion = self.means()
        speed, left = training.batch_size * step / seconds, seconds / step * (steps - step)
        return Progress(epoch, training.epochs, step, steps, rate, distortion, speed, left, skipped)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; numbers of JSON come back with the same bits."""
        names = "has_rate", "count", "steps", "norm_sum", "norm_max", "clipped"
        return {"sums": [self.rate, self.distortion], **{name: getattr(self, name) for name in names}}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.rate, self.distortion = map(float, state["sums"])
        for name in ("has_rate", "count", "steps", "norm_sum", "norm_max", "clipped"):
            setattr(self, name, state[name])
