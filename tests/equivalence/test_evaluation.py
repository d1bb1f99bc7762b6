"""Evaluation reports the same quantities whatever was trained, or says why it cannot; and it changes nothing."""

import json
import math

import numpy as np
import pytest
import torch

from vaelab import likelihoods, posteriors
from vaelab.data.datasets import Dataset, Images
from vaelab.data.protocol import protocol
from vaelab.errors import NonFiniteError, UsageError
from vaelab.evaluation import Quantity, codes_of, decoded, evaluate
from vaelab.rng import stream

QUICK = {"k": 20, "is_images": 30, "samples": 100}


def measured(model, data, name="dynamic", **more):
    return evaluate(model, data, protocol(name), **{**QUICK, **more})


@pytest.mark.parametrize("dim", [1, 2])
def test_the_likelihood_of_few_dimensions_is_exact(vae, few, dim):
    found = measured(vae(dim), few).quantities
    assert found["nll"].mean > 0 and found["nll"].n == 60 and found["nll"].se > 0
    assert found["nll_error"].mean < 1e-3
    assert -found["nll"].mean >= found["elbo"].mean - 1e-3
    assert found["nll_is_excess"].n == found["nll_is"].n == 30


def test_a_third_dimension_has_no_quadrature_and_says_so(vae, few):
    found = measured(vae(3), few).quantities
    for name in ("nll", "nll_error", "nll_is_excess"):
        assert found[name].mean is None and "at most two latent dimensions, this model has 3" in found[name].reason
    assert math.isfinite(found["nll_is"].mean)


def test_bound_rate_and_distortion_agree(vae, few):
    result = measured(vae(scale=3.0), few)
    q = result.quantities
    assert q["elbo"].mean == pytest.approx(-(q["rate"].mean + q["distortion"].mean), abs=1e-9)
    values = result.per_image["elbo"]
    assert q["elbo"].mean == pytest.approx(values.mean(), abs=1e-12)
    assert q["elbo"].se == pytest.approx(values.std(ddof=1) / math.sqrt(60), rel=1e-9)


def test_a_cross_entropy_on_grey_levels_is_not_called_a_likelihood(vae, few):
    found = measured(vae(likelihood=likelihoods.GreyCrossEntropy), few, "grey").quantities
    for name in ("elbo", "distortion", "nll", "nll_is", "nll_is_excess", "ess"):
        assert found[name].mean is None and "not a likelihood" in found[name].reason
    both = found["cross_entropy"].mean + found["rate"].mean
    assert found["cross_entropy_plus_rate"].mean == pytest.approx(both, abs=1e-9)
    assert "cross_entropy" not in measured(vae(), few).quantities


def test_a_dirac_posterior_has_neither_rate_nor_bound(vae, few):
    found = measured(vae(posterior=posteriors.Delta), few).quantities
    for name in ("elbo", "rate", "nll_is", "ess"):
        assert found[name].mean is None and "Dirac posterior has no density" in found[name].reason
    assert found["sigma"].mean is None and found["sigma"].reason
    assert math.isfinite(found["distortion"].mean) and math.isfinite(found["nll"].mean)


def test_data_without_labels_has_no_accuracy_and_no_legibility(vae, few):
    parts = [Images(part.pixels) for part in (few.train, few.test)]
    found = measured(vae(), Dataset("x", *parts, None, "a test")).quantities
    for name in ("knn_accuracy", "legible", "class_entropy", "legible_fitted"):
        assert found[name].mean is None and "no labels" in found[name].reason


def test_the_order_of_the_test_images_is_of_no_matter(vae, few):
    order = np.random.default_rng(0).permutation(60)
    turned = Dataset("digits", few.train, Images(few.test.pixels[order], few.test.labels[order]), few.classes, "")
    one, other = (measured(vae(scale=3.0), data, "threshold") for data in (few, turned))
    assert np.abs(one.codes[order] - other.codes).max() < 1e-5
    assert np.abs(one.per_image["log_px"][order] - other.per_image["log_px"]).max() < 1e-3
    assert np.abs(one.per_image["rate"][order] - other.per_image["rate"]).max() < 1e-4
    for name in ("nll", "rate", "code_std", "code_mean", "sigma", "outside_prior", "knn_accuracy"):
        assert one.quantities[name].mean == pytest.approx(other.quantities[name].mean, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 60, 1000])
def test_the_batch_size_of_encoding_and_decoding_is_of_no_matter(vae, few, batch_size):
    model, x = vae(scale=3.0), protocol("threshold").test_set(few.test.pixels)
    expected = model.encode(x).mean.detach().double().numpy()
    assert np.abs(codes_of(model, x, batch_size) - expected).max() < 1e-5
    z = torch.randn(60, 2, generator=stream(0, "test"))
    images = decoded(model, z, batch_size)
    assert images.shape == (60, 1, 8, 8)
    assert (images - model.decode(z.unsqueeze(0)).mean[0]).abs().max() < 1e-6


def test_measuring_twice_gives_the_same_numbers_and_another_seed_does_not(vae, few):
    one, other = measured(vae(), few).to_dict(), measured(vae(), few).to_dict()
    assert one == other
    assert measured(vae(), few, seed=1).quantities["distortion"] != measured(vae(), few).quantities["distortion"]


@pytest.mark.parametrize("training", [True, False])
def test_measuring_moves_no_weight_no_mode_and_no_generator(vae, few, training):
    model = vae().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measured(model, few)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training is training and all(m.training is training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_training_mode_comes_back_after_an_error(vae):
    from vaelab.training import evaluating

    model = vae().train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and torch.is_grad_enabled()


def test_what_was_measured_is_written_as_strict_json(vae, few):
    document = json.loads(json.dumps(measured(vae(3), few).to_dict(), allow_nan=False))
    assert document["quantities"]["nll"]["mean"] is None
    assert document["protocol"] == {
        "data": "digits", "test_images": 60, "protocol": "dynamic", "test_draw_seed": 13126114,
        "distortion_samples": 4, "importance_samples": 20, "importance_sampled_images": 30, "prior_samples": 100,
        "seed": 0,
    }  # fmt: skip


def test_ten_thousand_prior_samples_are_read_unless_told_otherwise():
    assert evaluate.__kwdefaults__ is not None
    assert (evaluate.__kwdefaults__["samples"], evaluate.__kwdefaults__["k"]) == (10_000, 1000)


def test_images_without_a_finite_value_are_named():
    found = Quantity.over_images(np.array([1.0, np.nan, 2.0, np.inf, 3.0]))
    assert found.mean is None and found.se is None
    assert found.reason == "not finite for 2 of 5 images (1, 3)"
    assert Quantity.over_images(np.full(9, np.nan)).reason == "not finite for 9 of 9 images (0, 1, 2, 3, 4, …)"


def test_mean_and_standard_error_over_images():
    found = Quantity.over_images(np.array([1.0, 2.0, 6.0]))
    assert (found.mean, found.n) == (3.0, 3)
    assert found.se == pytest.approx(math.sqrt(7 / 3))
    assert Quantity.over_images(np.array([4.0])) == Quantity(4.0, None, 1)


@pytest.mark.parametrize("name", ["k", "is_images", "samples"])
def test_no_samples_are_refused(vae, few, name):
    with pytest.raises(UsageError, match=f"^{name} is 0"):
        measured(vae(), few, **{name: 0})


def test_codes_are_measured_against_the_priors_own_ball(vae, few):
    """In D dimensions the share outside is that of a standard normal where the codes are one."""
    from vaelab import evaluation as module

    codes = np.random.default_rng(0).standard_normal((20_000, 5))
    labelled = Dataset("x", Images(few.train.pixels), Images(few.test.pixels), None, "")
    found = module._codes(vae(5), labelled, protocol("dynamic"), codes, np.ones_like(codes))
    assert found["outside_prior"].mean == pytest.approx(math.exp(-4.5), abs=3e-3)
    assert found["code_std"].mean == pytest.approx(1, abs=0.01)
    assert found["code_mean"].mean < 0.05


def test_fewer_training_images_than_neighbours(vae, cut_digits):
    found = measured(vae(), cut_digits(3, 5)).quantities["knn_accuracy"]
    assert found.mean is not None or found.reason


def test_weights_that_are_not_finite_give_no_numbers_and_no_crash(vae, few):
    model = vae()
    with torch.no_grad():
        model.posterior.head.bias.fill_(math.nan)
    try:
        document = measured(model, few).to_dict()
    except NonFiniteError:
        return
    json.dumps(document, allow_nan=False)
    assert document["quantities"]["elbo"]["mean"] is None
