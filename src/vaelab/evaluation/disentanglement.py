"""Disentanglement: whether each latent dimension says something about one known factor only, and each factor is in one.

Scores of codes (N, D) and the integer factors (N, F) that the images were made from; each lies in [0, 1].

    MIG      mean over factors of (I(z_a; v) - I(z_b; v)) / H(v), z_a and z_b the two dimensions that tell most about v
             (Chen et al. 2018, arXiv 1802.04942, eq. 6). Each factor is divided by its own entropy.
    DCI      from importances R (D, F) of dimensions for factors (Eastwood & Williams 2018):
             disentanglement  mean over dimensions, weighted by their importance, of 1 - H_F(R_d / sum_k R_dk)
             completeness     mean over factors of 1 - H_D(R_k / sum_d R_dk)
             informativeness  1 - error / error of always guessing the commonest value, on images held out
             R is the impurity importance of a random forest for each factor, which sees all dimensions at each split: a
             forest that is offered a random few gives importance to dimensions that happen to stand alone.
    SAP      mean over factors of the gap between the two best scores of a single dimension (Kumar et al. 2018,
             arXiv 1711.00848): the squared correlation for numbers; for categories the balanced accuracy of thresholds on
             the dimension, on images held out, in excess of chance (as a share of what is possible).
    FactorVAE score  (Kim & Mnih 2018, arXiv 1802.05983, section 4): in a batch of images that share one factor's value,
             the dimension of least variance (relative to its variance over all images) votes; how often the majority vote
             names the factor, on votes held out. Chance is 1/F, not 0.

Where published code goes wrong: entropies in different bases or of the wrong variable in MIG; bins that depend on the
scale of the codes; scores of dimensions that are constant. Here codes are binned by rank, so that every score but SAP's
is invariant to monotone maps of a dimension, to numerical ties, and all are to scaling and to the order of dimensions.
The plug-in mutual information of independent codes is (bins - 1)(values - 1) / 2N nats too high; gaps cancel most of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vaelab.data.datasets import Dataset
from vaelab.data.protocol import Protocol
from vaelab.errors import UsageError
from vaelab.evaluation.codes import codes_of
from vaelab.evaluation.quantity import Quantity
from vaelab.models.vae import VAE

BINS = 20
NAMES = ("mig", "dci_disentanglement", "dci_completeness", "dci_informativeness", "sap", "factor_vae_score")


@dataclass(frozen=True)
class DCI:
    """The three scores, and the importances (D, F) that the first two are made of."""

    disentanglement: float
    completeness: float
    informativeness: float
    importance: np.ndarray


def measure(model: VAE, data: Dataset, protocol: Protocol, *, seed: int = 0) -> dict[str, Quantity]:
    """Every score of the posterior means of all images, training and test: the factors are a grid, of which neither part
    alone has all combinations. n/a where the data has no known factors."""
    parts = (data.train, data.test)
    factors = [part.factors for part in parts if part.factors is not None]
    if len(factors) < len(parts):
        return dict.fromkeys(NAMES, Quantity.missing("the factors that made these images are not known"))
    if model.classes is not None:
        return dict.fromkeys(NAMES, Quantity.missing("a conditional model is told a factor: its code need not hold it"))
    codes = np.concatenate([codes_of(model, protocol.test_set(part.pixels)) for part in parts])
    if not np.isfinite(codes).all():
        return dict.fromkeys(NAMES, Quantity.over_images(codes.sum(1)))
    known = np.concatenate(factors)
    found = {
        "mig": _score(lambda: mig(codes, known), len(codes)),
        "sap": _score(lambda: sap(codes, known), len(codes)),
        "factor_vae_score": _score(lambda: factor_vae_score(codes, known, seed=seed), len(codes)),
    }
    try:
        scores = dci(codes, known, seed=seed)
    except UsageError as error:
        return found | dict.fromkeys(NAMES[1:4], Quantity.missing(str(error)))
    three = (scores.disentanglement, scores.completeness, scores.informativeness)
    return found | {name: Quantity.of(score, len(codes)) for name, score in zip(NAMES[1:4], three, strict=True)}


def _score(score: Callable[[], float], n: int) -> Quantity:
    try:
        return Quantity.of(score(), n)
    except UsageError as error:
        return Quantity.missing(str(error))


def mutual_informations(codes: np.ndarray, factors: np.ndarray, bins: int = BINS) -> np.ndarray:
    """I(z_d; v_k) in nats, (D, F): plug-in estimates over bins of equal counts.

    A dimension with at most `bins` distinct values is its own binning.
    """
    found = np.zeros((codes.shape[1], factors.shape[1]))
    for d, column in enumerate(codes.T):
        z = _binned(column, bins)
        for k, v in enumerate(factors.T):
            v = np.unique(v, return_inverse=True)[1]
            joint = np.bincount(z * (v.max() + 1) + v, minlength=(z.max() + 1) * (v.max() + 1))
            found[d, k] = _entropy(np.bincount(z)) + _entropy(np.bincount(v)) - _entropy(joint)
    return found


def mig(codes: np.ndarray, factors: np.ndarray, bins: int = BINS) -> float:
    """Mutual information gap of codes (N, D) and factors (N, F). Raises UsageError, see `_checked`."""
    codes, factors = _checked(codes, factors)
    information = np.sort(mutual_informations(codes, factors, bins), 0)[::-1]
    second = information[1] if len(information) > 1 else 0.0
    entropies = np.array([_entropy(np.unique(v, return_counts=True)[1]) for v in factors.T])
    return float(((information[0] - second) / entropies).mean())


def dci(codes: np.ndarray, factors: np.ndarray, *, trees: int = 20, seed: int = 0) -> DCI:
    """Disentanglement, completeness and informativeness of codes (N, D) and factors (N, F).

    Args:
        codes, factors: a random half of the rows grows the forests, the other half tests them.
        trees: in the forest of each factor.
        seed: of the halves and of the forests.

    Raises:
        UsageError: fewer than two dimensions or factors; or see `_checked`.
    """
    from sklearn.ensemble import RandomForestClassifier

    codes, factors = _checked(codes, factors)
    if codes.shape[1] < 2 or factors.shape[1] < 2:
        raise UsageError(
            f"DCI was asked for {codes.shape[1]} latent dimensions and {factors.shape[1]} factors: expected at least two "
            "of each, since it compares them"
        )
    # scikit-learn's trees take values within 1e-7 for equal: standardised, the scale is of no matter
    codes = (codes - codes.mean(0)) / np.where(_varies(codes), codes.std(0), 1.0)
    train, test = _halves(len(codes), seed)
    importance, scores = np.zeros((codes.shape[1], factors.shape[1])), []
    for k, v in enumerate(factors.T):
        all_of_them: Any = None  # scikit-learn's stubs know only the names
        forest = RandomForestClassifier(trees, max_features=all_of_them, min_samples_leaf=2, random_state=seed)
        forest.fit(codes[train], v[train])
        importance[:, k] = forest.feature_importances_
        error = (forest.predict(codes[test]) != v[test]).mean()
        guess = 1 - np.unique(v[test], return_counts=True)[1].max() / len(test)
        scores.append(1 - error / guess if guess > 0 else 0.0)
    weight = importance.sum()
    if weight == 0:
        return DCI(0.0, 0.0, max(0.0, float(np.mean(scores))), importance)
    disentangled = np.array([1 - _entropy(row) / np.log(len(row)) if row.sum() else 0.0 for row in importance])
    complete = np.array([1 - _entropy(row) / np.log(len(row)) if row.sum() else 0.0 for row in importance.T])
    return DCI(
        float(disentangled @ importance.sum(1) / weight),
        float(complete.mean()),
        max(0.0, float(np.mean(scores))),
        importance,
    )


def sap(codes: np.ndarray, factors: np.ndarray, *, categories: Sequence[int] = (), seed: int = 0) -> float:
    """Separated attribute predictability of codes (N, D) and factors (N, F).

    Args:
        codes, factors: see the module's notes.
        categories: columns of `factors` whose values are names, not numbers.
        seed: of the halves that thresholds are fitted to and tested on.

    Raises:
        UsageError: see `_checked`.
    """
    codes, factors = _checked(codes, factors)
    gaps = []
    for k, v in enumerate(factors.T):
        score = _threshold_score if k in categories else _squared_correlation
        best = sorted((score(z, v, seed) for z in codes.T), reverse=True)
        gaps.append(best[0] - (best[1] if len(best) > 1 else 0.0))
    return float(np.mean(gaps))


def factor_vae_score(
    codes: np.ndarray, factors: np.ndarray, *, votes: int = 800, batch: int = 64, seed: int = 0
) -> float:
    """The FactorVAE score of codes (N, D) and factors (N, F).

    Args:
        codes, factors: all images that batches are drawn from.
        votes: to learn the majority from, and as many again to test it on.
        batch: images with a value in common, drawn without replacement; all there are, where they are fewer.
        seed: of the batches.

    Raises:
        UsageError: a factor none of whose values has ten images; or see `_checked`.
    """
    codes, factors = _checked(codes, factors)
    spread = codes.std(0)
    active = _varies(codes)
    if not active.any():
        return 0.0
    scaled = codes[:, active] / spread[active]
    groups = []
    for k, v in enumerate(factors.T):
        alike = [rows for value in np.unique(v) if len(rows := np.flatnonzero(v == value)) >= 10]
        if not alike:
            raise UsageError(
                f"no value of factor {k} has ten images: the FactorVAE score needs batches that share a value; give more "
                "images, or a factor of fewer values"
            )
        groups.append(alike)
    draw = np.random.RandomState(seed)
    counts = np.zeros((2, scaled.shape[1], len(groups)))
    for i in range(2 * votes):
        k = draw.randint(len(groups))
        rows = groups[k][draw.randint(len(groups[k]))]
        rows = draw.choice(rows, min(batch, len(rows)), replace=False)
        counts[i % 2, scaled[rows].var(0).argmin(), k] += 1
    majority = counts[0].argmax(1)
    return float(counts[1][np.arange(len(majority)), majority].sum() / counts[1].sum())


def _checked(codes: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as float64 and the factors that take more than one value.

    Raises:
        UsageError: shapes other than (N, D) and (N, F) with N >= 4, codes that are not finite, factors that are not whole
            numbers, or no factor with two values.
    """
    codes, factors = np.asarray(codes, np.float64), np.asarray(factors)
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors) or len(codes) < 4 or not codes.shape[1]:
        raise UsageError(
            f"codes have shape {codes.shape} and factors {factors.shape}: expected (N, D) and (N, F) with one N of 4 or more"
        )
    if not np.isfinite(codes).all():
        raise UsageError("some codes are not finite: no score can be given")
    if factors.dtype.kind not in "iub":
        raise UsageError(f"factors are {factors.dtype}: expected integers, one for each value a factor takes")
    factors = factors[:, [len(np.unique(v)) > 1 for v in factors.T]]
    if not factors.shape[1]:
        raise UsageError("no factor takes more than one value: there is nothing to tell apart")
    return codes, factors.astype(np.int64)


def _varies(codes: np.ndarray) -> np.ndarray:
    """Which columns vary by more than rounding, whatever their scale."""
    return codes.std(0) > 1e-9 * np.abs(codes).max(0)


def _binned(column: np.ndarray, bins: int) -> np.ndarray:
    """Numbers of bins (N,), of equal counts as far as ties allow."""
    values, index = np.unique(column, return_inverse=True)
    if len(values) <= bins:
        return index
    edges = np.unique(np.quantile(column, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, column, side="right")


def _entropy(counts: np.ndarray) -> float:
    """Entropy in nats of what is proportional to `counts`."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _halves(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.RandomState(seed).permutation(n)
    return order[: n // 2], order[n // 2 :]


def _squared_correlation(z: np.ndarray, v: np.ndarray, seed: int) -> float:
    del seed
    centred, value = z - z.mean(), v - v.mean()
    if not _varies(z):
        return 0.0
    return float((centred @ value) ** 2 / (centred @ centred) / (value @ value))


def _threshold_score(z: np.ndarray, v: np.ndarray, seed: int) -> float:
    """Balanced accuracy of as many thresholds as the values need, in excess of chance as a share of what is possible."""
    from sklearn.tree import DecisionTreeClassifier

    z = (z - z.mean()) / (z.std() if _varies(z) else 1.0)
    train, test = _halves(len(z), seed)
    values = np.unique(v)
    tree = DecisionTreeClassifier(max_leaf_nodes=len(values), class_weight="balanced", random_state=seed)
    read = tree.fit(z[train, None], v[train]).predict(z[test, None])
    hits = [(read[v[test] == value] == value).mean() for value in values if (v[test] == value).any()]
    chance = 1 / len(values)
    return max(0.0, float((np.mean(hits) - chance) / (1 - chance)))
