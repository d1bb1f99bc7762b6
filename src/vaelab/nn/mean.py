"""The mean image: networks that start from it.

Most of what an image of a data set is, all of them share. A network that begins with that for nothing learns the rest
several times sooner: `Centred` takes the mean away from what an encoder reads, `AroundMean` adds it to what a decoder
says. Both are constants of the model, not parameters, zero until `start_at` was called (`vaelab.training.initial_model`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EXTREME = 1e-3
"""How near to 0 or 1 a pixel's mean is taken to be at most: the logit of a margin that is always black is finite."""


class _FromMean(nn.Module):
    """A network and a constant of the image's shape, which `start_at` sets."""

    def __init__(self, network: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.network, self.shape = network, tuple(shape)
        self.register_buffer("constant", torch.zeros(self.shape))

    constant: Tensor


class Centred(_FromMean):
    """network(x - mean): an encoder whose input has mean zero.

    Args:
        network: images (..., *shape) to features.
        shape: of one image.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x - self.constant)  # type: ignore[no-any-return]

    @torch.no_grad()
    def start_at(self, mean: Tensor) -> None:
        """`mean` of the training images, (*shape)."""
        self.constant.copy_(mean)


class AroundMean(_FromMean):
    """network(z) + logit(mean): a decoder of logits that starts at the mean image, in float32.

    Args:
        network: codes (..., D) to logits (..., *shape).
        shape: of one image.
    """

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z) + self.constant  # type: ignore[no-any-return]

    @torch.no_grad()
    def start_at(self, mean: Tensor) -> None:
        """`mean` of the training images, (*shape), in [0, 1]."""
        self.constant.copy_(mean.clamp(EXTREME, 1 - EXTREME).logit())
