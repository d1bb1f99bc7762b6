"""Objectives over one trace: what is differentiated changes, what is reported does not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vaelab import posteriors
from vaelab.data.protocol import protocol
from vaelab.distributions import DiagGaussian
from vaelab.errors import NoDensity, UsageError
from vaelab.objectives import (
    CIWAE,
    DIP,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    RAE,
    STL,
    WAE,
    BetaTC,
    Capacity,
    DReG,
    FreeBits,
    InfoVAE,
)
from vaelab.recipes import Training
from vaelab.registry import build, to_spec
from vaelab.rng import stream
from vaelab.schedules import Cosine, Cyclic, Linear
from vaelab.trace import Estimate, Level, Trace, log_mean_exp
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


# one objective is another at some values of its arguments


def gradients(model, images, objective, k=4, step=0):
    """Loss, and the gradient of every parameter, of one step with the noise of the stream ("noise")."""
    trace = model.trace(images, k=k, generator=stream(0, "noise"))
    loss = objective(trace, step).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def monte_carlo_elbo(trace, step):
    """The ELBO with the Monte Carlo rate log q - log p in place of the closed form."""
    return Estimate(None, -trace.log_w().mean())


EQUAL = {
    "IWAE of one sample is the ELBO": (IWAE(), monte_carlo_elbo, 1),
    "MIWAE of groups of one is the ELBO": (MIWAE(4), monte_carlo_elbo, 4),
    "MIWAE of one group is IWAE": (MIWAE(1), IWAE(), 4),
    "PIWAE of one group is IWAE": (PIWAE(1), IWAE(), 4),
    "DReG of one sample is STL": (DReG(), STL(), 1),
    "CIWAE(1) is the ELBO": (CIWAE(1.0), ELBO(), 4),
    "CIWAE(0) is IWAE": (CIWAE(0.0), IWAE(), 4),
    "InfoVAE(0, 1) is the ELBO": (InfoVAE(0.0, 1.0), ELBO(), 4),
    "FreeBits(0) is the ELBO": (FreeBits(0.0), ELBO(), 4),
    "FreeBits(0, beta) is the beta-VAE": (FreeBits(0.0, 3.0), ELBO(3.0), 4),
    "Capacity(0, gamma) is the beta-VAE": (Capacity(0.0, 3.0), ELBO(3.0), 4),
    "BetaTC(1, 1, 1) is the ELBO, weighted": (BetaTC(1, 1, 1, 500), monte_carlo_elbo, 4),
    "BetaTC(1, 1, 1) is the ELBO, stratified": (BetaTC(1, 1, 1, 500, "stratified"), monte_carlo_elbo, 4),
    "DIP(0, 0) is the ELBO": (DIP(1, 0.0, 0.0), ELBO(), 4),
    "WAE(0) is the ELBO without a rate": (WAE(0.0), ELBO(0.0), 4),
    "RAE(0, 0) is the ELBO without a rate": (RAE(0.0, 0.0), ELBO(0.0), 4),
    "InfoVAE(1, scale) is WAE": (InfoVAE(1.0, 5.0), WAE(5.0), 4),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_objectives_have_equal_loss_and_gradient(vae, images, name):
    one, other, k = EQUAL[name]
    model = vae(scale=3.0).double()
    (loss, gradient), (expected, gradients_expected) = (gradients(model, images.double(), o, k) for o in (one, other))
    assert loss == pytest.approx(expected, abs=1e-10)
    assert (gradient - gradients_expected).abs().max() < 1e-10
    assert gradient.abs().max() > 1e-2


ALL = [
    ELBO(), FreeBits(0.1), Capacity(5.0, 3.0), IWAE(), MIWAE(2), PIWAE(2), CIWAE(0.5), STL(), DReG(), BetaTC(1, 6, 1, 500),
    DIP(2, 1.0, 2.0), InfoVAE(0.5, 10.0), WAE(10.0), RAE(0.5, 0.1),
]  # fmt: skip


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_bounds_are_the_elbo_or_an_importance_weighted_bound_whatever_the_loss(vae, images, objective):
    trace = vae(scale=3.0).trace(images, k=4, generator=stream(0, "noise"))
    estimate = objective(trace, 0)
    elbo, log_w = -(trace.distortion + trace.rate), trace.log_w().detach()
    pairs = torch.stack([log_mean_exp(log_w[:2]), log_mean_exp(log_w[2:])]).mean(0)
    expected = {
        IWAE: log_mean_exp(log_w), DReG: log_mean_exp(log_w), PIWAE: log_mean_exp(log_w), MIWAE: pairs,
        CIWAE: (elbo + log_mean_exp(log_w)) / 2,
    }.get(type(objective), elbo)  # fmt: skip
    assert torch.allclose(estimate.bound.double(), expected.double(), rtol=0, atol=1e-4)
    assert estimate.bound.shape == (len(images),) and estimate.loss.shape == ()
    more = replace(trace, aux=torch.tensor(7.0), noise=stream(1, "noise"))
    again = replace(trace, noise=stream(1, "noise"))
    assert (objective(more, 0).loss - objective(again, 0).loss).item() == pytest.approx(7, abs=1e-3)
    assert torch.equal(objective(more, 0).bound, objective(again, 0).bound)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_every_objective_trains_and_survives_its_spec(vae, few, objective):
    model = vae()
    history = fit(model, objective, few, protocol("dynamic"), replace(TRAINING, epochs=5, k=4))
    assert history[-1]["train"]["distortion"] < history[0]["train"]["distortion"] - 1
    assert build(to_spec(objective)) == objective


SUMS = [ELBO(0.5), IWAE(), MIWAE(2), PIWAE(2), CIWAE(0.5), STL(), DReG(), RAE(0.5)]
OF_THE_BATCH = [FreeBits, Capacity, BetaTC(1, 6, 1, 500), DIP(2, 1.0, 2.0), InfoVAE(0.5, 10.0), WAE(10.0)]


def part(trace, images):
    """The trace of some of the images, with the noise at its start."""
    level = trace.levels[0]
    q = level.q.select(images)
    px = replace(trace.px, logits=trace.px.logits[:, images])
    return Trace(px, trace.log_px[:, images], (Level(q, level.p, level.z[:, images]),), noise=stream(1, "noise"))


@pytest.mark.parametrize("objective", SUMS + OF_THE_BATCH, ids=str)
def test_the_loss_of_a_batch_is_the_mean_of_its_halves_where_it_is_a_sum_over_images(vae, images, objective):
    model = vae(scale=3.0).double()
    order = model.trace(images.double()).rate.argsort()  # so that the halves differ
    trace = model.trace(images[order].double(), k=4, generator=stream(0, "noise"))
    n, rate = len(images), trace.rate.mean().item()
    if objective in (FreeBits, Capacity):  # between the rates of the halves
        objective = FreeBits(trace.levels[0].kl.mean().item()) if objective is FreeBits else Capacity(rate, 3.0)
    losses, slopes = [], []
    for rows in (slice(0, n), slice(0, n // 2), slice(n // 2, n)):
        loss = objective(part(trace, rows), 0).loss
        losses.append(loss.item())
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        slopes.append(torch.cat([g.flatten() for g in found]))
    difference = abs(losses[0] - (losses[1] + losses[2]) / 2)
    between = (slopes[0] - (slopes[1] + slopes[2]) / 2).abs().max()
    if objective in SUMS:
        assert difference < 1e-10 and between < 1e-10
    else:
        assert max(difference, between) > 1e-4


# what each adds


def test_free_bits_cost_nothing_below_the_floor(vae, images):
    """A dimension below it has no gradient from the rate; one above it has its own, and the floor is per dimension."""
    model = vae(scale=3.0).double()
    trace = model.trace(images.double(), generator=stream(0, "noise"))
    kl = trace.levels[0].kl.mean(0).detach()
    assert kl[0] != kl[1]
    floor = kl.mean().item()
    found = FreeBits(floor)(trace, 0)
    expected = trace.distortion.mean().item() + floor + kl.max().item()
    assert found.loss.item() == pytest.approx(expected, abs=1e-10)
    mean = trace.levels[0].q.mean_
    (gradient,) = torch.autograd.grad(found.loss - trace.distortion.mean(), mean, retain_graph=True)
    (whole,) = torch.autograd.grad(trace.rate.mean(), mean)
    below, above = kl.argmin(), kl.argmax()
    assert gradient[:, below].abs().max() == 0
    assert torch.allclose(gradient[:, above], whole[:, above], atol=1e-12)


def test_free_bits_of_a_rate_in_one_sum_have_the_floor_of_all_dimensions(trace):
    level = trace.levels[0]
    known_in_total = replace(level.q, mean_=level.q.mean_, log_std=level.q.log_std)
    other = Level(known_in_total, UnknownPrior(level.p.mean_, level.p.log_std), level.z)
    assert other.kl.shape == (len(level.q.mean_), 1)
    monte_carlo = replace(trace, levels=(other,))
    rate = monte_carlo.rate.mean().item()
    for floor in (0.0, 0.45 * rate, 0.6 * rate, 2 * rate):
        found = FreeBits(floor)(monte_carlo, 0).loss - trace.distortion.mean()
        assert found.item() == pytest.approx(max(rate, 2 * floor), rel=1e-5)


class UnknownPrior(DiagGaussian):
    """A normal whose KL the library does not know in closed form."""


def test_capacity_steers_the_mean_rate_of_the_batch_from_both_sides(trace):
    rate = trace.rate.mean().item()
    for capacity in (0.0, 0.5 * rate, 2 * rate, Linear(0, 10 * rate, 10)):
        step = 4
        target = capacity(step) if isinstance(capacity, Linear) else capacity
        found = Capacity(capacity, 2.0)(trace, step).loss - trace.distortion.mean()
        assert found.item() == pytest.approx(2 * abs(rate - target), rel=1e-5, abs=1e-4)


def test_the_l2_term_is_half_the_squared_norm_of_the_code(vae, images):
    trace = vae(posterior=posteriors.Delta).trace(images, generator=stream(0, "noise"))
    z = trace.levels[0].z[0]
    found = RAE(3.0)(trace, 0).loss - trace.distortion.mean()
    assert found.item() == pytest.approx(1.5 * (z**2).sum(1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("posterior", [posteriors.Delta, posteriors.Gaussian])
def test_the_gradient_penalty_is_differentiated_through_the_hand_written_bernoulli(vae, images, posterior):
    """Loss and gradients against torch's own cross-entropy and the Jacobian row by row, with the same signs."""
    model = vae(posterior=posterior).double()
    x = images[:4].double()
    found, gradient = gradients(model, x, RAE(0.3, 0.2), k=2)

    noise = stream(0, "noise")
    q = model.encode(x)
    z = q.rsample(2, noise)
    logits = model.decode(z).logits
    signs = torch.empty_like(logits).bernoulli_(0.5, generator=noise) * 2 - 1
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    loss = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").flatten(2).sum(2).mean()
    loss = loss + 0.15 * z.square().sum(2).mean()
    for k, b in ((k, b) for k in range(2) for b in range(4)):
        jacobian = torch.autograd.functional.jacobian(lambda u: decoded(model, u), z[k, b], create_graph=True)
        loss = loss + 0.2 * (signs[k, b].flatten() @ jacobian).square().sum() / 8
    model.zero_grad()
    loss.backward()
    assert found == pytest.approx(loss.item(), abs=1e-10)
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (gradient - expected).abs().max() < 1e-10


def decoded(model, z):
    return model.decode(z[None, None]).mean.flatten()


# what cannot be had


@pytest.mark.parametrize("objective", [ELBO(0.0), WAE(10.0), InfoVAE(1.0, 10.0), RAE(0.5, 0.1)], ids=str)
def test_a_dirac_posterior_trains_where_no_density_is_asked(vae, few, objective):
    model = vae(posterior=posteriors.Delta)
    history = fit(model, objective, few, protocol("dynamic"), replace(TRAINING, epochs=5))
    assert history[-1]["train"]["distortion"] < history[0]["train"]["distortion"] - 1
    images = protocol("dynamic").test_set(few.test.pixels)
    assert objective(model.trace(images, generator=stream(0, "noise")), 0).bound is None


@pytest.mark.parametrize(
    "objective",
    [FreeBits(0.1), Capacity(5.0), IWAE(), MIWAE(1), PIWAE(1), CIWAE(0.5), STL(), DReG(), BetaTC(1, 6, 1, 500),
     DIP(1, 1.0, 1.0), InfoVAE(0.5, 10.0)],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
def test_a_dirac_posterior_is_refused_where_one_is(vae, images, objective):
    trace = vae(posterior=posteriors.Delta).trace(images, generator=stream(0, "noise"))
    with pytest.raises(NoDensity, match="Dirac"):
        objective(trace, 0)


@pytest.mark.parametrize("objective", [STL(), DReG(), PIWAE(2)], ids=str)
def test_a_flow_has_no_density_with_stopped_parameters(vae, images, objective):
    trace = vae(posterior=posteriors.Planar).trace(images, k=4, generator=stream(0, "noise"))
    with pytest.raises(UsageError, match=rf"{type(objective).__name__} cannot be used .* flow"):
        objective(trace, 0)


@pytest.mark.parametrize(
    "objective", [IWAE(), MIWAE(2), CIWAE(0.5), ELBO(), FreeBits(0.1), WAE(1.0), DIP(2, 1.0, 1.0)], ids=str
)
def test_a_flow_trains_with_the_others(vae, images, objective):
    model = vae(posterior=posteriors.Planar)
    loss, gradient = gradients(model, images, objective)
    assert torch.tensor(loss).isfinite() and gradient.isfinite().all() and gradient.abs().max() > 0


def test_a_flow_does_not_tell_its_mean_nor_its_marginals(vae, images):
    trace = vae(posterior=posteriors.Planar).trace(images, generator=stream(0, "noise"))
    with pytest.raises(UsageError, match=r"choose kind=2"):
        DIP(1, 1.0, 1.0)(trace, 0)
    with pytest.raises(UsageError, match=r"BetaTC: .*does not factorise"):
        BetaTC(1, 6, 1, 500)(trace, 0)


@pytest.mark.parametrize(
    "objective",
    [PIWAE(1), STL(), DReG(), BetaTC(1, 6, 1, 500), DIP(1, 1.0, 1.0), InfoVAE(0.5, 1.0), WAE(1.0), RAE(1.0)],
    ids=str,
)
def test_more_than_one_level_is_refused(trace, objective):
    with pytest.raises(
        UsageError, match=rf"{type(objective).__name__} is for models with one stochastic layer.* has 2"
    ):
        objective(replace(trace, levels=trace.levels * 2), 0)


@pytest.mark.parametrize("objective", [MIWAE(3), PIWAE(3), MIWAE(8)], ids=str)
def test_groups_must_divide_the_samples(trace, objective):
    with pytest.raises(UsageError, match=rf"{objective.m} groups of equal size, and there are 4: choose k a multiple"):
        objective(trace, 0)


@pytest.mark.parametrize(
    "objective", [BetaTC(1, 6, 1, 500, "stratified"), DIP(1, 1.0, 1.0), InfoVAE(0.5, 1.0), WAE(1.0)], ids=str
)
def test_a_batch_of_one_image_has_no_aggregate(vae, images, objective):
    with pytest.raises(UsageError, match=r"this one has 1: choose a batch size"):
        objective(vae().trace(images[:1], generator=stream(0, "noise")), 0)


def test_fewer_images_than_the_batch_has_are_refused(trace):
    with pytest.raises(UsageError, match=r"data_size is 59 and the batch has 60"):
        BetaTC(1, 6, 1, 59)(trace, 0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ELBO("a"), "beta is a"),
        (lambda: ELBO(Linear(-1, 1, 5)), "beta is -1"),
        (lambda: FreeBits(-0.1), "floor is -0.1"),
        (lambda: FreeBits(Linear(0, 1, 5)), "floor is Linear"),
        (lambda: FreeBits(0.1, -1), "beta is -1"),
        (lambda: Capacity(-1), "capacity is -1"),
        (lambda: Capacity(1, float("nan")), "gamma is nan"),
        (lambda: MIWAE(0), "m is 0"),
        (lambda: PIWAE(2.5), "m is 2.5"),
        (lambda: CIWAE(1.5), "beta is 1.5: the share of the ELBO must be a finite number from 0 to 1"),
        (lambda: BetaTC(), "data_size is 0: the number of training images"),
        (lambda: BetaTC(-1, 1, 1, 5), "alpha is -1"),
        (lambda: BetaTC(1, -1, 1, 5), "beta is -1"),
        (lambda: BetaTC(1, 1, -1, 5), "gamma is -1"),
        (lambda: BetaTC(1, 1, 1, 5, "stratify"), "did you mean 'stratified'"),
        (lambda: DIP(3, 1, 1), "kind is 3"),
        (lambda: DIP(1, -1, 1), "^diagonal is -1"),
        (lambda: DIP(1, 1, -1), "off_diagonal is -1"),
        (lambda: InfoVAE(2, 1), "alpha is 2 and scale 1: the weights"),
        (lambda: InfoVAE(-1, 1), "alpha is -1 and scale 1: the weights"),
        (lambda: InfoVAE("a", 1), "alpha is a: InfoVAE takes a finite number"),
        (lambda: InfoVAE(0, float("nan")), "scale is nan"),
        (lambda: InfoVAE(0, 1, "rbg"), "did you mean 'rbf'"),
        (lambda: WAE(-1), "scale is -1"),
        (lambda: WAE(1, "rbg"), "did you mean 'rbf'"),
        (lambda: RAE(-1), "l2 is -1"),
        (lambda: RAE(1, float("inf")), "gradient_penalty is inf"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_a_gradient_penalty_needs_codes_that_are_differentiated(vae, images):
    with torch.no_grad():
        trace = vae().trace(images, generator=stream(0, "noise"))
    assert RAE(1.0)(trace, 0).loss.isfinite()
    with pytest.raises(UsageError, match="or take gradient_penalty=0"):
        RAE(1.0, 1.0)(trace, 0)


def test_infovae_weights_may_be_zero_to_rounding():
    for tenths in range(11):
        InfoVAE(tenths / 10, 1 - tenths / 10)
