"""Posteriors: what each can represent, in models whose true posterior is known, and in combination with every prior."""

import math

import pytest
import torch
from torch import nn

from vaelab import likelihoods, posteriors, priors
from vaelab.distributions import DiagGaussian, closed_form_kl
from vaelab.errors import UsageError
from vaelab.models.vae import VAE
from vaelab.nn.mlp import MLP
from vaelab.objectives import ELBO
from vaelab.oracles import LinearGaussian
from vaelab.registry import build, to_spec
from vaelab.rng import stream, stream_seed

F64 = torch.float64
SHAPE = (1, 4, 4)
ALL = {
    "Gaussian": posteriors.Gaussian,
    "FullGaussian": posteriors.FullGaussian,
    "Laplace": posteriors.Laplace,
    "InverseAutoregressive": lambda features, dim: posteriors.InverseAutoregressive(features, dim, 2, (8,)),
    "NeuralSpline": lambda features, dim: posteriors.NeuralSpline(features, dim, 2, (8,), 4),
    "Planar": lambda features, dim: posteriors.Planar(features, dim, 3),
}
PRIORS = {
    "StandardNormal": priors.StandardNormal,
    "Laplace": priors.Laplace,
    "Mixture": lambda dim: priors.MixtureOfGaussians(dim, 3),
    "FullMixture": lambda dim: priors.MixtureOfGaussians(dim, 3, "full"),
    "Vamp": lambda dim: priors.VampPrior(SHAPE, dim, 3),
    "SplineFlow": lambda dim: priors.Flow(dim, hidden=(8,)),
    "AutoregressiveFlow": lambda dim: priors.Flow(dim, "autoregressive", hidden=(8,)),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "test"), dtype=F64)


def seeded(make, seed=0):
    """A module in float64 with its first weights from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, "init"))
        return make().double()


def vae(posterior, prior, dim=2):
    return seeded(
        lambda: VAE(
            MLP(SHAPE, (8,), (6,), out_activation=True),
            ALL[posterior](6, dim),
            PRIORS[prior](dim),
            likelihoods.Bernoulli(MLP((dim,), (8,), SHAPE)),
        )
    )


def images(n=4):
    return (normal(n, *SHAPE, seed=11) > 0).double()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("posterior", ALL)
def test_every_posterior_goes_with_every_prior(posterior, prior):
    """The two forms of the bound agree: E[log w], and distortion and rate, whose expectations differ by noise only."""
    if (posterior, prior) == ("Planar", "Vamp"):
        with pytest.raises(UsageError, match="planar"):
            vae(posterior, prior)
        return
    model, k = vae(posterior, prior), 1000
    model = build(to_spec(model)).double() if prior != "Vamp" else model
    trace = model.trace(images(), k=k, generator=stream(0, "noise"))
    log_w = trace.log_w()
    assert log_w.shape == (k, 4) and log_w.isfinite().all()
    elbo = ELBO()(trace, 0).bound
    assert ((log_w.mean(0) - elbo).abs() < 4.5 * log_w.std(0) / math.sqrt(k)).all()
    elbo.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.prior_codes(7, generator=stream(0, "noise")).shape == (7, 2)


def correlated_oracle():
    """A linear-Gaussian model whose posterior is not axis-parallel: the columns of W are not orthogonal."""
    return LinearGaussian(normal(6, 3), normal(6, seed=1), 0.5)


def test_a_full_gaussian_posterior_reaches_log_px_where_the_diagonal_cannot():
    """log p(x, z) - log q(z|x) = log p(x) for every single sample, in a model with correlated codes."""
    oracle = correlated_oracle()
    x = oracle.sample(20, stream(2, "images"))
    mean, covariance = oracle.posterior(x)
    root = torch.linalg.cholesky(covariance)
    model = oracle.vae()
    head = posteriors.FullGaussian(6, 3).double()
    row, column = torch.tril_indices(3, 3, -1)
    with torch.no_grad():
        head.head.weight.zero_()
        head.head.weight[:3] = model.posterior.head.weight[:3]
        head.head.bias[:3] = model.posterior.head.bias[:3]
        head.head.bias[3:6] = 2 * root.diagonal().log()
        head.head.bias[6:] = root[row, column]
    full = VAE(model.encoder, head, model.prior, model.likelihood)
    q = full.encode(x)
    assert torch.allclose(q.mean, mean, atol=1e-12)
    assert torch.allclose(q.scale_tril @ q.scale_tril.mT, covariance.expand(20, 3, 3), atol=1e-12)
    trace = full.trace(x, k=5, generator=stream(0, "noise"))
    assert (trace.log_w() - oracle.log_px(x)).abs().max() < 1e-11
    many = full.trace(x, k=20_000, generator=stream(1, "noise"))
    assert (ELBO()(many, 0).bound - oracle.log_px(x)).mean().abs() < 5e-3
    # the best diagonal Gaussian has the posterior's precision on its diagonal, and misses this much
    precision = torch.linalg.inv(covariance)
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    best = DiagGaussian(mean, -0.5 * precision.diagonal().log().expand(20, 3))
    assert gap > 0.1 and closed_form_kl(best, q).mean().item() == pytest.approx(gap.item(), abs=1e-9)


@pytest.mark.parametrize("kind", ["FullGaussian", "InverseAutoregressive", "NeuralSpline", "Planar"])
def test_richer_posteriors_close_the_gap_of_the_diagonal_gaussian(kind):
    """One image of a model with correlated codes: the bound of the fitted posterior passes the best diagonal Gaussian's."""
    oracle = LinearGaussian(
        torch.tensor([[1.0, 1.2], [1.0, 0.8], [0.2, 0.0]], dtype=F64), torch.zeros(3, dtype=F64), 0.5
    )
    x = oracle.sample(1, stream(2, "images"))
    _, covariance = oracle.posterior(x)
    precision = torch.linalg.inv(covariance)
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    assert gap > 0.5
    model = oracle.vae()
    posterior = seeded(lambda: ALL[kind](3, 2))
    model = VAE(nn.Identity(), posterior, model.prior, model.likelihood)
    optimiser = torch.optim.Adam(posterior.parameters(), 0.02)
    noise = stream(0, "noise")
    for _ in range(400):
        optimiser.zero_grad()
        (-model.trace(x, k=64, generator=noise).log_w().mean()).backward()
        optimiser.step()
    with torch.no_grad():
        log_w = model.trace(x, k=50_000, generator=stream(1, "noise")).log_w()
    left = (oracle.log_px(x) - log_w.mean(0)).item()
    assert -4 * log_w.std().item() / math.sqrt(50_000) < left < 0.5 * gap


@pytest.mark.parametrize("kind", ALL)
def test_a_posterior_is_float32_under_autocast(kind):
    posterior, h = seeded(lambda: ALL[kind](6, 3)).float(), normal(4, 6).float()

    def once():
        z, log_q = posterior(h).draw(3, stream(0, "noise"))
        return z, posterior(h).log_prob(z) if log_q is None else log_q

    plain = once()
    with torch.autocast("cpu", torch.bfloat16):
        cast = once()
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, cast, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert posterior(h.bfloat16()).rsample(2, stream(0, "noise")).dtype == torch.float32


def test_a_full_gaussian_posterior_starts_diagonal():
    q = seeded(lambda: posteriors.FullGaussian(6, 3))(normal(4, 6))
    assert torch.equal(q.scale_tril, torch.diag_embed(q.scale_tril.diagonal(dim1=-2, dim2=-1)))
    assert (q.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("kind", ALL)
def test_any_number_of_dimensions(kind, dim):
    q = seeded(lambda: ALL[kind](6, dim))(normal(4, 6))
    z, _ = q.draw(3, stream(0, "noise"))
    assert z.shape == (3, 4, dim) and q.mean.shape == (4, dim)


@pytest.mark.parametrize(
    "posterior",
    [
        posteriors.FullGaussian(6, 3),
        posteriors.Laplace(6, 3),
        posteriors.InverseAutoregressive(6, 3, 1, [5, 4]),
        posteriors.NeuralSpline(6, 3, 3, [5], 4),
        posteriors.Planar(6, 3, 2),
    ],
    ids=lambda one: type(one).__name__,
)
def test_every_posterior_is_rebuilt_from_its_spec(posterior):
    rebuilt = build(to_spec(posterior))
    assert to_spec(rebuilt) == to_spec(posterior)
    shapes = {name: value.shape for name, value in posterior.state_dict().items()}
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: posteriors.Gaussian(0, 2), "features is 0: expected an integer of 1 or more"),
        (lambda: posteriors.FullGaussian(6, 0), "dim is 0"),
        (lambda: posteriors.Laplace(6, "2"), "dim is '2'"),
        (lambda: posteriors.Delta(6, True), "dim is True"),
        (lambda: posteriors.InverseAutoregressive(6, 2, -1), "layers is -1: expected an integer of 0 or more"),
        (lambda: posteriors.InverseAutoregressive(6, 2, hidden=(0,)), "hidden is 0"),
        (lambda: posteriors.NeuralSpline(6, 2, bins=1), "bins is 1: expected an integer of 2 or more"),
        (lambda: posteriors.NeuralSpline(6, 2, hidden=64), "hidden is 64: expected the widths"),
        (lambda: posteriors.Planar(6, 2, 1.5), r"layers is 1\.5"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
