"""What objectives ask of the aggregate posterior: its decomposition, MMD and covariance, where the answer is known."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad

from vaelab.distributions import DiagGaussian, FullGaussian, Laplace
from vaelab.errors import UsageError
from vaelab.estimators import log_aggregate, mmd
from vaelab.objectives import DIP, RAE, WAE, BetaTC, InfoVAE
from vaelab.oracles import LinearGaussian
from vaelab.priors import LabelGaussian
from vaelab.rng import stream
from vaelab.trace import Level, Trace

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "test"), dtype=F64)


def trace_of(q, k=1, p=None, z=None, seed=0):
    """A trace whose distortion is 0, for what the other terms of a loss make of q."""
    noise = stream(seed, "noise")
    z = q.rsample(k, noise) if z is None else z
    zeros = torch.zeros(z.shape[-1], dtype=z.dtype)
    p = DiagGaussian(zeros, zeros) if p is None else p
    return Trace(q, torch.zeros(z.shape[:2], dtype=z.dtype), (Level(q, p, z),), noise=noise)


def aggregate(n, seed=0):
    """Posteriors N(m, diag(s^2)) of n images whose means are Gaussian, and the covariance of their aggregate."""
    of_means = torch.tensor([[1.0, 0.6], [0.6, 0.7]], dtype=F64)
    std = torch.tensor([0.6, 0.4], dtype=F64)
    means = normal(n, 2, seed=seed) @ torch.linalg.cholesky(of_means).T + torch.tensor([0.3, -0.5], dtype=F64)
    return DiagGaussian(means, std.log().expand(n, 2)), of_means + std.square().diag()


# the estimators of log q(z)


@pytest.mark.parametrize("laplace", [False, True])
def test_stratified_weights_are_unbiased_for_the_mixture(laplace):
    """Averaged over all batches of 3 of 6 images, the estimate of q(z) at one image's code is the mixture's density."""
    means, scales = normal(6, 2), normal(6, 2, seed=1) / 3
    family = Laplace if laplace else DiagGaussian
    z = normal(1, 6, 2, seed=2)
    each = torch.stack([family(means[j], scales[j]).log_prob_each(z[0]) for j in range(6)], 1)
    exact, exact_each = each.sum(-1).exp().mean(1), each.exp().mean(1)
    found, found_each, count = torch.zeros(6, dtype=F64), torch.zeros(6, 2, dtype=F64), torch.zeros(6)
    for batch in map(list, itertools.permutations(range(6), 3)):
        joint, marginals = log_aggregate(family(means[batch], scales[batch]), z[:, batch], 6, "stratified")
        found[batch] += joint[0].exp()
        found_each[batch] += marginals[0].exp()
        count[batch] += 1
    assert torch.allclose(found / count, exact, rtol=1e-12)
    assert torch.allclose(found_each / count[:, None], exact_each, rtol=1e-12)


def test_with_the_whole_data_set_both_estimators_are_the_mixture():
    """The weighted one but for its constant, log N, in each of its densities."""
    q, z = DiagGaussian(normal(7, 3), normal(7, 3, seed=1) / 3), normal(4, 7, 3, seed=2)
    each = torch.stack([q.select(slice(j, j + 1)).log_prob_each(z) for j in range(7)], 2)
    joint, marginals = each.sum(-1).exp().mean(2).log(), each.exp().mean(2).log()
    for estimator, constant in (("stratified", 0.0), ("weighted", math.log(7))):
        found, found_each = log_aggregate(q, z, 7, estimator)
        assert (found + constant - joint).abs().max() < 1e-12
        assert (found_each + constant - marginals).abs().max() < 1e-12


@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
def test_total_correlation_of_a_gaussian_aggregate(estimator):
    """TC = -log det(correlation matrix) / 2; the weighted estimate is a constant (D - 1) log N too large, as defined."""
    n, size = 1000, 1_000_000 if estimator == "stratified" else 1000
    q, covariance = aggregate(n)
    std = covariance.diagonal().sqrt()
    exact = -0.5 * torch.logdet(covariance / torch.outer(std, std)).item()
    assert exact > 0.1
    found = torch.stack([BetaTC(0, 1, 0, size, estimator)(trace_of(q, 2, seed=s), 0).loss for s in range(3)])
    constant = math.log(size) if estimator == "weighted" else 0.0
    assert found.mean().item() - constant == pytest.approx(exact, abs=0.03)


def test_mutual_information_and_marginals_of_a_gaussian_aggregate():
    """I = (log det S - log det s^2) / 2, the capacity of the Gaussian channel; each marginal's KL in closed form."""
    q, covariance = aggregate(1000)
    exact = 0.5 * (torch.logdet(covariance) - 2 * q.log_std[0].sum()).item()
    variance, mean = covariance.diagonal(), torch.tensor([0.3, -0.5], dtype=F64)
    marginals = 0.5 * (variance + mean.square() - 1 - variance.log()).sum().item()
    found = torch.stack([BetaTC(1, 0, 0, 10**6, "stratified")(trace_of(q, seed=s), 0).loss for s in range(3)])
    assert found.mean().item() == pytest.approx(exact, abs=0.04)
    found = torch.stack([BetaTC(0, 0, 1, 10**6, "stratified")(trace_of(q, seed=s), 0).loss for s in range(3)])
    assert found.mean().item() == pytest.approx(marginals, abs=0.06)


def test_independent_dimensions_have_no_total_correlation():
    means = normal(800, 3)
    q = DiagGaussian(means, torch.full_like(means, -0.3))
    found = torch.stack([BetaTC(0, 1, 0, 10**6, "stratified")(trace_of(q, seed=s), 0).loss for s in range(3)])
    assert abs(found.mean().item()) < 0.04


@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
def test_the_three_terms_add_up_to_the_rate(estimator):
    """They telescope: log q(z|x) - log q(z) + log q(z) - ... - log p(z), for every sample."""
    trace = trace_of(aggregate(20)[0], 3)
    estimate = BetaTC(1, 1, 1, 50, estimator)(trace, 0)
    level = trace.levels[0]
    assert estimate.loss.item() == pytest.approx((level.log_q - level.log_p).mean().item(), abs=1e-12)
    assert torch.equal(estimate.bound, -trace.rate)
    assert abs(BetaTC(1, 2, 1, 50, estimator)(trace, 0).loss - estimate.loss) > 0.01


def test_a_weight_acts_once_and_not_once_for_each_dimension():
    """Twice the weight adds one more of its term; a term is not multiplied by the number of dimensions."""
    trace = trace_of(aggregate(20)[0], 3)

    def loss(*weights):
        return BetaTC(*weights, 50, "stratified")(trace, 0).loss.item()

    terms = [loss(1, 0, 0), loss(0, 1, 0), loss(0, 0, 1)]
    assert loss(2, 3, 0.5) == pytest.approx(2 * terms[0] + 3 * terms[1] + 0.5 * terms[2], abs=1e-10)


def test_a_posterior_that_does_not_factorise_is_refused():
    q = FullGaussian(normal(5, 2), torch.eye(2, dtype=F64).expand(5, 2, 2))
    with pytest.raises(
        UsageError, match=r"BetaTC: FullGaussian does not factorise.*take a Gaussian or Laplace posterior"
    ):
        BetaTC(1, 6, 1, 50)(trace_of(q), 0)


# maximum mean discrepancy


def expected_mmd(shift, kernel):
    """Of N(0, I) and N(shift, I), in closed form: with x - y ~ N(m, 2 I) and bandwidth C = 2 D,

    E exp(-t |x - y|^2 / C) = (1 + 4 t / C)^(-D/2) exp(-t |m|^2 / (C + 4 t)), and C / (C + d^2) is its integral over t of e^-t.
    """
    dim = len(shift)
    c, squared = 2 * dim, float(shift.square().sum())

    def rbf(t, m2):
        return (1 + 4 * t / c) ** (-dim / 2) * math.exp(-t * m2 / (c + 4 * t))

    def imq(m2):
        return quad(lambda t: math.exp(-t) * rbf(t, m2), 0, math.inf)[0]

    return 2 * (rbf(1, 0) - rbf(1, squared)) if kernel == "rbf" else 2 * (imq(0) - imq(squared))


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("size", [0.0, 0.5, 2.0])
def test_mmd_of_gaussians(kernel, size):
    """The estimate is unbiased: its mean over 1000 pairs of samples of 25, within its standard error."""
    shift = size * torch.tensor([0.6, 0.0, -0.8], dtype=F64)
    found = mmd(normal(1000, 25, 3), normal(1000, 25, 3, seed=1) + shift, kernel)
    error = found.std().item() / math.sqrt(1000)
    expected = expected_mmd(shift, kernel)
    assert abs(found.mean().item() - expected) < 3 * error
    assert expected == 0 if size == 0 else expected > 10 * error
    assert (found < 0).any() or size > 0  # a biased estimate never is


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_mmd_by_two_loops(kernel):
    a, b = normal(1, 4, 3), normal(1, 4, 3, seed=1)

    def k(u, v):
        squared = (u - v).square().sum().item()
        return math.exp(-squared / 6) if kernel == "rbf" else 6 / (6 + squared)

    pairs = list(itertools.permutations(range(4), 2))
    terms = [k(a[0, i], a[0, j]) + k(b[0, i], b[0, j]) - 2 * k(a[0, i], b[0, j]) for i, j in pairs]
    expected = sum(terms) / 12
    assert mmd(a, b, kernel).item() == pytest.approx(expected, abs=1e-14)
    assert mmd(a, b[0], kernel).item() == pytest.approx(expected, abs=1e-14)


def test_mmd_has_a_gradient_where_codes_coincide():
    a = normal(1, 6, 2)
    a[0, 1] = a[0, 0]
    a.requires_grad_()
    mmd(a, normal(6, 2, seed=1), "imq").sum().backward()
    assert a.grad.isfinite().all() and a.grad.abs().max() > 0


@pytest.mark.parametrize("objective", [WAE(3.0), InfoVAE(1.0, 3.0, "rbf"), InfoVAE(0.0, 3.0)])
def test_prior_codes_come_from_the_noise_of_the_step(objective):
    """Same step, same loss; another step's noise gives another; torch's global generator is left alone."""
    q, _ = aggregate(30)
    z = q.rsample(2, stream(9, "z"))
    before = torch.get_rng_state()
    losses = [objective(trace_of(q, z=z, seed=seed), 0).loss.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_penalty_is_the_mmd_to_the_prior():
    """Codes N(m, I) against the prior N(0, I); a mean over the K samples."""
    shift = torch.tensor([1.0, -1.0], dtype=F64)
    q = DiagGaussian(shift.expand(50, 2), torch.zeros(50, 2, dtype=F64))
    for kernel in ("imq", "rbf"):
        expected = expected_mmd(shift, kernel)
        found = torch.stack([WAE(1.0, kernel)(trace_of(q, 3, seed=seed), 0).loss for seed in range(200)])
        assert abs(found.mean().item() - expected) < 3 * found.std().item() / math.sqrt(200)
        trace, again = trace_of(q, 3), trace_of(q, 3)
        whole = InfoVAE(0.25, 4.0, kernel)(trace, 0).loss
        expected = 0.75 * trace.rate.mean() + 3.25 * WAE(1.0, kernel)(again, 0).loss
        assert whole.item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_conditional_prior_is_asked_once_for_each_label():
    """p(z|c) and q(z|x) that agree label by label have no discrepancy, however far apart the labels are."""
    prior = LabelGaussian(2, 2).double()
    with torch.no_grad():
        prior.mean.copy_(torch.tensor([[5.0, 0.0], [-5.0, 0.0]]))
    labels = torch.arange(2).repeat(40)
    p = prior(None, labels)
    same = torch.stack([WAE(1.0)(trace_of(p, p=p, seed=seed), 0).loss.detach() for seed in range(100)])
    assert abs(same.mean().item()) < 3 * same.std().item() / 10
    assert WAE(1.0)(trace_of(prior(None, labels * 0), p=p), 0).loss.item() > 0.1


# covariance


def whitened(n, dim):
    """Codes whose covariance over images is I."""
    centred = normal(n, dim) - normal(n, dim).mean(0)
    q, _ = torch.linalg.qr(centred)
    return q * math.sqrt(n - 1)


@pytest.mark.parametrize("kind", [1, 2])
def test_dip_vanishes_for_whitened_codes(kind):
    """Kind 1 asks the means to have covariance I, kind 2 the codes: there the posteriors' variance is a part of it."""
    share = 1.0 if kind == 1 else 0.7
    means = math.sqrt(share) * whitened(40, 3)
    log_std = torch.full((40, 3), 0.5 * math.log(0.3), dtype=F64)
    trace = trace_of(DiagGaussian(means, log_std))
    found = DIP(kind, 5.0, 7.0)(trace, 0)
    assert found.loss.item() == pytest.approx(trace.rate.mean().item(), abs=1e-12)
    assert torch.equal(found.bound, -trace.rate)
    other = DIP(3 - kind, 5.0, 7.0)(trace, 0).loss - trace.rate.mean()
    assert other.item() == pytest.approx(3 * 5.0 * 0.3**2, abs=1e-12)


def test_dip_penalises_variances_and_covariances():
    means = whitened(40, 2) @ torch.tensor([[1.5, 0.4], [0.0, 0.8]], dtype=F64)
    trace = trace_of(DiagGaussian(means, torch.zeros(40, 2, dtype=F64)))
    c = torch.cov(means.T)
    for kind, more in ((1, 0.0), (2, 1.0)):
        expected = 2 * ((c[0, 0] + more - 1) ** 2 + (c[1, 1] + more - 1) ** 2) + 3 * 2 * c[0, 1] ** 2
        found = DIP(kind, diagonal=2.0, off_diagonal=3.0)(trace, 0).loss - trace.rate.mean()
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_dip_of_other_posteriors():
    """A Laplace's variance is exact; of a full Gaussian the codes tell: their covariance is S + L L^T in the mean."""
    means = whitened(4000, 2) * 0.5
    q = Laplace(means, torch.zeros_like(means))
    trace = trace_of(q)
    found = DIP(2, 1.0, 1.0)(trace, 0).loss - trace.rate.mean()
    assert found.item() == pytest.approx(2 * (0.25 + 2 - 1) ** 2, abs=1e-12)
    root = torch.tensor([[1.0, 0.0], [0.6, 0.5]], dtype=F64)
    trace = trace_of(FullGaussian(means, root.expand(4000, 2, 2)), 20)
    c = root @ root.T + 0.25 * torch.eye(2, dtype=F64)
    expected = (c.diagonal() - 1).square().sum() + 2 * c[0, 1] ** 2
    found = DIP(2, 1.0, 1.0)(trace, 0).loss - trace.rate.mean()
    assert found.item() == pytest.approx(expected.item(), abs=0.02)


# the decoder's Jacobian


def test_the_gradient_penalty_is_frobenius_squared_norm_in_the_mean():
    """A linear decoder's Jacobian is W everywhere; each image draws signs of its own."""
    oracle = LinearGaussian.random(pixels=6, dim=2, std=0.4, generator=stream(1, "oracle"))
    x = oracle.sample(20_000, stream(2, "images"))
    trace = oracle.vae().trace(x, k=2, generator=stream(0, "noise"))
    found = RAE(0.0, 1.0)(trace, 0).loss - trace.distortion.mean()
    exact = oracle.weight.square().sum().item()
    # |W^T s|^2 = |W|_F^2 + twice the sum over pairs of pixels of s_i s_j (W W^T)_ij
    products = (oracle.weight @ oracle.weight.T).triu(1)
    error = 2 * products.square().sum().sqrt().item() / math.sqrt(40_000)
    assert abs(found.item() - exact) < 3 * error
    assert error < 0.01 * exact
    ones = oracle.weight.sum(0).square().sum().item()
    assert abs(ones - exact) > 20 * error
