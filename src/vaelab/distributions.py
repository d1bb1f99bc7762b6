"""Distributions: small, differentiable, and exactly the ones the library needs.

Why not torch.distributions: it dispatches slowly, validates arguments in every call, and cannot be detached (estimators
such as sticking-the-landing need log q with stopped parameters). Each density here is tested against it, or against an
integral.

A distribution has a batch shape (..., B) and an event of `event_dim` trailing axes. Drawn values carry a leading K.

    DiagGaussian   z = m + s * eps                   Kingma & Welling 2014, arXiv 1312.6114, section 2.4
    FullGaussian   z = m + L eps                     Kingma & Welling 2019, arXiv 1906.02691, section 2.5.1
    Laplace        z = m + b * e, |e| ~ Exp(1)       heavier tails, and sparse codes as a prior
    Mixture        sum over m of w_m p_m(z)          as a prior; sampling picks a component, so no gradient to w
    Transformed    z = m + s * f(eps)                a flow: log q(z) = log N(eps; 0, I) - log|det df/deps| - sum log s
    Delta          z = m                             no density

Which of them have a closed-form KL stands in one table at the end; what is not in it is estimated by Monte Carlo.

Matrix products with codes in them run in float32 or better, whatever the precision of training (`full_precision`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import numpy as np
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

    def log_prob_all(self, value: Tensor) -> Tensor:
        """log density of each of the values (K, B, *event) under each of the distributions (M, *event): (K, B, M)."""
        return self.log_prob(value.unsqueeze(-1 - self._event_dim()))

    def cross_log_prob(self, values: Tensor) -> Tensor:
        """log density of each of the values (N, *event) under each of the distributions (1, G, *event): (G, N)."""
        rows = [self.log_prob(value.unsqueeze(0))[0] for value in values]
        return torch.stack(rows, 1)

    def select(self, index: slice | Tensor) -> Self:
        """The distributions of some indices of the last batch axis: (1, G, *event) to (1, len(index), *event)."""
        parts = {name: t for name, t in self._tensors().items() if t.dim() > self._event_dim()}
        return replace(self, **{name: t[..., index, *[slice(None)] * self._event_dim()] for name, t in parts.items()})

    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that it is made of."""
        return tuple(self._tensors().values())

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


def full_precision(tensor: Tensor) -> torch.autocast:
    """The context in which products with codes are computed: no autocast to bfloat16."""
    return torch.autocast(tensor.device.type, enabled=False)


def log_chi2_tail(squared: float, dof: int) -> float:
    """log Prob(chi^2 > squared) with `dof` degrees of freedom; where that underflows its Chernoff bound."""
    from scipy.special import chdtr, chdtrc  # scipy.stats, which is made of them, is slow to import

    if squared <= 0:
        return 0.0
    tail = float(chdtrc(dof, squared))
    if tail > 0.5:  # near 1 the logarithm needs the digits of the other side
        return float(np.log1p(-chdtr(dof, squared)))
    exact = float(np.log(tail)) if tail > 0 else -math.inf
    return exact if math.isfinite(exact) else 0.5 * (dof - squared + dof * math.log(squared / dof))


def _reach(radius: float, centre: Tensor, scale: Tensor) -> float:
    """(radius - |centre|) / scale of the batch member that reaches furthest; centre (*batch, D), scale (*batch,)."""
    centre, scale = centre.detach().double(), scale.detach().double()
    return float(((radius - torch.linalg.vector_norm(centre, dim=-1)) / scale).min())


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

    def log_prob_all(self, value: Tensor) -> Tensor:
        # (z - m)^2 / s^2 = z^2 / s^2 - 2 z m / s^2 + m^2 / s^2: two matrix products in place of K B M D differences; in
        # float64, since the three terms cancel
        x = value.flatten(-self.event_dim).double()
        mean, log_std = (t.flatten(-self.event_dim).double() for t in torch.broadcast_tensors(self.mean_, self.log_std))
        precision = torch.exp(-2 * log_std)
        with full_precision(x):
            square = x.square() @ precision.T - 2 * x @ (precision * mean).T + (precision * mean.square()).sum(-1)
        return (-0.5 * square - log_std.sum(-1) - 0.5 * LOG_2PI * x.shape[-1]).to(value.dtype)

    def cross_log_prob(self, values: Tensor) -> Tensor:
        one = replace(self, mean_=self.mean_.squeeze(0), log_std=self.log_std.expand_as(self.mean_).squeeze(0))
        return one.log_prob_all(values).T

    def log_tail(self, radius: float) -> float:
        # |z| > R needs |z - m| > R - |m|, and |z - m| <= max(s) |eps|
        mean, std = (t.flatten(-self.event_dim) for t in torch.broadcast_tensors(self.mean_, self.std))
        reach = _reach(radius, mean, std.amax(-1))
        return log_chi2_tail(max(reach, 0.0) ** 2, mean.shape[-1])

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        # z = mu + sigma * eps: the reparameterisation (Kingma & Welling 2014, arXiv 1312.6114, section 2.4)
        return self.mean_ + self.std * _noise(self.mean_, k, generator)


def _noise(like: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn((k, *like.shape), generator=generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, eq=False)
class FullGaussian(Distribution):
    """A normal with any covariance L L^T.

    Args:
        mean_: (*batch, D).
        scale_tril: L, (*batch, D, D), lower triangular with a positive diagonal; the part above it is not read.
    """

    mean_: Tensor
    scale_tril: Tensor

    @property
    def mean(self) -> Tensor:
        return self.mean_

    def log_prob(self, value: Tensor) -> Tensor:
        scaled = _solve(self.scale_tril, value - self.mean_)
        return -0.5 * scaled.square().sum(-1) - self._log_det() - 0.5 * LOG_2PI * value.shape[-1]

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        eps = _noise(self.mean_, k, generator)
        with full_precision(eps):
            return self.mean_ + (self.scale_tril.tril() @ eps.unsqueeze(-1)).squeeze(-1)

    def select(self, index: slice | Tensor) -> Self:
        return replace(self, mean_=self.mean_[..., index, :], scale_tril=self.scale_tril[..., index, :, :])

    def log_tail(self, radius: float) -> float:
        largest = torch.linalg.matrix_norm(self.scale_tril.detach().tril().double(), 2)  # |L eps| <= largest * |eps|
        return log_chi2_tail(max(_reach(radius, self.mean_, largest), 0.0) ** 2, self.mean_.shape[-1])

    def _log_det(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _solve(scale_tril: Tensor, difference: Tensor) -> Tensor:
    """L^-1 d for L (*batch, D, D) and d (K, *batch, D): the K become columns, so that L is not copied for each."""
    extra = difference.dim() + 1 - scale_tril.dim()
    with full_precision(difference):
        if extra <= 0:
            return torch.linalg.solve_triangular(scale_tril, difference.unsqueeze(-1), upper=False).squeeze(-1)
        columns = difference.flatten(0, extra - 1).movedim(0, -1)
        solved = torch.linalg.solve_triangular(scale_tril, columns, upper=False).movedim(-1, 0)
    return solved.unflatten(0, difference.shape[:extra])


@dataclass(frozen=True, eq=False)
class Laplace(Distribution):
    """Independent Laplace densities exp(-|z - m| / b) / 2b: `loc` m and `log_scale` log b, (*batch, *event)."""

    loc: Tensor
    log_scale: Tensor
    event_dim: int = 1

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def std(self) -> Tensor:
        return math.sqrt(2) * self.log_scale.exp()

    def log_prob(self, value: Tensor) -> Tensor:
        return sum_event(self.log_prob_each(value), self.event_dim)

    def log_prob_each(self, value: Tensor) -> Tensor:
        return -(value - self.loc).abs() * torch.exp(-self.log_scale) - self.log_scale - math.log(2)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        # one uniform gives the sign and, in [0, 1), what the exponential is made of: log(0) cannot occur
        shape = (k, *self.loc.shape)
        u = 2 * torch.rand(shape, generator=generator, dtype=self.loc.dtype, device=self.loc.device)
        eps = torch.where(u < 1, torch.log1p(-u), -torch.log1p(-(u - 1)))
        return self.loc + self.log_scale.exp() * eps

    def log_tail(self, radius: float) -> float:
        # |z - m| <= max(b) times the sum of D standard exponentials, and twice that sum is chi^2 with 2 D
        loc, scale = (t.flatten(-self.event_dim) for t in torch.broadcast_tensors(self.loc, self.log_scale.exp()))
        return log_chi2_tail(2 * _reach(radius, loc, scale.amax(-1)), 2 * loc.shape[-1])


@dataclass(frozen=True, eq=False)
class Mixture(Distribution):
    """sum over m of w_m p_m(z), one mixture: batch shape ().

    Args:
        logits: (M,); the weights are their softmax.
        components: batch shape (M,), event *D.
    """

    logits: Tensor
    components: Distribution

    @property
    def event_dim(self) -> int:
        return self.components._event_dim()

    @property
    def mean(self) -> Tensor:
        return torch.tensordot(torch.softmax(self.logits, 0), self.components.mean, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.logsumexp(torch.log_softmax(self.logits, 0) + self.components.log_prob_all(value), -1)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """`k` samples, (k, *D): differentiable in the components, not in the logits (which component is a draw)."""
        weights = torch.softmax(self.logits.detach(), 0)
        chosen = torch.multinomial(weights, k, replacement=True, generator=generator)
        return self.components.select(chosen).rsample(1, generator)[0]

    def detach(self) -> Self:
        return replace(self, logits=self.logits.detach(), components=self.components.detach())

    def log_tail(self, radius: float) -> float:
        return self.components.log_tail(radius)  # that of the component that reaches furthest


class Bijection(Protocol):
    """An invertible map of (K, *batch, D), and what the density needs of it; see `vaelab.flows`."""

    def forward(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """f(eps) (K, *batch, D) and log|det df/deps| (K, *batch)."""
        ...

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """eps with f(eps) = y, and log|det df/deps| there. Raises UsageError where no inverse is known."""
        ...

    def select(self, index: slice | Tensor) -> Self:
        """The maps of some indices of the last batch axis."""
        ...

    @property
    def extent(self) -> float | None:
        """A if each coordinate of f(eps) is at most max(A, |its own of eps|) in size; None where no A is known."""
        ...


@dataclass(frozen=True, eq=False)
class Transformed(Distribution):
    """A flow: z = m + s * f(eps) with standard normal eps, where m and s are the mean and deviations of `base`.

    With f the identity this is `base`. `draw` gives log q(z) from the forward pass alone.
    """

    base: DiagGaussian
    flow: Bijection

    @property
    def mean(self) -> Tensor:
        """The image of the base's mean, m + s * f(0), (*batch, D): a code, not the mean, which has no closed form."""
        centre, _ = self.flow.forward(torch.zeros_like(self.base.mean_).unsqueeze(0))
        return self.base.mean_ + self.base.std * centre.squeeze(0)

    def draw(self, k: int = 1, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        eps = _noise(self.base.mean_, k, generator)
        y, log_det = self.flow.forward(eps)
        return self.base.mean_ + self.base.std * y, self._log_density(eps, log_det)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        return self.draw(k, generator)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z) (K, B) through the inverse. Raises UsageError where the flow has none that can be computed."""
        return self._log_density(*self.flow.inverse((value - self.base.mean_) * torch.exp(-self.base.log_std)))

    def _log_density(self, eps: Tensor, log_det: Tensor) -> Tensor:
        return -0.5 * (eps.square() + LOG_2PI).sum(-1) - log_det - self.base.log_std.sum(-1)

    def detach(self) -> Self:
        """Raises UsageError: the parameters of a flow are a network's, and cannot be stopped for one density."""
        raise UsageError(
            "log q with stopped parameters, which STL and DReG need, cannot be had from a flow: "
            "train it with ELBO or IWAE, or take a Gaussian posterior"
        )

    def select(self, index: slice | Tensor) -> Self:
        return replace(self, base=self.base.select(index), flow=self.flow.select(index))

    def log_tail(self, radius: float) -> float:
        if self.flow.extent is None:
            return super().log_tail(radius)
        # |f(eps)|^2 <= |eps|^2 + D A^2
        reach = max(_reach(radius, self.base.mean_, self.base.std.amax(-1)), 0.0)
        dim = self.base.mean_.shape[-1]
        return log_chi2_tail(reach**2 - dim * self.flow.extent**2, dim)


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
    """KL(q || p) in nats: (B, *D) for each latent dimension where both factorise, (B, 1) in total where one of them is a
    `FullGaussian`, None where no closed form is known (mixtures, flows).
    """
    known = _CLOSED_FORMS.get((type(q), type(p)))
    return None if known is None else known(q, p)


def _gaussians(q: DiagGaussian, p: DiagGaussian) -> Tensor:
    # log(s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2; for a standard normal p this is eq. 10 of
    # Kingma & Welling 2014 with its sign turned
    log_ratio = q.log_std - p.log_std
    scaled = (q.mean_ - p.mean_) * torch.exp(-p.log_std)
    return 0.5 * (torch.exp(2 * log_ratio) + scaled.square() - 1) - log_ratio


def _laplaces(q: Laplace, p: Laplace) -> Tensor:
    # log(b_p / b_q) + (|d| + b_q exp(-|d| / b_q)) / b_p - 1, d = m_q - m_p
    log_ratio = q.log_scale - p.log_scale
    distance = (q.loc - p.loc).abs()
    near = torch.exp(log_ratio - distance * torch.exp(-q.log_scale))
    return distance * torch.exp(-p.log_scale) + near - 1 - log_ratio


def _gaussian_laplace(q: DiagGaussian, p: Laplace) -> Tensor:
    # -H(q) + log 2b + E|z - m_p| / b, with the mean of a folded normal
    difference = q.mean_ - p.loc
    scaled = difference * torch.exp(-q.log_std)
    folded = math.sqrt(2 / math.pi) * q.std * torch.exp(-0.5 * scaled.square())
    folded = folded + difference * torch.erf(scaled / math.sqrt(2))
    return folded * torch.exp(-p.log_scale) + p.log_scale - q.log_std + math.log(2) - 0.5 * (LOG_2PI + 1)


def _laplace_gaussian(q: Laplace, p: DiagGaussian) -> Tensor:
    # -H(q) + log(s sqrt(2 pi)) + (2 b^2 + (m_q - m_p)^2) / (2 s^2), H(q) = 1 + log 2b
    spread = 2 * torch.exp(2 * (q.log_scale - p.log_std))
    scaled = (q.loc - p.mean_) * torch.exp(-p.log_std)
    return 0.5 * (spread + scaled.square() + LOG_2PI) + p.log_std - q.log_scale - 1 - math.log(2)


def _full(q: DiagGaussian | FullGaussian, p: DiagGaussian | FullGaussian) -> Tensor:
    # (|L_p^-1 L_q|^2 + |L_p^-1 (m_q - m_p)|^2 - D) / 2 + log det L_p - log det L_q
    q, p = _as_full(q), _as_full(p)
    columns = torch.cat([q.scale_tril.tril(), (q.mean_ - p.mean_).unsqueeze(-1)], -1)
    with full_precision(columns):
        squares = torch.linalg.solve_triangular(p.scale_tril, columns, upper=False).square().sum((-1, -2))
    return (0.5 * (squares - q.mean_.shape[-1]) + p._log_det() - q._log_det()).unsqueeze(-1)


def _as_full(one: DiagGaussian | FullGaussian) -> FullGaussian:
    return one if isinstance(one, FullGaussian) else FullGaussian(one.mean_, torch.diag_embed(one.std))


_CLOSED_FORMS: dict[tuple[type, type], Callable[[Any, Any], Tensor]] = {
    (DiagGaussian, DiagGaussian): _gaussians,
    (Laplace, Laplace): _laplaces,
    (DiagGaussian, Laplace): _gaussian_laplace,
    (Laplace, DiagGaussian): _laplace_gaussian,
    (FullGaussian, DiagGaussian): _full,
    (DiagGaussian, FullGaussian): _full,
    (FullGaussian, FullGaussian): _full,
}
