"""The aggregate posterior against mixtures written out by torch, and against Gaussians whose answer is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vaelab import likelihoods, posteriors, priors
from vaelab.distributions import DiagGaussian, FullGaussian, Laplace
from vaelab.evaluation import latent
from vaelab.evaluation.codes import features_of, linear_probe, outside_prior
from vaelab.evaluation.quantity import Quantity
from vaelab.models.vae import VAE
from vaelab.nn.mlp import MLP
from vaelab.oracles import LinearGaussian
from vaelab.rng import stream

N = 3000
KEYS = ("mutual_information", "mutual_information_upper", "aggregate_kl", "aggregate_kl_lower", "total_correlation")


@pytest.fixture(scope="module")
def oracle():
    return LinearGaussian.random(pixels=9, dim=2, std=0.4, generator=stream(1, "oracle"))


@pytest.fixture(scope="module")
def images(oracle):
    return oracle.sample(N, stream(2, "images"))


def mixed(oracle):
    """The exact model with its posterior means mixed, and the covariance of its aggregate, which is correlated."""
    model, mix = oracle.vae(), torch.tensor([[1.0, 0.0], [0.8, 0.5]], dtype=torch.float64)
    with torch.no_grad():
        model.posterior.head.weight[:2] = mix @ model.posterior.head.weight[:2]
        model.posterior.head.bias[:2] = mix @ model.posterior.head.bias[:2]
    _, v = oracle.posterior(oracle.bias[None])
    return model, mix @ (torch.eye(2, dtype=torch.float64) - v) @ mix.T + v


def near(found: Quantity, exact: float, bias: float) -> None:
    """Within four standard errors and what a mixture of N components may be off by."""
    assert found.mean is not None and found.se is not None
    assert found.se < 0.05
    assert abs(found.mean - exact) < 4 * found.se + bias, (found, exact)


@torch.no_grad()
def one_group(model, x, seed=0):
    (part,) = latent.aggregates(model, features_of(model, x), np.zeros(len(x), int), seed)
    return part


def test_the_mixture_is_torchs_to_rounding(oracle, images):
    model, x = oracle.vae(widen=1.3, shift=0.5), images[:200]
    part = one_group(model, x)
    with torch.no_grad():
        q, z = model.encode(x), torch.from_numpy(part.z)
        weights = Categorical(torch.ones(200, dtype=torch.float64))
        both = MixtureSameFamily(weights, Independent(Normal(q.mean, q.std), 1)).log_prob(z)
        single = sum(MixtureSameFamily(weights, Normal(q.mean[:, d], q.std[:, d])).log_prob(z[:, d]) for d in range(2))
        each = Independent(Normal(q.mean, q.std), 1).log_prob(z[:, None])
    assert np.abs(part.mixture - both.numpy()).max() < 1e-10
    assert np.abs(part.factors - single.numpy()).max() < 1e-10
    assert np.abs(part.prior - Normal(0, 1).log_prob(z).sum(-1).numpy()).max() < 1e-10
    gap, own = (each - torch.from_numpy(part.given_x)[:, None]).abs().min(1)
    assert gap.max() < 1e-10 and len(own.unique()) == 200  # each sample has a component of its own …
    each[torch.arange(200), own] = -math.inf
    others = each.logsumexp(1) - math.log(199)  # … which `others` leaves out
    assert np.abs(part.others - others.numpy()).max() < 1e-8


def test_rate_is_information_plus_distance_on_the_same_samples(oracle, images):
    model = oracle.vae(widen=1.4, shift=0.7)
    found, _ = latent.measure(model, images, seed=3)
    part = one_group(model, images, seed=3)
    rate = (part.given_x - part.prior).mean()
    assert found["mutual_information"].mean + found["aggregate_kl"].mean == pytest.approx(rate, abs=1e-10)
    assert found["mutual_information"].n == found["aggregate_kl"].n == N
    exact = sum(found[f"rate_dim_{d}"].mean for d in range(2))
    assert abs(rate - exact) < 4 * (part.given_x - part.prior).std() / math.sqrt(N)


def test_the_rate_of_each_dimension_is_its_closed_form(oracle, images):
    """With the exact posterior, KL(N(m, v) || N(0, 1)) has the mean -1/2 log v over images, since E m^2 = 1 - v."""
    found, _ = latent.measure(oracle.vae(), images)
    _, v = oracle.posterior(images)
    for d in range(2):
        rate = found[f"rate_dim_{d}"]
        assert abs(rate.mean + 0.5 * math.log(v[d, d])) < 4 * rate.se
        assert rate.n == N
    with torch.no_grad():
        kl = oracle.vae().trace(images).levels[0].kl.mean(0)
    assert [found[f"rate_dim_{d}"].mean for d in range(2)] == pytest.approx(kl.tolist(), abs=1e-12)


def test_the_exact_posterior_has_the_prior_as_its_aggregate(oracle, images):
    found, said = latent.measure(oracle.vae(), images)
    _, v = oracle.posterior(images)
    near(found["aggregate_kl"], 0, 0.02)
    near(found["aggregate_kl_lower"], 0, 0.02)
    near(found["mutual_information"], float(-0.5 * v.diagonal().log().sum()), 0.02)
    near(found["mutual_information_upper"], float(-0.5 * v.diagonal().log().sum()), 0.02)
    near(found["total_correlation"], 0, 0.02)
    assert found["active_units"].mean == 2 and said == []


def test_a_gaussian_aggregate_elsewhere(oracle, images):
    """q(z) = N(shift * s, I - V + widen^2 V), so KL and information are Gaussian closed forms."""
    widen, shift = 1.5, 1.0
    found, _ = latent.measure(oracle.vae(widen, shift), images)
    _, v = oracle.posterior(images)
    v = v.diagonal()
    total = 1 - v + widen**2 * v
    kl = 0.5 * (total + shift**2 * v - 1 - total.log()).sum().item()
    near(found["aggregate_kl"], kl, 0.02)
    near(found["aggregate_kl_lower"], kl, 0.02)
    near(found["mutual_information"], 0.5 * (total / (widen**2 * v)).log().sum().item(), 0.02)


def test_total_correlation_of_a_correlated_aggregate(oracle, images):
    model, s = mixed(oracle)
    found, _ = latent.measure(model, images)
    exact = 0.5 * (s.diagonal().log().sum() - torch.linalg.slogdet(s)[1]).item()
    assert exact > 0.1
    near(found["total_correlation"], exact, 0.02)


def test_two_bounds_hold_where_the_mixture_saturates():
    """Six precise dimensions and few images: I is log N, far below the truth; the bounds say so, and bracket it."""
    oracle = LinearGaussian.random(pixels=12, dim=6, std=0.02, generator=stream(4, "oracle"), scale=2.0)
    found, said = latent.measure(oracle.vae(), oracle.sample(1000, stream(5, "images")))
    _, v = oracle.posterior(oracle.bias[None])
    exact = float(-0.5 * v.diagonal().log().sum())
    assert exact > 15
    assert found["mutual_information"].mean <= math.log(1000) + 1e-9
    assert found["mutual_information"].mean == pytest.approx(math.log(1000), abs=1e-2)
    assert found["aggregate_kl"].mean > 10
    near_zero = found["aggregate_kl_lower"]
    assert -0.3 < near_zero.mean < 4 * near_zero.se
    upper = found["mutual_information_upper"]
    assert exact - 4 * upper.se < upper.mean < exact + 0.5
    assert said == []  # no hole, though the mixture's own KL is ten nats


def test_fewer_samples_are_scored_where_all_take_too_long(oracle, images, monkeypatch):
    whole = one_group(oracle.vae(), images[:300])
    monkeypatch.setattr(latent, "WORK", 300 * 2 * 40)
    some = one_group(oracle.vae(), images[:300])
    assert len(some.factors) == 40 and len(some.mixture) == 300
    assert np.array_equal(some.factors, whole.factors[:40]) and np.array_equal(some.mixture, whole.mixture)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunks_change_nothing(oracle, images, monkeypatch, rows):
    whole = one_group(oracle.vae(), images[:150])
    monkeypatch.setattr(latent, "ROWS", rows)
    monkeypatch.setattr(latent, "ROWS_JOINT", rows)
    parts = one_group(oracle.vae(), images[:150])
    for name in ("given_x", "mixture", "others", "factors"):
        assert np.abs(getattr(parts, name) - getattr(whole, name)).max() < 1e-12


def test_full_covariances_and_laplace_agree_with_torch():
    noise = stream(6, "q")
    mean = torch.randn(40, 3, generator=noise, dtype=torch.float64)
    root = torch.randn(40, 3, 3, generator=noise, dtype=torch.float64).tril(-1) + 0.7 * torch.eye(3)
    full = FullGaussian(mean, root)
    z = full.rsample(1, noise)[0]
    weights = Categorical(torch.ones(40, dtype=torch.float64))
    joint = torch.distributions.MultivariateNormal(mean, scale_tril=root)
    given_x, mixture, _ = latent._mixture(full, z)
    assert np.abs(given_x - joint.log_prob(z).numpy()).max() < 1e-10
    assert np.abs(mixture - MixtureSameFamily(weights, joint).log_prob(z).numpy()).max() < 1e-10
    std = joint.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    single = sum(MixtureSameFamily(weights, Normal(mean[:, d], std[:, d])).log_prob(z[:, d]) for d in range(3))
    marginal = latent._marginals(full, False)
    assert np.abs(latent._factors(marginal, z) - single.numpy()).max() < 1e-10

    laplace = Laplace(mean, 0.3 * mean)
    each = torch.distributions.Laplace(mean, torch.exp(0.3 * mean))
    expected = MixtureSameFamily(weights, Independent(each, 1)).log_prob(z)
    assert np.abs(latent._mixture(laplace, z)[1] - expected.numpy()).max() < 1e-10
    single = sum(
        MixtureSameFamily(weights, torch.distributions.Laplace(each.loc[:, d], each.scale[:, d])).log_prob(z[:, d])
        for d in range(3)
    )
    assert np.abs(latent._factors(laplace, z) - single.numpy()).max() < 1e-10
    assert latent._marginals(DiagGaussian(mean, mean), True) is not None


def small(posterior=posteriors.Gaussian, prior=None, dim=2, classes=None):
    """A VAE on (1, 8, 8) images with fixed random weights, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = MLP((dim,), (8,), (1, 8, 8), "tanh")
        prior = prior() if prior else priors.LabelGaussian(dim, classes) if classes else priors.StandardNormal(dim)
        encoder = MLP((1, 8, 8), (), (16,), "tanh", out_activation=True)
        model = VAE(encoder, posterior(16, dim), prior, likelihoods.Bernoulli(decoder))
    with torch.no_grad():
        for part in model.posterior.modules():
            if isinstance(part, nn.Linear) and part.in_features == 16:
                part.weight.mul_(4)
    if classes:
        nn.init.normal_(prior.mean, generator=stream(7, "prior"))
    return model.eval()


def bits(n, seed=0):
    return (torch.rand(n, 1, 8, 8, generator=stream(seed, "bits")) < 0.4).float()


def test_a_conditional_model_has_one_aggregate_for_each_label():
    model, x = small(classes=2), bits(120)
    c = torch.arange(120) % 3 // 2  # 80 of label 0, 40 of label 1
    found, _ = latent.measure(model, x, c, seed=1)
    with torch.no_grad():
        parts = latent.aggregates(model, features_of(model, x, c), c.numpy(), seed=1)
        for label, part in enumerate(parts):
            q, z = model.encode(x[c == label], c[c == label]), torch.from_numpy(part.z).float()
            component = Independent(Normal(q.mean, q.std), 1)
            mixture = MixtureSameFamily(Categorical(torch.ones(len(q.mean))), component).log_prob(z)
            assert np.abs(part.mixture - mixture.numpy()).max() < 1e-4
            p = Normal(model.prior.mean[label], model.prior.log_std[label].exp())
            assert np.abs(part.prior - p.log_prob(z).sum(-1).numpy()).max() < 1e-4
    assert [len(part.z) for part in parts] == [80, 40]
    expected = np.concatenate([part.mixture - part.prior for part in parts]).mean()
    assert found["aggregate_kl"].mean == pytest.approx(expected, abs=1e-12)
    assert found["aggregate_kl"].n == 120


def test_what_does_not_exist_is_said_with_its_reason():
    found, _ = latent.measure(small(posteriors.Delta), bits(50))
    for name in KEYS:
        assert found[name].mean is None and "Dirac posterior has no density" in found[name].reason
    assert found["rate_dim_0"].mean is None and found["active_units"].mean is not None

    found, _ = latent.measure(small(prior=lambda: priors.SecondStage(2, 2, (8,))), bits(50))
    assert found["aggregate_kl"].mean is None and "no density" in found["aggregate_kl"].reason
    assert math.isfinite(found["mutual_information"].mean) and math.isfinite(found["total_correlation"].mean)

    found, _ = latent.measure(small(posteriors.Planar), bits(50))
    assert found["mutual_information"].mean is None and "planar" in found["mutual_information"].reason

    found, _ = latent.measure(small(), bits(1))
    assert found["mutual_information"].mean is None and "at least two images" in found["mutual_information"].reason

    model = small()
    with torch.no_grad():
        model.posterior.head.bias.fill_(math.nan)
    found, said = latent.measure(model, bits(9))
    assert {q.mean for q in found.values()} == {None} and said == []
    assert "not finite for 9 of 9 images" in found["aggregate_kl"].reason


@pytest.mark.parametrize("kind", ["FullGaussian", "Laplace", "NeuralSpline", "InverseAutoregressive"])
def test_every_posterior_with_a_density_is_measured(kind):
    model = small(getattr(posteriors, kind))
    found, _ = latent.measure(model, bits(60))
    part = one_group(model, bits(60))
    rate = part.given_x - part.prior
    assert found["mutual_information"].mean + found["aggregate_kl"].mean == pytest.approx(rate.mean(), abs=1e-6)
    with torch.no_grad():
        exact = model.trace(bits(60), k=500, generator=stream(8, "k")).rate.mean().item()
    assert abs(rate.mean() - exact) < 4 * rate.std() / math.sqrt(60)
    assert 0.2 < found["mutual_information"].mean <= math.log(60) + 1e-6


def test_active_units_vary_with_the_image():
    noise = np.random.default_rng(0).standard_normal((5000, 3))
    means = noise * np.sqrt([0.02, 0.005, 0.0])
    assert latent.active_units(means, means, np.zeros(5000, int)).mean == 1
    label = np.arange(5000) % 2
    means[:, 2] = label  # says the label only: nothing about the image, given the label
    assert latent.active_units(means, means, np.zeros(5000, int)).mean == 2
    assert latent.active_units(means, means, label).mean == 1
    one, other = means + 0.2 * noise[::-1], means - 0.2 * np.roll(noise, 7, 0)
    assert latent.active_units(one, other, label).mean == 1  # independent noise of variance 0.04 is not activity


def test_alarms_are_raised_where_they_should_and_nowhere_else(oracle, images):
    model = oracle.vae()
    with torch.no_grad():
        model.posterior.head.weight.zero_()
        model.posterior.head.bias.zero_()
    found, said = latent.measure(model, images[:500])
    assert found["active_units"].mean == 0 and found["mutual_information"].mean == pytest.approx(0, abs=1e-10)
    assert len(said) == 1 and said[0].startswith(
        "posterior collapse: 0 of 2 latent dimensions are active and the rate is 0"
    )

    model = oracle.vae()
    with torch.no_grad():
        model.posterior.head.bias[:2] += 4
    _, said = latent.measure(model, images[:500])
    assert [s.split(":")[0] for s in said] == ["prior hole", "codes outside the prior"]


def test_the_share_outside_any_prior_is_that_of_its_own_samples(oracle):
    """A share of exp(-4.5) of the prior's own samples lies outside, whatever the prior; for a normal the ball decides."""
    n, expected = 40_000, math.exp(-4.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        mixture = priors.MixtureOfGaussians(2, 3)
    for prior in (mixture, priors.Laplace(2), priors.Flow(2)):
        model = small(prior=lambda prior=prior: prior)
        with torch.no_grad():
            z = model.prior_codes(n, generator=stream(9, "z")).double().numpy()
        share = outside_prior(model, z)
        assert abs(share.mean - expected) < 4 * math.sqrt(expected / 10_000 + expected / n)
    ball = outside_prior(small(), np.array([[2.99, 0.0], [3.01, 0.0], [0.0, 0.0], [3.0, 3.0]]))
    assert ball.mean == 0.5
    one = outside_prior(small(dim=1), np.array([[2.5], [2.6]]))  # 98.9 % of a normal lie within 2.54
    assert one.mean == 0.5
    none = outside_prior(small(prior=lambda: priors.SecondStage(2, 2, (8,))), np.zeros((3, 2)))
    assert none.mean is None and "no density" in none.reason


def test_the_linear_probe_reads_what_a_plane_can_separate():
    noise = np.random.default_rng(1)
    labels = np.arange(600) % 3
    centres = np.array([[0, 0], [100, 0], [0, 0.01]])  # scales that differ by 10^4
    codes = centres[labels] + noise.standard_normal((600, 2)) * [5, 0.0005]
    found = linear_probe(codes[:300], labels[:300], codes[300:], labels[300:])
    assert found.mean == 1.0 and found.n == 300
    ring = np.stack([np.cos(codes[:, 0]), np.sin(codes[:, 0])], 1) * (1 + labels[:, None])
    assert linear_probe(ring[:300], labels[:300], ring[300:], labels[300:]).mean < 0.6  # rings inside rings
    assert linear_probe(codes[:9, :1], np.zeros(9, int), codes[:9, :1], np.zeros(9, int)).mean is None
    constant = linear_probe(np.zeros((300, 1)), labels[:300], np.zeros((300, 1)), labels[300:])
    assert constant.mean == pytest.approx(1 / 3)
