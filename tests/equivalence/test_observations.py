"""The report's sentences say what the numbers say, whichever way they went."""

import copy

import pytest

from vaelab.report.observations import removing_kl

NUMBERS = {
    "elbo": (-140.0, -900.0), "rate": (7.0, 60.0), "distortion": (133.0, 120.0), "code_std": (1.0, 9.0),
    "outside_prior": (0.01, 0.8), "sigma": (0.2, 0.001), "knn_accuracy": (0.75, 0.85), "legible": (0.7, 0.1),
    "class_entropy": (2.2, 1.0), "legible_fitted": (0.7, 0.5), "class_entropy_fitted": (2.2, 2.0),
    "nll": (133.0, 200.0), "nll_is_excess": (3.0, 30.0), "ess": (40.0, 2.0),
}  # fmt: skip
CLAIMS = {
    "trade": "Nothing pays",
    "explosion": "The latent space",
    "neighbours": "tell the classes apart",
    "generation": "Generation",
    "fitted": "Drawing the same decoder",
    "exact": "The exact log-likelihood",
    "importance": "The importance-sampled estimate",
}


def values(**changes):
    pairs = {**NUMBERS, **changes}
    return {
        metric: {arm: {"mean": mean, "se": None, "n": 1} for arm, mean in zip(("kl", "no_kl"), pair, strict=True)}
        for metric, pair in pairs.items()
    }


def sentences(table, n=1):
    found = [o["text"] for o in removing_kl(table, n, 1000, 500, 10)]
    return {name: next((t for t in found if begin in t), None) for name, begin in CLAIMS.items()}


def test_every_sentence_is_there_with_its_numbers():
    found = sentences(values(), n=3)
    assert all(found.values())
    assert all(text.endswith("(n = 3)") for text in found.values())
    assert "from 7.00 to 60.00 nats per image (8.6 times as much)" in found["trade"]
    assert "from 1.00 to 9.00 (9.0 times)" in found["explosion"] and "from 1.0 % to 80.0 %" in found["explosion"]
    assert "-133.00 nats per image with KL and -200.00 without" in found["exact"]
    assert "7.00 and 700.00 nats below" in found["exact"]
    assert "1,000 samples" in found["importance"] and "500 evenly spaced test images" in found["importance"]
    assert "of at most 2.30 nats" in found["generation"]


def test_a_standard_error_is_printed_where_there_is_one():
    table = values()
    table["rate"]["kl"]["se"] = 0.125
    assert "from 7.00 ± 0.12 to 60.00 nats" in sentences(table)["trade"]


WAYS = [
    ("explosion", {"code_std": (1.0, 9.0)}, "explodes"),
    ("explosion", {"code_std": (1.0, 1.1)}, "hardly grows"),
    ("explosion", {"code_std": (1.0, 0.2)}, "shrinks"),
    ("generation", {"legible": (0.7, 0.1)}, "fails without KL, in legibility and in variety"),
    ("generation", {"legible": (0.7, 0.1), "class_entropy": (2.2, 2.2)}, "fewer samples can be read"),
    ("generation", {"legible": (0.7, 0.69)}, "not in legibility but in variety"),
    ("generation", {"legible": (0.7, 0.69), "class_entropy": (2.2, 2.2)}, "Generation does not fail"),
    ("generation", {"legible": (0.1, 0.7), "class_entropy": (1.0, 2.2)}, "Generation does not fail"),
    ("trade", {"distortion": (133.0, 120.0)}, "the distortion falls"),
    ("trade", {"distortion": (120.0, 133.0)}, "the distortion rises"),
    ("trade", {"elbo": (-140.0, -900.0)}, "both, falls from -140.00"),
    ("trade", {"elbo": (-140.0, -100.0)}, "both, rises from -140.00"),
    ("neighbours", {"knn_accuracy": (0.7, 0.8)}, "apart better"),
    ("neighbours", {"knn_accuracy": (0.8, 0.7)}, "apart less well"),
    ("neighbours", {"knn_accuracy": (0.8, 0.801)}, "apart about as well"),
    ("fitted", {"legible_fitted": (0.7, 0.5)}, "what was lost is the match"),
    ("fitted", {"legible_fitted": (0.7, 0.1)}, "what was lost is the match"),
    (
        "fitted",
        {"legible_fitted": (0.7, 0.1), "class_entropy_fitted": (2.2, 1.0)},
        "does not describe the codes better",
    ),
    (
        "fitted",
        {"legible_fitted": (0.7, 0.0), "class_entropy_fitted": (2.2, 2.0)},
        "does not describe the codes better",
    ),
    ("importance", {"nll_is_excess": (3.0, 30.0)}, "is too pessimistic"),
    ("importance", {"nll_is_excess": (0.01, 30.0)}, "agrees with it"),
]


@pytest.mark.parametrize(("name", "changes", "expected"), WAYS, ids=lambda value: str(value)[:40])
def test_the_sentence_follows_the_numbers(name, changes, expected):
    assert expected in sentences(values(**changes))[name]
    others = {other for one, _, other in WAYS if one == name and other != expected}
    if name != "trade":
        assert not [other for other in others if other in sentences(values(**changes))[name]]


def test_images_are_said_to_become_points_only_where_sigma_falls():
    assert "becomes a point" in sentences(values(sigma=(0.2, 0.001)))["explosion"]
    for sigma in ((0.2, 0.19), (0.2, 0.6)):
        assert "becomes a point" not in sentences(values(sigma=sigma))["explosion"]


NEEDS = {
    "trade": ("rate", "distortion", "elbo"),
    "explosion": ("code_std", "outside_prior", "sigma"),
    "neighbours": ("knn_accuracy",),
    "generation": ("legible", "class_entropy"),
    "fitted": ("legible", "class_entropy"),
    "exact": ("nll", "elbo"),
    "importance": ("nll_is_excess",),
}


@pytest.mark.parametrize("how", ["none", "no arm", "no metric"])
@pytest.mark.parametrize("metric", NUMBERS)
def test_a_missing_value_omits_its_sentences_and_no_others(metric, how):
    table = copy.deepcopy(values())
    if how == "none":
        table[metric]["no_kl"] = {"mean": None, "se": None, "n": 1, "reason": "not measured"}
    elif how == "no arm":
        del table[metric]["no_kl"]
    else:
        del table[metric]
    found = sentences(table)
    for name, text in found.items():
        if metric in NEEDS[name]:
            assert text is None
        elif metric not in ("legible_fitted", "class_entropy_fitted", "ess", "sigma"):
            assert text is not None


def test_nothing_measured_says_nothing():
    assert removing_kl({}, 1, 1000, 500, 0) == []


@pytest.mark.parametrize("metric", ["rate", "code_std"])
def test_a_collapsed_model_with_kl_is_described_without_a_crash(metric):
    """Every code the same: rate and spread of the codes are exactly zero."""
    found = sentences(values(**{metric: (0.0, 5.0)}))
    assert "nan" not in str(found) and "inf" not in str(found)
