"""The objectives of many samples: their bounds, and the gradients they are about, against exact answers."""

import itertools
import math

import pytest
import torch
from torch import nn

from vaelab.distributions import DiagGaussian
from vaelab.models.vae import VAE
from vaelab.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, STL, DReG
from vaelab.oracles import LinearGaussian
from vaelab.priors import Prior
from vaelab.rng import stream
from vaelab.trace import log_mean_exp

F64 = torch.float64


@pytest.fixture
def oracle():
    return LinearGaussian.random(pixels=5, dim=2, std=0.4, generator=stream(1, "oracle"))


@pytest.fixture
def images(oracle):
    return oracle.sample(30, stream(2, "images"))


def slope(ks, values):
    """Of log value over log K, by least squares."""
    x = torch.tensor([[math.log(k), 1.0] for k in ks], dtype=F64)
    y = torch.tensor([[math.log(value)] for value in values], dtype=F64)
    return torch.linalg.lstsq(x, y).solution[0].item()


# bounds


def test_the_bias_of_iwae_falls_like_one_over_k(oracle, images):
    """E[log p(x) - IWAE_K] ~ var(w) / (2K), by the bound that the objective reports."""
    model, exact, ks, bias = oracle.vae(widen=1.6), oracle.log_px(images), [4, 8, 16, 32, 64], []
    for k in ks:
        repeats = 16_000 // k
        with torch.no_grad():
            trace = model.trace(images.repeat(repeats, 1), k=k, generator=stream(3, "noise", k))
        bias.append((exact.repeat(repeats) - IWAE()(trace, 0).bound).mean().item())
    assert slope(ks, bias) == pytest.approx(-1, abs=0.1)


def test_every_bound_of_the_exact_posterior_is_log_px(oracle, images):
    trace = oracle.vae().trace(images, k=6, generator=stream(0, "noise"))
    for objective in (IWAE(), MIWAE(3), PIWAE(3), DReG()):
        estimate = objective(trace, 0)
        assert (estimate.bound - oracle.log_px(images)).abs().max() < 1e-11
        assert estimate.loss.item() == pytest.approx(-oracle.log_px(images).mean().item(), abs=1e-11)


def test_the_reported_bound_is_the_bound_and_not_the_surrogate(oracle, images):
    """-sum w~ log w has IWAE's gradient and is too optimistic by log K - H(w~)."""
    trace = oracle.vae(widen=2.0, shift=1.0).trace(images, k=8, generator=stream(0, "noise"))
    log_w = trace.log_w().detach()
    bound = log_w.exp().mean(0).log()
    share = torch.softmax(log_w, 0)
    surrogate = (share * log_w).sum(0)
    entropy = -(share * share.log()).sum(0)
    assert (surrogate - bound - (math.log(8) - entropy)).abs().max() < 1e-10
    assert (surrogate - bound).mean() > 0.5
    for objective in (IWAE(), PIWAE(2), DReG(), MIWAE(1), CIWAE(0.0)):
        assert (objective(trace, 0).bound - bound).abs().max() < 1e-10
        assert objective(trace, 0).loss.item() == pytest.approx(-bound.mean().item(), abs=1e-10)
    mixed = 0.3 * ELBO()(trace, 0).bound + 0.7 * bound
    assert (CIWAE(0.3)(trace, 0).bound - mixed).abs().max() < 1e-10


def test_miwae_averages_over_groups_the_log_of_means_within_them(oracle, images):
    """M = 2 groups of K = 6; with the axes swapped it would be another bound."""
    trace = oracle.vae(widen=2.0, shift=1.0).trace(images, k=12, generator=stream(0, "noise"))
    w = trace.log_w().detach().exp()
    expected = (w[:6].mean(0).log() + w[6:].mean(0).log()) / 2
    swapped = torch.stack([w[i::6].mean(0).log() for i in range(6)]).mean(0)
    found = MIWAE(2)(trace, 0)
    assert (found.bound - expected).abs().max() < 1e-10
    assert found.loss.item() == pytest.approx(-expected.mean().item(), abs=1e-10)
    assert (expected - swapped).mean() > 0.1


def test_the_bounds_are_ordered_by_jensen_for_every_image(oracle, images):
    trace = oracle.vae(widen=2.0).trace(images, k=12, generator=stream(0, "noise"))
    bounds = [MIWAE(m)(trace, 0).bound for m in (12, 6, 3, 1)]
    assert all((b >= a).all() and (b > a).any() for a, b in itertools.pairwise(bounds))
    assert torch.equal(bounds[-1], IWAE()(trace, 0).bound)


# gradients in the mean


def posterior_gradients(objective, model, x, k, generator):
    """Of each image's own loss, with respect to its posterior's mean and log sigma: (B, 2 D)."""
    trace = model.trace(x, k=k, generator=generator)
    q = trace.levels[0].q
    return len(x) * torch.cat(torch.autograd.grad(objective(trace, 0).loss, [q.mean_, q.log_std]), 1)


def test_signal_to_noise_falls_for_iwae_and_rises_for_dreg():
    """Slopes -1/2 and +1/2 in K (Rainforth et al. 2018, theorem 1; Tucker et al. 2019), for an over-dispersed posterior."""
    oracle = LinearGaussian.random(pixels=3, dim=1, std=0.4, generator=stream(1, "oracle"))
    model, x, ks = oracle.vae(widen=1.5, shift=0.5), oracle.sample(1, stream(2, "images")), [8, 16, 32, 64]
    ratios = {"iwae": [], "dreg": []}
    for k in ks:
        many = x.expand(400_000 // k, -1)
        dreg = posterior_gradients(DReG(), model, many, k, stream(3, "noise", k))
        iwae = posterior_gradients(IWAE(), model, many, k, stream(4, "noise", k))
        # one expectation, two variances: DReG's mean is the better known
        ratios["dreg"].append(dreg.mean(0).abs() / dreg.std(0))
        ratios["iwae"].append(dreg.mean(0).abs() / iwae.std(0))
    for i in range(2):
        assert slope(ks, [ratio[i] for ratio in ratios["iwae"]]) == pytest.approx(-0.5, abs=0.06)
        assert slope(ks, [ratio[i] for ratio in ratios["dreg"]]) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_dreg_is_unbiased_for_the_gradient_of_iwae(oracle, images, k):
    many = images[:1].expand(60_000, -1)
    model = oracle.vae(widen=1.5, shift=0.6)
    dreg = posterior_gradients(DReG(), model, many, k, stream(3, "noise"))
    iwae = posterior_gradients(IWAE(), model, many, k, stream(4, "noise"))
    error = (dreg.var(0) / len(dreg) + iwae.var(0) / len(iwae)).sqrt()
    assert ((dreg.mean(0) - iwae.mean(0)).abs() < 4 * error).all()
    assert (dreg.mean(0).abs() > 10 * error).any()
    if k > 1:
        assert (dreg.var(0) < 0.7 * iwae.var(0)).all()


def test_stl_is_unbiased_for_the_gradient_of_the_elbo(oracle, images):
    """Against the closed form: KL(q || p(z|x)) is the only part of the ELBO that moves with q."""
    widen, shift = 1.5, 0.6
    found = posterior_gradients(STL(), oracle.vae(widen, shift), images[:1].expand(60_000, -1), 1, stream(3, "noise"))
    std = oracle.posterior(images[:1])[1].diagonal().sqrt()
    exact = torch.cat([shift / std, (widen**2 - 1) * torch.ones(2, dtype=F64)])
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / math.sqrt(len(found))).all()


def test_the_gradient_of_stl_and_dreg_vanishes_at_the_optimum_and_that_of_the_elbo_does_not(oracle, images):
    for objective, k in ((STL(), 1), (STL(), 5), (DReG(), 5)):
        gradient = posterior_gradients(objective, oracle.vae(), images, k, stream(0, "noise"))
        assert gradient.abs().max() < 1e-12
    for objective, k in ((ELBO(), 1), (IWAE(), 1), (IWAE(), 5)):
        gradient = posterior_gradients(objective, oracle.vae(), images, k, stream(0, "noise"))
        assert gradient.abs().mean() > 0.1


# gradients, sample by sample, against two passes that treat encoder and decoder apart


class LearnedPrior(Prior):
    """A diagonal Gaussian with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.dim = 2
        self.mean, self.log_std = nn.Parameter(torch.tensor([0.3, -0.2])), nn.Parameter(torch.tensor([0.1, 0.2]))

    def forward(self, model=None, c=None):
        return DiagGaussian(self.mean, self.log_std)


class EncoderPrior(LearnedPrior):
    """The posterior of one learned image, as a VampPrior of one component is."""

    def __init__(self):
        super().__init__()
        self.image = nn.Parameter(torch.linspace(-1, 1, 5).unsqueeze(0))

    def forward(self, model=None, c=None):
        q = model.encode(self.image)
        return DiagGaussian(q.mean_[0] + self.mean, q.log_std[0] + self.log_std)


def with_prior(model, prior):
    return VAE(model.encoder, model.posterior, prior.double(), model.likelihood)


def two_passes(model, x, k, generator, m):
    """The gradient of every parameter: IWAE's of what reads codes, DReG's (m None) or MIWAE's of what makes them."""
    parameters = dict(model.named_parameters())
    q, p = model.encode(x), model.latent_prior()
    z = q.rsample(k, generator)
    fixed = z.detach()
    joint = model.decode(fixed).log_prob(x) + p.log_prob(fixed)
    log_w = (joint - q.log_prob(fixed)).detach()
    share = torch.softmax(log_w, 0)
    reads = -(share * joint).sum(0).mean()
    if m is None:
        stopped = model.decode(z).log_prob(x) + p.detach().log_prob(z) - q.detach().log_prob(z)
        makes = -(share.square() * stopped).sum(0).mean()
    else:
        log_w = model.decode(z).log_prob(x) + p.detach().log_prob(z) - q.log_prob(z)
        makes = -torch.logsumexp(log_w.reshape(m, k // m, -1), 1).mean()
    names = list(parameters)
    first = torch.autograd.grad(reads, list(parameters.values()), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(makes, list(parameters.values()), allow_unused=True)
    return {
        name: (0 if a is None else a) + (b if b is not None and name.startswith("posterior") else 0)
        for name, a, b in zip(names, first, second, strict=True)
    }


@pytest.mark.parametrize("prior", [None, LearnedPrior, EncoderPrior])
@pytest.mark.parametrize(("objective", "m"), [(DReG(), None), (PIWAE(1), 1), (PIWAE(2), 2), (PIWAE(6), 6)])
def test_every_parameter_has_the_gradient_of_two_separate_passes(oracle, images, objective, m, prior):
    model = oracle.vae(widen=2.0, shift=0.7)
    model = model if prior is None else with_prior(model, prior())
    objective(model.trace(images, k=6, generator=stream(5, "noise")), 0).loss.backward()
    expected = two_passes(model, images, 6, stream(5, "noise"), m)
    for name, parameter in model.named_parameters():
        assert expected[name].abs().max() > 1e-3
        assert (parameter.grad - expected[name]).abs().max() < 1e-10 * max(1, expected[name].abs().max()), name


def test_piwae_of_one_group_is_iwae_and_groups_change_the_encoder_only(oracle, images):
    def gradients(objective):
        model = with_prior(oracle.vae(widen=2.0, shift=0.7), LearnedPrior())
        objective(model.trace(images, k=6, generator=stream(5, "noise")), 0).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    iwae, one, three = gradients(IWAE()), gradients(PIWAE(1)), gradients(PIWAE(3))
    miwae, dreg = gradients(MIWAE(3)), gradients(DReG())
    for name, expected in iwae.items():
        assert torch.allclose(one[name], expected, rtol=1e-10, atol=1e-10)
        encoder = name.startswith("posterior")
        assert torch.allclose(three[name], miwae[name] if encoder else expected, rtol=1e-10, atol=1e-10)
        assert torch.allclose(dreg[name], expected, rtol=1e-10, atol=1e-10) != encoder
        assert not torch.allclose(miwae[name], expected, rtol=1e-3)


def test_a_group_whose_weight_underflows_still_moves_the_encoder(oracle, images):
    """In float32 exp(-104) is 0, but in its own group of MIWAE a sample that bad may be the best."""
    model = oracle.vae(widen=12.0).float()
    x = images.float()
    trace = model.trace(x, k=4, generator=stream(6, "noise"))
    assert (torch.softmax(trace.log_w(), 0) == 0).any()
    PIWAE(4)(trace, 0).loss.backward()
    expected = two_passes(model, x, 4, stream(6, "noise"), 4)
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - expected[name]).abs().max()
        assert difference < 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("objective", [DReG(), PIWAE(2)])
def test_other_objectives_may_share_the_trace(oracle, images, objective):
    model = oracle.vae(widen=2.0)
    trace = model.trace(images, k=4, generator=stream(0, "noise"))
    weight = model.posterior.head.weight

    def gradient(one):
        return torch.autograd.grad(one(trace, 0).loss, weight, retain_graph=True)[0]

    before, own = gradient(ELBO()), gradient(objective)
    assert torch.equal(gradient(ELBO()), before)
    assert torch.equal(gradient(objective), own)
    assert torch.equal(gradient(ELBO()), before)


def test_dreg_of_one_sample_is_stl(oracle, images):
    for prior in (LearnedPrior, EncoderPrior):
        found = []
        for objective in (DReG(), STL()):
            model = with_prior(oracle.vae(widen=1.5), prior())
            objective(model.trace(images, generator=stream(0, "noise")), 0).loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters()})
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, found[1][name], rtol=1e-10, atol=1e-12), name


def test_frozen_encoders_and_evaluation_without_gradients_are_fine(oracle, images):
    model = oracle.vae(widen=1.5)
    model.posterior.requires_grad_(False)
    trace = model.trace(images, k=4, generator=stream(0, "noise"))
    DReG()(trace, 0).loss.backward()
    assert model.likelihood.weight.grad.abs().max() > 0
    with torch.no_grad():
        again = model.trace(images, k=4, generator=stream(0, "noise"))
        assert (PIWAE(2)(again, 0).bound - log_mean_exp(trace.log_w())).abs().max() < 1e-10


def test_iwae_of_a_wrong_family_stays_below_log_px_in_the_mean():
    """A correlated exact posterior, a diagonal encoder: all bounds miss log p(x), by less with more samples."""
    weight = torch.tensor([[1.0, 0.8], [0.2, 1.0], [0.5, 0.5]], dtype=F64)
    oracle = LinearGaussian(weight, torch.zeros(3), 0.5)
    x = oracle.sample(2000, stream(0, "images"))
    model, gaps = oracle.vae(), []
    for k in (1, 4, 16):
        with torch.no_grad():
            bound = IWAE()(model.trace(x, k=k, generator=stream(1, "noise", k)), 0).bound
        gaps.append((oracle.log_px(x) - bound).mean().item())
    assert gaps[0] > gaps[1] > gaps[2] > 0
