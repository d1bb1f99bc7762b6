"""Comparing runs image by image.

Two models' log-likelihoods differ far less on one image than one model's do between images: an image that is hard for one
is hard for the other. So the difference of their means is measured by the differences d_i of each image,

    mean d,   s.e. = sd(d) / sqrt(n),   and a percentile bootstrap interval of mean d (Efron 1979) over images

and not by the two standard errors, which would be right for two different sets of images: those differ by several times
(`unpaired_se` is kept beside, to show it). The interval speaks of other test images, not of other trainings: the spread
between seeds of one recipe is often larger, and takes several runs to see.

It is only a comparison if both runs saw the same test images: same draw, same protocol, and both log p(x) or both
log p(x|c). Importance-sampled values are compared only with the same K and proposal, since their bias depends on them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaelab import strict_json
from vaelab.data import readers
from vaelab.errors import DataError, RunError, UsageError
from vaelab.evaluation.quantity import Evaluation, Quantity
from vaelab.run import Run, code_hash, replacing, write_json

SAME = {
    "protocol": "protocol",
    "test_draw_seed": "seed of the test draw",
    "test_images": "number of test images",
    "test_fingerprint": "test images",
    "density": "density",
}
"""What two runs must share, with the word for it."""
RESAMPLES = 5000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class PerImage:
    """What one run's evaluation leaves for comparisons: its protocol and its arrays, see `Evaluation.per_image`."""

    protocol: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """Mean over n images of what the second run has more than the first, in nats, or the reason why there is none.

    Attributes:
        mean: of the differences.
        se: their standard error over images.
        low: lower end of the bootstrap interval of the mean.
        high: its upper end.
        n: images.
        unpaired_se: what the standard error would be for two different sets of images.
        reason: why there is no number.
    """

    mean: float | None
    se: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unpaired_se: float | None = None
    reason: str = ""

    @classmethod
    def of(
        cls, first: np.ndarray, second: np.ndarray, *, index: np.ndarray | None = None, seed: int = 0
    ) -> "Difference":
        """Of two arrays (N,) over the same images, whose numbers in the test set are `index`."""
        paired = Quantity.over_images(second - first, index)
        if paired.mean is None or paired.se is None:
            return cls(paired.mean, n=paired.n, reason=paired.reason)
        low, high = bootstrap(second - first, seed=seed)
        unpaired = float(np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / len(first)))
        return cls(paired.mean, paired.se, low, high, paired.n, unpaired)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap(
    values: np.ndarray, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values (N,), with memory bounded in N."""
    rng = np.random.default_rng(seed)
    each = max(1, 10**6 // len(values))
    means = [
        values[rng.integers(len(values), size=(min(each, resamples - start), len(values)))].mean(1)
        for start in range(0, resamples, each)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def compare(first: PerImage, second: PerImage, *, seed: int = 0) -> dict[str, Difference]:
    """Differences second - first of nll, nll_is and elbo, image by image.

    Args:
        first: the run that is compared with.
        second: the other run.
        seed: of the bootstrap.

    Raises:
        UsageError: the runs were not measured on the same test images by the same protocol.
    """
    for key, word in SAME.items():
        one, other = first.protocol.get(key), second.protocol.get(key)
        if one != other:
            raise UsageError(
                f"these runs cannot be paired: the {word} is {one} for the first and {other} for the second; compare runs "
                "of one data set and one protocol"
            )
    return {
        "nll": _difference(first, second, "log_px", -1, "no exact log-likelihood", seed),
        "nll_is": _sampled(first, second, seed),
        "elbo": _difference(first, second, "elbo", 1, "no bound on log p(x)", seed),
    }


def _difference(first: PerImage, second: PerImage, key: str, sign: int, absent: str, seed: int) -> Difference:
    for which, run in (("first", first), ("second", second)):
        if key not in run.arrays:
            return Difference(None, reason=f"the {which} run has {absent}")
    return Difference.of(sign * first.arrays[key], sign * second.arrays[key], seed=seed)


def _sampled(first: PerImage, second: PerImage, seed: int) -> Difference:
    for which, run in (("first", first), ("second", second)):
        if "log_px_is" not in run.arrays:
            return Difference(None, reason=f"the {which} run has no importance-sampled log-likelihood")
    for key, word in (("importance_samples", "K"), ("proposal", "the proposal"), ("importance_precision", "precision")):
        one, other = (run.protocol.get(key, "float32") for run in (first, second))  # the last key is younger
        if one != other:
            reason = f"{word} is {one} for the first run and {other} for the second, and the bias depends on it"
            return Difference(None, reason=f"{reason}: evaluate both with the same")
    common, i, j = np.intersect1d(first.arrays["is_images"], second.arrays["is_images"], return_indices=True)
    if not len(common):
        return Difference(None, reason="no image was importance-sampled for both runs")
    return Difference.of(-first.arrays["log_px_is"][i], -second.arrays["log_px_is"][j], index=common, seed=seed)


def save(run: Run, evaluation: Evaluation, **facts: Any) -> dict[str, Any]:
    """Keep an evaluation in a run folder: evaluation.json, and evaluation.npz with one value an image (no pickles).

    Args:
        run: whose model was measured.
        evaluation: of it.
        facts: join the document (the time it took, say).

    Returns:
        The document: quantities, protocol, alarms, the code's hash, that of the weights, and the facts.
    """
    document = evaluation.to_dict() | {"code": code_hash(), "weights": _hash_of(run), **facts}
    with replacing(run.path / "evaluation.npz") as temporary, temporary.open("wb") as file:
        described = json.dumps({"protocol": evaluation.protocol, "weights": document["weights"]})
        arrays: dict[str, Any] = {"described": np.array(described), **evaluation.per_image}
        np.savez(file, **arrays)
    write_json(run.path / "evaluation.json", document)
    return document


def load(run: Run) -> PerImage | None:
    """What `save` kept; None where there is nothing, or where it is of other weights than the run has now.

    Raises:
        RunError: the file is damaged.
    """
    path = run.path / "evaluation.npz"
    if not path.is_file():
        return None
    try:
        arrays = readers.read_npz(path, readers.npz_names(path))
    except DataError as error:
        raise RunError(f"'{path}' is damaged: {error}; run vaelab evaluate again") from None
    text = str(arrays.pop("described", "")).encode("utf-8", "surrogatepass")
    described = strict_json.parse(text, path)
    numbers = all(values.ndim == 1 and values.dtype.kind in "fiu" for values in arrays.values())
    pairs = arrays.get("log_px_is", np.empty(0)).shape == arrays.get("is_images", np.empty(0)).shape
    if not (numbers and pairs and isinstance(described, dict) and isinstance(described.get("protocol"), dict)):
        raise RunError(f"'{path}' is damaged: it is not what vaelab evaluate writes; run vaelab evaluate again")
    return PerImage(described["protocol"], arrays) if described.get("weights") == _hash_of(run) else None


def _hash_of(run: Run) -> str:
    """Twelve hex digits over the weights."""
    path: Path = run.weights
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""
