"""Sums of exponentials in one pass (`shares.c`): of rows, and of what groups of codes say of each binary image."""

import math
from dataclasses import dataclass
from typing import Self, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from vaelab import pixels
from vaelab.distributions import Distribution
from vaelab.native.build import library
from vaelab.native.calls import kernels, scratch, up
from vaelab.native.decoder import FULL, Decoder

CHUNK = 128
"""Codes that a thread takes at a time: what lies between their layers fits the cache beside a core."""


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


@dataclass(frozen=True)
class Undecoded:
    """p(x|z) at codes that nobody has decoded yet: what a decoder's packed layers read, (G, K)."""

    decoder: Decoder
    inputs: Tensor

    def select(self, index: slice) -> "Undecoded":
        """At some of the codes, as of a distribution."""
        return Undecoded(self.decoder, self.inputs[index])


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

    def decoder(self, likelihood: nn.Module, group: int, parts: int) -> Decoder | None:
        """What decodes codes that come in groups of so many, on their way into `shares`; None where `likelihood` should.

        With the tiles the products of numbers in two parts or three take a third or half the time of torch's. Without, they would
        take longer.
        """
        if not _whole(group) or not kernels().vaelab_tiles():
            return None
        found = Decoder.of(likelihood, parts)
        return found if found is not None and found.pixels == self.pixels else None

    def serve(self, px: Distribution | Undecoded, group: int) -> TypeGuard[pixels.Bernoulli | Undecoded]:
        """Whether `shares` can be asked about codes that come in groups of so many."""
        if isinstance(px, Undecoded):
            return True
        if type(px) is not pixels.Bernoulli or px.logits.dtype != torch.float32 or not _whole(group):
            return False
        return px.logits.flatten(-px.event_dim).shape[-1] == self.pixels

    def shares(
        self, px: pixels.Bernoulli | Undecoded, weight: Tensor, groups: int, images: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """log sum e^(log p(x|z) + weight) over each group of codes, (groups, I), and the largest log p(x|z), (I,).

        Args:
            px: at the codes, batch shape (1, G).
            weight: of each code, (G,).
            groups: how many of equal size the codes fall into.
            images: numbers of the images, (I,).
        """
        threads = torch.get_num_threads()
        if isinstance(px, Undecoded):
            x, packed, widest = px.inputs.contiguous(), (*px.decoder.arguments(), px.decoder.parts), px.decoder.room
            of_zeros = x.new_empty(0)
        else:
            x, packed, widest = px.logits.flatten(-px.event_dim)[0].contiguous(), (0, 0, 0, 0, 0, FULL), 0
            of_zeros, none = x.new_empty(len(x)), x.new_zeros(self.pixels)
            kernels().bernoulli(
                x.data_ptr(), none.data_ptr(), of_zeros.data_ptr(), 0, len(x), 1, self.pixels, threads
            )  # fmt: skip
        weight = weight.to(x).contiguous()
        index = torch.from_numpy(np.ascontiguousarray(images, np.int64))
        top, total = x.new_empty(2, groups, len(index))
        best = x.new_full((threads, len(index)), -math.inf)
        group = len(x) // groups
        chunk = math.lcm(group, 32) * max(1, CHUNK // math.lcm(group, 32))
        each = chunk * (6 * widest + 3 * up(self.pixels) + 66)
        kernels().shares(
            *packed, x.data_ptr(), of_zeros.data_ptr(), weight.data_ptr(), self.rows.data_ptr(), index.data_ptr(),
            top.data_ptr(), total.data_ptr(), best.data_ptr(), len(x), len(index), self.pixels, group, chunk,
            scratch(up(len(index)) * up(self.pixels) + threads * each).data_ptr(), threads,
        )  # fmt: skip
        return top + total.log(), best.amax(0)


def _whole(group: int) -> bool:
    """Whether groups of so many codes fill blocks of 32, or blocks fill them."""
    return 32 % group == 0 or group % 32 == 0
