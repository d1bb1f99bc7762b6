"""Densities against torch.distributions and against sums and integrals; KL against quadrature and Monte Carlo."""

import itertools
import math

import pytest
import torch

from vaelab.distributions import (
    Delta,
    DiagGaussian,
    FullGaussian,
    Laplace,
    Mixture,
    closed_form_kl,
    log_chi2_tail,
)
from vaelab.errors import NoDensity, UsageError
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


def lower(*batch, dim=2, seed=0):
    """Lower triangular with a positive diagonal, (*batch, dim, dim)."""
    return normal(*batch, dim, dim, seed=seed).tril(-1) + torch.diag_embed(
        (0.4 * normal(*batch, dim, seed=seed + 50)).exp()
    )


def diag(*shape, seed=0):
    return DiagGaussian(normal(*shape, seed=seed), 0.4 * normal(*shape, seed=seed + 1))


def full(*batch, dim=2, seed=0):
    return FullGaussian(normal(*batch, dim, seed=seed), lower(*batch, dim=dim, seed=seed + 1))


def laplace(*shape, seed=0):
    return Laplace(normal(*shape, seed=seed), 0.4 * normal(*shape, seed=seed + 1))


def mixture(components):
    return Mixture(normal(components.mean.shape[0], seed=9), components)


ONE = {
    "gaussian": diag(1, seed=10),
    "laplace": laplace(1, seed=12),
    "full": full(dim=1, seed=14),
    "mixture": mixture(diag(3, 1, seed=16)),
}
TWO = {
    "gaussian": diag(2, seed=20),
    "laplace": laplace(2, seed=22),
    "full": full(seed=24),
    "mixture": mixture(diag(3, 2, seed=26)),
    "full mixture": mixture(full(3, seed=28)),
    "laplace mixture": mixture(laplace(3, 2, seed=30)),
}


def tolerance(name):
    """The midpoint rule on cells of 1/16 is exact for these normals, and of second order at the edge of a Laplace density."""
    return 1e-3 if "laplace" in name else 1e-9


def grid(dim, extent, side):
    """Midpoints (N, 1, dim) of cells in [-extent, extent]^dim, and the volume of one."""
    line = (torch.arange(side, dtype=F64) + 0.5) * (2 * extent / side) - extent
    return torch.cartesian_prod(*[line] * dim).reshape(-1, 1, dim), (2 * extent / side) ** dim


@pytest.mark.parametrize("name", ONE)
def test_densities_in_one_dimension_integrate_to_one(name):
    z, volume = grid(1, 60, 600_000)
    assert (ONE[name].log_prob(z).exp().sum() * volume).item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("name", TWO)
def test_densities_in_two_dimensions_integrate_to_one(name):
    z, volume = grid(2, 25, 800)
    assert (TWO[name].log_prob(z).exp().sum() * volume).item() == pytest.approx(1, abs=tolerance(name))


@pytest.mark.parametrize("name", TWO)
def test_samples_have_the_moments_of_the_density(name):
    """Mean and second moments against quadrature, within 4.5 standard errors."""
    p, n = TWO[name], 100_000
    z, volume = grid(2, 25, 800)
    weights = p.log_prob(z).exp() * volume
    drawn = p.rsample(n, stream(3, "noise"))
    assert drawn.shape == (n, 2)

    def moments(z):
        return torch.stack([z[:, 0], z[:, 1], z[:, 0] ** 2, z[:, 1] ** 2, z[:, 0] * z[:, 1], z[:, 0].abs()], 1)

    expected = (moments(z[:, 0]) * weights).sum(0)
    found = moments(drawn)
    assert ((found.mean(0) - expected).abs() < 4.5 * found.std(0) / math.sqrt(n)).all()
    assert torch.allclose(p.mean, expected[:2], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", ONE)
def test_samples_follow_the_density(name):
    """Kolmogorov-Smirnov: sup |F_n - F| sqrt(n) is above 1.95 once in a thousand."""
    p, n = ONE[name], 50_000
    z, volume = grid(1, 40, 400_000)
    cdf = (p.log_prob(z).exp() * volume).cumsum(0).squeeze(1)
    drawn = p.rsample(n, stream(4, "noise")).squeeze(1).sort().values
    at = cdf[((drawn + 40) / 80 * 400_000).long()]
    rank = torch.arange(1, n + 1, dtype=F64) / n
    assert torch.maximum((rank - at).abs(), (rank - 1 / n - at).abs()).max() * math.sqrt(n) < 1.95


def test_laplace_and_full_gaussian_densities_are_torchs():
    value, p, q = normal(5, 4, 3, seed=2), laplace(4, 3), full(4, dim=3)
    expected = torch.distributions.Laplace(p.loc, p.log_scale.exp()).log_prob(value).sum(-1)
    assert torch.allclose(p.log_prob(value), expected, rtol=0, atol=1e-12)
    expected = torch.distributions.MultivariateNormal(q.mean, scale_tril=q.scale_tril).log_prob(value)
    assert torch.allclose(q.log_prob(value), expected, rtol=1e-12, atol=1e-12)


def test_a_diagonal_scale_tril_is_the_diagonal_gaussian():
    q, value = diag(4, 3), normal(5, 4, 3, seed=2)
    same = FullGaussian(q.mean, torch.diag_embed(q.std))
    assert torch.allclose(same.log_prob(value), q.log_prob(value), atol=1e-12)
    assert torch.equal(same.rsample(3, stream(0, "noise")), q.rsample(3, stream(0, "noise")))


def test_full_gaussian_does_not_read_above_the_diagonal():
    q = full(4, dim=3)
    spoilt = FullGaussian(q.mean, q.scale_tril + normal(3, 3, seed=7).triu(1))
    value, p = normal(5, 4, 3, seed=2), diag(4, 3, seed=5)
    assert torch.equal(spoilt.log_prob(value), q.log_prob(value))
    assert torch.equal(spoilt.rsample(2, stream(0, "n")), q.rsample(2, stream(0, "n")))
    assert torch.equal(closed_form_kl(spoilt, p), closed_form_kl(q, p))
    assert torch.equal(closed_form_kl(p, spoilt), closed_form_kl(p, q))
    assert spoilt.log_tail(30.0) == q.log_tail(30.0)


@pytest.mark.parametrize("p", [diag(3, 2), full(3), laplace(3, 2)], ids=["gaussian", "full", "laplace"])
def test_samples_carry_the_reparameterised_gradient(p):
    """The gradient of E[z_i^2 + z_0 z_1] in every parameter: through the samples, and through the closed form."""
    tensors = {name: t.clone().requires_grad_() for name, t in p._tensors().items()}
    p = type(p)(**tensors)
    z = p.rsample(200_000, stream(5, "noise"))
    (z.square().sum(-1) + z[..., 0] * z[..., 1]).mean(0).sum().backward()
    if isinstance(p, FullGaussian):
        root = tensors["scale_tril"].detach().clone().requires_grad_()
        covariance = root @ root.mT
    else:
        root = tensors["log_scale" if isinstance(p, Laplace) else "log_std"].detach().clone().requires_grad_()
        covariance = torch.diag_embed((2 if isinstance(p, Laplace) else 1) * torch.exp(2 * root))
    mean = p.mean.detach().clone().requires_grad_()
    second = covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    (second.diagonal(dim1=-2, dim2=-1).sum() + second[..., 0, 1].sum()).backward()
    scale_grad = root.grad.tril() if isinstance(p, FullGaussian) else root.grad
    ours = next(t.grad for name, t in tensors.items() if name in ("scale_tril", "log_scale", "log_std"))
    assert torch.allclose(ours, scale_grad, atol=0.1, rtol=0.02)
    assert torch.allclose(next(iter(tensors.values())).grad, mean.grad, atol=0.05, rtol=0.02)


PAIRS = [
    (diag(4, 1), diag(1, seed=2)),
    (laplace(4, 1), laplace(1, seed=2)),
    (diag(4, 1), laplace(1, seed=2)),
    (laplace(4, 1), diag(1, seed=2)),
    (full(4, dim=1), diag(1, seed=2)),
    (diag(4, 1), full(dim=1, seed=2)),
    (full(4, dim=1), full(dim=1, seed=2)),
]


@pytest.mark.parametrize(("q", "p"), PAIRS, ids=lambda one: type(one).__name__)
def test_closed_form_kl_against_quadrature(q, p):
    z, volume = grid(1, 40, 400_000)
    log_q, log_p = q.log_prob(z), p.log_prob(z)
    integral = (log_q.exp() * (log_q - log_p)).sum(0) * volume
    assert torch.allclose(closed_form_kl(q, p).squeeze(-1), integral, rtol=0, atol=2e-7)
    assert closed_form_kl(q, p).shape == (4, 1)


MANY = [
    (diag(4, 3), diag(4, 3, seed=2), 3),
    (laplace(4, 3), laplace(3, seed=2), 3),
    (diag(4, 3), laplace(4, 3, seed=2), 3),
    (laplace(4, 3), diag(3, seed=2), 3),
    (full(4, dim=3), diag(3, seed=2), 1),
    (diag(4, 3), full(dim=3, seed=2), 1),
    (full(4, dim=3), full(4, dim=3, seed=2), 1),
]


@pytest.mark.parametrize(("q", "p", "width"), MANY, ids=lambda one: type(one).__name__)
def test_closed_form_kl_against_monte_carlo(q, p, width):
    kl = closed_form_kl(q, p)
    assert kl.shape == (4, width)
    z = q.rsample(20_000, stream(6, "noise"))
    ratio = q.log_prob(z) - p.log_prob(z)
    assert ((ratio.mean(0) - kl.sum(-1)).abs() < 4 * ratio.std(0) / math.sqrt(len(z))).all()
    assert torch.allclose(closed_form_kl(q, q), torch.zeros(1, dtype=F64), atol=1e-12)


def test_no_closed_form_is_claimed_for_mixtures():
    assert closed_form_kl(diag(4, 2), mixture(diag(3, 2))) is None
    assert closed_form_kl(mixture(diag(3, 2)), diag(2)) is None


def test_a_mixture_of_one_component_is_the_component():
    one, value = full(1, seed=3), normal(5, 4, 2, seed=2)
    p = Mixture(torch.tensor([0.7], dtype=F64), one)
    assert torch.allclose(p.log_prob(value), FullGaussian(one.mean[0], one.scale_tril[0]).log_prob(value), atol=1e-12)
    assert torch.equal(p.mean, one.mean[0]) and p.log_tail(9.0) == one.log_tail(9.0)


@pytest.mark.parametrize("components", [diag(3, 2), full(3), laplace(3, 2)], ids=lambda one: type(one).__name__)
def test_a_mixtures_density_is_torchs(components):
    p, value = mixture(components), normal(5, 4, 2, seed=2)
    weights = torch.distributions.Categorical(logits=p.logits)
    if isinstance(components, FullGaussian):
        parts = torch.distributions.MultivariateNormal(components.mean, scale_tril=components.scale_tril)
    else:
        kind = torch.distributions.Laplace if isinstance(components, Laplace) else torch.distributions.Normal
        scale = components.log_scale.exp() if isinstance(components, Laplace) else components.std
        parts = torch.distributions.Independent(kind(components.mean, scale), 1)
    expected = torch.distributions.MixtureSameFamily(weights, parts).log_prob(value)
    assert torch.allclose(p.log_prob(value), expected, atol=1e-12)


def test_a_mixtures_samples_carry_gradient_to_the_components_only():
    logits, mean = normal(3).requires_grad_(), normal(3, 2, seed=1).requires_grad_()
    p = Mixture(logits, DiagGaussian(mean, torch.zeros(3, 2, dtype=F64)))
    p.rsample(1000, stream(0, "noise")).sum(0)[0].backward()
    assert logits.grad is None and mean.grad[:, 0].sum().item() == pytest.approx(1000) and (mean.grad[:, 1] == 0).all()
    assert not p.detach().log_prob(normal(5, 1, 2)).requires_grad
    assert p.log_prob(normal(5, 1, 2)).requires_grad


@pytest.mark.parametrize("q", [diag(6, 3), full(6, dim=3), laplace(6, 3)], ids=lambda one: type(one).__name__)
def test_every_value_under_every_distribution(q):
    """`log_prob_all`, `cross_log_prob` and `select` are log_prob, pair by pair."""
    value = normal(5, 4, 3, seed=2)
    each = q.log_prob_all(value)
    assert each.shape == (5, 4, 6)
    for m in range(6):
        assert torch.allclose(each[..., m], q.select(slice(m, m + 1)).log_prob(value), atol=1e-11)
    lifted = type(q)(**{name: t.unsqueeze(0) for name, t in q._tensors().items()})
    assert torch.allclose(lifted.cross_log_prob(value[:, 0]), each[:, 0].T, atol=1e-11)
    chosen = q.select(torch.tensor([4, 0, 4]))
    assert torch.equal(chosen.mean, q.mean[[4, 0, 4]])


def test_gaussian_pairs_are_exact_in_float32_where_the_terms_cancel():
    """sigma = 0.003 at a mean of 20: the square is the difference of numbers of 4e7, eight digits of a float32."""
    q = DiagGaussian(torch.full((3, 2), 20.0), torch.full((3, 2), math.log(0.003)))
    value = torch.full((4, 1, 2), 20.0) + 0.003 * normal(4, 1, 2).float()
    exact = DiagGaussian(q.mean.double(), q.log_std.double()).log_prob_all(value.double())
    assert (q.log_prob_all(value) - exact).abs().max() < 1e-5


@pytest.mark.parametrize("p", TWO.values(), ids=TWO)
def test_the_tail_bound_holds_and_is_not_vacuous(p):
    """Against the mass beyond a radius by quadrature: never below it, and the slack stays a fraction of its logarithm."""
    z, volume = grid(2, 40, 800)
    log_p, distance = p.log_prob(z).squeeze(1), z.squeeze(1).norm(dim=1)
    for radius in (0.5, 3.0, 6.0, 9.0, 12.0):
        mass = (log_p[distance > radius].exp().sum() * volume).log().item()
        assert p.log_tail(radius) >= mass - 1e-3
    assert p.log_tail(12.0) < -4
    assert p.log_tail(24.0) < 1.9 * p.log_tail(12.0)


def test_the_tail_bound_of_a_standard_normal_is_its_tail():
    p = DiagGaussian(torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64))
    assert p.log_tail(5.0) == pytest.approx(-12.5, abs=1e-12)
    assert p.log_tail(60.0) == pytest.approx(-1800, abs=10) and p.log_tail(60.0) >= -1800


@pytest.mark.parametrize("dof", [1, 2, 7])
def test_the_chi_square_tail_goes_on_where_its_mass_underflows(dof):
    from scipy.stats import chi2

    assert log_chi2_tail(9.0, dof) == pytest.approx(chi2.logsf(9.0, dof), abs=1e-12)
    assert log_chi2_tail(0.0, dof) == log_chi2_tail(-3.0, dof) == 0.0
    far = log_chi2_tail(4000.0, dof)
    assert -2000 < far < -1940 + 4 * dof


def test_the_tail_of_a_batch_is_that_of_the_member_that_reaches_furthest():
    for q in (diag(5, 2), full(5), laplace(5, 2)):
        alone = [q.select(slice(i, i + 1)).log_tail(9.0) for i in range(5)]
        assert q.log_tail(9.0) == max(alone) > min(alone)


def test_codes_keep_full_precision_under_autocast():
    q, value, p = full(4, dim=3), normal(5, 4, 3, seed=2), diag(3, seed=4)
    q = FullGaussian(q.mean.float(), q.scale_tril.float())
    p = DiagGaussian(p.mean.float(), p.log_std.float())
    several = DiagGaussian(q.mean, 0 * q.mean)
    value = value.float()

    def all_of_it():
        return [q.log_prob(value), q.rsample(3, stream(0, "n")), closed_form_kl(q, p), several.log_prob_all(value)]

    plain = all_of_it()
    with torch.autocast("cpu", torch.bfloat16):
        cast = all_of_it()
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, cast, strict=True))


def test_what_does_not_factorise_says_so():
    with pytest.raises(UsageError, match="FullGaussian does not factorise"):
        full(3).log_prob_each(normal(3, 2))
