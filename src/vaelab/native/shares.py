"""Sums of exponentials in one pass (`shares.c`): of rows, and of what groups of codes say of each binary image."""

from typing import Self, TypeGuard

import numpy as np
import torch
from torch import Tensor

from vaelab import pixels
from vaelab.distributions import Distribution
from vaelab.native.build import library
from vaelab.native.calls import kernels, scratch, up


def log_sums(x: Tensor) -> Tensor:
    """log of the sum of e^x over the last axis, as torch.logsumexp, which takes ten times as long for long rows."""
    if (
        x.requires_grad
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or not x.numel()
        or (own := library()) is None
    ):
        return x.logsumexp(-1)
    x = x.contiguous()
    out = x.new_empty(x.shape[:-1])
    own.log_sums(x.data_ptr(), out.data_ptr(), out.numel(), x.shape[-1], torch.get_num_threads())
    return out


class BinaryImages:
    """Images (N, *X) that bfloat16 holds exactly, packed once: `BinaryImages.of` images.

    Their products with float32 logits are three of bfloat16 numbers, with no more rounding than float32's own, in a third
    of the time; and log p(x|z) of every pair, which torch writes and reads six times, is not stored.
    """

    def __init__(self, x: Tensor) -> None:
        self.n, self.pixels = len(x), x[0].numel()
        self.rows = torch.empty(self.n * up(self.pixels), dtype=torch.bfloat16)
        flat = x.contiguous()
        kernels().pack_images(
            flat.data_ptr(), self.rows.data_ptr(), self.n, self.pixels, torch.get_num_threads()
        )  # fmt: skip

    @classmethod
    def of(cls, x: Tensor) -> Self | None:
        """None where there are no kernels, or bfloat16 does not hold these images."""
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
        return cls(x) if plain and library() is not None and torch.equal(x.bfloat16().float(), x) else None

    def serve(self, px: Distribution, group: int) -> TypeGuard[pixels.Bernoulli]:
        """Whether `shares` can be asked about codes that come in groups of so many."""
        sized = 32 % group == 0 or group % 32 == 0
        if type(px) is not pixels.Bernoulli or px.logits.dtype != torch.float32 or not sized:
            return False
        return px.logits.flatten(-px.event_dim).shape[-1] == self.pixels

    def shares(self, px: pixels.Bernoulli, weight: Tensor, groups: int, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """log sum e^(log p(x|z) + weight) over each group of codes, (groups, I), and the largest log p(x|z), (I,).

        Args:
            px: at the codes, batch shape (1, G).
            weight: of each code, (G,).
            groups: how many of equal size the codes fall into.
            images: numbers of the images, (I,).
        """
        logits = px.logits.flatten(-px.event_dim)[0].contiguous()
        weight = weight.to(logits).contiguous()
        threads, codes = torch.get_num_threads(), len(logits)
        of_zeros, none = logits.new_empty(codes), logits.new_zeros(self.pixels)
        kernels().bernoulli(
            logits.data_ptr(), none.data_ptr(), of_zeros.data_ptr(), 0, codes, 1, self.pixels, threads
        )  # fmt: skip
        index = torch.from_numpy(np.ascontiguousarray(images, np.int64))
        top, total = logits.new_empty(2, groups, len(index))
        best = logits.new_empty(len(index))
        room = scratch((3 * up(codes) + up(len(index))) * up(self.pixels))
        kernels().shares(
            logits.data_ptr(), of_zeros.data_ptr(), weight.data_ptr(), self.rows.data_ptr(), index.data_ptr(),
            top.data_ptr(), total.data_ptr(), best.data_ptr(), codes, len(index), self.pixels, codes // groups,
            room.data_ptr(), threads,
        )  # fmt: skip
        return top + total.log(), best
