"""Draws of p(x|z) as a function of given noise, so that a graph makes them and draws as torch does.

Of two uniform numbers for each pixel: two are enough for every family here, for a mixture takes one to choose the component,
and a normal is the cosine of one at a radius of the other (Box & Muller 1958). `vaelab.pixels` draws the same distributions
from torch's generators, which have no place in a graph.
"""

import math

import torch
from torch import Tensor

from vaelab.distributions import Distribution
from vaelab.pixels import (
    LEVELS,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Gaussian,
    Laplace,
    LogisticMixture,
    continuous_bernoulli_quantile,
)


def draw(px: Distribution, u: Tensor) -> Tensor | None:
    """One draw (N, *X) of p(x|z) (1, N, *X), or None of a family that is not known here.

    Args:
        px: of event (C, H, W).
        u: (N, 2, *X), independent and uniform in (0, 1].
    """
    one, other = u[:, 0], u[:, 1]
    if isinstance(px, Bernoulli):
        return (one < px.mean[0]).to(u.dtype)
    if isinstance(px, ContinuousBernoulli):
        return continuous_bernoulli_quantile(px.logits[0], one)
    if isinstance(px, Gaussian):
        return px.mean[0] + _first(px.log_std).exp() * torch.sqrt(-2 * one.log()) * torch.cos(2 * math.pi * other)
    if isinstance(px, Laplace):
        return px.mean[0] + _first(px.log_scale).exp() * (one.log() - other.log())
    if isinstance(px, LogisticMixture):
        weight, centre, log_scale = (part[0] for part in px._parts())  # (N, J, *X)
        below = torch.cumsum(weight.exp(), 1) < other.unsqueeze(1)
        chosen = below.sum(1, keepdim=True).clamp(max=px.components - 1)
        centre, log_scale = (part.gather(1, chosen).squeeze(1) for part in (centre, log_scale))
        x = centre + log_scale.exp() * (one.log() - torch.log1p(-one))
        return (x.clamp(0, 1) * (LEVELS - 1)).round() / (LEVELS - 1)
    if isinstance(px, Categorical):
        below = torch.cumsum(torch.softmax(px._each()[0], 1), 1) < one.unsqueeze(1)
        return below.sum(1).clamp(max=LEVELS - 1).to(u.dtype) / (LEVELS - 1)
    return None


def _first(parameter: Tensor) -> Tensor:
    """A parameter of all pixels (), or of each (1, N, *X), without its first axis."""
    return parameter[0] if parameter.dim() else parameter
