"""Objectives over one trace: what is differentiated changes, what is reported does not."""

from dataclasses import replace

import pytest
import torch

from vaelab import posteriors
from vaelab.data.protocol import protocol
from vaelab.errors import NoDensity, UsageError
from vaelab.objectives import ELBO
from vaelab.recipes import Training
from vaelab.rng import stream
from vaelab.schedules import Cosine, Cyclic, Linear
from vaelab.trace import log_mean_exp
from vaelab.training import fit

TRAINING = Training(epochs=2, batch_size=100, lr=1e-2, precision="float32")


@pytest.fixture
def images(few):
    return protocol("dynamic").test_set(few.test.pixels)


@pytest.fixture
def trace(vae, images):
    return vae(scale=3.0).trace(images, k=4, generator=stream(0, "noise"))


def test_the_bound_does_not_depend_on_beta(trace):
    bounds = [ELBO(beta)(trace, 0).bound for beta in (0.0, 1.0, 4.0, Linear(0, 1, 100))]
    assert all(torch.equal(bounds[0], bound) for bound in bounds)
    assert torch.equal(bounds[0], -(trace.distortion + trace.rate))


def test_the_loss_is_distortion_plus_beta_times_rate(trace):
    for beta in (0.0, 0.5, 1.0, 4.0):
        expected = (trace.distortion.double() + beta * trace.rate.double()).mean().item()
        assert ELBO(beta)(trace, 0).loss.item() == pytest.approx(expected, rel=1e-6)


def test_without_kl_the_prior_has_no_gradient(trace, vae, images):
    """beta = 0: what the rate alone would move stays where it is."""
    model = vae()
    trace = model.trace(images, generator=stream(0, "noise"))
    (whole,) = torch.autograd.grad(ELBO(1.0)(trace, 0).loss, model.posterior.head.weight, retain_graph=True)
    (without,) = torch.autograd.grad(ELBO(0.0)(trace, 0).loss, model.posterior.head.weight, retain_graph=True)
    (rate,) = torch.autograd.grad(trace.rate.mean(), model.posterior.head.weight)
    assert rate.norm() > 1e-3
    assert (whole - without - rate).abs().max() < 1e-6


def test_the_bound_is_the_mean_log_weight_in_the_limit_and_below_the_importance_weighted_one(vae, images):
    trace = vae().trace(images, k=4000, generator=stream(1, "noise"))
    log_w = trace.log_w()
    bound = ELBO()(trace, 0).bound
    assert (log_w.mean(0) - bound).abs().mean() < 0.05
    assert (log_mean_exp(log_w) > bound - 0.05).all()


def test_a_loss_beside_the_bound_is_differentiated_and_not_reported(trace):
    more = replace(trace, aux=torch.tensor(7.0))
    assert (ELBO()(more, 0).loss - ELBO()(trace, 0).loss).item() == pytest.approx(7, abs=1e-4)
    assert torch.equal(ELBO()(more, 0).bound, ELBO()(trace, 0).bound)


def test_a_schedule_that_stays_at_one_is_beta_one(vae, few):
    models = []
    for beta in (1.0, Linear(1, 1, 100), Cosine(1, 1, 3), Cyclic(1, 1, 2), 0.5):
        models.append(vae())
        fit(models[-1], ELBO(beta), few, protocol("dynamic"), TRAINING)
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    assert all(torch.equal(weights[0], other) for other in weights[1:4])
    assert not torch.equal(weights[0], weights[4])


def test_a_schedule_is_read_at_the_step(trace):
    warm = ELBO(Linear(0, 1, 10))
    for step in (0, 5, 10, 50):
        assert torch.equal(warm(trace, step).loss, ELBO(min(step / 10, 1.0))(trace, step).loss)


def test_a_negative_beta_is_refused():
    for beta in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match=f"beta is {beta}"):
            ELBO(beta)


def test_a_dirac_posterior_has_no_bound_and_needs_beta_zero(vae, images):
    trace = vae(posterior=posteriors.Delta).trace(images, generator=stream(0, "noise"))
    assert ELBO(0.0)(trace, 0).bound is None
    assert ELBO(0.0)(trace, 0).loss.item() == pytest.approx(trace.distortion.mean().item(), rel=1e-6)
    with pytest.raises(NoDensity, match="ELBO\\(beta=0\\)"):
        ELBO(1.0)(trace, 0)


def test_a_dirac_posterior_trains_as_an_autoencoder(vae, few):
    model = vae(posterior=posteriors.Delta)
    training = replace(TRAINING, epochs=20)
    history = fit(model, ELBO(beta=0), few, protocol("dynamic"), training)
    assert history[0]["train"]["rate"] is None and history[0]["test"]["rate"] is None
    assert history[-1]["train"]["distortion"] < history[0]["train"]["distortion"] - 3


def test_samples_of_one_image_share_its_posterior(vae, images):
    """K samples of B images are K x B independent codes: noise repeats in neither direction."""
    trace = vae().trace(images, k=3, generator=stream(0, "noise"))
    q = trace.levels[0].q
    eps = (trace.levels[0].z - q.mean) / q.std
    assert len(eps.flatten().unique()) == eps.numel()
    assert trace.log_px.shape == (3, len(images))
    assert torch.equal(trace.distortion, -trace.log_px.mean(0))
