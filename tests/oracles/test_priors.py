"""Priors: what each is made of, that it is learned, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from vaelab import likelihoods, posteriors, priors
from vaelab.distributions import DiagGaussian, FullGaussian, Mixture
from vaelab.errors import NoDensity, UsageError
from vaelab.models.vae import VAE
from vaelab.nn.label import WithLabel
from vaelab.nn.mlp import MLP
from vaelab.objectives import ELBO
from vaelab.registry import build, to_spec
from vaelab.rng import stream, stream_seed

F64 = torch.float64
SHAPE = (1, 4, 4)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "test"), dtype=F64)


def seeded(make, seed=0):
    """A module in float64 with its first weights from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, "init"))
        return make().double()


def vae(prior, posterior=posteriors.Gaussian, dim=2):
    return seeded(
        lambda: VAE(
            MLP(SHAPE, (8,), (6,), out_activation=True),
            posterior(6, dim),
            prior(),
            likelihoods.Bernoulli(MLP((dim,), (8,), SHAPE)),
        )
    )


def vamp(pseudo_inputs=5):
    return lambda: priors.VampPrior(SHAPE, 2, pseudo_inputs)


LEARNED = {
    "diagonal mixture": lambda: priors.MixtureOfGaussians(2, 3),
    "full mixture": lambda: priors.MixtureOfGaussians(2, 3, "full"),
    "spline": lambda: priors.Flow(2, hidden=(8,)),
    "autoregressive": lambda: priors.Flow(2, "autoregressive", hidden=(8,)),
}


def images(n=4):
    return (normal(n, *SHAPE, seed=11) > 0).double()


@pytest.mark.parametrize(
    "prior", [*LEARNED.values(), vamp(), lambda: priors.Laplace(2)], ids=[*LEARNED, "vamp", "laplace"]
)
def test_a_new_prior_is_about_as_wide_as_the_standard_normal(prior):
    """A model that starts with it pays about the same rate."""
    model = vae(prior)
    z = model.prior_codes(4_000, generator=stream(0, "noise"))
    assert z.shape == (4_000, 2)
    assert (z.mean(0).abs() < 1).all() and ((z.std(0) > 0.5) & (z.std(0) < 2)).all()


def test_the_laplace_prior_has_variance_one():
    p = priors.Laplace(2).double()()
    z = torch.linspace(-60, 60, 240_001, dtype=F64)
    density = torch.exp(p.log_prob_each(torch.stack([z, z], -1).unsqueeze(1)))[:, 0, 0]
    assert (density.sum() * 5e-4).item() == pytest.approx(1, abs=1e-6)
    assert (density * z.square()).sum().item() * 5e-4 == pytest.approx(1, abs=1e-6)


def test_a_full_mixture_reads_any_root_of_its_covariances():
    """A column's sign and what stands above the diagonal are free while it learns; the density is that of L L^T."""
    p = seeded(LEARNED["full mixture"])
    root = normal(3, 2, 2, seed=1).tril()
    root[1, :, 1] = -root[1, :, 1].abs()
    with torch.no_grad():
        p.scale_tril.copy_(root + normal(3, 2, 2, seed=2).triu(1))
        p.logits.copy_(normal(3, seed=3))
    value = normal(5, 4, 2, seed=4)
    parts = torch.distributions.MultivariateNormal(p.mean, root @ root.mT)
    expected = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=p.logits), parts)
    assert torch.allclose(p().log_prob(value), expected.log_prob(value), rtol=0, atol=1e-10)


@pytest.mark.parametrize("covariance", priors.MixtureOfGaussians.COVARIANCES)
def test_a_mixture_takes_the_parameters_of_a_fitted_one(covariance):
    p = priors.MixtureOfGaussians(2, 3, covariance).double()
    root = normal(3, 2, 2) + 2 * torch.eye(2, dtype=F64)
    covariances = root @ root.mT
    given = covariances.diagonal(dim1=-2, dim2=-1) if covariance == "diagonal" else covariances
    weights, means = torch.tensor([0.2, 0.5, 0.3], dtype=F64), normal(3, 2, seed=5)
    p.fill(weights, means, given)
    full = torch.diag_embed(given) if covariance == "diagonal" else given
    parts = torch.distributions.MultivariateNormal(means, full)
    expected = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), parts)
    value = normal(5, 4, 2, seed=6)
    assert torch.allclose(p().log_prob(value), expected.log_prob(value), rtol=0, atol=1e-12)


@pytest.mark.parametrize("covariance", priors.MixtureOfGaussians.COVARIANCES)
def test_a_mixture_is_not_changed_by_parameters_it_refuses(covariance):
    p = priors.MixtureOfGaussians(2, 3, covariance).double()
    before = {name: value.clone() for name, value in p.state_dict().items()}
    bad = -torch.ones(3, 2, dtype=F64) if covariance == "diagonal" else -torch.eye(2, dtype=F64).repeat(3, 1, 1)
    with pytest.raises(UsageError, match="not positive definite"):
        p.fill(torch.ones(3, dtype=F64) / 3, normal(3, 2), bad)
    with pytest.raises(UsageError, match=r"shapes .*: expected \(\(3,\), \(3, 2\)"):
        p.fill(torch.ones(4, dtype=F64) / 4, normal(4, 2), bad)
    assert all(torch.equal(value, before[name]) for name, value in p.state_dict().items())


@pytest.mark.parametrize(
    "posterior", [posteriors.Gaussian, posteriors.FullGaussian, posteriors.Laplace, posteriors.NeuralSpline]
)
def test_a_vamp_prior_of_one_pseudo_input_is_that_posterior(posterior):
    model = vae(vamp(1), posterior)
    q, p = model.encode(model.prior.images.clamp(0, 1)), model.latent_prior()
    value = normal(5, 4, 2)
    assert torch.allclose(p.log_prob(value), q.log_prob(value[:, :, None]).squeeze(-1), rtol=0, atol=1e-9)


def test_a_vamp_prior_is_the_mean_of_the_posteriors_at_clamped_images():
    model = vae(vamp(3))
    with torch.no_grad():
        model.prior.images.copy_(2 * normal(3, *SHAPE))
    each = [model.encode(u.clamp(0, 1).unsqueeze(0)).log_prob(normal(5, 4, 2)).exp() for u in model.prior.images]
    expected = torch.stack(each).mean(0).log()
    assert torch.allclose(model.latent_prior().log_prob(normal(5, 4, 2)), expected, rtol=0, atol=1e-9)


def test_a_vamp_priors_gradient_reaches_encoder_and_pseudo_inputs():
    """Of the prior's term alone: the codes are constants here."""
    model = vae(vamp())
    model.latent_prior().log_prob(normal(5, 4, 2)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("likelihood" not in name), name


def test_a_vamp_prior_does_not_keep_the_model():
    model = vae(vamp())
    model.latent_prior()
    assert [name for name, _ in model.prior.named_parameters()] == ["images"]
    assert not [module for module in model.prior.modules() if module is not model.prior]


@pytest.mark.parametrize(
    ("posterior", "reason"), [(posteriors.Delta, "Delta has no density"), (posteriors.Planar, "its own samples only")]
)
def test_a_vamp_prior_refuses_posteriors_without_a_density_everywhere(posterior, reason):
    with pytest.raises(UsageError, match=f"(?s){reason}.*take Gaussian"):
        vae(vamp(), posterior)


def test_a_vamp_prior_takes_a_planar_flow_of_no_layers():
    model = vae(vamp(), lambda features, dim: posteriors.Planar(features, dim, layers=0))
    assert model.trace(images(), generator=stream(0, "noise")).rate.isfinite().all()


def test_a_vamp_prior_refuses_labels_and_needs_its_model():
    decoder = WithLabel(MLP((2 + 3,), (8,), SHAPE), 3)
    encoder = MLP(SHAPE, (8,), (6,))
    model = VAE(encoder, posteriors.Gaussian(6, 2), vamp()(), likelihoods.Bernoulli(decoder))
    with pytest.raises(UsageError, match="conditional: take LabelGaussian"):
        model.latent_prior(torch.zeros(4, dtype=torch.long))
    with pytest.raises(UsageError, match=r"model\.latent_prior"):
        vamp()()()


@pytest.mark.parametrize("prior", LEARNED.values(), ids=LEARNED)
def test_a_learned_prior_fits_codes_by_their_likelihood(prior):
    """Two clusters that a Gaussian cannot describe: after a hundred steps the log-likelihood is above that of the best
    Gaussian, which is -log det(2 pi e S) / 2, and below the entropy of the truth.
    """
    sign = torch.sign(normal(300, 1))
    codes = 1.5 * sign + 0.3 * normal(300, 2, seed=1)
    truth = Mixture(
        torch.zeros(2, dtype=F64),
        DiagGaussian(torch.tensor([[1.5, 1.5], [-1.5, -1.5]], dtype=F64), torch.full((2, 2), math.log(0.3), dtype=F64)),
    )
    best_gaussian = -0.5 * torch.logdet(2 * math.pi * math.e * torch.cov(codes.T, correction=0))
    p = seeded(prior)
    optimiser = torch.optim.Adam(p.parameters(), 0.03)
    for _ in range(150):
        optimiser.zero_grad()
        loss = -p().log_prob(codes.unsqueeze(0)).mean()
        loss.backward()
        optimiser.step()
    assert best_gaussian + 0.2 < -loss < truth.log_prob(codes.unsqueeze(0)).mean() + 0.1


@pytest.mark.parametrize("prior", LEARNED.values(), ids=LEARNED)
def test_every_parameter_of_a_learned_prior_learns_in_the_bound(prior):
    model = vae(prior)
    for name, parameter in model.prior.named_parameters():
        if "network" in name:
            with torch.no_grad():
                parameter.add_(0.2 * normal(*parameter.shape))
    ELBO()(model.trace(images(), k=3, generator=stream(0, "noise")), 0).loss.backward()
    for name, parameter in model.prior.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("prior", LEARNED.values(), ids=LEARNED)
def test_prior_codes_are_drawn_from_the_generator_that_is_passed(prior):
    model = vae(prior)
    first, second, other = (model.prior_codes(9, generator=stream(s, "sample")) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_label_prior_is_the_gaussian_of_each_label():
    p = seeded(lambda: priors.LabelGaussian(2, 3))
    with torch.no_grad():
        p.mean.copy_(normal(3, 2))
        p.log_std.copy_(normal(3, 2, seed=1))
    c, value = torch.tensor([2, 0, 2, 1]), normal(5, 4, 2, seed=2)
    expected = torch.distributions.Normal(p.mean[c], p.log_std[c].exp()).log_prob(value).sum(-1)
    assert torch.allclose(p(c=c).log_prob(value), expected, rtol=0, atol=1e-12)
    p(c=torch.tensor([2, 2])).log_prob(value[:, :2]).sum().backward()
    assert p.mean.grad[2].abs().sum() > 0 and p.mean.grad[:2].abs().sum() == 0


@pytest.mark.parametrize("label", [-1, 3])
def test_the_label_prior_refuses_a_label_it_does_not_have(label):
    with pytest.raises(UsageError, match="outside 0 to 2"):
        priors.LabelGaussian(2, 3)(c=torch.tensor([0, label]))


def linear_second_stage():
    """A second stage that is linear: its codes are N(W v + b, s^2), so N(b, W W^T + s^2 I)."""
    p = seeded(lambda: priors.SecondStage(3, 2, (4,)))
    weight, bias = normal(3, 2), normal(3, seed=1)
    decoder = nn.Linear(2, 3).double()
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
        p.vae.likelihood.log_scale.fill_(math.log(0.7))
    p.vae.likelihood.decoder = decoder
    return p, bias, weight @ weight.T + 0.49 * torch.eye(3, dtype=F64)


def test_a_second_stage_samples_codes_with_its_decoders_noise():
    p, mean, covariance = linear_second_stage()
    with torch.no_grad():
        z = p().rsample(200_000, stream(0, "noise"))
    assert torch.allclose(z.mean(0), mean, atol=0.03)
    assert torch.allclose(torch.cov(z.T), covariance, atol=0.05)


def test_a_second_stage_has_samples_and_no_density():
    model = vae(lambda: priors.SecondStage(2, 1, (4,)))
    assert model.prior_codes(7, generator=stream(0, "noise")).shape == (7, 2)
    with pytest.raises(NoDensity, match="samples of codes and no density"):
        model.trace(images(), generator=stream(0, "noise")).log_w()
    with pytest.raises(NoDensity):
        ELBO()(model.trace(images(), generator=stream(0, "noise")), 0)
    estimate = ELBO(beta=0)(model.trace(images(), generator=stream(0, "noise")), 0)
    assert estimate.bound is None and estimate.loss.isfinite()
    with pytest.raises(UsageError, match="no closed form: average draws"):
        _ = model.latent_prior().mean


def test_the_second_stages_own_vae_is_trained_like_any_other():
    p = seeded(lambda: priors.SecondStage(3, 2, (8,)))
    codes = normal(16, 3)
    estimate = ELBO()(p.vae.trace(codes, generator=stream(0, "noise")), 0)
    estimate.loss.backward()
    assert estimate.bound.shape == (16,)
    assert all(parameter.grad is not None for parameter in p.parameters())


EVERY = [
    priors.StandardNormal(2),
    priors.Laplace(2),
    priors.MixtureOfGaussians(2, 4, "full"),
    priors.VampPrior([1, 4, 4], 2, 7),
    priors.Flow(2, "autoregressive", 1, [5, 6]),
    priors.LabelGaussian(2, 3),
    priors.SecondStage(4, 2, [9, 8]),
]


@pytest.mark.parametrize("prior", EVERY, ids=lambda one: type(one).__name__)
def test_every_prior_is_rebuilt_from_its_spec(prior):
    rebuilt = build(to_spec(prior))
    assert to_spec(rebuilt) == to_spec(prior)
    assert {n: v.shape for n, v in rebuilt.state_dict().items()} == {n: v.shape for n, v in prior.state_dict().items()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: priors.StandardNormal(0), "dim is 0: expected an integer of 1 or more"),
        (lambda: priors.Laplace(2.5), r"dim is 2\.5"),
        (lambda: priors.MixtureOfGaussians(2, 0), "components is 0"),
        (lambda: priors.MixtureOfGaussians(2, covariance="diag"), "did you mean 'diagonal'"),
        (lambda: priors.MixtureOfGaussians(-1, covariance="full"), "dim is -1"),
        (lambda: priors.VampPrior(SHAPE, 2, 0), "pseudo_inputs is 0"),
        (lambda: priors.VampPrior((1, 0, 4), 2), "shape is 0"),
        (lambda: priors.VampPrior(16, 2), "shape is 16"),
        (lambda: priors.Flow(2, "splines"), "did you mean 'spline'"),
        (lambda: priors.Flow(2, layers=-1), "layers is -1: expected an integer of 0 or more"),
        (lambda: priors.Flow(2, hidden=(8, 0)), "hidden is 0"),
        (lambda: priors.Flow(2, hidden=8), "hidden is 8: expected the widths"),
        (lambda: priors.LabelGaussian(2, 0), "classes is 0"),
        (lambda: priors.SecondStage(2, 0), "latent_dim is 0"),
        (lambda: priors.SecondStage(2, 1, ()), "at least one layer"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_full_mixture_starts_with_quarter_covariances():
    p = priors.MixtureOfGaussians(3, 2, "full")()
    assert isinstance(p.components, FullGaussian)
    assert torch.equal(p.components.scale_tril, 0.5 * torch.eye(3).repeat(2, 1, 1))
