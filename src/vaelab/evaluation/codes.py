"""Codes: posterior means of the test images, against the prior and against the codes of the training images.

    outside_prior         share of test codes outside the smallest region that holds 98.9 % of the prior: its 3-sigma
                          circle where it is a standard normal in two dimensions
    knn_accuracy          share of test images whose five nearest training codes vote for the right class
    linear_accuracy       the same for a linear probe, multinomial logistic regression on standardised codes

The nearest neighbours see whatever structure there is, the probe only what a linear map can read: a two-dimensional map
of ten classes has a high first and a low second. Both are fitted to codes of training images.
"""

import math

import numpy as np
import torch
from torch import Tensor

from vaelab.data.datasets import Dataset
from vaelab.data.protocol import TEST_DRAW_SEED, Protocol
from vaelab.errors import NoDensity, UsageError
from vaelab.evaluation.quantity import Quantity, to_numpy
from vaelab.models.vae import VAE
from vaelab.nn.label import WithLabel
from vaelab.priors import StandardNormal
from vaelab.rng import stream
from vaelab.training import evaluating, labels_for

PRIOR_MASS = 1 - math.exp(-4.5)
"""Mass of a 2-D standard normal inside its 3-sigma circle: 98.9 %. In D dimensions, the ball with the same mass."""
NEIGHBOURS = 5


def features_of(model: VAE, x: Tensor, c: Tensor | None = None, batch_size: int = 2000) -> Tensor:
    """What the posterior reads of images (N, *X): the encoder's output (N, F), which is small enough to keep."""
    index = torch.arange(len(x), device=x.device).split(batch_size)
    if isinstance(model.encoder, WithLabel) and c is not None:
        return torch.cat([model.encoder(x[i], c[i]) for i in index])
    return torch.cat([model.encoder(x[i]) for i in index])


def codes_of(model: VAE, images: Tensor, batch_size: int = 2000, *, c: Tensor | None = None) -> np.ndarray:
    """Posterior means (N, D) of images (N, *X) with, in a conditional model, labels c (N,); float64."""
    index = torch.arange(len(images)).split(batch_size)
    with evaluating(model):
        return np.concatenate(
            [
                to_numpy(model.encode(images[i].to(model.device), None if c is None else c[i].to(model.device)).mean)
                for i in index
            ]
        )


def measure(
    model: VAE, data: Dataset, protocol: Protocol, codes: np.ndarray, sigma: np.ndarray | None, *, seed: int = 0
) -> dict[str, Quantity]:
    """What the codes of the test images say.

    Args:
        model: that made them.
        data: its test part was encoded; codes of the training part fit the probes.
        protocol: how the images are read.
        codes: posterior means of the test images (N, D).
        sigma: standard deviations of the posterior (N, D); None where it has none.
        seed: of the prior's samples that decide its region, where that is not known in closed form.
    """
    names = ("code_mean", "code_std", "sigma", "outside_prior", "knn_accuracy", "linear_accuracy")
    if not np.isfinite(codes).all():
        return dict.fromkeys(names, Quantity.over_images(codes.sum(1)))
    c = labels_for(model, data.test)
    found = {
        "code_mean": Quantity.of(float(np.linalg.norm(codes.mean(0))), len(codes)),
        "code_std": Quantity.of(np.sqrt(codes.var(0).mean()), len(codes)),
        "sigma": Quantity.missing("this posterior has no sigma")
        if sigma is None
        else Quantity.of(sigma.mean(), len(codes)),
        "outside_prior": outside_prior(model, codes, c, seed),
    }
    return found | _probes(model, data, protocol, codes)


def outside_prior(model: VAE, codes: np.ndarray, c: Tensor | None = None, seed: int = 0) -> Quantity:
    """Share of codes (N, D) outside the smallest region that holds `PRIOR_MASS` of the prior.

    For a standard normal the region is a ball. For any other prior with a density it is where log p(z), or log p(z|c)
    with the labels c (N,) given, exceeds its quantile over 10,000 samples of the prior.
    """
    if isinstance(model.prior, StandardNormal):
        from scipy.special import gammaincinv  # the quantile of chi^2; scipy.stats is slow to import

        radius = math.sqrt(2 * gammaincinv(codes.shape[1] / 2, PRIOR_MASS))
        return Quantity.over_images((np.linalg.norm(codes, axis=1) > radius).astype(float))
    with evaluating(model):
        try:
            level = torch.quantile(_log_prior(model, *_prior_samples(model, c, seed)), 1 - PRIOR_MASS)
            z = torch.from_numpy(codes).to(next(model.parameters()))
            below = _log_prior(model, z, None if c is None else c.to(z.device)) < level
        except (NoDensity, UsageError) as error:
            return Quantity.missing(str(error))
    return Quantity.over_images(to_numpy(below))


def _prior_samples(model: VAE, c: Tensor | None, seed: int, n: int = 10_000) -> tuple[Tensor, Tensor | None]:
    noise = stream(seed, "prior-region", device=model.device)
    if c is not None:
        c = c.to(model.device)[torch.randint(len(c), (n,), generator=noise, device=model.device)]
    return model.prior_codes(n, c, generator=noise), c


def _log_prior(model: VAE, z: Tensor, c: Tensor | None) -> Tensor:
    return model.latent_prior(c).log_prob(z.unsqueeze(0))[0].double()


def _probes(model: VAE, data: Dataset, protocol: Protocol, codes: np.ndarray) -> dict[str, Quantity]:
    names = ("knn_accuracy", "linear_accuracy")
    if data.train.labels is None or data.test.labels is None:
        return dict.fromkeys(names, Quantity.missing("the data has no labels"))
    if model.classes is not None:
        reason = "the encoder of a conditional model may be told the label: finding it in the code would say nothing"
        return dict.fromkeys(names, Quantity.missing(reason))
    from sklearn.neighbors import KNeighborsClassifier

    pixels, labels = torch.from_numpy(data.train.pixels), data.train.labels
    train = codes_of(model, protocol.training_batch(pixels, stream(TEST_DRAW_SEED, "codes")))
    if not np.isfinite(train).all():
        reason = f"{int((~np.isfinite(train)).any(1).sum()):,} training images have codes that are not finite"
        return dict.fromkeys(names, Quantity.missing(reason))
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(train))).fit(train, labels)
    right = neighbours.predict(codes) == data.test.labels
    found = {"knn_accuracy": Quantity.over_images(right.astype(float))}
    return found | {"linear_accuracy": linear_probe(train, labels, codes, data.test.labels)}


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> Quantity:
    """Accuracy on codes `test` (M, D) of logistic regression fitted to codes `train` (N, D), standardised by theirs.

    The penalty on the squared weights is scikit-learn's default, C = 1: next to nothing for thousands of codes.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        return Quantity.missing("the training images have one label only: there is nothing to tell apart")
    mean, std = train.mean(0), train.std(0)
    std = np.where(std > 0, std, 1.0)
    probe = LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            probe.fit((train - mean) / std, labels)
        except ConvergenceWarning:
            return Quantity.missing("the linear probe did not converge in 1000 steps")
    right = np.equal(probe.predict((test - mean) / std), truth)
    return Quantity.over_images(right.astype(float))
