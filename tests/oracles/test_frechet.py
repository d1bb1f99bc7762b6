"""The Fréchet distance of Gaussians whose answer is known, and what is compared with what."""

import math

import numpy as np
import pytest
import torch

from vaelab import likelihoods, posteriors, priors
from vaelab.data.datasets import Dataset, Images
from vaelab.data.protocol import protocol
from vaelab.errors import UsageError
from vaelab.evaluation import samples
from vaelab.evaluation.samples import NAMES, decoded, drawn_labels, frechet_distance, measure
from vaelab.legibility import Classifier
from vaelab.models.vae import VAE
from vaelab.nn.label import WithLabel
from vaelab.nn.mlp import MLP


def draws(mean, covariance, n=50, seed=0):
    """Rows whose sample mean and covariance are exactly these; a singular covariance too."""
    white = np.random.default_rng(seed).standard_normal((n, len(mean)))
    white = white - white.mean(0)
    values, vectors = np.linalg.eigh(np.cov(white, rowvar=False).reshape(len(mean), -1))
    white = white @ vectors / np.sqrt(values)
    values, vectors = np.linalg.eigh(np.asarray(covariance, float))
    return np.asarray(mean) + white @ (vectors * np.sqrt(values.clip(0))).T


def rotation(dim, seed=3):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


def test_gaussians_along_the_axes():
    one = draws([0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    other = draws([1, 2, -2], np.diag([4.0, 4.0, 0.25]), n=80, seed=1)
    assert frechet_distance(one, other) == pytest.approx(9 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2, abs=1e-10)
    assert frechet_distance(draws([2.0], [[4.0]]), draws([5.0], [[1.0]])) == pytest.approx(9 + 1, abs=1e-10)


def test_gaussians_that_do_not_commute():
    """Against the matrix square root of scipy, where the two covariances have different axes."""
    from scipy.linalg import sqrtm

    a = rotation(4) @ np.diag([5, 3, 1, 0.1]) @ rotation(4).T
    b = rotation(4, 5) @ np.diag([2, 2, 0.5, 7]) @ rotation(4, 5).T
    expected = np.trace(a + b - 2 * np.real(sqrtm(a @ b))) + 4
    found = frechet_distance(draws(np.ones(4), a), draws(np.zeros(4), b, seed=1))
    assert found == pytest.approx(expected, abs=1e-8)
    assert abs(found - (np.square(np.sqrt([5, 3, 1, 0.1]) - np.sqrt([2, 2, 0.5, 7])).sum() + 4)) > 0.5
    # in two dimensions the trace is sqrt(tr(ab) + 2 sqrt(det ab))
    a, b = np.array([[2, 1], [1, 3.0]]), np.array([[1, -0.5], [-0.5, 1]])
    trace = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    found = frechet_distance(draws([0, 0], a), draws([0, 0], b, seed=1))
    assert found == pytest.approx(np.trace(a + b) - 2 * trace, abs=1e-10)


def test_no_distance_from_itself_and_the_same_in_both_directions():
    one, other = (np.random.default_rng(i).standard_normal((300, 20)) ** 2 for i in range(2))
    assert frechet_distance(one, one[::-1]) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), abs=1e-10)
    assert frechet_distance(one, other) > 0.1


def test_rotations_and_shifts_of_both_change_nothing():
    one, other = (np.random.default_rng(i).standard_normal((100, 6)) * np.arange(1, 7) + i for i in range(2))
    turn = rotation(6)
    assert frechet_distance(one @ turn + 3, other @ turn + 3) == pytest.approx(frechet_distance(one, other), abs=1e-9)
    assert frechet_distance(2 * one, 2 * other) == pytest.approx(4 * frechet_distance(one, other), abs=1e-9)


def test_singular_covariances_have_a_real_distance():
    """Fewer rows than features, and features that never vary: what the classifier's dead units give."""
    one, other = (
        np.random.default_rng(0).standard_normal((20, 128)),
        np.random.default_rng(1).standard_normal((30, 128)),
    )
    one[:, 60:], other[:, 60:] = 0, 0
    found = frechet_distance(one, other)
    assert math.isfinite(found) and found > 0
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-5)
    flat = draws([0, 0], np.diag([1.0, 0.0]))
    assert frechet_distance(flat, draws([0, 0], np.diag([0.0, 1.0]), seed=1)) == pytest.approx(2, abs=1e-10)


def test_bad_features_are_refused():
    for one, other in ((np.zeros((1, 3)), np.zeros((5, 3))), (np.zeros((5, 3)), np.zeros((5, 4)))):
        with pytest.raises(UsageError, match="at least two rows"):
            frechet_distance(one, other)


# --- what is compared ---


@pytest.fixture(scope="module")
def classifier():
    """One that was never trained: the tests are of what it is shown."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier((1, 8, 8), 10).eval()


@pytest.fixture
def few(digits):
    return Dataset(
        "digits", Images(digits.train.pixels[:150], digits.train.labels[:150]),
        Images(digits.test.pixels[:80], digits.test.labels[:80]), digits.classes, "",
    )  # fmt: skip


def model(likelihood=likelihoods.Bernoulli, classes=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        decoder = MLP((2 + (classes or 0),), (16,), (1, 8, 8), "tanh")
        return VAE(
            MLP((1, 8, 8), (), (8,), "tanh", out_activation=True), posteriors.Gaussian(8, 2),
            priors.StandardNormal(2), likelihood(WithLabel(decoder, classes) if classes else decoder),
        ).eval()  # fmt: skip


def shown(monkeypatch, *arguments, **more):
    """What `measure` finds, and the images whose features it took, in order."""
    seen = []
    take = samples.features_of
    monkeypatch.setattr(samples, "features_of", lambda c, images: seen.append(images) or take(c, images))
    return measure(*arguments, **more), seen


def test_images_of_one_kind_are_compared(monkeypatch, few, classifier):
    """Means with grey levels; bits drawn from p(x|z) with the test draw; and as many held-out images as samples."""
    found, seen = shown(monkeypatch, model(), few, protocol("dynamic"), classifier, samples=100)
    assert set(found) == set(NAMES)
    grey, means, grey_again, held, bits, drawn, bits_again, held_bits = seen
    assert torch.equal(grey, grey_again) and torch.equal(bits, bits_again)
    halves = len(few.test) // 2
    assert len(grey) == len(bits) == len(means) == len(held) == len(drawn) == len(held_bits) == halves
    together = torch.cat([grey, held]).flatten(1).tolist()
    assert sorted(together) == sorted((torch.from_numpy(few.test.pixels).float() / 255).flatten(1).tolist())
    drawn_once = torch.cat([bits, held_bits]).flatten(1).tolist()
    assert sorted(drawn_once) == sorted(protocol("dynamic").test_set(few.test.pixels).flatten(1).tolist())
    for images, binary in ((means, False), (held, False), (drawn, True), (held_bits, True)):
        assert bool(((images == 0) | (images == 1)).all()) is binary
    assert (held_bits <= (held > 0)).all()  # the same images, as bits
    assert all(found[name].n == halves for name in NAMES if "frechet" in name)


def test_a_threshold_is_compared_with_thresholded_images(monkeypatch, few, classifier):
    _, (expected, *_) = shown(monkeypatch, model(), few, protocol("threshold"), classifier, samples=10)
    whole = protocol("threshold").test_set(few.test.pixels).flatten(1).tolist()
    assert all(image in whole for image in expected.flatten(1).tolist())


def test_a_perfect_model_is_no_further_than_held_out_images(monkeypatch, few, classifier):
    """Prior samples that are the held-out images themselves get exactly the held-out distance."""
    _, (_, _, _, held, *_) = shown(monkeypatch, model(), few, protocol("threshold"), classifier, samples=60)
    monkeypatch.undo()
    monkeypatch.setattr(samples, "decoded", lambda *a, **k: held)
    found = measure(model(), few, protocol("threshold"), classifier, samples=60)
    assert found["frechet"].mean == found["frechet_heldout"].mean > 0
    assert found["frechet_drawn"].mean == found["frechet_drawn_heldout"].mean


def test_held_out_and_test_rows_do_not_depend_on_the_model(few, classifier):
    one, other = model(), model()
    with torch.no_grad():
        other.likelihood.decoder.layers[-1].bias.add_(3)
    a, b = (measure(m, few, protocol("dynamic"), classifier, samples=60) for m in (one, other))
    for name in ("legible_test", "class_entropy_test", "frechet_heldout", "frechet_drawn_heldout"):
        assert a[name] == b[name] and a[name].mean is not None
    assert a["frechet"].mean != b["frechet"].mean and a["frechet_drawn"].mean != b["frechet_drawn"].mean


def test_what_cannot_be_compared_is_said(few, classifier):
    grey = measure(model(likelihoods.GreyCrossEntropy), few, protocol("grey"), classifier, samples=50)
    assert grey["frechet"].mean is not None and grey["legible_test"].mean is not None
    assert grey["frechet_drawn"].mean is None and "none to draw" in grey["frechet_drawn"].reason
    for found in (
        measure(model(), few, protocol("dynamic"), None),
        measure(model(), Dataset("x", Images(few.train.pixels), Images(few.test.pixels), None, ""),
                protocol("dynamic"), classifier),
    ):  # fmt: skip
        assert set(found) == set(NAMES) and all("no labels" in q.reason for q in found.values())
    one = measure(model(), few, protocol("dynamic"), classifier, samples=1)
    assert one["frechet"].mean is None and "at least two" in one["frechet"].reason


def test_a_conditional_model_is_asked_for_the_labels_of_the_test_images(monkeypatch, few, classifier):
    asked = []
    plain = samples.prior_codes
    monkeypatch.setattr(samples, "prior_codes", lambda m, n, s, c=None: asked.append(c) or plain(m, n, s, c))
    found = measure(model(classes=10), few, protocol("dynamic"), classifier, samples=200)
    assert all(q.mean is not None for q in found.values())
    (c,) = asked
    assert c is not None and len(c) == 200 and torch.equal(c, drawn_labels(few.test.labels, 200, 0))
    n = 100_000
    frequency = np.bincount(few.test.labels, minlength=10) / len(few.test.labels)
    counts = drawn_labels(few.test.labels, n, 1).bincount(minlength=10).numpy()
    assert (np.abs(counts - n * frequency) < 4 * np.sqrt(n * frequency * (1 - frequency))).all()
    label = torch.full((9,), 3)
    z = torch.zeros(9, 2)
    with torch.no_grad():
        expected = model(classes=10).decode(z[None], label).mean[0]
    assert (decoded(model(classes=10), z, 4, c=label) - expected).abs().max() < 1e-6
