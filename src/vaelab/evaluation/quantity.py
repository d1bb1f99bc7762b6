"""What evaluation returns: numbers with their standard errors, or the reason why there is none."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Quantity:
    """A number with its standard error over n images, or the reason why there is none."""

    mean: float | None
    se: float | None = None
    n: int = 0
    reason: str = ""

    @classmethod
    def over_images(cls, values: np.ndarray, index: np.ndarray | None = None) -> "Quantity":
        """Mean and standard error of one value an image; not finite anywhere: no number, and which images.

        `index` holds the images' numbers in the test set, where `values` are of some of them.
        """
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            bad = bad if index is None else index[bad]
            shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
            return cls(None, reason=f"not finite for {len(bad)} of {len(values)} images ({shown})", n=len(values))
        se = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        return cls(float(values.mean()), se, len(values))

    @classmethod
    def of(cls, value: float, n: int) -> "Quantity":
        """A number over n images without a standard error; not finite: no number, and the reason."""
        return cls(float(value), None, n) if math.isfinite(value) else cls(None, None, n, f"not finite: {value}")

    @classmethod
    def missing(cls, reason: str) -> "Quantity":
        return cls(None, reason=reason)


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        quantities: by name, see the module's notes.
        protocol: how it was measured: protocol of the data, seed of the test draw, K, images.
        codes: posterior means of the test images (N, D), float64.
        per_image: arrays in nats where they exist: elbo, rate, distortion, log_px (N,); log_px_is (M,) of the images
            whose numbers in the test set are in is_images (M,).
        alarms: what cannot be trusted and what is wrong with the model, one sentence each.
    """

    quantities: dict[str, Quantity]
    protocol: dict[str, Any]
    codes: np.ndarray
    per_image: dict[str, np.ndarray] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for evaluation.json; arrays are left out."""
        quantities = {k: asdict(v) for k, v in self.quantities.items()}
        return {"quantities": quantities, "protocol": self.protocol, "alarms": list(self.alarms)}


def to_numpy(value: Tensor) -> np.ndarray:
    """A tensor as a float64 array."""
    return value.detach().double().cpu().numpy()


def evenly(n: int, total: int) -> np.ndarray:
    """The numbers (min(n, total),) of evenly spaced images of `total`.

    Not the first ones: the first half of MNIST's test images was written by other people than the second, and is easier.
    """
    n = min(n, total)
    return np.arange(n) * total // max(n, 1)
