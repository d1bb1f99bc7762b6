"""Flows: invertible maps f of standard normal noise, and what their densities cost.

A flow turns a Gaussian into a distribution of any shape (Rezende & Mohamed 2015, arXiv 1505.05770):

    z = m + s * f(eps)        log q(z) = log N(eps; 0, I) - log|det df/deps| - sum log s

f acts on the noise inside the Gaussian's reparameterisation, so that it sees numbers of order one wherever the codes lie;
an affine layer before f in place of after it gives the same family. In a posterior f also reads a context h(x).

    kind            map                                                       f, with its determinant    inverse
    planar          eps + u tanh(w.eps + b), some layers                      one pass                   unknown
    autoregressive  y_i = a_i + exp(c_i) eps_i, a_i and c_i from eps_<i, h    one pass                   D passes
    spline          y_i = monotone spline of eps_i on [-5, 5]; the second     one pass                   two passes
                    half's knots from the first half and h

One pass of f is what a posterior needs: it draws its samples, and their density comes with the draw (inverse autoregressive
flow, Kingma et al. 2016, arXiv 1606.04934). A prior is asked for the density of given codes, so there the network maps z
to eps in one pass and samples by the inverse (masked autoregressive flow, Papamakarios et al. 2017, arXiv 1705.07057): that
is `inverted`. Splines: Durkan et al. 2019, arXiv 1906.04032. They leave everything outside [-5, 5] where it is, which
bounds the tail, so that quadrature can integrate over a spline prior.

The last layer of each network starts at zero: every flow starts as the identity.

Autoregressive and spline maps are zuko's, an optional dependency. Importing zuko switches off the argument validation of all
of torch.distributions, in the whole program; `zuko_module` puts it back.
"""

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution as TorchDistribution

from vaelab.distributions import full_precision
from vaelab.errors import UsageError

BOUND = 5.0
"""A spline acts on [-BOUND, BOUND] and is the identity outside (zuko's default)."""
SLOPE = 0.1
"""A spline's slopes at its knots lie in [SLOPE, 1 / SLOPE]. With zuko's default of 0.001 float32 loses the inverse: over
random networks log q by the inverse was up to 2.5 nats from that of the draw (here 0.0014), and with larger weights some
inverses were not a number (here none)."""
FLOOR = 1e-3
"""A planar layer's slope along w is at least this."""


def zuko_module() -> ModuleType:
    """zuko, imported when it is first needed, with torch.distributions' argument validation as it was.

    Raises:
        UsageError: it is not installed.
    """
    if (zuko := sys.modules.get("zuko")) is not None:
        return zuko
    validate = TorchDistribution._validate_args
    try:
        return importlib.import_module("zuko")
    except ImportError as error:
        raise UsageError(f"flows need the package zuko ({error}): pip install 'vaelab[flows]'") from None
    finally:
        TorchDistribution.set_default_validate_args(validate)


def autoregressive(dim: int, context: int, layers: int, hidden: Sequence[int]) -> nn.Module:
    """`layers` affine autoregressive maps of (..., dim), in alternating order; with a context (..., context) if > 0."""
    return _stack(dim, context, layers, hidden, passes=dim, affine=True)


def spline(dim: int, context: int, layers: int, hidden: Sequence[int], bins: int) -> nn.Module:
    """`layers` spline couplings of (..., dim), halves alternating; with a context (..., context) if > 0."""
    return _stack(dim, context, layers, hidden, passes=2, affine=False, bins=bins)


def _stack(
    dim: int, context: int, layers: int, hidden: Sequence[int], passes: int, affine: bool, bins: int = 0
) -> nn.Module:
    zuko = zuko_module()
    if affine:
        univariate, shapes = zuko.transforms.MonotonicAffineTransform, [(), ()]
    else:
        univariate = partial(zuko.transforms.MonotonicRQSTransform, bound=BOUND, slope=SLOPE)
        shapes = [(bins,), (bins,), (bins - 1,)]
    order = torch.arange(dim)
    maps = [
        zuko.flows.autoregressive.MaskedAutoregressiveTransform(
            features=dim,
            context=context,
            passes=passes,
            order=order if i % 2 == 0 else order.flip(0),
            univariate=univariate,
            shapes=shapes,
            hidden_features=tuple(hidden),
            activation=nn.ELU,
        )
        for i in range(layers)
    ]
    for one in maps:
        # one dimension without a context has free parameters in place of a network
        free = one.phi if dim == 1 and context == 0 else one.hyper[-1].parameters()
        for parameter in free:
            nn.init.zeros_(parameter)
    return zuko.lazy.LazyComposedTransform(*maps)


@dataclass(frozen=True, eq=False)
class Network:
    """A map of zuko's, with its context.

    Args:
        network: from `autoregressive` or `spline`.
        context: (*batch, C), or None.
        inverted: whether the network maps y to eps, as a prior's does; its f is then the network's inverse.
        extent: see `vaelab.distributions.Bijection`; `BOUND` for splines.
    """

    network: nn.Module
    context: Tensor | None = None
    inverted: bool = False
    extent: float | None = None

    def forward(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        return self._against(eps) if self.inverted else self._along(eps)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        found, log_det = self._along(y) if self.inverted else self._against(y)
        return found, -log_det

    def select(self, index: slice | Tensor) -> Self:
        return self if self.context is None else replace(self, context=self.context[..., index, :])

    def _along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The network's image of x, and log|det| of the network's Jacobian."""
        with full_precision(x):
            return self.network(self.context).call_and_ladj(x)

    def _against(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The x whose image is y, and log|det| of the inverse's Jacobian."""
        with full_precision(y):
            transform = self.network(self.context)
            x = transform.inv(y)
            return x, -transform.call_and_ladj(x)[1]


@dataclass(frozen=True, eq=False)
class PlanarLayers:
    """f = f_L o ... o f_1, f_l(z) = z + u_l tanh(w_l.z + b_l) (Rezende & Mohamed 2015, eq. 10).

    f_l is invertible where w.u > -1, so u is moved along w until w.u = softplus(w.u + c) - (1 - 0.001) (their appendix
    A.1). Their c = 0 moves u by -0.3 w / |w|^2 even where w.u = 0, which is unbounded as w goes to 0; this c leaves u
    alone there, so u = 0 is the identity.

    Args:
        u, w: (*batch, L, D).
        b: (*batch, L).
    """

    u: Tensor
    w: Tensor
    b: Tensor
    extent: None = None

    def forward(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = eps, torch.zeros_like(eps[..., 0])
        for u, w, b in zip(self.u.unbind(-2), self.w.unbind(-2), self.b.unbind(-1), strict=True):
            along = (w * u).sum(-1)
            allowed = F.softplus(along + math.log(math.expm1(1 - FLOOR))) - (1 - FLOOR)
            square = w.square().sum(-1).clamp_min(torch.finfo(w.dtype).tiny)
            moved = u + ((allowed - along) / square).unsqueeze(-1) * w
            height = torch.tanh((w * z).sum(-1) + b)
            z = z + moved * height.unsqueeze(-1)
            log_det = log_det + torch.log1p(allowed * (1 - height.square()))
        return z, log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Raises UsageError: there is no formula for it."""
        raise UsageError(
            "a planar flow knows the density of its own samples only: its inverse has no formula. Where the density of "
            "other codes is needed, take InverseAutoregressive or NeuralSpline"
        )

    def select(self, index: slice | Tensor) -> Self:
        return replace(self, u=self.u[..., index, :, :], w=self.w[..., index, :, :], b=self.b[..., index, :])
