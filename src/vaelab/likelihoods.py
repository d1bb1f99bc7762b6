"""Likelihoods p(x|z): modules that hold the decoder network and return a distribution over images.

A likelihood belongs to a **measure**: a density on [0, 1] and a probability of bits cannot be compared. The data's
protocol has a measure too (`vaelab.data.protocol`), and the two must agree.

    binary      pixels in {0, 1}: Bernoulli
    levels256   pixels in {0, 1/255, ..., 1}
    grey        grey levels read as if they were probabilities: a cross-entropy, not a likelihood
"""

from typing import ClassVar

from torch import Tensor, nn

from vaelab.distributions import Bernoulli as BernoulliDistribution


class Bernoulli(nn.Module):
    """Independent bits: decoder from z (K, B, *D) to logits (K, B, *X)."""

    measures: ClassVar[tuple[str, ...]] = ("binary",)
    normalised: ClassVar[bool] = True

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor) -> BernoulliDistribution:
        logits = self.decoder(z)
        return BernoulliDistribution(logits, event_dim=logits.dim() - 2)


class GreyCrossEntropy(nn.Module):
    """Bernoulli cross-entropy on grey levels in [0, 1]: what the classic examples minimise.

    -sum_i x_i log p_i + (1 - x_i) log(1 - p_i) is not the negative log of any normalised density of a grey image, so a
    model with this member has a cross-entropy and a rate, and no likelihood.
    """

    measures: ClassVar[tuple[str, ...]] = ("grey",)
    normalised: ClassVar[bool] = False

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor) -> BernoulliDistribution:
        logits = self.decoder(z)
        return BernoulliDistribution(logits, event_dim=logits.dim() - 2)
