"""Distributions: small, differentiable, and exactly the ones the library needs.

Why not torch.distributions: it dispatches slowly, validates arguments in every call, and cannot be detached (estimators
such as sticking-the-landing need log q with stopped parameters). Each density here is tested against it, or against an
integral.

A distribution has a batch shape (..., B) and an event of `event_dim` trailing axes. Drawn values carry a leading K.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from vaelab.errors import NoDensity, UsageError

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Distribution(ABC):
    """A distribution over tensors; subclasses are frozen dataclasses whose tensor fields are its parameters."""

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """log density (or mass) of `value` (K, B, *event) in nats, summed over the event: (K, B)."""

    @abstractmethod
    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """`k` samples, (K, *batch, *event), differentiable in the parameters where that is possible."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The mean, (*batch, *event)."""

    def draw(self, k: int = 1, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """`k` samples (K, *batch, *event), and their log density (K, *batch) where drawing gives it for nothing."""
        return self.rsample(k, generator), None

    def log_prob_each(self, value: Tensor) -> Tensor:
        """log density of each event dimension, (K, B, *event), where the distribution factorises over them.

        Raises:
            UsageError: it does not factorise.
        """
        raise UsageError(f"{type(self).__name__} does not factorise over its dimensions")

    def log_tail(self, radius: float) -> float:
        """An upper bound on the log of the mass at a distance of more than `radius` from the origin.

        Raises:
            UsageError: no bound is known.
        """
        raise UsageError(f"no bound on the tail of {type(self).__name__} is known")

    def cross_log_prob(self, values: Tensor) -> Tensor:
        """log density of each of the values (N, *event) under each of the distributions (1, G, *event): (G, N)."""
        rows = [self.log_prob(value.unsqueeze(0))[0] for value in values]
        return torch.stack(rows, 1)

    def select(self, index: slice) -> Self:
        """The distributions of some indices of the last batch axis: (1, G, *event) to (1, len(index), *event)."""
        parts = {name: t for name, t in self._tensors().items() if t.dim() > self._event_dim()}
        return replace(self, **{name: t[..., index, *[slice(None)] * self._event_dim()] for name, t in parts.items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _event_dim(self) -> int:
        return getattr(self, "event_dim", 1)

    def detach(self) -> Self:
        """The same distribution with its parameters stopped."""
        return replace(self, **{name: t.detach() for name, t in self._tensors().items()})


def sum_event(elements: Tensor, event_dim: int) -> Tensor:
    """Sum over the last `event_dim` axes."""
    return elements.flatten(-event_dim).sum(-1) if event_dim else elements


@dataclass(frozen=True, eq=False)
class DiagGaussian(Distribution):
    """Independent normals: `mean_` and `log_std`, (*batch, *event), in the units of the value."""

    mean_: Tensor
    log_std: Tensor
    event_dim: int = 1

    @property
    def mean(self) -> Tensor:
        return self.mean_

    @property
    def std(self) -> Tensor:
        return self.log_std.exp()

    def log_prob(self, value: Tensor) -> Tensor:
        return sum_event(self.log_prob_each(value), self.event_dim)

    def log_prob_each(self, value: Tensor) -> Tensor:
        scaled = (value - self.mean_) * torch.exp(-self.log_std)
        return -0.5 * scaled.square() - self.log_std - 0.5 * LOG_2PI

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        # z = mu + sigma * eps: the reparameterisation (Kingma & Welling 2014, arXiv 1312.6114, section 2.4)
        shape = (k, *self.mean_.shape)
        eps = torch.randn(shape, generator=generator, dtype=self.mean_.dtype, device=self.mean_.device)
        return self.mean_ + self.std * eps


@dataclass(frozen=True, eq=False)
class Delta(Distribution):
    """All mass on one point (a Dirac): what a plain autoencoder's encoder gives. It has no density."""

    point: Tensor

    @property
    def mean(self) -> Tensor:
        return self.point

    def log_prob(self, value: Tensor) -> Tensor:
        raise NoDensity(
            "a Dirac posterior has no density, so this model has no rate, no bound and no importance weights: "
            "train it with ELBO(beta=0), or give it a Gaussian posterior"
        )

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        return self.point.expand(k, *self.point.shape)


def closed_form_kl(q: Distribution, p: Distribution) -> Tensor | None:
    """KL(q || p) for each latent dimension, (B, *D) in nats, or None where no closed form is known.

    Gaussians: log(s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2; for a standard normal p this is eq. 10 of
    Kingma & Welling 2014 with its sign turned.
    """
    if isinstance(q, DiagGaussian) and isinstance(p, DiagGaussian):
        log_ratio = q.log_std - p.log_std
        scaled = (q.mean_ - p.mean_) * torch.exp(-p.log_std)
        return 0.5 * (torch.exp(2 * log_ratio) + scaled.square() - 1) - log_ratio
    return None
