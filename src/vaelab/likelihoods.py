"""Likelihoods p(x|z): modules that hold the decoder network and return a distribution over images.

A likelihood belongs to a **measure**: a density on [0, 1] and a probability of bits cannot be compared. The data's
protocol has a measure too (`vaelab.data.protocol`), and the two must agree.

    binary      pixels in {0, 1}                Bernoulli
    levels256   pixels in {0, 1/255, ..., 1}    Categorical, DiscretisedLogistic, DiscretisedLogisticMixture
    continuous  dequantised, in [0, 1)          ContinuousBernoulli, Gaussian, Laplace: densities
    grey        grey levels read as if they were probabilities: GreyCrossEntropy, not a likelihood

What others call the reconstruction loss is a point in this table: "BCE" on grey images is `GreyCrossEntropy`, half the
summed squared error is `Gaussian` with a fixed std of 1 (up to a constant), and a weight on it is another std:
beta = std^2 (Rybkin et al. 2021, arXiv 2006.13202, section 3).

A pixel that needs several numbers (a mean and a scale, 256 logits) has them in the decoder's channels: `outputs` gives
the decoder's out_shape for an image's shape.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vaelab import pixels
from vaelab.errors import UsageError, unknown_name
from vaelab.nn.label import WithLabel

LEAST_SCALE = 2.0**-12
"""Least scale of a pixel, one sixteenth of a grey level. Pixels that never vary (the black margin of MNIST) would drive
it to zero, where gradients explode; at this bound a discretised logistic gives such a level 0.9993 of the mass."""

FOLLOWED = 0.02
"""Weight of the newest batch in the scale that `Gaussian` with an optimal scale keeps for evaluation."""


class Likelihood(nn.Module):
    """A decoder network and what its outputs mean.

    Args:
        decoder: codes z (K, B, *D) to parameters, (K, B, *X) or more channels; wrapped in `WithLabel` if it reads labels.
    """

    measures: ClassVar[tuple[str, ...]]
    normalised: ClassVar[bool] = True

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    @staticmethod
    def outputs(image_shape: Sequence[int]) -> tuple[int, ...]:
        """The decoder's out_shape for images of a shape (C, H, W), or (P,)."""
        return tuple(image_shape)

    def parameters_at(self, z: Tensor, c: Tensor | None) -> Tensor:
        """What the decoder says at codes z (K, B, *D), for labels c (B,)."""
        return self.decoder(z, c) if isinstance(self.decoder, WithLabel) else self.decoder(z)

    def _outputs_at(self, z: Tensor, c: Tensor | None, parts: int) -> Tensor:
        """What the decoder says, (K, B, parts * C, H, W). Raises UsageError where its channels are no multiple."""
        outputs = self.parameters_at(z, c)
        if outputs.shape[2] % parts:
            raise UsageError(
                f"the decoder of {type(self).__name__} gives {outputs.shape[2]} channels, expected a multiple of "
                f"{parts}: build it with out_shape = the likelihood's outputs(image_shape)"
            )
        return outputs


def _more_channels(image_shape: Sequence[int], parts: int) -> tuple[int, ...]:
    channels, *rest = image_shape
    return (parts * channels, *rest)


class Bernoulli(Likelihood):
    """Independent bits: decoder from z (K, B, *D) to logits (K, B, *X)."""

    measures: ClassVar[tuple[str, ...]] = ("binary",)

    def forward(self, z: Tensor, c: Tensor | None = None) -> pixels.Bernoulli:
        logits = self.parameters_at(z, c)
        return pixels.Bernoulli(logits, event_dim=logits.dim() - 2)


class GreyCrossEntropy(Likelihood):
    """Bernoulli cross-entropy on grey levels in [0, 1]: what the classic examples minimise.

    -sum_i x_i log p_i + (1 - x_i) log(1 - p_i) is not the negative log of any normalised density of a grey image, so a
    model with this member has a cross-entropy and a rate, and no likelihood.
    """

    measures: ClassVar[tuple[str, ...]] = ("grey",)
    normalised: ClassVar[bool] = False

    def forward(self, z: Tensor, c: Tensor | None = None) -> pixels.Bernoulli:
        logits = self.parameters_at(z, c)
        return pixels.Bernoulli(logits, event_dim=logits.dim() - 2)


class ContinuousBernoulli(Likelihood):
    """The cross-entropy with its normaliser, a density on [0, 1]: decoder from z (K, B, *D) to logits (K, B, *X).

    Loaiza-Ganem & Cunningham 2019, arXiv 1907.06845. Images shown are its means, which are greyer than sigmoid(logits).
    """

    measures: ClassVar[tuple[str, ...]] = ("continuous",)

    def forward(self, z: Tensor, c: Tensor | None = None) -> pixels.ContinuousBernoulli:
        logits = self.parameters_at(z, c)
        return pixels.ContinuousBernoulli(logits, event_dim=logits.dim() - 2)


class _LocationScale(Likelihood):
    """Densities with a location and a scale for each pixel; the location is the decoder's output itself."""

    measures: ClassVar[tuple[str, ...]] = ("continuous",)
    scales: ClassVar[tuple[str, ...]] = ("fixed", "shared", "per-pixel")
    log_scale: Tensor

    def __init__(self, decoder: nn.Module, scale: str, size: float, name: str) -> None:
        super().__init__(decoder)
        if scale not in self.scales:
            raise unknown_name("scale", scale, self.scales)
        if not (math.isfinite(size) and size > 0):
            raise UsageError(f"{name} is {size}: expected a finite number above 0, in units of the image's [0, 1]")
        self.scale = scale
        value = torch.tensor(math.log(size))
        if scale == "shared":
            self.log_scale = nn.Parameter(value)
        else:
            self.register_buffer("log_scale", value, persistent=scale == "optimal")

    @staticmethod
    def outputs(image_shape: Sequence[int], scale: str = "fixed") -> tuple[int, ...]:
        """The decoder's out_shape: twice the channels for a scale per pixel."""
        return _more_channels(image_shape, 2 if scale == "per-pixel" else 1)

    def _location_and_log_scale(self, z: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.scale != "per-pixel":
            return self.parameters_at(z, c), self.log_scale
        location, raw = pixels.wide(self._outputs_at(z, c, 2)).chunk(2, 2)
        return location, _bounded(raw + self.log_scale)


def _bounded(log_scale: Tensor) -> Tensor:
    """A smooth maximum with log of `LEAST_SCALE`: the scale becomes the sum of the two."""
    least = math.log(LEAST_SCALE)
    return least + nn.functional.softplus(log_scale - least, threshold=40)


class Gaussian(_LocationScale):
    """Independent normals: decoder from z (K, B, *D) to means (K, B, *X), and log scales beside them if per pixel.

    Args:
        decoder: its out_shape is `outputs(image_shape, scale)`.
        scale: of the pixels,
            `fixed`      `std`, a constant
            `shared`     one learned number, `std` at first
            `optimal`    sigma-VAE (Rybkin et al. 2021, arXiv 2006.13202, eq. 6): in training the root mean squared error
                         of the batch, through which gradients pass; it has seen the images, so what training shows is no
                         density, and a little too good. A buffer follows the mean squared error (the mean of the first
                         50 batches, then exponential), and evaluation uses its root: a constant, so a proper density.
            `per-pixel`  from the decoder: scale = 2^-12 + std * exp(output)
        std: in units of the image's [0, 1]; one grey level is 1/256.

    Raises:
        UsageError: unknown scale, or a std that is not a finite number above 0.
    """

    scales: ClassVar[tuple[str, ...]] = ("fixed", "shared", "optimal", "per-pixel")
    batches: Tensor

    def __init__(self, decoder: nn.Module, scale: str = "fixed", std: float = 1.0) -> None:
        super().__init__(decoder, scale, std, "std")
        self.std = std
        if scale == "optimal":
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, z: Tensor, c: Tensor | None = None) -> pixels.Gaussian | pixels.BatchScaledGaussian:
        mean, log_std = self._location_and_log_scale(z, c)
        if self.scale == "optimal" and self.training:
            return pixels.BatchScaledGaussian(mean, log_std, mean.dim() - 2, LEAST_SCALE, self._follow)
        return pixels.Gaussian(mean, log_std, event_dim=mean.dim() - 2)

    @torch.no_grad()
    def _follow(self, mean_squared_error: Tensor) -> None:
        self.batches += 1
        weight = self.batches.to(self.log_scale).reciprocal().clamp(min=FOLLOWED)
        followed = torch.exp(2 * self.log_scale).lerp(mean_squared_error.to(self.log_scale), weight)
        self.log_scale.copy_(0.5 * followed.log())


class Laplace(_LocationScale):
    """Independent Laplace variables, of density exp(-|x - m| / b) / 2b: absolute instead of squared errors.

    Args:
        decoder: its out_shape is `outputs(image_shape, scale)`.
        scale: `fixed`, `shared` or `per-pixel`, as in `Gaussian`, with `b` in place of the standard deviation.
        b: the scale; the standard deviation is sqrt(2) b.

    Raises:
        UsageError: unknown scale, or a b that is not a finite number above 0.
    """

    def __init__(self, decoder: nn.Module, scale: str = "fixed", b: float = 1.0) -> None:
        super().__init__(decoder, scale, b, "b")
        self.b = b

    def forward(self, z: Tensor, c: Tensor | None = None) -> pixels.Laplace:
        mean, log_scale = self._location_and_log_scale(z, c)
        return pixels.Laplace(mean, log_scale, event_dim=mean.dim() - 2)


class DiscretisedLogistic(Likelihood):
    """Each grey level is the mass that a logistic has in its bin; the outermost bins take the tails.

    Kingma et al. 2016 (arXiv 1606.04934, appendix C.1.1). With outputs m, s of the decoder the logistic has the centre
    1/2 + m/2 and the scale 2^-12 + e^s / 2, so that a fresh network covers [0, 1].
    """

    measures: ClassVar[tuple[str, ...]] = ("levels256",)

    @staticmethod
    def outputs(image_shape: Sequence[int]) -> tuple[int, ...]:
        """The decoder's out_shape: centre and log scale for each channel."""
        return _more_channels(image_shape, 2)

    def forward(self, z: Tensor, c: Tensor | None = None) -> pixels.LogisticMixture:
        centre, log_scale = pixels.wide(self._outputs_at(z, c, 2)).chunk(2, 2)
        return _logistics(torch.zeros_like(centre), centre, log_scale, 1)


class DiscretisedLogisticMixture(Likelihood):
    """Each grey level from a mixture of discretised logistics (Salimans et al. 2017, arXiv 1701.05517, eq. 1-2).

    Channels are independent, each with weights of its own; in the paper they are not, see `vaelab.pixels.LogisticMixture`.
    The centres start evenly spread over [0, 1]: J equal components would stay alike.

    Args:
        decoder: its out_shape is `outputs(image_shape, components)`: weights, centres and log scales.
        components: J. One is `DiscretisedLogistic`, with a weight that does nothing.

    Raises:
        UsageError: fewer than one component.
    """

    measures: ClassVar[tuple[str, ...]] = ("levels256",)

    def __init__(self, decoder: nn.Module, components: int = 5) -> None:
        super().__init__(decoder)
        if components < 1:
            raise UsageError(f"components is {components}: expected an integer of 1 or more")
        self.components = components

    @staticmethod
    def outputs(image_shape: Sequence[int], components: int = 5) -> tuple[int, ...]:
        """The decoder's out_shape: three numbers for each component of each channel."""
        return _more_channels(image_shape, 3 * components)

    def forward(self, z: Tensor, c: Tensor | None = None) -> pixels.LogisticMixture:
        weight, centre, log_scale = pixels.wide(self._outputs_at(z, c, 3 * self.components)).chunk(3, 2)
        return _logistics(weight, centre, log_scale, self.components)


def _logistics(weight: Tensor, centre: Tensor, log_scale: Tensor, components: int) -> pixels.LogisticMixture:
    """The mixture of the decoder's three numbers for each component (K, B, J * C, H, W)."""
    start = (torch.arange(components, device=centre.device) + 0.5) / components
    shape = (-1, *[1] * (centre.dim() - 3))
    centre = start.repeat_interleave(centre.shape[2] // components).reshape(shape) + 0.5 * centre
    return pixels.LogisticMixture(weight, centre, _bounded(log_scale + math.log(0.5)), components, centre.dim() - 2)


class Categorical(Likelihood):
    """A probability for each of the 256 grey levels of each pixel: decoder to 256 logits a channel.

    It knows nothing of the order of the levels, and learns it (van den Oord et al. 2016, arXiv 1601.06759, section 3.4).
    256 numbers a pixel make it the slowest and largest member.
    """

    measures: ClassVar[tuple[str, ...]] = ("levels256",)

    @staticmethod
    def outputs(image_shape: Sequence[int]) -> tuple[int, ...]:
        """The decoder's out_shape: 256 logits for each channel."""
        return _more_channels(image_shape, pixels.LEVELS)

    def forward(self, z: Tensor, c: Tensor | None = None) -> pixels.Categorical:
        logits = self._outputs_at(z, c, pixels.LEVELS)
        return pixels.Categorical(logits, event_dim=logits.dim() - 2)


MEMBERS: tuple[type[Likelihood], ...] = (
    Bernoulli, GreyCrossEntropy, ContinuousBernoulli, Gaussian, Laplace, DiscretisedLogistic,
    DiscretisedLogisticMixture, Categorical,
)  # fmt: skip
