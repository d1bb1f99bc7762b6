"""Priors fitted afterwards: to Gaussians and mixtures that are known, and through the run folder."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from vaelab import fitted, posteriors, priors
from vaelab.data.datasets import Dataset, Images
from vaelab.data.protocol import protocol
from vaelab.errors import NoDensity, NonFiniteError, UsageError
from vaelab.evaluation.codes import codes_of
from vaelab.fitted import KINDS, aggregate_codes, fit, fit_prior, gain, with_prior, write_run
from vaelab.models.vae import VAE
from vaelab.nn.label import WithLabel
from vaelab.nn.mlp import MLP
from vaelab.objectives import ELBO
from vaelab.recipes import recipe
from vaelab.rng import stream
from vaelab.run import Run

QUICK = {"components": 2, "layers": 1, "hidden": (16,), "steps": 20}


def normal(n, mean, covariance, seed=0):
    z = torch.randn(n, len(mean), generator=stream(seed, "codes"), dtype=torch.float64)
    return z @ torch.linalg.cholesky(torch.tensor(covariance).double()).T + torch.tensor(mean).double()


@pytest.fixture(scope="module")
def truth():
    """Three Gaussians of different weights and shapes, in two dimensions."""
    means = torch.tensor([[-3.0, 0.0], [2.0, 2.0], [2.0, -3.0]])
    covariances = torch.tensor([[[1.0, 0.8], [0.8, 1.0]], [[0.2, 0.0], [0.0, 1.0]], [[0.5, -0.2], [-0.2, 0.3]]])
    return MixtureSameFamily(Categorical(torch.tensor([0.5, 0.2, 0.3])), MultivariateNormal(means, covariances))


@pytest.fixture(scope="module")
def drawn(truth):
    """8,000 codes to fit to and 4,000 to judge by."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return truth.sample((8000,)), truth.sample((4000,))


def test_a_gaussian_is_the_sample_mean_and_covariance():
    """In the likelihood's own sense, divided by N, on scales that differ by 10^4."""
    covariance = [[1.0, 0.5, 0], [0.5, 2.0, 0], [0, 0, 1e-8]]
    codes = normal(500, [5.0, -2.0, 1.0], covariance)
    p = fit(codes.float(), "gaussian")()
    z = codes.float().double().numpy()
    scale = np.sqrt(np.diag(covariance))
    root = p.components.scale_tril[0].double()
    assert ((p.mean.detach().double().numpy() - z.mean(0)) / scale) == pytest.approx(0, abs=2e-3)
    found = (root @ root.T).detach().numpy()
    assert (found / np.outer(scale, scale)) == pytest.approx(np.cov(z.T, bias=True) / np.outer(scale, scale), abs=1e-5)
    well = normal(200, [0.5, -0.25], [[1.0, 0.3], [0.3, 0.5]], seed=1)
    p = fit(well.float(), "gaussian")()
    assert p.mean.detach().numpy() == pytest.approx(well.mean(0).numpy(), abs=1e-6)


def test_a_gaussian_is_the_maximum_of_the_likelihood():
    codes = normal(300, [1.0, 2.0], [[1.0, 0.7], [0.7, 2.0]]).float()
    prior = fit(codes, "gaussian").double()
    value = prior().log_prob(codes.double().unsqueeze(0)).mean()
    gradients = torch.autograd.grad(value, [prior.mean, prior.scale_tril])
    assert all(g.abs().max() < 1e-5 for g in gradients)


@torch.no_grad()
def held_out(prior, truth, z):
    """Mean of log p - log truth on held-out codes, and its standard error."""
    difference = prior().log_prob(z.unsqueeze(0))[0] - truth.log_prob(z)
    return difference.mean().item(), difference.std().item() / math.sqrt(len(z))


def test_a_mixture_finds_the_density_it_was_drawn_from(drawn, truth):
    mean, se = held_out(fit(drawn[0], "mixture", components=3), truth, drawn[1])
    # the density of a fit of 17 parameters lies 17 / 2N below the truth, in the mean
    assert abs(mean) < 4 * se + 17 / 16_000
    one, _ = held_out(fit(drawn[0], "gaussian"), truth, drawn[1])
    assert one < -0.5  # and one Gaussian does not


def test_a_flow_comes_nearer_than_a_gaussian(drawn, truth):
    mean, se = held_out(fit(drawn[0], "flow", steps=250), truth, drawn[1])
    assert -0.15 < mean < 4 * se  # no density does better than the truth


def test_a_flow_starts_where_the_codes_are():
    """A spline bends what lies within five deviations: codes far from the origin must not lie outside them."""
    codes = normal(2000, [300.0, -40.0], [[1e-2, 0], [0, 1e2]]).float()
    p = fit(codes, "flow", steps=10)()
    with torch.no_grad():
        value = p.log_prob(codes.unsqueeze(0)).mean().item()
    assert value == pytest.approx(-math.log(2 * math.pi) - 1 - 0.5 * math.log(1e-2 * 1e2), abs=0.1)


def test_the_weights_that_were_best_on_the_held_out_codes_are_kept():
    """A loss that falls on the training codes and rises on the others from the second look on: five more, and stop."""
    prior, looks = priors.Flow(1, layers=0), []

    def loss(z, noise):
        if prior.training:
            return -prior.mean.sum() + 0 * z.sum()
        looks.append(prior.mean.item())
        return prior.mean.sum() - 1 if len(looks) == 2 else prior.mean.sum()

    fitted._descend(prior, loss, torch.zeros(100, 1), 10_000, 0, lambda done: None)
    assert looks == sorted(looks) and len(looks) == 2 + fitted.PATIENCE
    assert prior.mean.item() == looks[1]


@torch.no_grad()
def test_a_second_stage_has_the_moments_of_the_codes_and_no_density():
    codes = normal(6000, [20.0, -5.0, 1.0], [[9.0, 4.0, 0], [4.0, 4.0, 0], [0, 0, 1.0]]).float()
    with torch.enable_grad():
        prior = fit(codes, "second-stage", hidden=(64,), steps=1500)
    p, n = prior(), 20_000
    z = p.rsample(n, stream(0, "samples")).double()
    assert z.shape == (n, 3)
    std = codes.double().std(0)
    assert ((z.mean(0) - codes.double().mean(0)) / std).abs().max() < 0.1
    scale = torch.outer(std, std).numpy()
    assert np.cov(z.T.numpy()) / scale == pytest.approx(np.cov(codes.double().T.numpy()) / scale, abs=0.15)
    with pytest.raises(NoDensity, match="second-stage"):
        p.log_prob(z.float().unsqueeze(0))


@torch.no_grad()
def test_scaling_a_second_stage_back_is_exact():
    """A VAE of (z - m) / s becomes one of z: the same codes, means and noise, moved and scaled, and D log s of density."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = priors.SecondStage(3, 2, (8, 8)).double().vae
    z = normal(40, [20.0, -5.0, 1.0], [[9.0, 4.0, 0], [4.0, 4.0, 0], [0, 0, 1.0]])
    centre, scale = z.mean(0), torch.tensor(7.0, dtype=torch.float64)
    before = vae.trace((z - centre) / scale, generator=stream(0, "noise"))
    fitted._unscale(vae, centre, scale)
    after = vae.trace(z, generator=stream(0, "noise"))
    assert (after.rate - before.rate).abs().max() < 1e-12
    assert (after.px.mean - (centre + scale * before.px.mean)).abs().max() < 1e-12
    assert (after.distortion - before.distortion - 3 * math.log(7)).abs().max() < 1e-12


# --- of a model ---


def conditional(vae):
    """The small model with a decoder that reads ten labels."""
    plain = vae()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        decoder = WithLabel(MLP((12,), (16,), (1, 8, 8)), 10)
    return VAE(plain.encoder, plain.posterior, priors.StandardNormal(2), type(plain.likelihood)(decoder)).eval()


def test_samples_of_the_posterior_are_fitted_to_and_not_its_means(vae, digits):
    model, read = vae(scale=3.0), protocol("threshold")
    codes = aggregate_codes(model, digits.train, read, seed=0).double()
    with torch.no_grad():
        q = model.encode(read.test_set(digits.train.pixels))
        means, variance = q.mean.double(), q.std.double().square().mean(0)
    expected = means.var(0, correction=0) + variance
    error = math.sqrt(2 / len(codes))
    assert codes.shape == (1437, 2)
    assert ((codes.var(0) / expected) - 1).abs().max() < 4 * error
    assert (expected / means.var(0) > 1 + 8 * error).any()  # the means alone would be narrower, and be found out


def test_the_codes_of_an_autoencoder_are_its_points(vae, digits):
    model, read = vae(posterior=posteriors.Delta), protocol("threshold")
    codes = aggregate_codes(model, digits.train, read)
    assert np.abs(codes.numpy() - codes_of(model, read.test_set(digits.train.pixels))).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_prior(vae, digits, kind):
    state = torch.get_rng_state()
    model = vae(scale=3.0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    one, same, other = (fit_prior(model, digits, protocol("dynamic"), kind, **QUICK, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_another_prior_shares_the_other_parts(vae, digits):
    model = vae(scale=3.0)
    prior = fit_prior(model, digits, protocol("threshold"), "gaussian")
    changed = with_prior(model, prior)
    assert (changed.encoder, changed.posterior, changed.likelihood) == (
        model.encoder,
        model.posterior,
        model.likelihood,
    )
    assert changed.prior is prior and isinstance(model.prior, priors.StandardNormal)
    with pytest.raises(UsageError, match="dimensions"):
        with_prior(model, priors.StandardNormal(3))


@torch.no_grad()
def test_the_bound_gains_what_is_said(vae, digits):
    """E log p_new(z) - log p_old(z) is the difference of the two bounds, on the same samples."""
    model, read = vae(scale=3.0), protocol("threshold")
    with torch.enable_grad():
        prior = fit_prior(model, digits, read, "mixture", components=3)
    found = gain(model, prior, digits, read)
    x = read.test_set(digits.test.pixels)
    bounds = []
    for one in (model, with_prior(model, prior)):
        log_w = one.trace(x, k=200, generator=stream(0, "noise")).log_w()
        bounds.append(log_w.double().mean(0))
    difference = bounds[1] - bounds[0]
    assert found.n == 360
    assert abs(found.mean - difference.mean().item()) < 4 * found.se
    assert found.mean > 0.1
    objective = [ELBO()(one.trace(x, k=200, generator=stream(0, "noise")), 0).bound.mean() for one in (model, model)]
    assert objective[0] == objective[1]


def test_a_conditional_model_is_encoded_with_its_labels(vae, digits):
    model = conditional(vae)
    prior = fit_prior(model, digits, protocol("threshold"), "gaussian")
    changed = with_prior(model, prior)
    assert changed.classes == 10
    assert gain(model, prior, digits, protocol("threshold")).n == 360
    unlabelled = Dataset("x", Images(digits.train.pixels), Images(digits.test.pixels), None, "")
    with pytest.raises(UsageError, match="no labels"):
        fit_prior(model, unlabelled, protocol("threshold"), "gaussian")


REFUSED = [
    ("mixtur", {}, "did you mean 'mixture'"),
    ("mixture", {"components": 0}, "components is 0"),
    ("mixture", {"components": 10}, "there are 20 codes of 2 dimensions, too few for 10 full covariances: expected 40"),
    ("flow", {}, "too few for a flow: expected 40 or more"),
    ("second-stage", {"latent_dim": 0}, "latent_dim is 0"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), REFUSED)
def test_what_cannot_be_fitted_is_refused(kind, arguments, message):
    with pytest.raises(UsageError, match=message):
        fit(normal(20, [0.0, 0.0], [[1.0, 0], [0, 1.0]]).float(), kind, **arguments)


def test_codes_without_a_density_are_refused():
    codes = normal(100, [0.0, 0.0], [[1.0, 0], [0, 1.0]]).float()
    with pytest.raises(UsageError, match="there are 3 codes of 2 dimensions, too few"):
        fit(codes[:3], "gaussian")
    flat = codes.clone()
    flat[:, 1] = 2.5
    for kind in ("gaussian", "mixture"):
        with pytest.raises(UsageError, match="latent dimension 1 is the same"):
            fit(flat, kind, components=2)
    line = codes[:, :1].repeat(1, 2)
    with pytest.raises(UsageError, match=r"singular|not positive definite"):
        fit(line, "gaussian")
    codes[7, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"of 1 of 100 training images are not finite \(image 7"):
        fit(codes, "mixture")


# --- the run folder ---


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    from vaelab.running import train

    chosen = recipe("mnist", digits.shape, data="digits", protocol="threshold", latent_dim=2, hidden=(16,), epochs=1)
    return train(chosen, digits, tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_fitted_prior_is_complete(trained, digits, tmp_path, kind):
    model, read = trained.model(), protocol("threshold")
    prior = fit_prior(model, digits, read, kind, **QUICK)
    written = write_run(trained, model, prior, tmp_path / "new", fitted_kind=kind)
    again = Run.open(tmp_path / "new")
    assert again.finished and again.history() == trained.history()
    before, after = trained.recipe(), again.recipe()
    assert after.model["prior"] != before.model["prior"]
    assert {**after.to_dict(), "model": {**after.model, "prior": before.model["prior"]}} == before.to_dict()
    facts = again.environment()
    assert facts["fitted_from"] == str(trained.path.resolve()) and facts["fitted_kind"] == kind
    assert facts["data_fingerprint"] == digits.fingerprint
    with torch.no_grad():
        one, other = (m.sample(9, generator=stream(5, "s")).mean for m in (with_prior(model, prior), written.model()))
    assert torch.equal(one, other)
    with pytest.raises(UsageError, match="not empty"):
        write_run(trained, model, prior, tmp_path / "new")
