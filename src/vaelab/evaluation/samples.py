"""Samples of the prior: whether the lab's classifier can read them, and how far they are from real images.

    legible, class_entropy     see `vaelab.legibility`; `_fitted` for codes drawn from a Gaussian fitted to the codes,
                               `_test` for the real test images: what a perfect model gets
    frechet                    Fréchet distance in the features of the lab's classifier (its last hidden layer, 128
                               units) between Gaussians fitted to two sets of images:

                               |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

Dowson & Landau 1982; Heusel et al. 2017 (arXiv 1706.08500) use it with the features of an Inception network as the "FID".
This is not the FID: the features are of another network, so the numbers compare only with each other, on one data set.

Two sets must be images of one kind, or the distance is that between kinds:
    frechet          decoder means against the test images' expected pixels (grey levels, where the protocol draws bits)
    frechet_drawn    pixels drawn from p(x|z) against the protocol's own test images
A model may be good at the second and bad at the first (means of a model with sharp, wrong pixels), so both are given.
Both are against one random half of the test images. The distance is biased upwards for few images: `_heldout` has as many
images of the other half in place of the samples, with the same bias, and is what a perfect model gets.

A conditional model is asked for labels drawn from those of the test images.
"""

import math

import numpy as np
import torch
from torch import Tensor

from vaelab.data.datasets import Dataset
from vaelab.data.protocol import TEST_DRAW_SEED, Protocol
from vaelab.errors import UsageError
from vaelab.evaluation.codes import codes_of
from vaelab.evaluation.quantity import Quantity, to_numpy
from vaelab.legibility import Classifier, legibility
from vaelab.models.vae import VAE
from vaelab.rng import stream
from vaelab.training import evaluating

FITTED = 10_000
"""At most so many training images' codes fit the Gaussian."""

NAMES = (
    "legible", "class_entropy", "legible_fitted", "class_entropy_fitted", "legible_test", "class_entropy_test",
    "frechet", "frechet_heldout", "frechet_drawn", "frechet_drawn_heldout",
)  # fmt: skip


def measure(
    model: VAE,
    data: Dataset,
    protocol: Protocol,
    classifier: Classifier | None,
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> dict[str, Quantity]:
    """How good samples of the prior are, and the same of real images.

    Args:
        model: that is sampled.
        data: with labels, else all is n/a.
        protocol: how its images are read.
        classifier: trained on `data`; None where there are no labels.
        samples: drawn from the prior; the Fréchet distances take as many as half the test images, if fewer.
        seed: of the samples.
    """
    if classifier is None or data.test.labels is None or data.train.labels is None:
        return dict.fromkeys(NAMES, Quantity.missing("the data has no labels to train a classifier on"))
    conditional = model.classes is not None
    test = protocol.test_set(data.test.pixels)
    first = torch.from_numpy(data.test.labels[:100]) if conditional else None
    codes = codes_of(model, test[:100], c=first)
    if not np.isfinite(codes).all():
        return dict.fromkeys(NAMES, Quantity.over_images(codes.sum(1)))
    c = drawn_labels(data.test.labels, samples, seed) if conditional else None
    train = protocol.test_set(data.train.pixels[:FITTED])
    train_labels = torch.from_numpy(data.train.labels[:FITTED]) if conditional else None
    prior = prior_codes(model, samples, seed, c)
    means = decoded(model, prior, c=c)
    found = _read(classifier, means)
    found |= _read(classifier, decoded(model, fitted_codes(model, train, samples, seed, train_labels), c=c), "_fitted")
    expected = _expected(data.test.pixels, test, protocol)
    found |= _read(classifier, expected, "_test")

    order = torch.randperm(len(test), generator=stream(TEST_DRAW_SEED, "halves"))
    half, other = order[: len(test) // 2], order[len(test) // 2 :]
    count = min(samples, len(other))
    found["frechet"] = _frechet(classifier, expected[half], means[:count])
    found["frechet_heldout"] = _frechet(classifier, expected[half], expected[other[:count]])
    if not model.likelihood.normalised:
        reason = "a cross-entropy on grey levels is no distribution of pixels: there are none to draw"
        return found | dict.fromkeys(("frechet_drawn", "frechet_drawn_heldout"), Quantity.missing(reason))
    drawn = decoded(
        model, prior[:count], c=None if c is None else c[:count], noise=stream(seed, "pixels", device=model.device)
    )
    found["frechet_drawn"] = _frechet(classifier, test[half], drawn)
    found["frechet_drawn_heldout"] = _frechet(classifier, test[half], test[other[:count]])
    return found


def _expected(pixels: np.ndarray, read: Tensor, protocol: Protocol) -> Tensor:
    """The expected pixels of images that a protocol reads: the grey levels where it draws bits, else what it reads."""
    return torch.from_numpy(pixels).float().div_(255) if protocol.redrawn else read


def _read(classifier: Classifier, images: Tensor, suffix: str = "") -> dict[str, Quantity]:
    bad = ~torch.isfinite(images.flatten(1)).all(1)
    if bad.any():
        reason = f"{int(bad.sum()):,} of {len(images):,} images have pixels that are not finite"
        return {
            f"{name}{suffix}": Quantity(None, reason=reason, n=len(images)) for name in ("legible", "class_entropy")
        }
    read = legibility(classifier, images)
    se = math.sqrt(read.share * (1 - read.share) / read.n) if read.n > 1 else None
    return {
        "legible" + suffix: Quantity(read.share, se, read.n),
        "class_entropy" + suffix: Quantity(read.class_entropy, None, read.n),
    }


def _frechet(classifier: Classifier, one: Tensor, other: Tensor) -> Quantity:
    a, b = features_of(classifier, one), features_of(classifier, other)
    bad = [name for name, features in (("test images", a), ("samples", b)) if not np.isfinite(features).all()]
    if bad:
        return Quantity.missing(f"the features of the {bad[0]} are not finite")
    if min(len(a), len(b)) < 2:
        return Quantity.missing("a covariance needs at least two images of each kind")
    return Quantity.of(frechet_distance(a, b), len(b))


@torch.no_grad()
def features_of(classifier: Classifier, images: Tensor, batch_size: int = 500) -> np.ndarray:
    """The last hidden layer of the classifier (N, 128), float64, for images (N, C, H, W) in [0, 1]."""
    return np.concatenate([to_numpy(classifier.features(part)) for part in images.split(batch_size)])


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features (N, F) and (M, F).

    The trace of (S1 S2)^(1/2) is taken from the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric and so has real
    ones: the square root of the product itself turns complex where a covariance is singular.

    Raises:
        UsageError: fewer than two rows, or different numbers of features.
    """
    if min(len(one), len(other)) < 2 or one.shape[1:] != other.shape[1:]:
        raise UsageError(
            f"the Fréchet distance was asked for features of shapes {one.shape} and {other.shape}: expected at least two "
            "rows of each and as many columns in both"
        )
    a, b = one.astype(np.float64), other.astype(np.float64)
    first, second = (np.cov(f, rowvar=False).reshape(f.shape[1], -1) for f in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ second @ root)
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return float(shift + np.trace(first) + np.trace(second) - 2 * np.sqrt(inner.clip(0)).sum())


def drawn_labels(labels: np.ndarray, n: int, seed: int) -> Tensor:
    """`n` labels drawn with the frequencies of `labels`, int64."""
    index = torch.randint(len(labels), (n,), generator=stream(seed, "labels"))
    return torch.from_numpy(labels)[index]


def prior_codes(model: VAE, n: int, seed: int, c: Tensor | None = None) -> Tensor:
    """`n` codes drawn from the prior, (n, D), given labels c (n,) in a conditional model."""
    with evaluating(model):
        c = None if c is None else c.to(model.device)
        return model.prior_codes(n, c, generator=stream(seed, "sample", device=model.device))


def fitted_codes(model: VAE, images: Tensor, n: int, seed: int, c: Tensor | None = None) -> Tensor:
    """`n` codes drawn from a Gaussian fitted to the codes of images, (n, D): its mean and full covariance."""
    codes = codes_of(model, images, c=c)
    covariance = np.cov(codes, rowvar=False).reshape(codes.shape[1], -1)
    root = np.linalg.cholesky(covariance + 1e-12 * np.eye(len(covariance)))
    eps = torch.randn((n, codes.shape[1]), generator=stream(seed, "fitted"), dtype=torch.float64).numpy()
    return torch.from_numpy(codes.mean(0) + eps @ root.T).to(next(model.parameters()))


def fitting(model: VAE, batch_size: int) -> int:
    """`batch_size`, or as many codes as have 2^26 numbers of decoder output (256 MB): a categorical pixel has 256."""
    with evaluating(model):
        one = model.decode(
            torch.zeros(1, 1, model.latent_dim).to(next(model.parameters())),
            None if model.classes is None else torch.zeros(1, dtype=torch.long, device=model.device),
        )
    numbers = max((tensor.numel() for tensor in one.parameters()), default=1)
    return max(1, min(batch_size, 2**26 // numbers))


def decoded(
    model: VAE, z: Tensor, batch_size: int = 5000, *, c: Tensor | None = None, noise: torch.Generator | None = None
) -> Tensor:
    """Decoder means (n, *X) at codes (n, D), or pixels drawn there with `noise`, on the CPU.

    Args:
        model: the decoder's.
        z: the codes.
        batch_size: codes decoded at once.
        c: labels (n,) of a conditional model.
        noise: where the pixels' noise comes from, a generator on the model's device; None for the means.
    """
    images = []
    with evaluating(model):
        for index in torch.arange(len(z)).split(fitting(model, batch_size)):
            labels = None if c is None else c[index].to(model.device)
            px = model.decode(z[index].to(model.device).unsqueeze(0), labels)
            images.append((px.mean if noise is None else px.rsample(1, noise)[0])[0].cpu())
    return torch.cat(images)
