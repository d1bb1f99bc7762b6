"""Priors p(z): modules that return a distribution over z.

The standard normal is the prior of the first papers, and what `images/generation.png` of the lab samples from.

A prior is called with the model, since a VampPrior is made of the model's own posteriors, and with the labels, since a
conditional prior depends on them. Most read neither.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vaelab.distributions import DiagGaussian, Distribution

if TYPE_CHECKING:
    from vaelab.models.vae import VAE


class Prior(nn.Module, ABC):
    """A module that returns p(z), of `dim` dimensions."""

    dim: int

    @abstractmethod
    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> Distribution:
        """p(z), batch shape () or, where it depends on labels c (B,), (B,)."""

    def check(self, posterior: nn.Module) -> None:
        """Refuse a posterior that this prior cannot be combined with. Raises UsageError."""
        del posterior


class StandardNormal(Prior):
    """N(0, I) in `dim` dimensions."""

    zeros: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)

    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> DiagGaussian:
        return DiagGaussian(self.zeros, self.zeros)


class LabelGaussian(Prior):
    """p(z|c): a diagonal Gaussian for each label, learned (Sohn et al. 2015).

    Args:
        dim: latent dimensions.
        classes: number of labels, 0 to classes - 1.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.dim, self.classes = dim, classes
        self.mean = nn.Parameter(torch.zeros(classes, dim))
        self.log_std = nn.Parameter(torch.zeros(classes, dim))

    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> DiagGaussian:
        index = torch.zeros(1, dtype=torch.long, device=self.mean.device) if c is None else c.long()
        return DiagGaussian(self.mean[index], self.log_std[index])
