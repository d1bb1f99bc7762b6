"""Pairing runs image by image: what it gains, what it refuses, and what it keeps in a run folder."""

import dataclasses
import math

import numpy as np
import pytest

from vaelab.data.protocol import protocol
from vaelab.errors import RunError, UsageError
from vaelab.evaluation import evaluate
from vaelab.evaluation.compare import Difference, PerImage, bootstrap, compare, load, save
from vaelab.run import Run

DESCRIBED = {
    "protocol": "dynamic", "test_draw_seed": 13126114, "test_images": 400, "test_fingerprint": "abc",
    "density": "log p(x)", "importance_samples": 5000, "proposal": "posterior",
}  # fmt: skip


def arrays(seed=0, shift=0.0, n=400):
    """Hard and easy images (sd 20 nats), and a model whose own noise on each is small (sd 1)."""
    hard, noise = np.random.default_rng(0).normal(-90, 20, n), np.random.default_rng(seed + 1).normal(0, 1, n)
    values = hard + noise + shift
    return {"elbo": values - 4, "log_px": values, "log_px_is": values[::4].copy(), "is_images": np.arange(0, n, 4)}


def run(seed=0, shift=0.0, n=400, **described):
    return PerImage({**DESCRIBED, **described}, arrays(seed, shift, n))


def test_pairs_see_a_difference_that_two_means_do_not():
    found = compare(run(0), run(1, shift=0.5))
    d = found["nll"]
    assert d.mean == pytest.approx(-0.5, abs=4 * d.se)
    assert d.se == pytest.approx(math.sqrt(2 / 400), rel=0.15)
    assert d.unpaired_se == pytest.approx(math.sqrt(2 * 401 / 400), rel=0.1)
    assert d.se < d.unpaired_se / 10
    assert d.high < 0 and abs(d.mean) < d.unpaired_se
    assert found["elbo"].mean == pytest.approx(-d.mean, abs=1e-12) and found["elbo"].low > 0
    assert found["nll_is"].n == 100 and d.n == 400


def test_the_difference_is_the_second_run_minus_the_first_and_turns_with_them():
    one, other = compare(run(0), run(1, 0.5))["nll"], compare(run(1, 0.5), run(0))["nll"]
    values = -(arrays(1, 0.5)["log_px"] - arrays(0)["log_px"])
    assert one.mean == pytest.approx(values.mean(), abs=1e-12)
    assert one.se == pytest.approx(values.std(ddof=1) / 20, rel=1e-12)
    assert (other.mean, other.se) == pytest.approx((-one.mean, one.se), abs=1e-12)
    assert other.low == pytest.approx(-one.high, abs=0.01)


def test_a_run_does_not_differ_from_itself():
    for d in compare(run(), run()).values():
        assert (d.mean, d.se, d.low, d.high) == (0, 0, 0, 0)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says(draw):
    rng = np.random.default_rng(0)
    truth, held = (0.0 if draw == "normal" else 1.0), 0
    for i in range(400):
        low, high = bootstrap(getattr(rng, draw)(size=100), resamples=400, seed=i)
        held += low <= truth <= high
    assert 0.90 <= held / 400 <= 0.975


def test_the_bootstrap_interval_of_many_images_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 20_000)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(20_000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)
    assert bootstrap(values, resamples=50) == bootstrap(values, resamples=50)


@pytest.mark.parametrize(
    ("key", "other", "named"),
    [
        ("protocol", "threshold", "the protocol is dynamic for the first and threshold for the second"),
        ("test_fingerprint", "abd", "the test images is abc for the first and abd"),
        ("test_images", 399, "number of test images"),
        ("test_draw_seed", 777, "seed of the test draw"),
        ("density", "log p(x|c)", "density"),
    ],
)
def test_other_test_images_are_not_paired(key, other, named):
    with pytest.raises(UsageError, match="cannot be paired") as error:
        compare(run(), run(1, **{key: other}))
    assert named in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("importance_samples", 1000), ("proposal", "widened")])
def test_trap_8_estimates_with_another_k_or_proposal_are_not_compared(key, value):
    found = compare(run(), run(1, **{key: value}))
    assert found["nll_is"].mean is None and "the bias depends on it" in found["nll_is"].reason
    assert found["nll"].mean is not None


def test_only_common_images_are_compared():
    one, other = run(0), run(1, 0.5)
    other.arrays["is_images"], other.arrays["log_px_is"] = np.arange(0, 400, 6), other.arrays["log_px"][::6]
    d = compare(one, other)["nll_is"]
    common = np.arange(0, 400, 12)
    expected = -(other.arrays["log_px"] - one.arrays["log_px"])[common].mean()
    assert d.n == len(common) and d.mean == pytest.approx(expected, abs=1e-12)
    other.arrays["is_images"] = other.arrays["is_images"] * 6 + 1
    assert "no image" in compare(one, other)["nll_is"].reason


def test_what_one_run_does_not_have_is_not_compared():
    other = run(1)
    for key in ("log_px", "log_px_is", "elbo"):
        del other.arrays[key]
    for d in compare(run(), other).values():
        assert d.mean is None and "the second run has no" in d.reason
    assert "the first run has no" in compare(other, run())["nll"].reason


def test_images_that_are_not_finite_are_named_and_not_averaged_away():
    other = run(1)
    other.arrays["log_px"][[3, 50]] = np.nan
    other.arrays["log_px_is"][2] = np.inf
    found = compare(run(), other)
    assert found["nll"].mean is None and found["nll"].reason == "not finite for 2 of 400 images (3, 50)"
    assert found["nll_is"].reason == "not finite for 1 of 100 images (8)"


def test_one_image_has_a_difference_and_no_standard_error():
    d = Difference.of(np.array([1.0]), np.array([3.0]))
    assert (d.mean, d.se, d.low, d.n) == (2.0, None, None, 1)


# --- what is kept ---


@pytest.fixture
def kept(tmp_path, vae, few):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    folder = Run(tmp_path)
    found = evaluate(vae(), few, protocol("dynamic"), k=10, is_images=7, samples=50, gap_images=0)
    return folder, found, save(folder, found, seconds=1.5)


def test_one_value_an_image_is_kept_without_pickles(kept):
    folder, found, document = kept
    with np.load(folder.path / "evaluation.npz", allow_pickle=False) as stored:
        assert {"elbo", "rate", "distortion", "log_px", "log_px_is", "is_images", "described"} == set(stored.files)
    stored = load(folder)
    assert stored.protocol == found.protocol
    assert all(np.array_equal(stored.arrays[key], value) for key, value in found.per_image.items())
    assert len(document["code"]) == len(document["weights"]) == 12 and document["seconds"] == 1.5
    assert sorted(p.name for p in folder.path.iterdir()) == ["evaluation.json", "evaluation.npz", "model.safetensors"]
    assert compare(stored, PerImage(found.protocol, found.per_image))["nll"].mean == 0


def test_an_evaluation_of_other_weights_is_not_used(kept):
    folder, *_ = kept
    folder.weights.write_bytes(b"trained further")
    assert load(folder) is None


def test_nothing_kept_and_something_damaged(kept, tmp_path):
    folder, *_ = kept
    assert load(Run(tmp_path / "elsewhere")) is None
    for damaged in (b"", b"PK\x03\x04 no archive", (folder.path / "evaluation.npz").read_bytes()[:-200]):
        (folder.path / "evaluation.npz").write_bytes(damaged)
        with pytest.raises(RunError, match=r"evaluation\.npz' is damaged"):
            load(folder)


def test_a_failed_write_leaves_what_was_there(kept):
    folder, found, _ = kept
    before = (folder.path / "evaluation.npz").read_bytes()
    with pytest.raises(TypeError):
        save(folder, dataclasses.replace(found, protocol={"k": object()}))
    assert (folder.path / "evaluation.npz").read_bytes() == before
    assert len(list(folder.path.iterdir())) == 3
