"""The composition: encoder + posterior + prior + likelihood. Composed, never subclassed.

    q(z|x) = posterior(encoder(x))        p(z) = prior()        p(x|z) = likelihood(z)

Beta-VAE, the plain autoencoder, importance weighting and the others are not models: they are objectives over the trace
of this one (`vaelab.objectives`), or other members in its four places.

A conditional model (Sohn et al. 2015) has networks, or a prior, that also read a label c: wrap a network in
`vaelab.nn.WithLabel`, or take `vaelab.priors.LabelGaussian`. Then `classes` is the number of labels, every method needs
c, and all densities are given c.
"""

from typing import final

import torch
from torch import Tensor, nn

from vaelab.distributions import Distribution
from vaelab.errors import UsageError
from vaelab.nn.label import WithLabel
from vaelab.priors import LabelGaussian, Prior
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
        UsageError: posterior and prior differ in dimension, or the parts in their number of labels.
    """

    def __init__(self, encoder: nn.Module, posterior: nn.Module, prior: Prior, likelihood: nn.Module) -> None:
        super().__init__()
        if posterior.dim != prior.dim:
            raise UsageError(
                f"the posterior has {posterior.dim} latent dimensions and the prior {prior.dim}: give both the same"
            )
        prior.check(posterior)
        self.encoder, self.posterior, self.prior, self.likelihood = encoder, posterior, prior, likelihood
        classes = {part.classes for part in self.modules() if isinstance(part, WithLabel | LabelGaussian)}
        if len(classes) > 1:
            raise UsageError(f"the parts of this model expect {sorted(classes)} labels: give all the same number")
        self.classes: int | None = min(classes, default=None)

    @property
    def latent_dim(self) -> int:
        return self.posterior.dim  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, x: Tensor, c: Tensor | None = None) -> Distribution:
        """q(z|x) for images (B, *X) and, in a conditional model, labels c (B,)."""
        self._check_label(c)
        return self.posterior(self.encoder(x, c) if isinstance(self.encoder, WithLabel) else self.encoder(x))

    def latent_prior(self, c: Tensor | None = None) -> Distribution:
        """p(z): batch shape (), or (B,) where the prior itself depends on labels c (B,)."""
        self._check_label(c)
        return self.prior(self, c)

    def decode(self, z: Tensor, c: Tensor | None = None) -> Distribution:
        """p(x|z) for codes (K, B, *D) and, in a conditional model, labels c (B,)."""
        self._check_label(c)
        return self.likelihood(z, c)

    def trace(
        self, x: Tensor, c: Tensor | None = None, *, k: int = 1, generator: torch.Generator | None = None
    ) -> Trace:
        """One pass: encode, draw `k` codes an image, decode, and score the images.

        Args:
            x: images (B, *X) in [0, 1].
            c: labels (B,) of a conditional model.
            k: samples of the posterior for each image.
            generator: where the noise comes from; the global one if None.
        """
        q, p = self.encode(x, c), self.latent_prior(c)
        z, log_q = q.draw(k, generator)
        px = self.decode(z, c)
        return Trace(px=px, log_px=px.log_prob(x), levels=(Level(q, p, z, log_q),), noise=generator)

    def prior_codes(self, n: int, c: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` codes drawn from the prior, (n, *D), given labels c (n,) in a conditional model."""
        p = self.latent_prior(c)
        drawn = p.rsample(1 if isinstance(self.prior, LabelGaussian) else n, generator)
        return drawn.reshape(n, *drawn.shape[-1:])

    def sample(self, n: int, c: Tensor | None = None, *, generator: torch.Generator | None = None) -> Distribution:
        """p(x|z) at `n` codes drawn from the prior: batch shape (1, n)."""
        return self.decode(self.prior_codes(n, c, generator=generator).unsqueeze(0), c)

    def _check_label(self, c: Tensor | None) -> None:
        if self.classes is None and c is not None:
            raise UsageError("labels were given to a model that is not conditional: leave them out")
        if self.classes is not None and c is None:
            raise UsageError(f"this model is conditional on labels 0 to {self.classes - 1}: give c, one for each image")
