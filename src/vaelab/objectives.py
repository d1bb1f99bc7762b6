"""Objectives: what training differentiates, from a trace. Each is a frozen dataclass, its own configuration.

Every known objective is a reading of the same trace:
    VAE (Kingma & Welling 2014, arXiv 1312.6114)              ELBO()
    beta-VAE (Higgins et al. 2017)                            ELBO(beta=4)
    KL warm-up (Bowman et al. 2016, arXiv 1511.06349)         ELBO(beta=Linear(0, 1, steps))
    the lab's ablation; with a Delta posterior an autoencoder  ELBO(beta=0)

The estimate's `bound` is always the true bound, whatever the loss: evaluation and training speak the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vaelab.errors import NoDensity, UsageError
from vaelab.schedules import Schedule, at
from vaelab.trace import Estimate, Trace

Objective = Callable[[Trace, int], Estimate]
"""What training differentiates, from a trace and the number of the step."""


@dataclass(frozen=True)
class ELBO:
    """loss = mean over images of distortion + beta * rate; bound = -(distortion + rate).

    Args:
        beta: weight of the rate, a number >= 0 or a schedule over steps.
    """

    beta: float | Schedule = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.beta, int | float) and not 0 <= self.beta < float("inf"):
            raise UsageError(f"beta is {self.beta}: the weight of the KL term must be a finite number of 0 or more")

    def __call__(self, trace: Trace, step: int) -> Estimate:
        beta = at(self.beta, step)
        distortion = trace.distortion
        try:
            rate = trace.rate
        except NoDensity:
            if beta != 0:
                raise
            rate = None
        loss = distortion.mean() if rate is None or beta == 0 else (distortion + beta * rate).mean()
        if trace.aux is not None:
            loss = loss + trace.aux
        return Estimate(bound=None if rate is None else -(distortion + rate), loss=loss)
