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
from vaelab.evaluation import Quantity, codes_of, decoded, evaluate, evenly, fingerprint
from vaelab.precision import of_decoding
from vaelab.rng import stream

QUICK = {"k": 20, "is_images": 30, "samples": 100, "gap_images": 0}


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
        assert found[name].mean is None and "one or two latent dimensions and this model has 3" in found[name].reason
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
        "test_fingerprint": fingerprint(protocol("dynamic").test_set(few.test.pixels)), "density": "log p(x)",
        "distortion_samples": 4, "importance_samples": 20, "importance_sampled_images": 30, "proposal": "posterior",
        "importance_precision": of_decoding("auto", True, torch.device("cpu")).name,
        "gap_images": 0, "latent_images": 60, "prior_samples": 100, "seed": 0,
    }  # fmt: skip


def test_five_thousand_importance_samples_and_ten_thousand_prior_samples_are_drawn_unless_told_otherwise():
    assert evaluate.__kwdefaults__ is not None
    assert (evaluate.__kwdefaults__["samples"], evaluate.__kwdefaults__["k"]) == (10_000, 5000)


def test_images_without_a_finite_value_are_named():
    found = Quantity.over_images(np.array([1.0, np.nan, 2.0, np.inf, 3.0]))
    assert found.mean is None and found.se is None
    assert found.reason == "not finite for 2 of 5 images (1, 3)"
    some = Quantity.over_images(np.array([np.nan, 0.0]), np.array([40, 50]))
    assert some.reason == "not finite for 1 of 2 images (40)"
    assert Quantity.over_images(np.full(9, np.nan)).reason == "not finite for 9 of 9 images (0, 1, 2, 3, 4, …)"


def test_mean_and_standard_error_over_images():
    found = Quantity.over_images(np.array([1.0, 2.0, 6.0]))
    assert (found.mean, found.n) == (3.0, 3)
    assert found.se == pytest.approx(math.sqrt(7 / 3))
    assert Quantity.over_images(np.array([4.0])) == Quantity(4.0, None, 1)


@pytest.mark.parametrize("name", ["k", "is_images", "samples"])
def test_no_samples_are_refused(vae, few, name):
    with pytest.raises(UsageError, match=f"^{name} is 0: expected an integer of 1 or more"):
        measured(vae(), few, **{name: 0})


def test_a_negative_number_of_images_and_an_unknown_proposal_are_refused(vae, few):
    with pytest.raises(UsageError, match=r"^gap_images is -1: expected an integer of 0 or more"):
        measured(vae(), few, gap_images=-1)
    with pytest.raises(UsageError, match="unknown proposal 'posteriors': did you mean 'posterior'"):
        measured(vae(), few, proposal="posteriors")


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


# --- bits, curve, gap ---


def test_bits_per_dimension_have_three_names(vae, few):
    q = measured(vae(), few).quantities
    for name, nats in (("bits_per_dim", q["nll"]), ("bits_per_dim_is", q["nll_is"])):
        assert q[name].mean == pytest.approx(nats.mean / 64 / math.log(2), rel=1e-12)
        assert q[name].se == pytest.approx(nats.se / 64 / math.log(2), rel=1e-12)
        assert q[name].n == nats.n
    assert q["bits_per_dim_elbo"].mean == pytest.approx(-q["elbo"].mean / 64 / math.log(2), rel=1e-12)
    assert measured(vae(3), few).quantities["bits_per_dim"].reason


def test_a_density_of_rescaled_levels_is_offset_by_eight_bits(vae, few):
    found = measured(vae(likelihood=likelihoods.Laplace), few, "dequantised").quantities
    expected = found["nll"].mean / 64 / math.log(2) + 8
    assert found["bits_per_dim"].mean == pytest.approx(expected, rel=1e-12)


def test_the_curve_is_printed_with_its_k(vae, few):
    """Trap 8: an estimate without its K says nothing; it falls as K rises."""
    result = measured(vae(scale=3.0), few, k=600)
    q = result.quantities
    assert q["nll_is_1"].mean > q["nll_is_50"].mean > q["nll_is_500"].mean > q["nll_is"].mean - 1e-3
    assert result.protocol["importance_samples"] == 600 and "nll_is_5000" not in q
    assert q["nll_is"].mean == pytest.approx(q["nll"].mean + q["nll_is_excess"].mean, abs=3 * q["nll"].se)
    assert q["ess_worst"].mean <= q["ess"].mean <= 600


def test_k_of_one_is_the_bound(vae, few):
    """L_1 is the ELBO: both are estimated, from samples of their own."""
    q = measured(vae(), few, k=1, is_images=60).quantities
    assert q["nll_is"].mean == pytest.approx(-q["elbo"].mean, abs=0.5)
    assert "nll_is_1" not in q


def test_the_gap_is_what_the_bound_misses(vae, few):
    result = measured(vae(scale=3.0), few, gap_images=20)
    q = result.quantities
    some = evenly(20, 60)
    assert (q["gap"].n, result.protocol["gap_images"]) == (20, 20)
    assert q["gap"].mean == pytest.approx(q["approximation_gap"].mean + q["amortisation_gap"].mean, abs=1e-9)
    missed = (result.per_image["log_px"] - result.per_image["elbo"])[some]
    assert q["gap"].mean == pytest.approx(missed.mean(), abs=4 * missed.std() / math.sqrt(20))
    assert q["approximation_gap"].mean > -0.01 and q["amortisation_gap"].mean > 0


def test_importance_sampled_images_are_evenly_spaced(vae, few):
    assert evenly(3, 10).tolist() == [0, 3, 6] and evenly(20, 4).tolist() == [0, 1, 2, 3]
    result = measured(vae(3), few, is_images=7, gap_images=3)
    assert result.per_image["is_images"].tolist() == [0, 8, 17, 25, 34, 42, 51]
    assert result.quantities["gap"].n == 3


def test_a_flow_has_a_monte_carlo_rate_and_no_split_of_its_gap(vae, few):
    found = measured(vae(posterior=posteriors.NeuralSpline), few, gap_images=5).quantities
    assert math.isfinite(found["rate"].mean) and math.isfinite(found["elbo"].mean)
    assert found["amortisation_gap"].mean is None and "not searched for" in found["amortisation_gap"].reason


def test_a_proposal_that_the_posterior_cannot_give_is_no_number_and_the_rest_goes_on(vae, few):
    found = measured(vae(posterior=posteriors.NeuralSpline), few, proposal="widened").quantities
    assert found["nll_is"].mean is None and "needs a posterior with a scale" in found["nll_is"].reason
    assert math.isfinite(found["elbo"].mean)


def test_a_prior_without_a_density_leaves_the_distortion(vae, few):
    from vaelab.priors import SecondStage

    model = vae()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.prior = SecondStage(2, latent_dim=2, hidden=(8,))
    found = measured(model, few, gap_images=5).quantities
    for name in ("elbo", "rate", "nll", "nll_is", "gap", "bits_per_dim", "bits_per_dim_elbo"):
        assert found[name].mean is None and found[name].reason, name
    assert math.isfinite(found["distortion"].mean)


def test_a_conditional_model_is_given_the_labels_of_the_data(few):
    from vaelab import priors
    from vaelab.models.vae import VAE
    from vaelab.nn.label import WithLabel
    from vaelab.nn.mlp import MLP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VAE(
            WithLabel(MLP((74,), (), (16,), out_activation=True), 10), posteriors.Gaussian(16, 2),
            priors.StandardNormal(2), likelihoods.Bernoulli(WithLabel(MLP((12,), (16,), (1, 8, 8)), 10)),
        )  # fmt: skip
    result = measured(model, few, k=400, is_images=20, gap_images=4)
    q, values = result.quantities, result.per_image
    assert "log p(x|c)" in result.protocol["density"]
    assert np.abs(values["log_px"][values["is_images"]] - values["log_px_is"]).max() < 0.3
    assert math.isfinite(q["nll"].mean) and math.isfinite(q["gap"].mean)
    assert abs(q["gap"].mean - (values["log_px"] - values["elbo"])[evenly(4, 60)].mean()) < 1
    unlabelled = Dataset("x", *(Images(part.pixels) for part in (few.train, few.test)), None, "a test")
    with pytest.raises(UsageError, match="no labels"):
        measured(model, unlabelled)


# --- traps seen in public code ---


def test_trap_1_batch_norm_is_evaluated_with_its_running_statistics(vae, few):
    """In training mode each image's numbers would depend on those it is measured with."""
    from torch import nn

    model, x = vae(), protocol("dynamic").test_set(few.test.pixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh())
    with torch.no_grad():
        model.train().encode(x)
    whole = measured(model, few, is_images=60)
    half = Dataset(
        "digits",
        few.train,
        Images(few.test.pixels[::-1][:20].copy(), few.test.labels[::-1][:20].copy()),
        few.classes,
        "",
    )
    turned = measured(model, half, "threshold", is_images=20)
    same = measured(model, few, "threshold", is_images=60)
    assert np.abs(same.per_image["log_px_is"][::-1][:20] - turned.per_image["log_px_is"]).max() < 1e-4
    assert np.abs(same.codes[::-1][:20] - turned.codes).max() < 1e-5
    assert model.training and math.isfinite(whole.quantities["elbo"].mean)


def test_trap_2_the_bound_is_an_expectation_and_not_its_integrand_at_the_mean(vae, few):
    """log p(x, mu) - log q(mu) is another number: of a narrow q, too low by half a nat for each dimension."""
    model, x = vae(), protocol("dynamic").test_set(few.test.pixels)
    with torch.no_grad():
        model.posterior.head.bias[2:] = -4.0
        exact = model.trace(x, k=3000, generator=stream(0, "test")).log_w().mean(0)
        q = model.encode(x)
        at_mean = (model.decode(q.mean[None]).log_prob(x) + model.latent_prior().log_prob(q.mean[None]))[0]
        at_mean = at_mean - q.log_prob(q.mean[None])[0]
    result = measured(model, few)
    noise = (result.per_image["elbo"] - exact.numpy()).std() / math.sqrt(60)
    assert result.quantities["elbo"].mean == pytest.approx(exact.mean().item(), abs=4 * noise)
    assert exact.mean().item() - at_mean.mean().item() > 8 * noise


def test_trap_5_the_test_images_are_those_of_the_test_part(vae, few):
    """No number of the model on test images moves with the training images; all move with the test images."""
    other = Images(few.train.pixels[::-1][:150].copy(), few.train.labels[::-1][:150].copy())
    names = ("elbo", "rate", "distortion", "nll", "nll_is", "code_mean")
    one = measured(vae(), few).quantities
    trained = measured(vae(), Dataset("digits", other, few.test, few.classes, "")).quantities
    tested = measured(vae(), Dataset("digits", few.train, other, few.classes, "")).quantities
    assert all(one[name] == trained[name] for name in names)
    assert all(one[name] != tested[name] for name in names)
    assert tested["nll"].n == 150


def test_trap_6_no_seed_moves_the_test_images(vae, few):
    one, other = measured(vae(), few, seed=0), measured(vae(), few, seed=1)
    assert one.protocol["test_fingerprint"] == other.protocol["test_fingerprint"]
    assert one.quantities["nll"] == other.quantities["nll"]
    assert one.quantities["nll_is"] != other.quantities["nll_is"]
    threshold = measured(vae(), few, "threshold").protocol
    assert threshold["test_fingerprint"] != one.protocol["test_fingerprint"] and threshold["test_draw_seed"] is None


def test_a_negative_log_likelihood_of_bits_is_positive(vae, few):
    """A known evaluator returned the log-likelihood under this name, and its test asserted the wrong sign."""
    q = measured(vae(), few).quantities
    assert min(q[name].mean for name in ("nll", "nll_is", "distortion")) > 0 > q["elbo"].mean


def test_disentanglement_is_measured_where_the_factors_are_known(few, vae):
    from vaelab import priors
    from vaelab.data.datasets import load
    from vaelab.models.vae import VAE
    from vaelab.nn.mlp import MLP

    blocks, rng = load("blocks"), np.random.default_rng(0)
    parts = []
    for part, n in ((blocks.train, 600), (blocks.test, 60)):
        some = rng.permutation(len(part))[:n]
        parts.append(Images(part.pixels[some], part.labels[some], part.factors[some]))
    shape = blocks.train.pixels.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VAE(
            MLP(shape, (), (8,), out_activation=True), posteriors.Gaussian(8, 3), priors.StandardNormal(3),
            likelihoods.Bernoulli(MLP((3,), (), shape)),
        )  # fmt: skip
    found = measured(model, Dataset("blocks", *parts, blocks.classes, "")).quantities
    assert all(0 <= found[name].mean <= 1 for name in ("mig", "sap", "dci_disentanglement"))
    assert "mig" not in measured(vae(), few).quantities


def test_a_classifier_is_kept_for_the_kernels_that_trained_it(monkeypatch, tmp_path, digits):
    """Others give another, whose numbers would depend on who came first."""
    from vaelab import legibility

    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    trained = []

    def train(data, **_):
        trained.append(legibility.version())
        return legibility.Classifier(data.shape, 10).eval(), 0.5

    monkeypatch.setattr(legibility, "train_classifier", train)
    for version in ("one", "one", "other", "one", "other"):
        monkeypatch.setattr(legibility, "version", lambda version=version: version)
        assert legibility.classifier_for(digits)[0] is not None
    assert trained == ["one", "other"]


def test_a_classifier_of_the_kernels_reads_as_well_as_torchs(digits, no_kernels):
    from vaelab.legibility import train_classifier

    _, own = train_classifier(digits)
    no_kernels()
    _, theirs = train_classifier(digits)
    assert min(own, theirs) > 0.9 and abs(own - theirs) < 0.02
