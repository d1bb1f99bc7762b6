"""Disentanglement scores on codes whose score is known: 1 for the factors themselves, 0 for what says nothing of them."""

import math

import numpy as np
import pytest

from vaelab import posteriors
from vaelab.data.datasets import Dataset, Images, load
from vaelab.data.protocol import protocol
from vaelab.errors import UsageError
from vaelab.evaluation.disentanglement import (
    NAMES,
    dci,
    factor_vae_score,
    measure,
    mig,
    mutual_informations,
    sap,
)

FACTORS = np.stack([axis.ravel() for axis in np.indices((8, 6, 4, 5))], 1)  # 960 rows, a whole grid
N = len(FACTORS)


def scores(codes, factors=FACTORS):
    """Every score; FactorVAE's as its excess over chance."""
    three = dci(codes, factors, trees=5)
    chance = 1 / factors.shape[1]
    return {
        "mig": mig(codes, factors), "sap": sap(codes, factors),
        "disentanglement": three.disentanglement, "completeness": three.completeness,
        "informativeness": three.informativeness,
        "factor_vae": (factor_vae_score(codes, factors, votes=400) - chance) / (1 - chance),
    }  # fmt: skip


def test_the_factors_themselves_score_one():
    for name, score in scores(FACTORS.astype(float)).items():
        assert score == pytest.approx(1, abs=1e-9), name


def noisy():
    """Codes that hold the factors, and a product of two of them, with noise: every score is between 0 and 1."""
    noise = np.random.default_rng(0).standard_normal((N, 5))
    return np.column_stack([FACTORS, FACTORS[:, 0] * FACTORS[:, 1]]) + 0.5 * noise


def test_the_scale_of_a_dimension_is_of_no_matter():
    base, scaled = scores(noisy()), scores(noisy() * 2.0 ** np.array([-20, 20, 0, 3, -1]))
    assert scaled == pytest.approx(base, abs=1e-12)
    assert all(0.05 < score < 0.999 for score in base.values())


def test_order_and_sign_of_the_dimensions_are_of_no_matter():
    base, turned = scores(noisy()), scores((noisy() * [1, -1, 1, -1, -1])[:, [3, 0, 4, 2, 1]])
    for name, score in base.items():
        # a forest chooses between splits that are equally good by the order of the dimensions
        forest = name in ("disentanglement", "completeness", "informativeness")
        assert turned[name] == pytest.approx(score, abs=0.05 if forest else 0.01), name


def test_constant_codes_score_zero():
    for name, score in scores(np.ones((N, 3)) * [0.0, 1.0, 1e9]).items():
        # no dimension is active: the FactorVAE score itself is 0, below chance
        assert score == (pytest.approx(-1 / 3) if name == "factor_vae" else 0), name


def test_independent_codes_score_zero():
    """To what 960 codes can tell: (bins - 1)(values - 1) / 2N nats of plug-in information, a correlation of 1/sqrt(N)."""
    for name, score in scores(np.random.default_rng(1).standard_normal((N, 4))).items():
        assert abs(score) < 0.06, (name, score)


def test_one_factor_in_two_dimensions_and_two_factors_in_one():
    """A repeated dimension leaves no gap; a dimension that holds two factors is complete and not disentangled."""
    twice = np.column_stack([FACTORS[:, 0], FACTORS[:, 0]]).astype(float)
    assert mig(twice, FACTORS[:, :1]) == pytest.approx(0, abs=1e-12)
    assert sap(twice, FACTORS[:, :1]) == pytest.approx(0, abs=1e-12)
    both = np.column_stack([6 * FACTORS[:, 0] + FACTORS[:, 1], FACTORS[:, 2]]).astype(float)
    found = dci(both, FACTORS[:, :3], trees=5)
    # each factor is in one dimension; the first dimension is shared by two of three factors, in equal parts
    assert found.completeness == pytest.approx(1, abs=1e-9)
    assert found.importance[0] == pytest.approx([1, 1, 0], abs=1e-9)
    expected = (2 * (1 - math.log(2) / math.log(3)) + 1) / 3
    assert found.disentanglement == pytest.approx(expected, abs=1e-9)


def test_importances_weigh_the_dimensions():
    """DCI from a known importance matrix, as in Eastwood & Williams: rows weighted by their share of the whole."""
    codes = np.column_stack([FACTORS[:, 0] + 8 * FACTORS[:, 1], FACTORS[:, 2], np.zeros(N)]).astype(float)
    found = dci(codes, FACTORS[:, :3], trees=5)
    assert found.importance[2] == pytest.approx([0, 0, 0])
    expected = (2 * (1 - math.log(2) / math.log(3)) + 1) / 3
    assert found.disentanglement == pytest.approx(expected, abs=1e-9)
    assert found.completeness == pytest.approx(1, abs=1e-9)


def test_mutual_information_is_that_of_the_joint_table():
    """A binary channel that errs in a quarter of the cases: I = log 2 - H(1/4); each factor by its own entropy."""
    v = np.repeat([0, 1], 400)
    z = v.copy()
    z[:100], z[400:500] = 1, 0
    exact = math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert mutual_informations(z[:, None].astype(float), v[:, None])[0, 0] == pytest.approx(exact, abs=1e-12)
    assert mig(z[:, None].astype(float), v[:, None]) == pytest.approx(exact / math.log(2), abs=1e-12)
    many = np.column_stack([np.arange(800) % 8, v])
    codes = np.column_stack([many[:, 0], z]).astype(float)
    assert mig(codes, many) == pytest.approx((1 + exact / math.log(2)) / 2, abs=1e-12)


def test_bins_of_equal_counts_do_not_depend_on_a_monotone_map():
    x = np.random.default_rng(2).standard_normal((2000, 2))
    v = np.digitize(x[:, :1], [-1, 0, 1])
    base = mutual_informations(x, v)
    assert mutual_informations(np.exp(3 * x), v) == pytest.approx(base, abs=1e-12)
    assert mutual_informations(x, v[:, :1] * 7 - 3) == pytest.approx(base, abs=1e-12)
    entropy = -sum(p * math.log(p) for p in np.bincount(v[:, 0]) / 2000)
    assert 0.85 * entropy < base[0, 0] <= entropy and base[1, 0] < 0.03


def test_categories_are_found_by_thresholds():
    """Names in no order: a squared correlation sees little, thresholds all; chance scores 0."""
    v = np.repeat(np.arange(4), 100)[:, None]
    codes = np.column_stack([np.array([2.0, 0.0, 3.0, 1.0])[v[:, 0]], np.random.default_rng(3).standard_normal(400)])
    assert sap(codes, v, categories=(0,)) > 0.9
    assert sap(codes, v) < 0.1
    assert sap(codes[:, ::-1], v, categories=(0,)) == pytest.approx(sap(codes, v, categories=(0,)))
    assert sap(codes[:, 1:], v, categories=(0,)) < 0.15


def test_the_factor_vae_score_of_half_entangled_codes():
    """Factors 0 and 1 share one dimension and 2 and 3 another: votes cannot tell them apart, so the score is 1/2."""
    codes = np.column_stack([FACTORS[:, 0] + 0.0, FACTORS[:, 2] + 0.0])
    factors = np.column_stack([FACTORS[:, 0], FACTORS[:, 0], FACTORS[:, 2], FACTORS[:, 2]])
    assert factor_vae_score(codes, factors, votes=2000) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))
    collapsed = np.column_stack([FACTORS.astype(float), np.full(N, 3.0)])  # a constant dimension never varies: no vote
    assert factor_vae_score(collapsed, FACTORS) == 1


def test_the_same_seed_gives_the_same_scores():
    assert scores(noisy()) == scores(noisy())
    assert factor_vae_score(noisy(), FACTORS, seed=1) != factor_vae_score(noisy(), FACTORS, seed=2)


def test_blocks_are_a_grid_of_their_factors():
    data = load("blocks")
    factors = np.concatenate([data.train.factors, data.test.factors])
    pixels = np.concatenate([data.train.pixels, data.test.pixels])
    assert len(np.unique(factors, axis=0)) == len(factors) == 9 * 9 * 4 * 4
    ink = pixels[:, 0] > 0
    side = 2 * (factors[:, 2] + 1)
    assert (ink.sum((1, 2)) == side**2).all()
    assert (ink.any(1).argmax(1) == factors[:, 0] + 4 - side // 2).all()  # first column with ink
    assert (ink.any(2).argmax(1) == factors[:, 1] + 4 - side // 2).all()
    assert (pixels.max((1, 2, 3)) == np.array([75, 135, 195, 255])[factors[:, 3]]).all()
    assert (data.test.labels == data.test.factors[:, 2]).all()
    assert load("blocks").fingerprint == data.fingerprint


def test_a_model_of_blocks_is_scored_and_one_of_other_data_is_not():
    import torch

    from vaelab import likelihoods, priors
    from vaelab.models.vae import VAE
    from vaelab.nn.mlp import MLP

    def model(shape, dim=3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return VAE(
                MLP(shape, (), (8,), "tanh", out_activation=True), posteriors.Gaussian(8, dim),
                priors.StandardNormal(dim), likelihoods.Bernoulli(MLP((dim,), (), shape)),
            )  # fmt: skip

    data = load("blocks")
    cut = Dataset(
        "cut",
        *(Images(part.pixels[::3], part.labels[::3], part.factors[::3]) for part in (data.train, data.test)),
        data.classes, "",
    )  # fmt: skip
    found = measure(model((1, 16, 16)), cut, protocol("threshold"))
    assert set(found) == set(NAMES)
    assert all(0 <= q.mean <= 1 and q.n == 432 for q in found.values())
    one = measure(model((1, 16, 16), 1), cut, protocol("threshold"))
    assert one["dci_completeness"].mean is None and "at least two" in one["dci_completeness"].reason
    assert one["mig"].mean is not None
    plain = Dataset("plain", Images(data.train.pixels[:9]), Images(data.test.pixels[:9]), None, "")
    assert {q.reason for q in measure(model((1, 16, 16)), plain, protocol("threshold")).values()} == {
        "the factors that made these images are not known"
    }


@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (np.zeros((9, 2)), np.zeros((8, 2), int), "expected .N, D. and .N, F."),
        (np.zeros(9), np.arange(9)[:, None], "expected .N, D. and .N, F."),
        (np.full((9, 2), np.nan), np.arange(9)[:, None], "not finite"),
        (np.zeros((9, 2)), np.linspace(0, 1, 9)[:, None], "expected integers"),
        (np.zeros((9, 2)), np.ones((9, 2), int), "more than one value"),
    ],
)
@pytest.mark.parametrize("score", [mig, dci, sap, factor_vae_score])
def test_bad_input_is_refused(score, codes, factors, message):
    with pytest.raises(UsageError, match=message):
        score(codes, factors)


def test_a_factor_with_no_repeats_is_refused():
    codes = np.random.default_rng(5).standard_normal((50, 2))
    with pytest.raises(UsageError, match="no value of factor 0 has ten images"):
        factor_vae_score(codes, np.arange(50)[:, None])
