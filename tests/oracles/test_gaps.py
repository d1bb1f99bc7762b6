"""The gap of the bound and its two parts, against posteriors whose distance from the true one has a closed form."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from vaelab import posteriors
from vaelab.distributions import FullGaussian, Laplace
from vaelab.errors import NoDensity, UsageError
from vaelab.evaluation.gaps import split_gap
from vaelab.models.vae import VAE
from vaelab.oracles import LinearGaussian
from vaelab.rng import stream


@pytest.fixture
def oracle():
    """Orthogonal columns: the true posterior is a diagonal Gaussian."""
    return LinearGaussian.random(pixels=9, dim=2, std=0.4, generator=stream(1, "oracle"))


@pytest.fixture
def correlated():
    """Columns that are not orthogonal: the true posterior has a correlation of about -0.7."""
    weight = torch.tensor([[1.0, 0.8], [0.2, 0.5], [0.0, 0.1]], dtype=torch.float64)
    return LinearGaussian(weight, torch.zeros(3, dtype=torch.float64), 0.5)


class Wrapped(nn.Module):
    """Another family over the mean and sigma of a Gaussian posterior."""

    def __init__(self, gaussian, make):
        super().__init__()
        self.gaussian, self.make, self.dim = gaussian, make, gaussian.dim

    def forward(self, h):
        return self.make(self.gaussian(h))


def full(q):
    return FullGaussian(q.mean, torch.diag_embed(q.std))


def laplace(q):
    return Laplace(q.mean, q.log_std)


def of_family(vae, make):
    return VAE(vae.encoder, Wrapped(vae.posterior, make), vae.prior, vae.likelihood)


def split(oracle, model, n=60, **more):
    images = oracle.sample(n, stream(2, "images"))
    return split_gap(model, images, oracle.log_px(images).numpy(), **more)


def kl_to_posterior(oracle, variance):
    """KL(N(m, diag variance) || p(z|x)), m the true mean: the same for every image."""
    covariance = oracle.posterior(torch.zeros(1, len(oracle.bias), dtype=torch.float64))[1]
    precision = torch.linalg.inv(covariance)
    trace = (precision.diagonal() * variance).sum()
    return float(0.5 * (trace - oracle.dim + torch.logdet(covariance) - variance.log().sum()))


def test_the_exact_posterior_has_no_gap_at_all(oracle):
    found = split(oracle, oracle.vae())
    for values in (found.gap, found.approximation, found.amortisation, found.se):
        assert abs(values).max() < 1e-9


def test_a_wrong_encoder_of_the_right_family_has_an_amortisation_gap_only(oracle):
    widen, shift = 1.4, 0.8
    found = split(oracle, oracle.vae(widen, shift), fresh=2000)
    expected = oracle.dim * (0.5 * (widen**2 + shift**2 - 1) - math.log(widen))
    assert abs(found.approximation).max() < 1e-3
    assert found.amortisation.mean() == pytest.approx(expected, abs=0.02)
    assert found.gap.mean() == pytest.approx(expected, abs=0.02)


def test_a_mean_field_posterior_of_a_correlated_one_has_the_closed_form_approximation_gap(correlated):
    """The best has variances 1 / precision_dd; the encoder here has the marginal variances, which are larger."""
    covariance = correlated.posterior(torch.zeros(1, 3, dtype=torch.float64))[1]
    best = 1 / torch.linalg.inv(covariance).diagonal()
    approximation = kl_to_posterior(correlated, best)
    total = kl_to_posterior(correlated, covariance.diagonal())
    assert approximation > 0.3 and total - approximation > 0.2
    found = split(correlated, correlated.vae(), fresh=4000)
    assert found.approximation.mean() == pytest.approx(approximation, abs=0.01)
    assert found.amortisation.mean() == pytest.approx(total - approximation, abs=0.02)
    noise = found.approximation.std()
    assert noise == pytest.approx(found.se.mean(), rel=0.4)


def test_a_full_covariance_has_no_approximation_gap_there(correlated):
    found = split(correlated, of_family(correlated.vae(), full))
    assert abs(found.approximation).max() < 2e-3
    assert found.amortisation.mean() > 0.5


def test_a_laplace_posterior_of_a_gaussian_one_has_the_closed_form_approximation_gap(oracle):
    """The best scale is the standard deviation over sqrt 2, and KL = (log pi - 1) / 2 in each dimension."""
    found = split(oracle, of_family(oracle.vae(), laplace), fresh=4000)
    assert found.approximation.mean() == pytest.approx(oracle.dim * (math.log(math.pi) - 1) / 2, abs=0.01)
    assert found.amortisation.mean() > 0.1


def test_the_parts_add_up_and_the_best_is_no_worse(correlated):
    found = split(correlated, correlated.vae(1.3, 0.5), steps=5)
    assert np.abs(found.gap - found.approximation - found.amortisation).max() < 1e-12
    assert found.amortisation.mean() >= 0


def test_a_search_that_goes_astray_is_dropped(oracle, monkeypatch):
    """The start is better than what is five scales away, and is kept."""
    from vaelab.evaluation import gaps

    def astray(start, *others):
        return gaps._moved(start, torch.full_like(start.mean, 5.0), torch.zeros_like(start.mean))

    monkeypatch.setattr(gaps, "_search", astray)
    found = split(oracle, oracle.vae(shift=0.2))
    assert abs(found.amortisation).max() == 0
    assert found.approximation.mean() == pytest.approx(oracle.dim * 0.5 * 0.2**2, abs=0.01)


def test_nothing_moves(oracle):
    model = oracle.vae(1.3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one, other = split(oracle, model, 5, steps=3), split(oracle, model, 5, steps=3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training
    assert np.array_equal(one.approximation, other.approximation)


def test_members_without_a_search_say_so(oracle):
    images = oracle.sample(3, stream(2, "images"))
    base = oracle.vae()

    def measured(posterior):
        return split_gap(VAE(nn.Identity(), posterior.double(), base.prior, base.likelihood), images, np.zeros(3))

    with pytest.raises(UsageError, match="family Transformed is not searched"):
        measured(posteriors.Planar(9, 2))
    with pytest.raises(NoDensity, match="Dirac"):
        measured(posteriors.Delta(9, 2))
    for name in ("steps", "samples", "fresh"):
        with pytest.raises(UsageError, match=f"^{name} is 0"):
            split_gap(base, images, np.zeros(3), **{name: 0})
