"""Oracles: models whose log-likelihood and posterior are known in closed form, to test every estimator against.

The linear-Gaussian model
    p(z) = N(0, I)        p(x|z) = N(W z + b, s^2 I)        hence
    p(x) = N(b, W W^T + s^2 I)
    p(z|x) = N(m, V)      V = (I + W^T W / s^2)^-1          m = V W^T (x - b) / s^2

It is probabilistic PCA (Tipping & Bishop 1999). With orthogonal columns of W the posterior is a diagonal Gaussian, so a
VAE with the right encoder is exact: its ELBO equals log p(x), for every image and every sample.
"""

import math

import torch
from torch import Tensor, nn

from vaelab import posteriors, priors
from vaelab.distributions import LOG_2PI, DiagGaussian
from vaelab.models.vae import VAE


class LinearGaussian:
    """The model above, and the exact answers; float64.

    Args:
        weight: W, (P, D); orthogonal columns make the posterior diagonal.
        bias: b, (P,).
        std: s.
    """

    def __init__(self, weight: Tensor, bias: Tensor, std: float) -> None:
        self.weight, self.bias, self.std = weight.double(), bias.double(), std
        self.dim = weight.shape[1]

    @classmethod
    def random(
        cls, pixels: int, dim: int, std: float, generator: torch.Generator, scale: float = 1.0
    ) -> "LinearGaussian":
        """Orthogonal columns of lengths `scale` * (1, 1/2, 1/3, …) and a random bias."""
        q, _ = torch.linalg.qr(torch.randn(pixels, dim, generator=generator, dtype=torch.float64))
        lengths = scale / torch.arange(1, dim + 1, dtype=torch.float64)
        return cls(q * lengths, torch.randn(pixels, generator=generator, dtype=torch.float64), std)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Images (n, P) from the model."""
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, len(self.bias), generator=generator, dtype=torch.float64)
        return z @ self.weight.T + self.bias + self.std * noise

    def log_px(self, x: Tensor) -> Tensor:
        """log p(x) of images (N, P), (N,) nats."""
        covariance = self.weight @ self.weight.T + self.std**2 * torch.eye(len(self.bias), dtype=torch.float64)
        root = torch.linalg.cholesky(covariance)
        scaled = torch.linalg.solve_triangular(root, (x - self.bias).T, upper=False)
        return -0.5 * scaled.square().sum(0) - root.diagonal().log().sum() - 0.5 * len(self.bias) * LOG_2PI

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, D) and covariance (D, D) of p(z|x)."""
        eye = torch.eye(self.dim, dtype=torch.float64)
        covariance = torch.linalg.inv(eye + self.weight.T @ self.weight / self.std**2)
        return (x - self.bias) @ self.weight @ covariance / self.std**2, covariance

    def vae(self, widen: float = 1.0, shift: float = 0.0) -> VAE:
        """A VAE with this prior and likelihood, whose encoder is exact but for `widen` and `shift` of its posterior.

        Args:
            widen: factor on the posterior's standard deviations.
            shift: added to its means, in standard deviations.
        """
        eye = torch.eye(self.dim, dtype=torch.float64)
        covariance = torch.linalg.inv(eye + self.weight.T @ self.weight / self.std**2)
        std = covariance.diagonal().sqrt()
        to_mean = (covariance @ self.weight.T) / self.std**2
        posterior = posteriors.Gaussian(len(self.bias), self.dim).double()
        with torch.no_grad():
            posterior.head.weight.copy_(torch.cat([to_mean, torch.zeros_like(to_mean)]))
            offset = -to_mean @ self.bias + shift * std
            posterior.head.bias.copy_(torch.cat([offset, 2 * torch.log(widen * std)]))
        return VAE(nn.Identity(), posterior, priors.StandardNormal(self.dim).double(), _GaussianPixels(self))


class _GaussianPixels(nn.Module):
    """p(x|z) = N(W z + b, s^2 I)."""

    measures = ("continuous",)
    normalised = True

    def __init__(self, oracle: LinearGaussian) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(oracle.weight.clone()), nn.Parameter(oracle.bias.clone())
        self.log_std = nn.Parameter(torch.tensor(math.log(oracle.std), dtype=torch.float64))

    def forward(self, z: Tensor, c: Tensor | None = None) -> DiagGaussian:
        mean = z @ self.weight.T + self.bias
        return DiagGaussian(mean, self.log_std.expand_as(mean))
