"""Priors p(z): modules that return a distribution over z.

The standard normal is the prior of the first papers, and what `images/generation.png` of the lab samples from. The bound
is highest where p(z) is the aggregate posterior, the mean of q(z|x) over the images (Hoffman & Johnson 2016), so a prior
that can take its shape costs less rate and leaves fewer holes:

    member              p(z)                                                      tail bound, hence quadrature
    StandardNormal      N(0, I)                                                   yes
    Laplace             prod exp(-sqrt(2) |z_d|) / sqrt(2)                        yes
    MixtureOfGaussians  sum w_m N(m_m, S_m), learned                              yes
    VampPrior           mean of q(z|u_k) over learned images u_k                  unless the posterior is autoregressive
    Flow                a learned flow over a Gaussian                            splines yes, autoregressive no
    LabelGaussian       a Gaussian for each label                                 yes
    SecondStage         the codes of a second, small VAE: samples, no density     no

A prior is called with the model, since a VampPrior is made of the model's own posteriors, and with the labels, since a
conditional prior depends on them. Most read neither.

All learned members can be trained with the rest, but for `SecondStage`, or fitted to the codes of a trained model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from vaelab import flows, posteriors
from vaelab.distributions import DiagGaussian, Distribution, FullGaussian, Mixture, Transformed, full_precision
from vaelab.distributions import Laplace as LaplaceDistribution
from vaelab.errors import NoDensity, UsageError, unknown_name
from vaelab.nn.mlp import MLP
from vaelab.posteriors import whole, widths

if TYPE_CHECKING:
    from vaelab.models.vae import VAE


class Prior(nn.Module, ABC):
    """A module that returns p(z), of `dim` dimensions."""

    dim: int

    @abstractmethod
    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> Distribution:
        """p(z), batch shape () or, where it depends on labels c (B,), (B,)."""

    def check(self, posterior: nn.Module) -> None:
        """Refuse a posterior that this prior cannot be combined with. Raises UsageError."""
        del posterior


class StandardNormal(Prior):
    """N(0, I) in `dim` dimensions."""

    zeros: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = whole("dim", dim)
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)

    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> DiagGaussian:
        return DiagGaussian(self.zeros, self.zeros)


class Laplace(Prior):
    """Independent Laplace densities of mean 0 and variance 1, scale 1 / sqrt(2): as wide as the standard normal.

    Codes near zero and far out cost less than under a normal, those between cost more: it favours sparse codes, and codes
    along the axes, since it is not invariant to rotations.
    """

    zeros: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = whole("dim", dim)
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)

    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> LaplaceDistribution:
        return LaplaceDistribution(self.zeros, self.zeros - 0.5 * math.log(2))


class MixtureOfGaussians(Prior):
    """sum over m of w_m N(mean_m, L_m L_m^T), all learned.

    It starts with equal weights, means drawn from N(0, 3/4 I) and covariances I/4, about as wide as the standard normal;
    the components must differ, or all would receive the same gradient.

    Args:
        dim: latent dimensions.
        components: M.
        covariance: "diagonal" or "full".

    Attributes:
        logits: (M,), the weights' logarithms up to a constant.
        mean: (M, dim).
        log_std: (M, dim), where diagonal.
        scale_tril: (M, dim, dim), where full; what stands above the diagonal is not read, and a column's sign is free.
    """

    COVARIANCES = ("diagonal", "full")

    def __init__(self, dim: int, components: int = 10, covariance: str = "diagonal") -> None:
        super().__init__()
        if covariance not in self.COVARIANCES:
            raise unknown_name("covariance", str(covariance), self.COVARIANCES)
        self.dim, self.components, self.covariance = whole("dim", dim), whole("components", components), covariance
        self.logits = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(math.sqrt(0.75) * torch.randn(components, dim))
        if covariance == "diagonal":
            self.log_std = nn.Parameter(torch.full((components, dim), math.log(0.5)))
        else:
            self.scale_tril = nn.Parameter(0.5 * torch.eye(dim).repeat(components, 1, 1))

    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> Mixture:
        if self.covariance == "diagonal":
            return Mixture(self.logits, DiagGaussian(self.mean, self.log_std))
        # L and L with a column's sign turned have the same L L^T: so any non-zero diagonal will do
        sign = torch.sign(self.scale_tril.detach().diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
        return Mixture(self.logits, FullGaussian(self.mean, self.scale_tril.tril() * sign))

    @torch.no_grad()
    def fill(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        """Take the parameters of a fitted mixture.

        Args:
            weights: (M,), not negative, with the sum 1.
            means: (M, dim).
            covariances: (M, dim, dim), or the variances (M, dim) where diagonal.

        Raises:
            UsageError: shapes that do not fit, or a covariance that is not positive definite.
        """
        shape = (self.components, self.dim)
        square = shape if self.covariance == "diagonal" else (*shape, self.dim)
        given = tuple(tuple(t.shape) for t in (weights, means, covariances))
        if given != (shape[:1], shape, square):
            raise UsageError(
                f"weights, means and covariances have shapes {given}: expected {(shape[:1], shape, square)}"
            )
        if self.covariance == "diagonal":
            positive, own, root = bool((covariances > 0).all()), self.log_std, 0.5 * covariances.log()
        else:
            root, failed = torch.linalg.cholesky_ex(covariances)
            positive, own = not failed.any(), self.scale_tril
        if not positive:
            raise UsageError("a covariance is not positive definite: fit fewer components, or add to its diagonal")
        own.copy_(root)
        self.logits.copy_(weights.log())
        self.mean.copy_(means)


class VampPrior(Prior):
    """The mean of the model's own posteriors at learned images: p(z) = 1/P sum over k of q(z|u_k).

    Tomczak & Welling 2018, arXiv 1705.07120, eq. 9: the best prior is the aggregate posterior, and P pseudo-inputs stand
    for the images. Weights are equal. u_k is a learned image clamped to [0, 1], and starts as uniform noise. The prior is
    called with the model and keeps no reference to it.

    The posterior must have a density at any z, so Delta and Planar are refused; with InverseAutoregressive one density
    costs P * dim passes. A conditional model is refused: its q(z|x, c) would need a label for each pseudo-input.

    Args:
        pseudo_inputs: P.
        shape: of an image, (C, H, W).
        dim: latent dimensions.
    """

    def __init__(self, shape: Sequence[int], dim: int, pseudo_inputs: int = 500) -> None:
        super().__init__()
        self.shape, self.dim, self.pseudo_inputs = (
            widths("shape", shape),
            whole("dim", dim),
            whole("pseudo_inputs", pseudo_inputs),
        )
        self.images = nn.Parameter(torch.rand(pseudo_inputs, *self.shape))

    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> Mixture:
        if model is None:
            raise UsageError("a VampPrior is made of a model's posteriors: ask the model, as in model.latent_prior()")
        if model.classes is not None:
            raise UsageError(
                "a VampPrior has no labels for its pseudo-inputs, and this model is conditional: take LabelGaussian or "
                "StandardNormal"
            )
        return Mixture(self.images.new_zeros(self.pseudo_inputs), model.encode(self.images.clamp(0, 1)))

    def check(self, posterior: nn.Module) -> None:
        if isinstance(posterior, posteriors.Delta):
            raise UsageError(
                "a VampPrior is a mixture of posteriors, and the Dirac posterior Delta has no density: take Gaussian"
            )
        if isinstance(posterior, posteriors.Planar) and posterior.layers:
            raise UsageError(
                "a VampPrior needs the density of each posterior at the codes of all others, and the planar flow knows it "
                "of its own samples only: take Gaussian, NeuralSpline or InverseAutoregressive"
            )


class Flow(Prior):
    """A learned flow: z = mean + exp(log_std) * f(eps), starting as the standard normal.

    The network maps codes to noise, so that a density takes one pass (Papamakarios et al. 2017, arXiv 1705.07057); drawing
    inverts it, in two passes ("spline") or `dim` ("autoregressive"). `mean` and `log_std` are parameters too: a spline
    bends what lies within 5 deviations, so whoever fits this to codes starts with theirs.

    Args:
        dim: latent dimensions.
        kind: "spline", eight bins (Durkan et al. 2019, arXiv 1906.04032), or "autoregressive", affine.
        layers: maps; 0 is a learned diagonal Gaussian.
        hidden: widths of each map's network.

    Raises:
        UsageError: an argument out of range, or zuko is not installed.
    """

    KINDS = ("spline", "autoregressive")
    BINS = 8

    def __init__(self, dim: int, kind: str = "spline", layers: int = 2, hidden: Sequence[int] = (64,)) -> None:
        super().__init__()
        if kind not in self.KINDS:
            raise unknown_name("kind of flow", str(kind), self.KINDS)
        self.dim, self.kind = whole("dim", dim), kind
        self.layers, self.hidden = whole("layers", layers, 0), widths("hidden", hidden)
        self.mean, self.log_std = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.network = None
        if layers and kind == "spline":
            self.network = flows.spline(dim, 0, layers, self.hidden, self.BINS)
        elif layers:
            self.network = flows.autoregressive(dim, 0, layers, self.hidden)

    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> DiagGaussian | Transformed:
        base = DiagGaussian(self.mean, self.log_std)
        if self.network is None:
            return base
        extent = flows.BOUND if self.kind == "spline" else None
        return Transformed(base, flows.Network(self.network, inverted=True, extent=extent))


class LabelGaussian(Prior):
    """p(z|c): a diagonal Gaussian for each label, learned (Sohn et al. 2015).

    Args:
        dim: latent dimensions.
        classes: number of labels, 0 to classes - 1.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.dim, self.classes = whole("dim", dim), whole("classes", classes)
        self.mean = nn.Parameter(torch.zeros(classes, dim))
        self.log_std = nn.Parameter(torch.zeros(classes, dim))

    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> DiagGaussian:
        """p(z|c) for labels c (B,). Raises UsageError: a label outside 0 to classes - 1."""
        index = torch.zeros(1, dtype=torch.long, device=self.mean.device) if c is None else c.long()
        exported = torch.compiler.is_exporting()  # a graph has no values to look at
        if index.numel() and not exported and not (int(index.min()) >= 0 and int(index.max()) < self.classes):
            raise UsageError(f"a label lies outside 0 to {self.classes - 1}, which this prior was built for")
        return DiagGaussian(self.mean[index], self.log_std[index])


class SecondStage(Prior):
    """A second, small VAE over the codes of the first (Dai & Wipf 2019, arXiv 1903.05789), fitted to them afterwards.

    The codes z of the first VAE fill all `dim` dimensions, with noise, so a second VAE whose Gaussian decoder learns its
    noise can match their distribution even where the first could not match that of the images. It gives samples
    z = decoder(v) + noise, v ~ N(0, I), and no density.

    Args:
        dim: latent dimensions of the first VAE.
        latent_dim: latent dimensions of the second.
        hidden: widths of the second's encoder, and in reverse of its decoder; at least one.

    Attributes:
        vae: the second VAE, of codes (B, dim).
    """

    def __init__(self, dim: int, latent_dim: int, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        from vaelab import likelihoods
        from vaelab.models.vae import VAE

        self.dim, self.latent_dim, self.hidden = (
            whole("dim", dim),
            whole("latent_dim", latent_dim),
            widths("hidden", hidden),
        )
        if not self.hidden:
            raise UsageError("hidden is (): expected at least one layer, as in (256,)")
        self.vae = VAE(
            MLP((dim,), self.hidden[:-1], (self.hidden[-1],), activation="silu", out_activation=True),
            posteriors.Gaussian(self.hidden[-1], latent_dim),
            StandardNormal(latent_dim),
            likelihoods.Gaussian(MLP((latent_dim,), self.hidden[::-1], (dim,), activation="silu"), scale="shared"),
        )

    def forward(self, model: "VAE | None" = None, c: Tensor | None = None) -> "DecodedCodes":
        return DecodedCodes(self.vae)


@dataclass(frozen=True, eq=False)
class DecodedCodes(Distribution):
    """What a second-stage VAE generates: samples, without a density or a mean in closed form."""

    vae: "VAE"

    @property
    def mean(self) -> Tensor:
        """Raises UsageError: it is not known in closed form."""
        raise UsageError("the mean of a second-stage VAE has no closed form: average draws of it")

    def log_prob(self, value: Tensor) -> Tensor:
        raise NoDensity(
            "a second-stage prior gives samples of codes and no density of them (that is an integral over its own codes): "
            "take a mixture or a flow where a rate or a likelihood is needed"
        )

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """`k` codes, (k, *D), with the decoder's noise."""
        inner = self.vae.prior_codes(k, generator=generator)
        with full_precision(inner):
            return self.vae.decode(inner.unsqueeze(0)).rsample(1, generator)[0, 0]

    def detach(self) -> Self:
        """Itself: it has no density whose parameters could be stopped."""
        return self
