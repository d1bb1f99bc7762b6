"""Dense networks: tensors to tensors, of any depth."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.errors import unknown_name

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "leaky-relu": nn.LeakyReLU,
}


class ExactLinear(nn.Linear):
    """A linear layer that computes in its weights' own precision, also where autocast would take bfloat16.

    For the few layers that read or write codes: they cost next to nothing, and rounding a code to 8 bits moves it by
    more than the posterior's sigma.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


class MLP(nn.Module):
    """Dense layers with an activation between them.

    Args:
        in_shape: shape of one input, () axes before it are batch axes; (1, 28, 28), or (2,) for a code.
        hidden: widths of the hidden layers; none for a linear map.
        out_shape: shape of one output.
        activation: a name of `ACTIVATIONS`.
        exact_input: whether the first layer is an `ExactLinear`; by default where the input is a vector, a code.
        out_activation: whether the output passes through the activation too (an encoder's features, read by a head).
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        hidden: Sequence[int],
        out_shape: Sequence[int],
        activation: str = "relu",
        out_activation: bool = False,
        exact_input: bool | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        self.in_shape, self.hidden, self.out_shape = tuple(in_shape), tuple(hidden), tuple(out_shape)
        self.activation, self.out_activation, self.exact_input = activation, out_activation, exact_input
        exact = len(self.in_shape) == 1 if exact_input is None else exact_input
        widths = [math.prod(in_shape), *hidden, math.prod(out_shape)]
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            layers.append(ExactLinear(n_in, n_out) if i == 0 and exact else nn.Linear(n_in, n_out))
            if i < len(hidden) or out_activation:
                layers.append(ACTIVATIONS[activation]())
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., *in_shape) to (..., *out_shape)."""
        h = x.flatten(-len(self.in_shape)) if len(self.in_shape) > 1 else x
        h = self.layers(h)
        return h.unflatten(-1, self.out_shape) if len(self.out_shape) > 1 else h


class FourierMLP(nn.Module):
    """Dense layers that see their input and sines of it: for decoders of few-dimensional codes.

    z, and sqrt(2) sin(W z + b) with fixed W ~ N(0, scale^2) and b ~ U(0, 2 pi), go into an `MLP` (Rahimi & Recht 2007;
    Tancik et al. 2020, arXiv 2006.10739). A dense network bends a two-dimensional plane only slowly; the sines give it
    the curvature that a map of all digits needs.

    Args:
        in_shape: (D,).
        hidden: widths of the hidden layers.
        out_shape: shape of one output.
        activation: a name of `ACTIVATIONS`.
        frequencies: how many sines.
        scale: standard deviation of W: the typical frequency, in radians per unit of z.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(
        self,
        in_shape: Sequence[int],
        hidden: Sequence[int],
        out_shape: Sequence[int],
        activation: str = "silu",
        frequencies: int = 128,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_shape, self.hidden, self.out_shape = tuple(in_shape), tuple(hidden), tuple(out_shape)
        self.activation, self.frequencies, self.scale = activation, frequencies, scale
        (dim,) = self.in_shape
        self.register_buffer("frequency", scale * torch.randn(dim, frequencies))
        self.register_buffer("phase", 2 * math.pi * torch.rand(frequencies))
        self.network = MLP((dim + frequencies,), hidden, out_shape, activation, exact_input=False)

    def forward(self, z: Tensor) -> Tensor:
        """z (..., D) to (..., *out_shape)."""
        with torch.autocast(z.device.type, enabled=False):
            waves = math.sqrt(2) * torch.sin(z @ self.frequency + self.phase)
        return self.network(torch.cat([z, waves], -1))
