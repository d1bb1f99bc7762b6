"""What the processor can do at best: an epoch's matrix products at the rate of bfloat16 products, and Adam's memory."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.adam import adam

from benchmarks.common import FLOP, STEPS

PARAMETERS = 652_824
SHAPES = ((128, 784, 400), (128, 400, 784), (784, 128, 400), (1024, 1024, 1024), (2048, 2048, 2048))


class Floor:
    """`epoch()` is the seconds below which no epoch of this network can fall on this processor with these products."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.pairs = [(torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()) for m, k, n in SHAPES]
        self.weights, self.gradient, self.mean, self.square = (torch.zeros(PARAMETERS) for _ in range(4))
        self.count = torch.zeros(())
        self.rate = 0.0

    def epoch(self) -> float:
        self.rate = max(2 * a.shape[0] * a.shape[1] * b.shape[1] / _seconds(_product(a, b)) for a, b in self.pairs)
        return FLOP / self.rate + STEPS * _seconds(self._update)

    def _update(self) -> None:
        adam(
            [self.weights], [self.gradient], [self.mean], [self.square], [], [self.count], fused=True, amsgrad=False,
            beta1=0.9, beta2=0.999, lr=1e-3, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip


def _product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    return lambda: a @ b


def _seconds(work: Callable[[], object], least: float = 0.1) -> float:
    """Seconds of one call, the mean over at least `least` seconds of them."""
    work()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < least:
        work()
        count += 1
    return (time.perf_counter() - start) / count
