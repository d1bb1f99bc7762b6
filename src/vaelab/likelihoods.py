"""Likelihoods p(x|z): modules that hold the decoder network and return a distribution over images.

A likelihood belongs to a **measure**: a density on [0, 1] and a probability of bits cannot be compared. The data's
protocol has a measure too (`vaelab.data.protocol`), and the two must agree.

    binary      pixels in {0, 1}: Bernoulli
    levels256   pixels in {0, 1/255, ..., 1}
    grey        grey levels read as if they were probabilities: a cross-entropy, not a likelihood
"""

from typing import ClassVar

from torch import Tensor, nn

from vaelab.nn.label import WithLabel
from vaelab.pixels import Bernoulli as BernoulliPixels


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

    def parameters_at(self, z: Tensor, c: Tensor | None) -> Tensor:
        """What the decoder says at codes z (K, B, *D), for labels c (B,)."""
        return self.decoder(z, c) if isinstance(self.decoder, WithLabel) else self.decoder(z)


class Bernoulli(Likelihood):
    """Independent bits: decoder from z (K, B, *D) to logits (K, B, *X)."""

    measures: ClassVar[tuple[str, ...]] = ("binary",)

    def forward(self, z: Tensor, c: Tensor | None = None) -> BernoulliPixels:
        logits = self.parameters_at(z, c)
        return BernoulliPixels(logits, event_dim=logits.dim() - 2)


class GreyCrossEntropy(Likelihood):
    """Bernoulli cross-entropy on grey levels in [0, 1]: what the classic examples minimise.

    -sum_i x_i log p_i + (1 - x_i) log(1 - p_i) is not the negative log of any normalised density of a grey image, so a
    model with this member has a cross-entropy and a rate, and no likelihood.
    """

    measures: ClassVar[tuple[str, ...]] = ("grey",)
    normalised: ClassVar[bool] = False

    def forward(self, z: Tensor, c: Tensor | None = None) -> BernoulliPixels:
        logits = self.parameters_at(z, c)
        return BernoulliPixels(logits, event_dim=logits.dim() - 2)
