"""Posteriors q(z|x): modules that read the encoder's features and return a distribution over z.

The diagonal Gaussian is the posterior of the first papers (Kingma & Welling 2014, arXiv 1312.6114; Rezende et al. 2014,
arXiv 1401.4082). A Dirac turns the composition into a plain autoencoder.

Each owns the last linear layer, from `features` to its parameters, and computes it in float32 whatever the precision
of training: a code of 20 with sigma 0.01 has no bfloat16 neighbour nearer than 0.06.
"""

from torch import Tensor, nn

from vaelab.distributions import Delta as DeltaDistribution
from vaelab.distributions import DiagGaussian
from vaelab.nn.mlp import ExactLinear


class Gaussian(nn.Module):
    """Diagonal Gaussian: features (B, features) to mean and log sigma, each (B, dim)."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.features, self.dim = features, dim
        self.head = ExactLinear(features, 2 * dim)

    def forward(self, h: Tensor) -> DiagGaussian:
        mean, log_variance = self.head(h).chunk(2, dim=-1)
        return DiagGaussian(mean, 0.5 * log_variance)


class Delta(nn.Module):
    """Dirac: features (B, features) to a point (B, dim). With ``ELBO(beta=0)`` this is a plain autoencoder."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.features, self.dim = features, dim
        self.head = ExactLinear(features, dim)

    def forward(self, h: Tensor) -> DeltaDistribution:
        return DeltaDistribution(self.head(h))
