"""Every estimator against a model whose log p(x) and posterior are known in closed form."""

import math

import pytest
import torch

from vaelab import priors
from vaelab.errors import UsageError
from vaelab.evaluation import importance_sampled
from vaelab.models.vae import VAE
from vaelab.objectives import ELBO
from vaelab.oracles import LinearGaussian
from vaelab.quadrature import log_likelihood
from vaelab.rng import stream
from vaelab.trace import log_mean_exp


@pytest.fixture
def oracle():
    return LinearGaussian.random(pixels=9, dim=2, std=0.4, generator=stream(1, "oracle"))


@pytest.fixture
def images(oracle):
    return oracle.sample(50, stream(2, "images"))


def test_log_px_is_the_multivariate_normal(oracle, images):
    covariance = oracle.weight @ oracle.weight.T + oracle.std**2 * torch.eye(9, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(oracle.bias, covariance).log_prob(images)
    assert (oracle.log_px(images) - expected).abs().max() < 1e-10


def test_elbo_of_the_exact_posterior_is_log_px(oracle, images):
    """The Monte Carlo form -log q + log p(x, z) is log p(x) for every single sample."""
    log_w = oracle.vae().trace(images, k=3, generator=stream(0, "noise")).log_w()
    assert (log_w - oracle.log_px(images)).abs().max() < 1e-12


def test_elbo_with_closed_form_rate_is_log_px_in_the_mean(oracle, images):
    trace = oracle.vae().trace(images, k=20_000, generator=stream(0, "noise"))
    estimate = ELBO()(trace, 0)
    error = (estimate.bound - oracle.log_px(images)).mean().item()
    assert abs(error) < 5e-3


def test_elbo_of_a_wrong_posterior_misses_the_kl(oracle, images):
    """elbo = log p(x) - KL(q || p(z|x)), here for a posterior that is shifted and widened."""
    widen, shift = 1.5, 0.7
    trace = oracle.vae(widen, shift).trace(images, k=50_000, generator=stream(0, "noise"))
    gap = oracle.dim * (0.5 * (widen**2 + shift**2 - 1) - math.log(widen))
    measured = (oracle.log_px(images) + trace.distortion + trace.rate).mean().item()
    assert measured == pytest.approx(gap, abs=5e-3)


def test_importance_sampling_is_unbiased_for_px_with_a_wide_proposal(oracle, images):
    found = importance_sampled(oracle.vae(widen=1.3, shift=0.3), images, 20_000, seed=3)
    assert abs(found.log_px - oracle.log_px(images).numpy()).max() < 0.05
    assert found.worst_ess > 0.3 * 20_000 and found.ess.max() <= 20_000


def test_importance_sampling_with_the_exact_posterior_is_exact_and_all_samples_count(oracle, images):
    found = importance_sampled(oracle.vae(), images, 7)
    assert abs(found.log_px - oracle.log_px(images).numpy()).max() < 1e-10
    assert abs(found.ess - 7).max() < 1e-8


def test_importance_sampling_bias_falls_like_one_over_k(oracle, images):
    """E[log p(x) - log mean w] ~ var(w) / (2K): slope -1 in K (Burda et al. 2016; Domke & Sheldon 2018)."""
    log_w = oracle.vae(widen=1.6).trace(images, k=64 * 2000, generator=stream(5, "noise")).log_w()
    exact, ks = oracle.log_px(images), [4, 8, 16, 32, 64]
    bias = [(exact - log_mean_exp(log_w.unflatten(0, (k, -1)), 0)).mean().item() for k in ks]
    slope = torch.linalg.lstsq(
        torch.tensor([[math.log(k), 1.0] for k in ks]), torch.tensor([[math.log(b)] for b in bias])
    ).solution[0].item()  # fmt: skip
    assert slope == pytest.approx(-1, abs=0.15)


def test_a_narrow_proposal_is_too_pessimistic(oracle, images):
    found = importance_sampled(oracle.vae(widen=0.2), images, 500, seed=1)
    assert (oracle.log_px(images).numpy() - found.log_px).mean() > 0.5
    assert "too low" in found.warning


@pytest.mark.parametrize("scale", [0.2, 1.0, 12.0])
@pytest.mark.parametrize("dim", [1, 2])
def test_quadrature_is_exact(dim, scale):
    """`scale` 0.2: the posterior is the prior; 12: it is thirty times narrower and lies far out."""
    oracle = LinearGaussian.random(9, dim, 0.4, stream(1, "oracle"), scale=scale)
    images = oracle.sample(30, stream(2, "images")) * 1.5
    found = log_likelihood(oracle.vae(), images)
    error = abs(found.log_px - oracle.log_px(images).numpy())
    assert error.max() < 2e-4
    assert error.max() <= found.error.max() + 1e-9


def test_quadrature_follows_codes_far_outside_the_prior():
    """An image whose posterior lies 20 prior deviations out: a fixed extent of [-6, 6] would lose its whole integral."""
    oracle = LinearGaussian.random(9, 2, 0.5, stream(1, "oracle"), scale=3.0)
    z = torch.tensor([[20.0, -12.0]], dtype=torch.float64)
    image = z @ oracle.weight.T + oracle.bias
    assert oracle.posterior(image)[0].norm() > 15
    found = log_likelihood(oracle.vae(), image)
    assert found.radius > 20
    assert abs(found.log_px - oracle.log_px(image).numpy()).max() < 1e-3


def test_quadrature_does_not_need_a_good_encoder(oracle, images):
    found = log_likelihood(oracle.vae(widen=0.01, shift=300.0), images)
    assert abs(found.log_px - oracle.log_px(images).numpy()).max() < 2e-4


@pytest.mark.parametrize(("std", "resolved"), [(0.3, True), (0.03, True), (0.004, False)])
@pytest.mark.parametrize("dim", [1, 2])
def test_a_prior_too_sharp_for_the_tiles_is_refused(dim, std, resolved):
    """A mixture's narrow components fell between the nodes, and a nat was lost without an error being told."""
    oracle = LinearGaussian.random(9, dim, 1.0, stream(1, "oracle"))
    vae = oracle.vae()
    prior = priors.MixtureOfGaussians(dim, 3).double()
    centres = torch.tensor([0.408, 0.83, -0.3], dtype=torch.float64)
    shares = torch.full((3,), 1 / 3, dtype=torch.float64)
    prior.fill(shares, centres[:, None].expand(3, dim), torch.full((3, dim), std**2, dtype=torch.float64))
    model = VAE(vae.encoder, vae.posterior, prior, vae.likelihood)
    images = oracle.sample(5, stream(2, "images"))
    if not resolved:
        with pytest.raises(UsageError, match="too sharply peaked"):
            log_likelihood(model, images)
        return
    exact = []
    for m in centres:  # each component gives a Gaussian image density, in closed form
        mean = (m.expand(dim) @ oracle.weight.T) + oracle.bias
        covariance = std**2 * oracle.weight @ oracle.weight.T + oracle.std**2 * torch.eye(9, dtype=torch.float64)
        exact.append(torch.distributions.MultivariateNormal(mean, covariance).log_prob(images))
    found = log_likelihood(model, images)
    assert abs(found.log_px - (torch.stack(exact).logsumexp(0) - math.log(3)).numpy()).max() < 1e-3
