"""The composition: encoder + posterior + prior + likelihood. Composed, never subclassed.

    q(z|x) = posterior(encoder(x))        p(z) = prior()        p(x|z) = likelihood(z)

Beta-VAE, the plain autoencoder, importance weighting and the others are not models: they are objectives over the trace
of this one (`vaelab.objectives`), or other members in its four places.
"""

from typing import final

import torch
from torch import Tensor, nn

from vaelab.distributions import Distribution
from vaelab.errors import UsageError
from vaelab.trace import Level, Trace


@final
class VAE(nn.Module):
    """A variational autoencoder with one stochastic layer.

    Args:
        encoder: images (B, *X) to features (B, F).
        posterior: features to q(z|x), a member of `vaelab.posteriors`.
        prior: p(z), a member of `vaelab.priors`, of the posterior's dimension.
        likelihood: codes (K, B, *D) to p(x|z), a member of `vaelab.likelihoods`.

    Raises:
        UsageError: posterior and prior differ in dimension.
    """

    def __init__(self, encoder: nn.Module, posterior: nn.Module, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        if posterior.dim != prior.dim:
            raise UsageError(
                f"the posterior has {posterior.dim} latent dimensions and the prior {prior.dim}: give both the same"
            )
        self.encoder, self.posterior, self.prior, self.likelihood = encoder, posterior, prior, likelihood

    @property
    def latent_dim(self) -> int:
        return self.posterior.dim  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, x: Tensor) -> Distribution:
        """q(z|x) for images (B, *X)."""
        return self.posterior(self.encoder(x))

    def decode(self, z: Tensor) -> Distribution:
        """p(x|z) for codes (K, B, *D)."""
        return self.likelihood(z)

    def trace(self, x: Tensor, *, k: int = 1, generator: torch.Generator | None = None) -> Trace:
        """One pass: encode, draw `k` codes an image, decode, and score the images.

        Args:
            x: images (B, *X) in [0, 1].
            k: samples of the posterior for each image.
            generator: where the noise comes from; the global one if None.
        """
        q, p = self.encode(x), self.prior()
        z = q.rsample(k, generator)
        px = self.decode(z)
        return Trace(px=px, log_px=px.log_prob(x), levels=(Level(q, p, z),))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Distribution:
        """p(x|z) at `n` codes drawn from the prior: batch shape (1, n)."""
        return self.decode(self.prior().rsample(n, generator).unsqueeze(0))
