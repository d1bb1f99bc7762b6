"""Evaluation: the same normalised quantities for every model, whatever it was trained with.

Each is in nats per image unless it says otherwise, over the fixed test images of the run's protocol, in float32 with
float64 accumulation, with its standard error over images; a quantity that does not exist is `n/a` with the reason.

    elbo, rate, distortion     see `vaelab.trace`
    nll                        -log p(x): exact by quadrature in one or two latent dimensions (`vaelab.quadrature`)
    nll_is                     -log p(x) by importance sampling from the encoder's posterior (Burda et al. 2016,
                               arXiv 1509.00519, eq. 8): an upper bound in expectation, here on the first images only
    codes                      posterior means of the test images: their mean and spread, the share outside the prior,
                               and whether a nearest neighbour among the training codes has the same label
    legibility                 see `vaelab.legibility`
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vaelab.data.datasets import Dataset
from vaelab.data.protocol import TEST_DRAW_SEED, Protocol
from vaelab.distributions import DiagGaussian
from vaelab.errors import NoDensity, UsageError
from vaelab.evaluation.quantity import Evaluation, Quantity, to_numpy
from vaelab.legibility import Classifier, legibility
from vaelab.models.vae import VAE
from vaelab.quadrature import log_likelihood
from vaelab.rng import stream
from vaelab.training import evaluating

OnProgress = Callable[[str, float], None]
"""Called with what is being measured and the fraction of it that is done."""

PRIOR_MASS = 1 - math.exp(-4.5)
"""Mass of a 2-D standard normal inside its 3-sigma circle: 98.9 %. In D dimensions, the ball with the same mass."""
NEIGHBOURS = 5
DISTORTION_SAMPLES = 4


def evaluate(
    model: VAE,
    data: Dataset,
    protocol: Protocol,
    *,
    classifier: Classifier | None = None,
    k: int = 1000,
    is_images: int = 500,
    samples: int = 10_000,
    seed: int = 0,
    on_progress: OnProgress = lambda label, done: None,
) -> Evaluation:
    """Measure a model on the test images.

    Args:
        model: evaluated in float32 where it is.
        data: the data set whose test part is used; codes are compared with those of the training part.
        protocol: of the run.
        classifier: reads the samples; without one legibility is n/a.
        k: importance samples for each image.
        is_images: how many of the first test images are importance-sampled.
        samples: prior samples that the classifier reads.
        seed: of posterior and prior samples (never of the test images).
        on_progress: see `OnProgress`.
    """
    _positive(k=k, is_images=is_images, samples=samples)
    device = model.device
    x = protocol.test_set(data.test.pixels).to(device)
    with evaluating(model):
        quantities, per_image, codes, sigma = _bound(model, x, seed)
        quantities |= _likelihood(model, x, per_image, k, is_images, seed, on_progress)
        quantities |= _codes(model, data, protocol, codes, sigma)
        quantities |= _legibility(model, data, protocol, classifier, samples, seed)
    described = {
        "data": data.name,
        "test_images": len(x),
        "protocol": protocol.name,
        "test_draw_seed": TEST_DRAW_SEED if protocol.redrawn else None,
        "distortion_samples": DISTORTION_SAMPLES,
        "importance_samples": k,
        "importance_sampled_images": min(is_images, len(x)),
        "prior_samples": samples,
        "seed": seed,
    }
    return Evaluation(quantities, described, codes, per_image)


def _bound(
    model: VAE, x: Tensor, seed: int
) -> tuple[dict[str, Quantity], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """elbo, rate and distortion of each image, and the codes and sigmas (N, D)."""
    rates, distortions, codes, sigmas = [], [], [], []
    no_rate = ""
    for i, part in enumerate(x.split(1000)):
        trace = model.trace(part, k=DISTORTION_SAMPLES, generator=stream(seed, "eval", i, device=x.device))
        q = trace.levels[0].q
        codes.append(to_numpy(q.mean))
        sigmas.append(to_numpy(q.std) if isinstance(q, DiagGaussian) else np.zeros_like(codes[-1]))
        distortions.append(to_numpy(trace.distortion))
        try:
            rates.append(to_numpy(trace.rate))
        except NoDensity as error:
            no_rate = str(error)
    arrays = {"distortion": np.concatenate(distortions)}
    found: dict[str, Quantity] = {}
    if rates:
        arrays["rate"] = np.concatenate(rates)
        arrays["elbo"] = -(arrays["distortion"] + arrays["rate"])
    for name in ("elbo", "rate", "distortion"):
        found[name] = Quantity.over_images(arrays[name]) if name in arrays else Quantity.missing(no_rate)
    if not model.likelihood.normalised:
        reason = "a cross-entropy on grey levels is not a likelihood"
        if "elbo" in arrays:
            found["cross_entropy_plus_rate"] = Quantity.over_images(-arrays.pop("elbo"))
        found["cross_entropy"] = found["distortion"]
        found["elbo"] = found["distortion"] = Quantity.missing(reason)
    return found, arrays, np.concatenate(codes), np.concatenate(sigmas)


def _likelihood(
    model: VAE, x: Tensor, per_image: dict[str, np.ndarray], k: int, is_images: int, seed: int, on_progress: OnProgress
) -> dict[str, Quantity]:
    names = ("nll", "nll_error", "nll_is", "nll_is_excess", "ess")
    if not model.likelihood.normalised:
        return dict.fromkeys(names, Quantity.missing("a cross-entropy on grey levels is not a likelihood"))
    found: dict[str, Quantity] = {}
    if not np.isfinite(per_image["distortion"]).all():
        return dict.fromkeys(names, Quantity.over_images(per_image["distortion"]))
    if model.latent_dim <= 2:
        exact = log_likelihood(model, x, on_progress=lambda done: on_progress("exact log-likelihood", done))
        per_image["log_px"] = exact.log_px
        found["nll"] = Quantity.over_images(-exact.log_px)
        found["nll_error"] = Quantity.of(exact.error.mean(), len(x))
    else:
        reason = f"quadrature needs at most two latent dimensions, this model has {model.latent_dim}"
        found["nll"] = found["nll_error"] = Quantity.missing(reason)
    try:
        log_px, ess = importance_sampled(
            model, x[:is_images], k, seed=seed, on_progress=lambda done: on_progress("importance sampling", done)
        )
    except NoDensity as error:
        return found | dict.fromkeys(("nll_is", "nll_is_excess", "ess"), Quantity.missing(str(error)))
    per_image["log_px_is"] = log_px
    found["nll_is"] = Quantity.over_images(-log_px)
    found["ess"] = Quantity.of(np.median(ess), len(ess))
    found["nll_is_excess"] = (
        Quantity.over_images(per_image["log_px"][: len(log_px)] - log_px)
        if "log_px" in per_image
        else Quantity.missing(found["nll"].reason)
    )
    return found


def importance_sampled(
    model: VAE,
    x: Tensor,
    k: int,
    *,
    seed: int = 0,
    budget: int = 4_000,
    on_progress: Callable[[float], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
    """log (1/K) sum_k p(x, z_k) / q(z_k|x), z_k ~ q, and the effective sample size, each (N,).

    K is streamed: memory depends on `budget` (codes decoded at once), not on K. The estimate is biased downwards
    (in expectation it is a lower bound on log p(x)), and badly so where q is narrower than the true posterior.

    Args:
        model: any model whose posterior has a density.
        x: images (N, *X).
        k: samples for each image.
        seed: of the samples.
        budget: codes decoded at once; few, so that their logits stay in the processor's cache.
        on_progress: called with the fraction done.

    Raises:
        NoDensity: a Dirac posterior.
        UsageError: k below one.
    """
    _positive(k=k)
    x = x.to(model.device)
    log_px, ess = [], []
    chunk = max(1, min(len(x), budget // min(k, 100)))
    with evaluating(model):
        for i, part in enumerate(x.split(chunk)):
            noise = stream(seed, "importance", i, device=x.device)
            q, p = model.encode(part), model.latent_prior()
            parts = []
            for start in range(0, k, max(1, budget // len(part))):
                z = q.rsample(min(k - start, max(1, budget // len(part))), noise)
                log_w = model.decode(z).log_prob(part) + p.log_prob(z) - q.log_prob(z)
                # two numbers an image are all that is kept of a chunk: log sum w and log sum w^2
                parts.append(torch.stack([log_w.double().logsumexp(0), (2 * log_w.double()).logsumexp(0)]))
                on_progress((i * chunk + len(part) * (start + len(z)) / k) / len(x))
            first, second = torch.stack(parts).logsumexp(0)
            log_px.append(to_numpy(first - math.log(k)))
            ess.append(to_numpy(torch.exp(2 * first - second)))
    return np.concatenate(log_px), np.concatenate(ess)


def codes_of(model: VAE, images: Tensor, batch_size: int = 2000) -> np.ndarray:
    """Posterior means (N, D) of images (N, *X), float64."""
    with evaluating(model):
        return np.concatenate([to_numpy(model.encode(part.to(model.device)).mean) for part in images.split(batch_size)])


def _codes(model: VAE, data: Dataset, protocol: Protocol, codes: np.ndarray, sigma: np.ndarray) -> dict[str, Quantity]:
    from scipy.stats import chi2

    names = ("code_mean", "code_std", "sigma", "outside_prior", "knn_accuracy")
    if not np.isfinite(codes).all():
        return dict.fromkeys(names, Quantity.over_images(codes.sum(1)))
    radius = math.sqrt(chi2.ppf(PRIOR_MASS, codes.shape[1]))
    outside = np.linalg.norm(codes, axis=1) > radius
    found = {
        "code_mean": Quantity.of(float(np.linalg.norm(codes.mean(0))), len(codes)),
        "code_std": Quantity.of(np.sqrt(codes.var(0).mean()), len(codes)),
        "sigma": Quantity.of(sigma.mean(), len(codes))
        if isinstance(model.encode(protocol.test_set(data.test.pixels[:1]).to(model.device)), DiagGaussian)
        else Quantity.missing("this posterior has no sigma"),
        "outside_prior": Quantity.over_images(outside.astype(float)),
    }
    if data.train.labels is None or data.test.labels is None:
        return found | {"knn_accuracy": Quantity.missing("the data has no labels")}
    from sklearn.neighbors import KNeighborsClassifier

    pixels = torch.from_numpy(data.train.pixels)
    train = codes_of(model, protocol.training_batch(pixels, stream(TEST_DRAW_SEED, "codes")))
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(train))).fit(train, data.train.labels)
    right = neighbours.predict(codes) == data.test.labels
    return found | {"knn_accuracy": Quantity.over_images(right.astype(float))}


def _legibility(
    model: VAE, data: Dataset, protocol: Protocol, classifier: Classifier | None, samples: int, seed: int
) -> dict[str, Quantity]:
    names = ("legible", "class_entropy", "legible_fitted", "class_entropy_fitted")
    if classifier is None:
        return dict.fromkeys(names, Quantity.missing("the data has no labels to train a classifier on"))
    codes = codes_of(model, protocol.test_set(data.test.pixels[:100]).to(model.device))
    if not np.isfinite(codes).all():
        return dict.fromkeys(names, Quantity.over_images(codes.sum(1)))
    prior = prior_codes(model, samples, seed)
    fitted = fitted_codes(model, protocol.test_set(data.train.pixels[:10_000]).to(model.device), samples, seed)
    found = {}
    for suffix, z in (("", prior), ("_fitted", fitted)):
        read = legibility(classifier, decoded(model, z))
        se = math.sqrt(read.share * (1 - read.share) / read.n) if read.n > 1 else None
        found["legible" + suffix] = Quantity(read.share, se, read.n)
        found["class_entropy" + suffix] = Quantity(read.class_entropy, None, read.n)
    return found


def prior_codes(model: VAE, n: int, seed: int) -> Tensor:
    """`n` codes drawn from the prior, (n, D)."""
    return model.prior_codes(n, generator=stream(seed, "sample", device=model.device))


def fitted_codes(model: VAE, images: Tensor, n: int, seed: int) -> Tensor:
    """`n` codes drawn from a Gaussian fitted to the codes of images, (n, D): its mean and full covariance."""
    codes = codes_of(model, images)
    covariance = np.cov(codes, rowvar=False).reshape(codes.shape[1], -1)
    root = np.linalg.cholesky(covariance + 1e-12 * np.eye(len(covariance)))
    eps = torch.randn((n, codes.shape[1]), generator=stream(seed, "fitted"), dtype=torch.float64).numpy()
    return torch.from_numpy(codes.mean(0) + eps @ root.T).to(next(model.parameters()))


def decoded(model: VAE, z: Tensor, batch_size: int = 5000) -> Tensor:
    """Decoder means (n, *X) at codes (n, D), on the CPU."""
    with evaluating(model):
        parts = z.to(model.device).split(batch_size)
        return torch.cat([model.decode(part.unsqueeze(0)).mean[0].cpu() for part in parts])


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name} is {value}: expected an integer of 1 or more")
