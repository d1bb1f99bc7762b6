"""Densities against torch.distributions and against sums and integrals; KL against quadrature and Monte Carlo."""

import itertools

import pytest
import torch

from vaelab.distributions import Delta, DiagGaussian, closed_form_kl
from vaelab.errors import NoDensity
from vaelab.pixels import Bernoulli
from vaelab.rng import stream

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "test"), dtype=F64)


def test_gaussian_density_is_torchs():
    mean, log_std, value = normal(4, 3), normal(4, 3, seed=1) / 3, normal(5, 4, 3, seed=2)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(value).sum(-1)
    assert torch.allclose(DiagGaussian(mean, log_std).log_prob(value), expected, rtol=0, atol=1e-12)


def test_gaussian_samples_have_its_moments():
    q = DiagGaussian(torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([0.3, -1.0], dtype=F64))
    z = q.rsample(400_000, stream(0, "noise"))
    assert torch.allclose(z.mean(0), q.mean, atol=0.01)
    assert torch.allclose(z.std(0), q.std, rtol=0.01)


def test_gaussian_samples_carry_the_reparameterised_gradient():
    """d/dmu E[z^2] = 2 mu and d/dlog_std E[z^2] = 2 sigma^2."""
    mean = torch.tensor([0.7], dtype=F64, requires_grad=True)
    log_std = torch.tensor([-0.4], dtype=F64, requires_grad=True)
    DiagGaussian(mean, log_std).rsample(400_000, stream(0, "noise")).square().mean().backward()
    assert mean.grad.item() == pytest.approx(1.4, rel=0.02)
    assert log_std.grad.item() == pytest.approx(2 * torch.exp(2 * log_std.detach()).item(), rel=0.02)


def test_kl_of_gaussians_against_torch_quadrature_and_monte_carlo():
    q, p = DiagGaussian(normal(4, 3), normal(4, 3, seed=1) / 2), DiagGaussian(normal(3, seed=2), normal(3, seed=3) / 2)
    kl = closed_form_kl(q, p)
    other = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.mean, q.std), torch.distributions.Normal(p.mean, p.std)
    )
    assert torch.allclose(kl, other, rtol=0, atol=1e-12)
    z = q.rsample(200_000, stream(0, "noise"))
    assert torch.allclose((q.log_prob(z) - p.log_prob(z)).mean(0), kl.sum(-1), atol=0.05, rtol=0.01)
    line = torch.linspace(-30, 30, 60_001, dtype=F64)[:, None, None]
    one_q, one_p = torch.distributions.Normal(q.mean, q.std), torch.distributions.Normal(p.mean, p.std)
    integral = (one_q.log_prob(line).exp() * (one_q.log_prob(line) - one_p.log_prob(line))).sum(0) * 1e-3
    assert torch.allclose(integral, kl, atol=1e-8)


def test_bernoulli_masses_sum_to_one():
    px = Bernoulli(normal(1, 1, 2, 2, 2) * 3)
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=F64).reshape(256, 1, 2, 2, 2)
    assert px.log_prob(images.transpose(0, 1)).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_bernoulli_mass_and_gradient_are_torchs(scale):
    x = (normal(4, 1, 3, 3) > 0).double()
    ours = (scale * normal(2, 4, 1, 3, 3, seed=1)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weights = normal(2, 4, seed=2)
    mine = Bernoulli(ours).log_prob(x)
    other = torch.distributions.Bernoulli(logits=theirs).log_prob(x.expand(2, *x.shape)).sum((-1, -2, -3))
    assert torch.allclose(mine, other, rtol=1e-12, atol=1e-9)
    (mine * weights).sum().backward()
    (other * weights).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_bernoulli_sums_bfloat16_logits_in_float32():
    logits = normal(1, 2, 1, 28, 28).bfloat16()
    x = (normal(2, 1, 28, 28, seed=1) > 0).float()
    exact = Bernoulli(logits.double()).log_prob(x.double())
    assert (Bernoulli(logits).log_prob(x) - exact).abs().max() < 1e-3


def test_cross_log_prob_is_log_prob_of_every_pair():
    px, values = Bernoulli(normal(1, 5, 1, 2, 3)), (normal(4, 1, 2, 3, seed=1) > 0).double()
    expected = torch.stack([px.log_prob(v.expand(5, *v.shape))[0] for v in values], 1)
    assert torch.allclose(px.cross_log_prob(values), expected, atol=1e-12)
    gaussian = DiagGaussian(normal(1, 5, 3), normal(1, 5, 3, seed=1))
    value = normal(4, 3, seed=2)
    expected = torch.stack([gaussian.log_prob(v.expand(5, 3))[0] for v in value], 1)
    assert torch.allclose(gaussian.cross_log_prob(value), expected, atol=1e-12)


def test_bernoulli_samples_have_its_mean():
    px = Bernoulli(normal(1, 1, 1, 2, 2))
    drawn = px.rsample(100_000, stream(0, "noise"))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), px.mean, atol=0.01)


def test_detach_stops_the_parameters_only():
    mean = torch.zeros(1, 2, requires_grad=True)
    z = torch.ones(1, 1, 2, requires_grad=True)
    DiagGaussian(mean, torch.zeros(1, 2)).detach().log_prob(z).sum().backward()
    assert mean.grad is None
    assert z.grad is not None


def test_a_dirac_has_no_density():
    with pytest.raises(NoDensity, match="beta=0"):
        Delta(torch.zeros(1, 2)).log_prob(torch.zeros(1, 1, 2))
