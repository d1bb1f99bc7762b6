"""The trace: what one pass of a model produced, and the algebra every objective and estimator is written in.

Shape legend, used in every docstring of the library
    K samples of the posterior, B images, *D latent event, *X image event.
Units
    Log-densities, `rate`, `distortion`, `elbo` are in nats per image: sums over pixels and latent dimensions.

    distortion = -E_q log p(x|z)      rate = KL(q(z|x) || p(z))      elbo = -(distortion + rate)
    log w_k    = log p(x|z_k) + log p(z_k) - log q(z_k|x)            elbo = E log w,   IWAE_K = E log mean_k w_k

An objective reads a `Trace`, never a model's parts; a hierarchical model yields the same record with more levels.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vaelab.distributions import Distribution, closed_form_kl


@dataclass(frozen=True, eq=False)
class Level:
    """One stochastic layer: its posterior `q`, its prior `p` and the samples `z` (K, B, *D).

    `drawn_log_q` is log q(z|x) where drawing z gave it (a flow); else it is computed when it is asked for.
    """

    q: Distribution
    p: Distribution
    z: Tensor
    drawn_log_q: Tensor | None = None

    @cached_property
    def log_q(self) -> Tensor:
        """log q(z|x), (K, B). Raises NoDensity for a Dirac posterior."""
        return self.q.log_prob(self.z) if self.drawn_log_q is None else self.drawn_log_q

    @cached_property
    def log_p(self) -> Tensor:
        """log p(z), (K, B)."""
        return self.p.log_prob(self.z)

    @cached_property
    def kl(self) -> Tensor:
        """KL(q || p) in nats: (B, *D) where it has a closed form that factorises, else (B, 1) by Monte Carlo over K."""
        exact = closed_form_kl(self.q, self.p)
        return exact if exact is not None else (self.log_q - self.log_p).mean(0).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Trace:
    """One pass of a model.

    Attributes:
        px: p(x|z) at the samples.
        log_px: log p(x|z), (K, B).
        levels: the stochastic layers, from the one nearest to the image.
        aux: a scalar that enters what is differentiated (a commitment loss, say), never a bound.
        noise: where an objective that needs further randomness (samples of the prior) takes it from.
    """

    px: Distribution
    log_px: Tensor
    levels: tuple[Level, ...]
    aux: Tensor | None = None
    noise: torch.Generator | None = None

    @property
    def distortion(self) -> Tensor:
        """-E_q log p(x|z), (B,)."""
        return -self.log_px.mean(0)

    @cached_property
    def rate(self) -> Tensor:
        """KL(q || p) summed over latent dimensions and levels, (B,). Raises NoDensity for a Dirac posterior."""
        return torch.stack([level.kl.flatten(1).sum(1) for level in self.levels]).sum(0)

    def log_w(self) -> Tensor:
        """log p(x, z) - log q(z|x), (K, B). Raises NoDensity for a Dirac posterior."""
        log_ratio = torch.stack([level.log_p - level.log_q for level in self.levels]).sum(0)
        return self.log_px + log_ratio


@dataclass(frozen=True, eq=False)
class Estimate:
    """What an objective makes of a trace.

    Attributes:
        bound: (B,) the lower bound on log p(x) that may be reported, in nats; None where there is none.
        loss: () what is differentiated. Never reported.
    """

    bound: Tensor | None
    loss: Tensor


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """log of the mean of exp(log_w) over `dim`, in float64: the importance-sampled estimate of log p(x)."""
    return torch.logsumexp(log_w.double(), dim) - math.log(log_w.shape[dim])
