"""Each distribution over images sums or integrates to one over its measure; gradients; samplers against densities."""

import itertools
import math

import numpy as np
import pytest
import torch

from vaelab import pixels
from vaelab.errors import UsageError
from vaelab.rng import stream

F64 = torch.float64
LEVELS = torch.arange(256, dtype=F64) / 255


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "test"), dtype=F64)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=stream(seed, "test"), dtype=F64)


def levels(*shape, seed=0):
    return torch.randint(256, shape, generator=stream(seed, "test")).double() / 255


def logistics(*batch, components=3, channels=2, seed=0, spread=1.0):
    """A mixture on (channels, 2, 3) images whose scales run from a sixteenth of a level to a tenth of the range."""
    shape = (*batch, components * channels, 2, 3)
    centre = 0.5 + 0.4 * normal(*shape, seed=seed) * spread
    log_scale = math.log(2.0**-12) + math.log(400) * uniform(*shape, seed=seed + 1)
    return pixels.LogisticMixture(normal(*shape, seed=seed + 2), centre, log_scale, components)


def members(*batch):
    """One of each on (2, 2, 3) images, with images of its measure: name to (distribution, values (batch[-1], 2, 2, 3))."""
    n, shape = batch[-1], (*batch, 2, 2, 3)
    real, level = uniform(n, 2, 2, 3, seed=8), levels(n, 2, 2, 3, seed=9)
    return {
        "bernoulli": (pixels.Bernoulli(3 * normal(*shape)), (real > 0.5).double()),
        "continuous-bernoulli": (pixels.ContinuousBernoulli(4 * normal(*shape)), real),
        "gaussian": (pixels.Gaussian(normal(*shape), torch.tensor(-0.7, dtype=F64)), real),
        "gaussian-per-pixel": (pixels.Gaussian(normal(*shape), normal(*shape, seed=1)), real),
        "laplace": (pixels.Laplace(normal(*shape), torch.tensor(-0.7, dtype=F64)), real),
        "laplace-per-pixel": (pixels.Laplace(normal(*shape), normal(*shape, seed=1)), real),
        "logistic": (logistics(*batch, components=1), level),
        "logistic-mixture": (logistics(*batch), level),
        "categorical": (pixels.Categorical(3 * normal(*batch, 512, 2, 3)), level),
    }


NAMES = list(members(1, 1))
MASSES = {"logistic", "logistic-mixture", "categorical"}


def vector(px):
    """Distributions of one pixel each, batch (1, G), event (1,): those of the pixels of `px`, batch (1, 1)."""
    fields = {}
    for name, t in px._tensors().items():
        slow = t.shape[2] // 2 if t.dim() else 1
        fields[name] = t.unflatten(2, (slow, 2)).movedim(2, -1).reshape(1, -1, slow) if t.dim() else t
    return type(px)(**{**vars(px), **fields, "event_dim": 1})


# --- normalisation ---


def test_bernoulli_masses_of_all_images_sum_to_one():
    px = pixels.Bernoulli(3 * normal(1, 1, 2, 2, 2))
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=F64).reshape(256, 1, 2, 2, 2)
    assert px.log_prob(images).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", sorted(MASSES))
def test_masses_of_the_256_levels_sum_to_one(name):
    px = vector(members(1, 1)[name][0])
    total = px.log_prob(LEVELS[:, None, None]).exp().sum(0)
    assert total.shape == (12,) and (total - 1).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.004, 0.1, 3.0, 1e4])
@pytest.mark.parametrize("centre", [-2.0, 0.0, 0.3, 0.5019, 1.0, 3.0])
def test_a_discretised_logistic_sums_to_one_at_every_scale_in_float32_too(scale, centre):
    for dtype in (F64, torch.float32):
        x = LEVELS.to(dtype)
        log_mass = pixels.log_logistic_mass(
            x, torch.tensor(centre, dtype=dtype), torch.tensor(scale, dtype=dtype).log()
        )
        assert log_mass.isfinite().all() and log_mass.max() <= 1e-6
        # the edges of the bins are rounded, and with them a share of eps / scale of the mass
        eps = torch.finfo(dtype).eps
        assert abs(log_mass.double().exp().sum().item() - 1) < (500 + 2 * max(1, abs(centre)) / scale) * eps


def test_the_discretised_logistic_mass_is_a_difference_of_sigmoids_and_far_out_the_density_times_the_bin():
    centre, scale = torch.tensor(0.37, dtype=F64), 0.05
    upper, lower = ((LEVELS + side * 0.5 / 255 - centre) / scale for side in (1, -1))
    expected = torch.where(LEVELS > 0.999, torch.sigmoid(-lower), torch.sigmoid(upper) - torch.sigmoid(lower))
    expected[0] = torch.sigmoid(upper[0])
    found = pixels.log_logistic_mass(LEVELS, centre, torch.tensor(math.log(scale), dtype=F64))
    assert (found.exp() - expected).abs().max() < 1e-14
    assert (found - expected.log())[:128].abs().max() < 1e-12
    far = pixels.log_logistic_mass(LEVELS[100], torch.tensor(60.0, dtype=F64), torch.tensor(math.log(scale), dtype=F64))
    distance, width = ((LEVELS[100] - 60) / scale).item(), 1 / 255 / scale
    assert far.item() == pytest.approx(distance + math.log(2 * math.sinh(width / 2)), rel=1e-14)


@pytest.mark.parametrize("logit", [-700.0, -80.0, -3.0, -0.5, -0.4999, -1e-4, 0.0, 1e-9, 0.3, 0.5, 7.0, 80.0, 700.0])
def test_continuous_bernoulli_integrates_to_one_and_has_its_mean(logit):
    edge = 1 - torch.logspace(-6, 0, 3, dtype=F64).flip(0)  # finer towards the end where the mass lies
    cuts = torch.cat([torch.zeros(1, dtype=F64), edge, torch.ones(1, dtype=F64)]).unique()
    nodes, weights = gauss_legendre(cuts)
    x = nodes if logit > 0 else 1 - nodes
    log_p = pixels.ContinuousBernoulli(torch.full((1, 1, 1), logit, dtype=F64), 1).log_prob(x[:, None, None]).flatten()
    assert (weights * log_p.exp()).sum().item() == pytest.approx(1, abs=1e-10)
    mean = pixels.continuous_bernoulli_mean(torch.tensor(logit, dtype=F64)).item()
    assert (weights * log_p.exp() * x).sum().item() == pytest.approx(mean, abs=1e-10)


def gauss_legendre(cuts, points=200):
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(points))
    half = cuts.diff()[:, None] / 2
    return (cuts[:-1, None] + half * (nodes + 1)).flatten(), (half * weights).flatten()


def test_the_series_of_the_continuous_bernoulli_meets_the_formula():
    """On both sides of |l| = 1/2, and inside, where the formula still has 14 digits."""
    l = torch.tensor([0.5 - 1e-12, 0.5 + 1e-12, 0.3, 0.1], dtype=F64)  # noqa: E741
    l = torch.cat([l, -l])  # noqa: E741
    assert (pixels.continuous_bernoulli_normaliser(l) - torch.log(torch.expm1(l) / l)).abs().max() < 1e-15
    assert (pixels.continuous_bernoulli_mean(l) - (-1 / torch.expm1(-l) - 1 / l)).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["gaussian", "gaussian-per-pixel", "laplace", "laplace-per-pixel"])
def test_densities_on_the_line_integrate_to_one(name):
    px = vector(members(1, 1)[name][0])
    span = torch.linspace(-1, 1, 400_001, dtype=F64)[:, None, None]
    width = 40 * (px.log_std if "gaussian" in name else px.log_scale).exp().expand_as(px.mean)
    for i in range(3):
        one = px.select(slice(i, i + 1))
        half = width[0, i, 0]
        density = one.log_prob(one.mean + half * span).exp().squeeze()
        assert torch.trapezoid(density, half * span.squeeze()).item() == pytest.approx(1, abs=2e-8)


# --- against torch ---


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_bernoulli_mass_and_gradient_are_torchs(scale):
    x = (normal(4, 1, 3, 3) > 0).double()
    ours = (scale * normal(2, 4, 1, 3, 3, seed=1)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weights = normal(2, 4, seed=2)
    mine = pixels.Bernoulli(ours).log_prob(x)
    other = torch.distributions.Bernoulli(logits=theirs).log_prob(x.expand(2, *x.shape)).sum((-1, -2, -3))
    assert torch.allclose(mine, other, rtol=1e-12, atol=1e-9)
    (mine * weights).sum().backward()
    (other * weights).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_densities_are_torchs():
    from torch import distributions

    for name in ("gaussian-per-pixel", "laplace-per-pixel", "continuous-bernoulli", "categorical"):
        px, x = members(2, 3)[name]
        if name == "gaussian-per-pixel":
            other = distributions.Normal(px.mean, px.log_std.exp())
        elif name == "laplace-per-pixel":
            other = distributions.Laplace(px.mean, px.log_scale.exp())
        elif name == "continuous-bernoulli":
            other = distributions.ContinuousBernoulli(logits=px.logits)
        else:
            other = distributions.Categorical(logits=px.logits.unflatten(2, (256, 2)).movedim(2, -1))
        value = x * 255 if name == "categorical" else x
        expected = other.log_prob(value.expand(2, *value.shape)).sum((-1, -2, -3))
        # torch's normaliser is a series of two terms within 0.002 of lambda = 1/2, in error by 1e-9 there
        assert (px.log_prob(x) - expected).abs().max() < 1e-8 if "bernoulli" in name else 1e-11
        if name != "categorical":
            assert (px.mean - other.mean).abs().max() < 1e-6


# --- gradients ---


@pytest.mark.parametrize("name", NAMES)
def test_gradients_against_finite_differences(name):
    px, x = members(2, 2)[name]
    tensors = px._tensors()
    inputs = [t.detach().requires_grad_() for t in tensors.values()]

    def log_prob(*values):
        return type(px)(**{**vars(px), **dict(zip(tensors, values, strict=True))}).log_prob(x)

    assert torch.autograd.gradcheck(log_prob, inputs, eps=1e-7, atol=3e-5, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.0, 80.0])
def test_extreme_parameters_have_finite_masses_and_gradients_in_float32(name, size):
    px, _ = members(1, 1)[name]
    ends = torch.tensor([0.0, 1.0, 128 / 255 if name in MASSES else 1.0])[:, None, None, None, None]
    for signs in itertools.product([-size, size], repeat=len(px._tensors())):
        values = dict(zip(px._tensors(), signs, strict=True))
        inputs = {}
        for field, t in px._tensors().items():
            least = math.log(2.0**-12) if field in ("log_std", "log_scale") else -math.inf  # what likelihoods give
            inputs[field] = torch.full(t.shape, max(values[field], least)).requires_grad_()
        log_p = type(px)(**{**vars(px), **inputs}).log_prob(ends.expand(3, 1, 2, 2, 3))
        log_p.sum().backward()
        assert log_p.isfinite().all()
        for field, t in inputs.items():
            assert (field, name) == ("weight", "logistic") or (t.grad is not None and t.grad.isfinite().all())


@pytest.mark.parametrize("log_scale", [85.0, 100.0, 1000.0])
def test_a_scale_beyond_float32_is_all_tails(log_scale):
    centre, raw = torch.zeros(3, requires_grad=True), torch.full((3,), log_scale, requires_grad=True)
    log_mass = pixels.log_logistic_mass(torch.tensor([0.0, 128 / 255, 1.0]), centre, raw)
    log_mass.sum().backward()
    assert log_mass.isfinite().all() and log_mass[[0, 2]].tolist() == pytest.approx([math.log(0.5)] * 2)
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (centre, raw))


def test_the_mean_of_a_continuous_bernoulli_and_its_gradient_are_finite_everywhere():
    logits = torch.tensor([-200.0, -80, -0.5, -1e-20, 0, 1e-20, 0.5, 80, 200], requires_grad=True)
    pixels.continuous_bernoulli_mean(logits).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[3:6].tolist() == pytest.approx([1 / 12] * 3)


# --- samplers and means ---


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_mean(name):
    px, _ = members(1, 1)[name]
    drawn = px.rsample(40_000, stream(0, "noise"))
    assert drawn.shape == (40_000, 1, 1, 2, 2, 3) and px.mean.shape == (1, 1, 2, 2, 3)
    error = (drawn.mean(0) - px.mean).abs() / (drawn.std(0) / 200 + 1e-6)
    assert error.max() < 4.5


@pytest.mark.parametrize("name", sorted(MASSES))
def test_samples_of_levels_have_their_masses(name):
    px = vector(members(1, 1)[name][0]).select(slice(0, 4))
    drawn = px.rsample(100_000, stream(0, "noise"))[:, 0, :, 0]
    index = (drawn * 255).round()
    assert (drawn * 255 - index).abs().max() < 1e-10 and index.min() >= 0 and index.max() <= 255
    mass = px.log_prob(LEVELS[:, None, None]).exp()
    for i in range(4):
        share = torch.bincount(index[:, i].long(), minlength=256) / 100_000
        assert (share - mass[:, i]).abs().max() < 4.5 * math.sqrt(0.25 / 100_000)


@pytest.mark.parametrize("name", sorted(MASSES))
def test_the_mean_of_levels_is_the_sum_over_them(name):
    px = vector(members(1, 1)[name][0])
    mass = px.log_prob(LEVELS[:, None, None]).exp()
    assert (px.mean[0, :, 0] - (mass * LEVELS[:, None]).sum(0)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["continuous-bernoulli", "gaussian-per-pixel", "laplace-per-pixel"])
def test_samples_of_densities_have_their_distribution(name):
    """Kolmogorov-Smirnov against the integral of the density."""
    px = vector(members(1, 1)[name][0]).select(slice(0, 4))
    drawn = px.rsample(50_000, stream(0, "noise"))[:, 0, :, 0].sort(0).values
    for i in range(4):
        span = torch.linspace(drawn[0, i] - 1e-9, drawn[-1, i] + 1e-9, 20_001, dtype=F64)
        density = px.select(slice(i, i + 1)).log_prob(span[:, None, None]).exp().flatten()
        integral = torch.cat([torch.zeros(1, dtype=F64), torch.cumulative_trapezoid(density, span)])
        here = torch.from_numpy(np.interp(drawn[:, i].numpy(), span.numpy(), integral.numpy()))
        steps = (torch.arange(50_000) + 0.5) / 50_000
        assert (here - steps).abs().max() < 1.95 / math.sqrt(50_000) + 1e-3


def test_the_inverse_distribution_function_of_the_continuous_bernoulli_in_every_branch():
    logits = torch.tensor([-80.0, -5, -0.02, -0.0199, 0, 0.0199, 0.02, 5, 80, 700], dtype=F64, requires_grad=True)
    px = pixels.ContinuousBernoulli(logits[None, None], 1)
    x = px.rsample(1000, stream(3, "noise"))
    u = torch.rand(x.shape, generator=stream(3, "noise"), dtype=F64)
    cdf = torch.where(logits > 0, 1 - torch.expm1(-logits * (1 - x)) / torch.expm1(-logits), 0.0)
    cdf = torch.where(logits > 0, torch.exp(-logits * (1 - x)) * torch.expm1(-logits * x) / torch.expm1(-logits), cdf)
    cdf = torch.where(logits < 0, torch.expm1(logits * x) / torch.expm1(logits), cdf)
    cdf = torch.where(logits == 0, x, cdf)
    assert (x >= 0).all() and (x <= 1).all()
    assert (cdf - u).abs().max() < 1e-9
    x.mean(0).sum().backward()
    slope = torch.autograd.functional.jacobian(pixels.continuous_bernoulli_mean, logits.detach()).diagonal()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert (logits.grad - slope).abs().max() < 0.006  # of the mean of 1000 samples


def test_the_ends_of_the_uniform_give_samples_inside(monkeypatch):
    logits = torch.tensor([-200.0, -80, -0.5, 0, 0.5, 80, 200])[None, None].requires_grad_()
    for u in (0.0, 1 - 2.0**-24):
        monkeypatch.setattr(pixels, "_uniform", lambda shape, like, generator, u=u: torch.full(shape, u))
        x = pixels.ContinuousBernoulli(logits, 1).rsample(1)
        assert x.min() >= 0 and x.max() <= 1
        (gradient,) = torch.autograd.grad(x.sum(), logits)
        assert gradient.isfinite().all()
        for name, (px, _) in members(1, 1).items():
            assert not px.rsample(1).isnan().any(), name
        laplace = pixels.Laplace(torch.zeros(1, 1, 7), torch.zeros(()), 1)
        assert laplace.rsample(1).isfinite().all()


# --- precision, shapes, pairs ---


@pytest.mark.parametrize("pixels_", [1, 3, 5, 49, 784])
@pytest.mark.parametrize("scale", [0.1, 5.0, 60.0])  # the last: far beyond where sigmoid(-l) is 0 in float32
def test_float32_bernoulli_sums_are_those_of_float64(pixels_, scale):
    logits = scale * normal(1, 4, pixels_)
    x = (uniform(4, pixels_) > 0.5).double()
    exact = pixels.Bernoulli(logits, 1)
    narrow_logits = logits.float().requires_grad_()
    narrow = pixels.Bernoulli(narrow_logits, 1)
    expected = exact.log_prob(x)
    found = narrow.log_prob(x.float())
    bound = 1e-6 * expected.abs().max().clamp(min=1)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < bound
    with torch.no_grad():
        assert (narrow.cross_log_prob(x.float()).diagonal() - expected[0]).abs().max() < bound
    (gradient,) = torch.autograd.grad(found.sum(), narrow_logits)
    assert (gradient - (x - torch.sigmoid(logits))).abs().max() < 2e-7
    one = torch.zeros(4, pixels_)
    one[1, 0] = torch.nan  # of one image: the others keep their own
    broken = pixels.Bernoulli(logits.float() + one, 1).log_prob(x.float())[0]
    assert broken.isnan().tolist() == [False, True, False, False]
    assert (broken - expected[0])[[0, 2, 3]].abs().max() < bound


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_parameters_are_summed_in_float32(name):
    px, x = members(2, 4)[name]
    coarse = {k: t.bfloat16() if t.dim() else t.float() for k, t in px._tensors().items()}
    exact = type(px)(**{**vars(px), **{k: t.double() for k, t in coarse.items()}})
    found = type(px)(**{**vars(px), **coarse})
    log_p = found.log_prob(x.float())
    assert log_p.dtype == found.mean.dtype == torch.float32
    assert found.rsample(2, stream(0, "noise")).dtype == torch.float32
    # a level's edge in float32 is off by 6e-8, which a scale of 2^-12 turns into 2.4e-4, and a slope of up to 12 pixels
    bound = 5e-3 if "logistic" in name else 1e-5
    assert (log_p - exact.log_prob(x)).abs().max() <= bound * exact.log_prob(x).abs().max().clamp(min=1)
    assert (found.mean - exact.mean).abs().max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_cross_log_prob_is_log_prob_of_every_pair(name):
    px, x = members(1, 4)[name]
    expected = torch.stack([px.log_prob(one.expand(4, *one.shape))[0] for one in x], 1)
    found = px.cross_log_prob(x)
    assert found.shape == (4, 4) and (found - expected).abs().max() < 1e-11 * expected.abs().max().clamp(min=1)
    part = px.select(slice(1, 3)).cross_log_prob(x[:3])
    assert (part - expected[1:3, :3]).abs().max() < 1e-11 * expected.abs().max().clamp(min=1)


def test_the_matrix_form_of_the_gaussian_does_not_cancel():
    mean = uniform(1, 2, 1, 28, 28)
    px = pixels.Gaussian(mean.float(), torch.tensor(math.log(0.005)))
    x = (mean[0] + 0.005 * normal(2, 1, 28, 28)).float()
    exact = pixels.Gaussian(px.mean.double(), px.log_std.double()).log_prob(x.double())[0]
    assert (px.cross_log_prob(x).diagonal() - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_k_samples_are_scored_as_one_by_one(name):
    px, x = members(3, 2)[name]
    for k in range(3):
        one = {n: t[k : k + 1] if t.dim() else t for n, t in px._tensors().items()}
        assert torch.allclose(type(px)(**{**vars(px), **one}).log_prob(x)[0], px.log_prob(x)[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_detach_stops_the_parameters(name):
    px, x = members(1, 2)[name]
    tracked = type(px)(**{**vars(px), **{k: t.requires_grad_() for k, t in px._tensors().items()}})
    assert tracked.log_prob(x).requires_grad and not tracked.detach().log_prob(x).requires_grad


@pytest.mark.parametrize("name", [name for name in NAMES if "bernoulli" not in name])
def test_an_image_of_another_shape_is_refused(name):
    px, x = members(1, 2)[name]
    with pytest.raises(UsageError, match=r"\(1, 2, 3\) and the decoder describes \(2, 2, 3\)"):
        px.log_prob(x[:, :1])


def test_a_batch_scaled_gaussian_has_the_root_mean_squared_error():
    seen = []
    mean, x = normal(3, 4, 1, 5, 6).requires_grad_(), uniform(4, 1, 5, 6)
    px = pixels.BatchScaledGaussian(mean, torch.tensor(0.3, dtype=F64), 3, 2.0**-12, seen.append)
    log_p = px.log_prob(x)
    error = (x - mean).square().mean().item()
    assert [e.item() for e in seen] == pytest.approx([error]) and not seen[0].requires_grad
    assert log_p.mean().item() == pytest.approx(-15 * (1 + math.log(2 * math.pi * error)), abs=1e-10)
    log_p.mean().backward()  # d/dm of -P/2 log MSE, also through the scale
    expected = 15 * 2 * (x - mean.detach()) / mean.numel() / error
    assert mean.grad is not None and (mean.grad - expected).abs().max() < 1e-12
    # the scale is not a constant: an image's density also moves with the errors of the others
    (elsewhere,) = torch.autograd.grad(px.log_prob(x)[0, 0], mean)
    assert elsewhere[1:].abs().max() > 1e-3 and elsewhere[:, 1:].abs().max() > 1e-3
    fixed = pixels.Gaussian(mean, px.log_std)
    assert torch.equal(px.rsample(2, stream(0, "noise")), fixed.rsample(2, stream(0, "noise")))
