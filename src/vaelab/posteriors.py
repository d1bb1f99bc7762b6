"""Posteriors q(z|x): modules that read the encoder's features and return a distribution over z.

The diagonal Gaussian is the posterior of the first papers (Kingma & Welling 2014, arXiv 1312.6114; Rezende et al. 2014,
arXiv 1401.4082). The true posterior p(z|x) is in general no such thing, and the bound falls short of log p(x) by
KL(q(z|x) || p(z|x)); the members differ in how much of that they can remove, and in what can be computed of them.

    member                  shape                                    KL from a Gaussian     density of any z
    Gaussian                an ellipse along the axes                closed, each dim       yes
    FullGaussian            any ellipse (correlated codes)           closed, in total       yes
    Laplace                 a peak with heavier tails                closed, each dim       yes
    InverseAutoregressive   a flow (arXiv 1606.04934)                Monte Carlo            yes, in D passes
    NeuralSpline            a flow (arXiv 1906.04032)                Monte Carlo            yes, in two passes
    Planar                  a flow (arXiv 1505.05770)                Monte Carlo            of its own samples only
    Delta                   a point: with it, a plain autoencoder    none                   none

The flows (`vaelab.flows`) start as the Gaussian, and with ``layers=0`` are it. Their network reads, beside z, a context
h(x): further outputs of the last layer, as many as the network's first hidden layer is wide.

Each owns the last linear layer, from `features` to its parameters, and computes it in float32 whatever the precision
of training: a code of 20 with sigma 0.01 has no bfloat16 neighbour nearer than 0.06. The flows' networks do the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vaelab import flows
from vaelab.distributions import Delta as DeltaDistribution
from vaelab.distributions import DiagGaussian, Transformed
from vaelab.distributions import FullGaussian as FullGaussianDistribution
from vaelab.distributions import Laplace as LaplaceDistribution
from vaelab.errors import UsageError
from vaelab.nn.mlp import ExactLinear


def whole(name: str, value: int, least: int = 1) -> int:
    """`value`, a constructor argument called `name`. Raises UsageError unless it is an integer of `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} is {value!r}: expected an integer of {least} or more")
    return value


def widths(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """The widths of hidden layers, as a tuple. Raises UsageError unless they are integers of 1 or more."""
    if not isinstance(values, list | tuple):
        raise UsageError(f"{name} is {values!r}: expected the widths of its layers, as in (64,) or (64, 64)")
    return tuple(whole(name, value) for value in values)


def _head(features: int, outputs: int, at_zero: slice = slice(0)) -> ExactLinear:
    """The last layer; the outputs in `at_zero` start at zero."""
    head = ExactLinear(features, outputs)
    with torch.no_grad():
        head.weight[at_zero].zero_()
        head.bias[at_zero].zero_()
    return head


def _gaussian(parameters: Tensor, dim: int) -> DiagGaussian:
    mean, log_variance = parameters[..., : 2 * dim].chunk(2, dim=-1)
    return DiagGaussian(mean, 0.5 * log_variance)


class Gaussian(nn.Module):
    """Diagonal Gaussian: features (B, features) to mean and log sigma, each (B, dim)."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.features, self.dim = whole("features", features), whole("dim", dim)
        self.head = ExactLinear(features, 2 * dim)

    def forward(self, h: Tensor) -> DiagGaussian:
        return _gaussian(self.head(h), self.dim)


class FullGaussian(nn.Module):
    """Gaussian with any covariance L L^T: features (B, features) to mean (B, dim) and L (B, dim, dim).

    The diagonal of L is the exponential of an output, what is below it is one (Kingma & Welling 2019, arXiv 1906.02691,
    section 2.5.1) and starts at zero: the diagonal Gaussian.
    """

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.features, self.dim = whole("features", features), whole("dim", dim)
        self.head = _head(features, 2 * dim + dim * (dim - 1) // 2, slice(2 * dim, None))

    def forward(self, h: Tensor) -> FullGaussianDistribution:
        parameters = self.head(h)
        diagonal = _gaussian(parameters, self.dim)
        row, column = torch.tril_indices(self.dim, self.dim, -1, device=parameters.device)
        scale_tril = torch.diag_embed(diagonal.std)
        scale_tril[..., row, column] = parameters[..., 2 * self.dim :]
        return FullGaussianDistribution(diagonal.mean_, scale_tril)


class Laplace(nn.Module):
    """Independent Laplace densities: features (B, features) to location and log scale, each (B, dim)."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.features, self.dim = whole("features", features), whole("dim", dim)
        self.head = ExactLinear(features, 2 * dim)

    def forward(self, h: Tensor) -> LaplaceDistribution:
        return LaplaceDistribution(*self.head(h).chunk(2, dim=-1))


class Delta(nn.Module):
    """Dirac: features (B, features) to a point (B, dim). With ``ELBO(beta=0)`` this is a plain autoencoder."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.features, self.dim = whole("features", features), whole("dim", dim)
        self.head = ExactLinear(features, dim)

    def forward(self, h: Tensor) -> DeltaDistribution:
        return DeltaDistribution(self.head(h))


class InverseAutoregressive(nn.Module):
    """Inverse autoregressive flow over a diagonal Gaussian (Kingma et al. 2016, arXiv 1606.04934).

    Drawing, and the density of what is drawn, take one pass; the density of another z takes `dim` passes. The determinant
    is that of a triangular matrix. The order of the dimensions alternates from layer to layer.

    Args:
        features: of the encoder.
        dim: latent dimensions.
        layers: autoregressive maps; 0 is the Gaussian itself.
        hidden: widths of each map's masked network.

    Raises:
        UsageError: an argument out of range, or zuko is not installed.
    """

    def __init__(self, features: int, dim: int, layers: int = 2, hidden: Sequence[int] = (64,)) -> None:
        super().__init__()
        self.features, self.dim = whole("features", features), whole("dim", dim)
        self.layers, self.hidden = whole("layers", layers, 0), widths("hidden", hidden)
        context = _context_width(self.layers, self.hidden, dim)
        self.head = ExactLinear(features, 2 * dim + context)
        self.network = flows.autoregressive(dim, context, layers, self.hidden) if layers else None

    def forward(self, h: Tensor) -> DiagGaussian | Transformed:
        return _flow(self.head(h), self.dim, self.network)


class NeuralSpline(nn.Module):
    """Coupling flow of rational-quadratic splines over a diagonal Gaussian (Durkan et al. 2019, arXiv 1906.04032).

    Each layer moves the first half of the dimensions by splines whose knots depend on x, and the second by splines whose
    knots depend on x and the first half; the halves alternate. One pass forwards, two back.

    Args:
        features: of the encoder.
        dim: latent dimensions; with one, the spline's knots depend on x alone.
        layers: spline maps; 0 is the Gaussian itself.
        hidden: widths of each map's network.
        bins: of each spline, 2 or more.

    Raises:
        UsageError: an argument out of range, or zuko is not installed.
    """

    def __init__(self, features: int, dim: int, layers: int = 2, hidden: Sequence[int] = (64,), bins: int = 8) -> None:
        super().__init__()
        self.features, self.dim = whole("features", features), whole("dim", dim)
        self.layers, self.hidden, self.bins = (
            whole("layers", layers, 0),
            widths("hidden", hidden),
            whole("bins", bins, 2),
        )
        context = _context_width(self.layers, self.hidden, dim)
        self.head = ExactLinear(features, 2 * dim + context)
        self.network = flows.spline(dim, context, layers, self.hidden, bins) if layers else None

    def forward(self, h: Tensor) -> DiagGaussian | Transformed:
        return _flow(self.head(h), self.dim, self.network, flows.BOUND)


def _context_width(layers: int, hidden: tuple[int, ...], dim: int) -> int:
    # the first layer is linear in the context, so a wider one would add nothing to a single map
    return (hidden[0] if hidden else 2 * dim) if layers else 0


def _flow(
    parameters: Tensor, dim: int, network: nn.Module | None, extent: float | None = None
) -> DiagGaussian | Transformed:
    base = _gaussian(parameters, dim)
    if network is None:
        return base
    return Transformed(base, flows.Network(network, parameters[..., 2 * dim :], extent=extent))


class Planar(nn.Module):
    """Planar flow over a diagonal Gaussian, its parameters amortised (Rezende & Mohamed 2015, arXiv 1505.05770).

    Each layer bends the density along one direction, so that many are needed in many dimensions. No inverse: the density
    is known of its own samples only, and objectives and quantities that need another's say so.

    Args:
        features: of the encoder.
        dim: latent dimensions.
        layers: planar maps; 0 is the Gaussian itself.
    """

    def __init__(self, features: int, dim: int, layers: int = 8) -> None:
        super().__init__()
        self.features, self.dim, self.layers = (
            whole("features", features),
            whole("dim", dim),
            whole("layers", layers, 0),
        )
        # u starts at zero, the identity; w does not, or neither would have a gradient
        self.head = _head(features, 2 * dim + layers * (2 * dim + 1), slice(2 * dim, 2 * dim + layers * dim))

    def forward(self, h: Tensor) -> DiagGaussian | Transformed:
        parameters = self.head(h)
        base = _gaussian(parameters, self.dim)
        if not self.layers:
            return base
        n = self.layers * self.dim
        u, w, b = parameters[..., 2 * self.dim :].split([n, n, self.layers], -1)
        shape = (self.layers, self.dim)
        return Transformed(base, flows.PlanarLayers(u.unflatten(-1, shape), w.unflatten(-1, shape), b))
