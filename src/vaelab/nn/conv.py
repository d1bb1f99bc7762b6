"""Convolutional networks, plain and residual, for images of any size and number of channels.

Down: 3x3 convolutions of stride 2 and padding 1 take a side of n to ceil(n / 2), from any n down to 1. Up: the decoder
works out the sides of its stages from the image's (28, 14, 7; 27, 14, 7), and 4x4 transposed convolutions of stride 2
and padding 1 double a side, of which the last row or column is cut off where the next side is odd. A kernel that the
stride divides touches each output equally often, which 3x3 does not (checkerboards: Odena et al. 2016), and takes 4
products an output where resizing before a 3x3 convolution takes 9.

Residual blocks are pre-activation, h + conv(act(conv(act(h)))) (He et al. 2016, arXiv 1603.05027), with the last
convolution zero at first, so that a deep network starts as a shallow one (Zhang et al. 2019, arXiv 1901.09321) and needs
no normalisation. There is none: batch normalisation would make the likelihood of an image depend on its neighbours in
the batch.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vaelab.errors import UsageError, unknown_name
from vaelab.nn.mlp import ACTIVATIONS, ExactLinear


class _Residual(nn.Module):
    """h + conv(act(conv(act(h)))), the identity at first."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        act = ACTIVATIONS[activation]
        self.layers = nn.Sequential(act(), nn.Conv2d(channels, channels, 3, padding=1), act(), last)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layers(h)


class Double(nn.Module):
    """A transposed convolution from (B, C, h, w) to (B, C', rows, columns), rows 2h or 2h - 1."""

    def __init__(self, n_in: int, n_out: int, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.convolution = nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.convolution(h)[..., : self.rows, : self.columns]


class ConvEncoder(nn.Module):
    """Images to features, by convolutions that halve the sides.

    Args:
        in_shape: (C, H, W), or (C + classes, H, W) inside `WithLabel`.
        channels: of each stage; each halves both sides.
        features: F.
        residual: whether each stage has a residual block.
        activation: a name of `vaelab.nn.mlp.ACTIVATIONS`.

    Raises:
        UsageError: a shape, channel or feature number that is none, or an unknown activation.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        features: int = 256,
        residual: bool = False,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.in_shape, self.channels, self.features = tuple(in_shape), tuple(channels), features
        self.residual, self.activation = residual, activation
        _check("in_shape", self.in_shape, 3)
        _check("channels", self.channels)
        _check("features", (features,))
        act = _activation(activation)
        n_in, rows, columns = self.in_shape
        layers: list[nn.Module] = []
        for width in self.channels:
            # a side of 1 stays 1 with either stride; with stride 2 the bfloat16 weight gradient of torch 2.13's CPU kernel
            # is memory that nobody wrote to
            stride = (1 if rows == 1 else 2, 1 if columns == 1 else 2)
            layers.append(nn.Conv2d(n_in, width, 3, stride=stride, padding=1))
            layers.extend([_Residual(width, activation)] if residual else [])
            layers.append(act())
            n_in, rows, columns = width, math.ceil(rows / 2), math.ceil(columns / 2)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(n_in * rows * columns, features), act())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C, H, W) to features (..., F)."""
        return self.layers(x.reshape(-1, *self.in_shape)).reshape(*x.shape[:-3], self.features)


class ConvDecoder(nn.Module):
    """Codes to images, or to the parameters of their pixels, by transposed convolutions that double the sides.

    The first layer is an `ExactLinear`, since it reads codes.

    Args:
        in_shape: (D,), or (D + classes,) inside `WithLabel`.
        channels: of each stage, from the smallest sides on.
        out_shape: (C, H, W), as a likelihood's `outputs` gives it.
        residual: whether each stage has a residual block.
        activation: a name of `vaelab.nn.mlp.ACTIVATIONS`.

    Raises:
        UsageError: a shape or channel number that is none, or an unknown activation.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        out_shape: Sequence[int] = (1, 28, 28),
        residual: bool = False,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.in_shape, self.channels, self.out_shape = tuple(in_shape), tuple(channels), tuple(out_shape)
        self.residual, self.activation = residual, activation
        _check("in_shape", self.in_shape, 1)
        _check("channels", self.channels)
        _check("out_shape", self.out_shape, 3)
        act = _activation(activation)
        n_out, *side = self.out_shape
        sides = [tuple(side)]
        for _ in self.channels:
            sides.insert(0, tuple(math.ceil(n / 2) for n in sides[0]))
        self.start = (self.channels[0], *sides[0])
        self.first = ExactLinear(self.in_shape[0], math.prod(self.start))
        layers: list[nn.Module] = []
        for width, after, (rows, columns) in zip(self.channels, [*self.channels[1:], n_out], sides[1:], strict=True):
            layers.extend([_Residual(width, activation)] if residual else [])
            layers += [act(), Double(width, after, rows, columns)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """z (..., D) to (..., *out_shape)."""
        h = self.first(z).reshape(-1, *self.start)
        return self.layers(h).reshape(*z.shape[:-1], *self.out_shape)


def _activation(name: str) -> type[nn.Module]:
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def _check(name: str, values: tuple[int, ...], count: int | None = None) -> None:
    if not values or min(values) < 1 or count not in (None, len(values)):
        expected = "one or more" if count is None else str(count)
        raise UsageError(f"{name} is {values}: expected {expected} integer{'' if count == 1 else 's'}, each 1 or more")
