"""Importance sampling against a model whose log p(x), and the variance of whose weights, are known in closed form."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import genpareto
from torch import nn

from vaelab import likelihoods, posteriors, priors
from vaelab.errors import NoDensity, UsageError
from vaelab.evaluation import importance
from vaelab.evaluation.importance import _pareto_index, importance_sampled
from vaelab.models.vae import VAE
from vaelab.nn.label import WithLabel
from vaelab.nn.mlp import MLP
from vaelab.oracles import LinearGaussian
from vaelab.rng import stream

DIM = 2


@pytest.fixture
def oracle():
    return LinearGaussian.random(pixels=9, dim=DIM, std=0.4, generator=stream(1, "oracle"))


@pytest.fixture
def images(oracle):
    return oracle.sample(100, stream(2, "images"))


def error(oracle, images, found):
    return found.log_px - oracle.log_px(images).numpy()


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def bits(n=12):
    return (torch.rand(n, 1, 8, 8, generator=stream(3, "bits")) < 0.3).float()


def network(posterior=posteriors.Gaussian, dim=3, encoder=None):
    """A VAE of binary images (1, 8, 8), float32."""
    return seeded(
        lambda: VAE(
            encoder or MLP((1, 8, 8), (), (16,), "tanh", out_activation=True), posterior(16, dim),
            priors.StandardNormal(dim), likelihoods.Bernoulli(MLP((dim,), (16,), (1, 8, 8), "tanh")),
        )
    )  # fmt: skip


# --- what is estimated ---


@pytest.mark.parametrize("k", [1, 7, 1001])
@pytest.mark.parametrize("proposal", ["posterior", "defensive"])
def test_the_exact_posterior_gives_log_px_for_every_k(oracle, images, k, proposal):
    """Defensive weights are bounded by 1 / 0.9 of the exact ones, and average to them."""
    found = importance_sampled(oracle.vae(), images, k, proposal=proposal)
    if proposal == "posterior":
        assert abs(error(oracle, images, found)).max() < 1e-10
        assert abs(found.ess - k).max() < 1e-6 * k and abs(found.max_weight - 1 / k).max() < 1e-9
    else:
        assert error(oracle, images, found).max() < math.log(1 / 0.9) + 1e-9


def test_the_curve_has_the_bias_that_theory_gives(oracle):
    """L_1 misses log p(x) by KL(q || p(z|x)), L_K by Var(w / p(x)) / 2K; both are known for a widened Gaussian."""
    f, images = 1.5, oracle.sample(300, stream(2, "images"))
    found = importance_sampled(oracle.vae(widen=f), images, 5000, seed=1)
    exact = oracle.log_px(images).numpy()
    variance = (f**2 / math.sqrt(2 * f**2 - 1)) ** DIM - 1
    assert list(found.curve) == [1, 50, 500, 5000]
    assert (exact - found.curve[1]).mean() == pytest.approx(DIM * ((f**2 - 1) / 2 - math.log(f)), abs=2e-3)
    assert (exact - found.log_px).mean() == pytest.approx(variance / 10_000, abs=4 * math.sqrt(variance / 5000 / 300))
    for k in (50, 500):  # from the same samples, so that their noise cancels
        expected = variance / 2 * (1 / k - 1 / 5000)
        assert (found.log_px - found.curve[k]).mean() == pytest.approx(expected, rel=0.08)
    assert found.median_ess == pytest.approx(5000 / (1 + variance), rel=0.01)
    assert np.array_equal(found.curve[5000], found.log_px)
    assert abs(found.drift) < 1e-3 and found.warning == ""


@pytest.mark.parametrize("proposal", ["posterior", "widened", "defensive"])
@pytest.mark.parametrize("k", [3, 20])
def test_the_weights_are_unbiased_for_px(oracle, proposal, k):
    """E w / p(x) = 1 for any K, also where K does not hold the mixture's shares."""
    images = oracle.sample(700, stream(4, "images"))
    found = importance_sampled(oracle.vae(widen=0.85, shift=0.3), images, k, proposal=proposal)
    ratio = np.exp(error(oracle, images, found))
    assert abs(ratio.mean() - 1) < 4 * ratio.std(ddof=1) / math.sqrt(len(ratio)) < 0.25


@pytest.mark.parametrize("k", [1, 3])
def test_defensive_weights_are_unbiased_where_k_does_not_hold_the_shares(oracle, k):
    """Of a narrow q: were the prior's sample always the first of three, the mean ratio would be above 2."""
    images = oracle.sample(1000, stream(4, "images"))
    ratio = np.exp(error(oracle, images, importance_sampled(oracle.vae(widen=0.3), images, k, proposal="defensive")))
    assert abs(ratio.mean() - 1) < 3.5 * ratio.std(ddof=1) / math.sqrt(len(ratio)) < 0.5


def test_a_tenth_of_the_defensive_samples_is_the_priors(oracle, images):
    """With a posterior far from everything, all weight is the prior's: the estimate is exact, with a tenth of K."""
    lost = oracle.vae(widen=0.1, shift=60.0)
    found = importance_sampled(lost, images, 5000, proposal="defensive")
    alone = importance_sampled(lost, images, 5000)
    assert abs(error(oracle, images, found).mean()) < 0.05
    assert error(oracle, images, alone).mean() < -100
    assert found.curve[500].mean() > found.curve[50].mean() > found.curve[1].mean()


def test_a_narrow_posterior_is_mended_by_either_proposal(oracle, images):
    narrow = oracle.vae(widen=0.5)
    wrong = {p: abs(error(oracle, images, importance_sampled(narrow, images, 500, proposal=p))).mean()
             for p in importance.PROPOSALS}  # fmt: skip
    assert wrong["defensive"] < 0.6 * wrong["posterior"]
    assert wrong["widened"] < 0.6 * wrong["posterior"]


def test_a_narrow_posterior_is_too_pessimistic_and_is_warned_of(oracle, images):
    found = importance_sampled(oracle.vae(widen=0.2), images, 500, seed=1)
    assert error(oracle, images, found).mean() < -0.5
    assert "too low" in found.warning and "the proposal 'widened' or 'defensive'" in found.warning
    assert "rose by" in found.warning and "heavy a tail" in found.warning
    assert importance_sampled(oracle.vae(widen=1.3), images, 500).warning == ""
    assert "too few" in importance_sampled(oracle.vae(), images, 24).warning


def test_standard_errors_and_worst_cases(oracle, images):
    found = importance_sampled(oracle.vae(widen=1.4), images, 50)
    assert found.se == pytest.approx(found.log_px.std(ddof=1) / 10)
    assert found.worst_ess == found.ess.min() and 1 <= found.ess.min() <= found.ess.max() <= 50
    assert ((found.max_weight >= 1 / 50) & (found.max_weight <= 1)).all()
    assert math.isnan(importance_sampled(oracle.vae(), images[:1], 2).se)


# --- the tail of the weights ---


@pytest.mark.parametrize("index", [0.2, 0.5, 0.9])
def test_the_pareto_index_is_recovered(index):
    """Log weights whose excesses are generalised Pareto; the fit draws towards 1/2 with ten of its observations."""
    found = []
    for i in range(40):
        body = genpareto.rvs(index, size=5000, random_state=i)
        found.append(_pareto_index(np.log(1 + body)))
    size = 212
    assert np.mean(found) == pytest.approx((size * index + 5) / (size + 10), abs=0.035)


def test_the_fit_of_few_weights_is_drawn_towards_a_half():
    found = [_pareto_index(np.log(1 + genpareto.rvs(-0.2, size=100, random_state=i))) for i in range(400)]
    assert np.mean(found) == pytest.approx((20 * -0.2 + 5) / 30, abs=0.06)


def test_a_narrow_gaussian_proposal_has_the_index_that_theory_gives():
    """w = exp(a x^2) under N(0, f^2) of a target N(0, 1): P(w > t) ~ t^(-1/k) with k = 1 - f^2."""
    x = np.random.default_rng(0).standard_normal((40, 20_000)) * 0.5
    found = [_pareto_index(0.5 * (1 / 0.25 - 1) * row**2) for row in x]
    assert np.mean(found) == pytest.approx(0.75, abs=0.1)


def test_weights_without_a_tail():
    assert _pareto_index(np.zeros(100)) == -math.inf
    assert math.isnan(_pareto_index(np.zeros(24))) and math.isnan(_pareto_index(np.full(100, np.nan)))


# --- what it must not depend on ---


@pytest.mark.parametrize("proposal", ["posterior", "widened", "defensive"])
def test_batch_order_and_chunks_are_of_no_matter(proposal):
    model, x = network(), bits()
    expected = importance_sampled(model, x, 1200, proposal=proposal)
    order = torch.tensor([7, 2, 11, 0, 5])
    for images, index, chunk in ((x[order], order, 500), (x[3:4], slice(3, 4), 500), (x, slice(None), 77)):
        found = importance_sampled(model, images, 1200, proposal=proposal, chunk=chunk)
        assert abs(found.log_px - expected.log_px[index]).max() < 1e-5
        assert abs(found.curve[50] - expected.curve[50][index]).max() < 1e-5


def test_threads_are_of_no_matter_and_are_put_back():
    model, x = network(), bits()
    expected = importance_sampled(model, x, 60)
    torch.set_num_threads(3)
    assert abs(importance_sampled(model, x, 60).log_px - expected.log_px).max() < 1e-5
    assert torch.get_num_threads() == 3

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        importance_sampled(model, x, 60, on_progress=stop)
    assert torch.get_num_threads() == 3


def test_images_and_seeds_have_noise_of_their_own():
    """Identical noise for all images would leave the standard error over images blind to it."""
    model, x = network(), bits()
    noise = [importance_sampled(model, x, 1, seed=s).log_px for s in range(40)]
    correlation = np.corrcoef(np.array(noise).T)
    off = correlation[~np.eye(len(x), dtype=bool)]
    assert abs(off.mean()) < 0.06 and abs(off).max() < 0.7


def test_trap_1_batch_norm_is_evaluated_with_its_running_statistics():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh())
    model, x = network(encoder=seeded(lambda: encoder)), bits()
    with torch.no_grad():
        model.train().encode(x)  # moves the running statistics away from their start
    expected = importance_sampled(model.eval(), x, 20).log_px
    model.train()
    for part, index in ((x, slice(None)), (x[4:6], slice(4, 6)), (x.flip(0), slice(None, None, -1))):
        assert abs(importance_sampled(model, part, 20).log_px - expected[index]).max() < 1e-5
    assert model.training


# --- the number of samples, and the sign ---


@pytest.mark.parametrize("proposal", ["posterior", "widened", "defensive"])
@pytest.mark.parametrize("k", [1, 7, 1001])
def test_k_samples_are_k_samples(k, proposal):
    """A known evaluator silently used its batch size, 100, where fewer were asked for."""
    model, seen = network(), []
    model.likelihood.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:-1].numel()))
    found = importance_sampled(model, bits(3), k, proposal=proposal)
    assert sum(seen) == 3 * k and found.k == k and max(found.curve) == k


def test_log_px_of_bits_is_negative():
    """A known evaluator returned +log p(x) under the name of its negative."""
    assert (importance_sampled(network(), bits(), 10).log_px < 0).all()


# --- members ---


@pytest.mark.parametrize("name", ["FullGaussian", "Laplace", "InverseAutoregressive", "NeuralSpline", "Planar"])
def test_every_posterior_estimates_the_same_log_px(name):
    """The decoder and the prior are those of a Gaussian model: log p(x) is the same, whatever the proposal."""
    expected = importance_sampled(network(), bits(), 3000)
    decoder = network().likelihood.state_dict()
    other = network(getattr(posteriors, name))
    other.likelihood.load_state_dict(decoder)
    found = importance_sampled(other, bits(), 3000)
    assert abs(found.log_px - expected.log_px).mean() < 0.1


@pytest.mark.parametrize("name", ["FullGaussian", "Laplace"])
def test_posteriors_with_a_scale_are_widened(name):
    q = network(getattr(posteriors, name)).encode(bits())
    wide = importance.widened(q, 1.5)
    z = q.rsample(20_000, stream(0, "q")) - q.mean
    w = wide.rsample(20_000, stream(0, "q")) - wide.mean
    assert torch.allclose(w, 1.5 * z, atol=1e-5) and torch.equal(wide.mean, q.mean)


def test_proposals_that_a_posterior_cannot_give():
    planar, x = network(posteriors.Planar), bits(2)
    with pytest.raises(UsageError, match="widened"):
        importance_sampled(planar, x, 20, proposal="widened")
    with pytest.raises(UsageError):
        importance_sampled(planar, x, 20, proposal="defensive")
    for proposal in importance.PROPOSALS:
        with pytest.raises(NoDensity, match="Dirac"):
            importance_sampled(network(posteriors.Delta), x, 20, proposal=proposal)
    with pytest.raises(UsageError, match="unknown proposal 'wide': did you mean 'widened'"):
        importance_sampled(planar, x, 20, proposal="wide")


@pytest.mark.parametrize("name", ["k", "chunk"])
def test_no_samples_are_refused(name):
    with pytest.raises(UsageError, match=f"^{name} is 0"):
        importance_sampled(network(), bits(2), **{"k": 5, name: 0})
    with pytest.raises(UsageError, match="number of images is 0"):
        importance_sampled(network(), bits(2)[:0], 5)


@pytest.mark.parametrize("proposal", ["posterior", "defensive"])
def test_a_conditional_model_is_asked_about_its_labels(proposal):
    """log p(x|c) with the prior of each label; the images' own order of labels, and each label by itself, agree."""

    def conditional():
        return VAE(
            WithLabel(MLP((64 + 3,), (), (16,), "tanh", out_activation=True), 3), posteriors.Gaussian(16, 2),
            priors.LabelGaussian(2, 3), likelihoods.Bernoulli(WithLabel(MLP((2 + 3,), (16,), (1, 8, 8), "tanh"), 3)),
        )  # fmt: skip

    model, x, c = seeded(conditional), bits(), torch.arange(12) % 3
    with torch.no_grad():
        model.prior.mean.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]]))
    together = importance_sampled(model, x, 400, c=c, proposal=proposal)
    for label in range(3):
        own = importance_sampled(model, x[c == label], 400, c=c[c == label], proposal=proposal)
        assert abs(own.log_px - together.log_px[c.numpy() == label]).max() < 1e-5
    from vaelab.quadrature import log_likelihood

    exact = log_likelihood(model, x, c).log_px
    many = importance_sampled(model, x, 5000, c=c, proposal=proposal)
    assert abs(many.log_px - exact).mean() < 0.1
    with pytest.raises(UsageError, match="conditional"):
        importance_sampled(model, x, 5)


@pytest.mark.parametrize("k", [1, 3, 1003])
def test_a_block_without_a_prior_sample_is_no_error(k):
    """Priors that are mixtures or flows cannot draw no samples."""
    parts = posteriors.Gaussian(4, 2), priors.MixtureOfGaussians(2, 3)
    model = VAE(nn.Linear(4, 4), *parts, likelihoods.Bernoulli(nn.Linear(2, 4)))
    x = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    for seed in range(3):
        found = importance_sampled(model, x, k, seed=seed, proposal="defensive")
        assert math.isfinite(found.log_px[0])


# --- bfloat16 decoding ---


def confident(width=64):
    """A VAE whose logits are as large as those of a trained one: tens of nats a pixel where it is wrong."""
    model = network()
    with torch.no_grad():
        model.likelihood.decoder.layers[-1].weight.mul_(12)
        model.likelihood.decoder.layers[-1].bias.fill_(-2)
    return model


def test_bfloat16_decoding_moves_an_estimate_by_hundredths_and_their_mean_by_thousandths():
    model, x = confident(), bits(200)
    exact = importance_sampled(model, x, 500)
    coarse = importance_sampled(model, x, 500, precision="bfloat16")
    assert -exact.log_px.mean() > 30  # nats: the images cost something
    moved = coarse.log_px - exact.log_px
    assert 0 < np.abs(moved).max() < 0.1 and np.sqrt((moved**2).mean()) < 0.03
    assert abs(moved.mean()) < 0.005 < 0.1 * exact.se  # far below what is uncertain anyway
    for k in exact.curve:
        assert abs((coarse.curve[k] - exact.curve[k]).mean()) < 3e-4 * abs(exact.curve[k].mean())
    assert importance_sampled(model, x[:3], 500).log_px.tolist() == exact.log_px[:3].tolist()  # float32 is as it was


def test_bfloat16_decoding_is_refused_where_a_scale_would_magnify_it(oracle, images):
    with pytest.raises(UsageError, match="bfloat16 decoding is for Bernoulli pixels"):
        importance_sampled(oracle.vae(), images[:2], 10, precision="bfloat16")
    with pytest.raises(UsageError, match="'half': choose auto, float32 or bfloat16"):
        importance_sampled(network(), bits(2), 10, precision="half")
    auto, exact = (importance_sampled(oracle.vae(), images[:2], 10, precision=p) for p in ("auto", "float32"))
    assert auto.log_px.tolist() == exact.log_px.tolist()
