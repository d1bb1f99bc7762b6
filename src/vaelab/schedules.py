"""Schedules: numbers that change with the training step.

A schedule is a frozen dataclass that is called with a step and returns a number. Warm-up of the KL term is
``ELBO(beta=Linear(0, 1, steps))`` (Bowman et al. 2016, arXiv 1511.06349; Sønderby et al. 2016, arXiv 1602.02282), cyclic
annealing ``ELBO(beta=Cyclic(0, 1, period))`` (Fu et al. 2019, arXiv 1903.10145).

The learning rate's schedules are named (`LEARNING_RATE`): functions of the fraction of training that is done, since they
must reach their end with the last step whatever the number of epochs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from vaelab.errors import UsageError


def _check(start: float, end: float, name: str, steps: int) -> None:
    for value in (start, end):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"a schedule runs from {start!r} to {end!r}: expected two finite numbers")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"{name} is {steps!r}: expected an integer of 1 or more")


@dataclass(frozen=True)
class Linear:
    """From `start` at step 0 to `end` at step `steps`, constant after."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.start, self.end, "steps", self.steps)

    def __call__(self, step: int) -> float:
        done = min(step / self.steps, 1.0) if self.steps > 0 else 1.0
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Cosine:
    """From `start` at step 0 to `end` at step `steps` along half a cosine, constant after."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.start, self.end, "steps", self.steps)

    def __call__(self, step: int) -> float:
        done = min(step / self.steps, 1.0) if self.steps > 0 else 1.0
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Cyclic:
    """Every `period` steps: linearly from `start` to `end` during the share `rise` of it, then constant."""

    start: float
    end: float
    period: int
    rise: float = 0.5

    def __post_init__(self) -> None:
        _check(self.start, self.end, "period", self.period)
        if not (isinstance(self.rise, int | float) and 0 < self.rise <= 1):
            raise UsageError(f"rise is {self.rise!r}: the share of a period that rises lies in (0, 1]")

    def __call__(self, step: int) -> float:
        done = min((step % self.period) / (self.period * self.rise), 1.0)
        return self.start + (self.end - self.start) * done


Schedule = Linear | Cosine | Cyclic


def at(value: float | Schedule, step: int) -> float:
    """The value of a number or a schedule at a step."""
    return float(value) if isinstance(value, int | float) else value(step)


def _one_cycle(done: float) -> float:
    rise = 0.25
    if done < rise:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / rise)) / 2
    return (1 + math.cos(math.pi * (done - rise) / (1 - rise))) / 2


def _warm_cosine(done: float) -> float:
    rise = 0.1
    return (done + 1e-3) / (rise + 1e-3) if done < rise else (1 + math.cos(math.pi * (done - rise) / (1 - rise))) / 2


def _warm_linear(done: float) -> float:
    rise = 0.1
    return 0.04 + 0.96 * done / rise if done < rise else 1 - (done - rise) / (1 - rise)


LEARNING_RATE: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "warm-cosine": _warm_cosine,
    "warm-linear": _warm_linear,
    "one-cycle": _one_cycle,
}
"""Multiplier of the learning rate, from the fraction of training done, in [0, 1)."""
