"""Priors p(z): modules that return a distribution over z.

The standard normal is the prior of the first papers, and what `images/generation.png` of the lab samples from.
"""

import torch
from torch import Tensor, nn

from vaelab.distributions import DiagGaussian


class StandardNormal(nn.Module):
    """N(0, I) in `dim` dimensions."""

    zeros: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)

    def forward(self) -> DiagGaussian:
        return DiagGaussian(self.zeros, self.zeros)
