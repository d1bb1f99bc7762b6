"""Evaluation: the same normalised quantities for every model, whatever it was trained with.

Each is in nats per image unless it says otherwise, over the fixed test images of the run's protocol, in float32 with
float64 accumulation, with its standard error over images; a quantity that does not exist is `n/a` with the reason. The
log-likelihood of a conditional model is log p(x|c), with the labels of the data, and the protocol says so.

    elbo, rate, distortion     see `vaelab.trace`
    nll                        -log p(x): exact by quadrature in one or two latent dimensions (`vaelab.quadrature`)
    nll_is, nll_is_k           -log p(x) by importance sampling with all and with k samples (`evaluation.importance`)
    bits_per_dim               nll / (P ln 2) for P pixels, plus what the protocol says a density of rescaled levels must
                               add to count bits of the original ones; from nll_is and from -elbo under their own names
    gap                        log p(x) - elbo, and its two parts (`evaluation.gaps`)
    latent space               what the codes carry, the aggregate posterior against the prior (`evaluation.latent`)
    codes                      spread, share outside the prior, nearest neighbours, linear probe (`evaluation.codes`)
    samples                    legibility and Fréchet distance (`evaluation.samples`)
    disentanglement            scores where the factors of the images are known (`evaluation.disentanglement`)
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import Tensor

from vaelab import heap
from vaelab.data.datasets import Dataset
from vaelab.data.protocol import TEST_DRAW_SEED, Protocol
from vaelab.distributions import DiagGaussian, Laplace
from vaelab.errors import NoDensity, UsageError, unknown_name
from vaelab.evaluation import codes as codes_
from vaelab.evaluation import disentanglement, latent
from vaelab.evaluation import samples as samples_
from vaelab.evaluation.codes import codes_of
from vaelab.evaluation.gaps import Gaps, split_gap
from vaelab.evaluation.importance import CURVE, DRIFT, PROPOSALS, ImportanceSampled, importance_sampled
from vaelab.evaluation.quantity import Evaluation, Quantity, evenly, to_numpy
from vaelab.evaluation.samples import decoded, fitted_codes, prior_codes
from vaelab.legibility import Classifier
from vaelab.likelihoods import Bernoulli
from vaelab.models.vae import VAE
from vaelab.precision import of_decoding
from vaelab.quadrature import log_likelihood
from vaelab.rng import stream
from vaelab.training import evaluating, labels_for

__all__ = [
    "CURVE", "PROPOSALS", "Evaluation", "Gaps", "ImportanceSampled", "Quantity", "codes_of", "decoded", "evaluate",
    "evenly", "fitted_codes", "importance_sampled", "prior_codes", "split_gap", "with_samples",
]  # fmt: skip

OnProgress = Callable[[str, float], None]
"""Called with what is being measured and the fraction of it that is done."""

DISTORTION_SAMPLES = 4


def evaluate(
    model: VAE,
    data: Dataset,
    protocol: Protocol,
    *,
    classifier: Classifier | None = None,
    k: int = 5000,
    is_images: int = 1000,
    proposal: str = "posterior",
    precision: str = "auto",
    gap_images: int = 100,
    latent_images: int = 10_000,
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
        is_images: how many of the test images are importance-sampled, evenly spaced.
        proposal: of importance sampling, see `vaelab.evaluation.importance`.
        precision: in which importance samples are decoded, see `vaelab.precision`, and whether the decoder of quadrature may
            compute with 16 bits, see `vaelab.quadrature`; all else is in float32.
        gap_images: for how many of those the bound's gap is split, evenly spaced; none for 0.
        latent_images: how many of the test images make the aggregate posterior; its cost is their square.
        samples: prior samples that the classifier reads.
        seed: of posterior and prior samples (never of the test images).
        on_progress: see `OnProgress`.

    Raises:
        UsageError: k, is_images or samples below one, gap_images below zero, an unknown proposal, labels that are
            missing, or bfloat16 for pixels that are not Bernoulli.
    """
    check_arguments(k=k, is_images=is_images, samples=samples, gap_images=gap_images, latent_images=latent_images)
    if model.device.type == "cpu":
        heap.keep()
    if proposal not in PROPOSALS:
        raise unknown_name("proposal", proposal, PROPOSALS)
    x = protocol.test_set(data.test.pixels).to(model.device)
    c = labels_for(model, data.test, model.device)
    precision = of_decoding(precision, isinstance(model.likelihood, Bernoulli), model.device).name
    measuring = _Measuring(model, protocol, x, c, seed, on_progress)
    with evaluating(model):
        codes, sigma = measuring.bound()
        measuring.likelihood(k, is_images, proposal, precision)
        if gap_images:
            measuring.gap(gap_images)
        found = measuring.found
        about, alarms = latent.measure(
            model, x, c, seed=seed, images=latent_images,
            on_progress=lambda done: on_progress("aggregate posterior", done),
        )  # fmt: skip
        found |= about | codes_.measure(model, data, protocol, codes, sigma, seed=seed)
        found |= samples_.measure(model, data, protocol, classifier, samples=samples, seed=seed)
        if data.test.factors is not None:
            found |= disentanglement.measure(model, data, protocol, seed=seed)
    described = {
        "data": data.name,
        "test_images": len(x),
        "protocol": protocol.name,
        "test_draw_seed": TEST_DRAW_SEED if protocol.redrawn else None,
        "test_fingerprint": fingerprint(x, c),
        "density": "log p(x)" if c is None else "log p(x|c), with the labels of the data",
        "distortion_samples": DISTORTION_SAMPLES,
        "importance_samples": k,
        "importance_sampled_images": min(is_images, len(x)),
        "proposal": proposal,
        "importance_precision": precision,
        "gap_images": found["gap"].n if gap_images else 0,
        "latent_images": min(latent_images, len(x)),
        "prior_samples": samples,
        "seed": seed,
    }
    return Evaluation(found, described, codes, measuring.per_image, (*measuring.alarms, *alarms))


def with_samples(
    found: Evaluation,
    model: VAE,
    data: Dataset,
    protocol: Protocol,
    classifier: Classifier,
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> Evaluation:
    """An evaluation that was made without a classifier, and what one reads in samples; arguments as in `evaluate`."""
    with evaluating(model):
        read = samples_.measure(model, data, protocol, classifier, samples=samples, seed=seed)
    return replace(found, quantities={**found.quantities, **read})


def fingerprint(x: Tensor, c: Tensor | None = None) -> str:
    """Twelve hex digits over images, as the model sees them, and labels."""
    digest = hashlib.sha256(x.float().cpu().numpy().tobytes())
    digest.update(b"" if c is None else c.long().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def check_arguments(**numbers: int) -> None:
    """Refuse numbers of samples and images that nothing can be measured with. Raises UsageError."""
    for name, value in numbers.items():
        least = 0 if name == "gap_images" else 1
        if value < least:
            raise UsageError(f"{name} is {value}: expected an integer of {least} or more")


class _Measuring:
    """The quantities that are made of log-densities, as they are found."""

    def __init__(
        self, model: VAE, protocol: Protocol, x: Tensor, c: Tensor | None, seed: int, on_progress: OnProgress
    ) -> None:
        self.model, self.protocol, self.x, self.c = model, protocol, x, c
        self.seed, self.on_progress = seed, on_progress
        self.found: dict[str, Quantity] = {}
        self.per_image: dict[str, np.ndarray] = {}
        self.alarms: list[str] = []
        self.unnormalised = "" if model.likelihood.normalised else "a cross-entropy on grey levels is not a likelihood"

    def labels(self, index: Tensor | np.ndarray | slice) -> Tensor | None:
        return None if self.c is None else self.c[index]

    def bound(self) -> tuple[np.ndarray, np.ndarray | None]:
        """elbo, rate, distortion; returns the codes and sigmas (N, D)."""
        rates, distortions, codes, sigmas = [], [], [], []
        no_rate, size = "", samples_.fitting(self.model, 1000 * DISTORTION_SAMPLES) // DISTORTION_SAMPLES or 1
        for i, part in enumerate(self.x.split(size)):
            noise = stream(self.seed, "eval", i, device=self.x.device)
            trace = self.model.trace(
                part, self.labels(slice(i * size, (i + 1) * size)), k=DISTORTION_SAMPLES, generator=noise
            )
            q = trace.levels[0].q
            codes.append(to_numpy(q.mean))
            if isinstance(q, DiagGaussian | Laplace):
                sigmas.append(to_numpy(q.std))
            distortions.append(to_numpy(trace.distortion))
            try:
                rates.append(to_numpy(trace.rate))
            except NoDensity as error:
                no_rate = str(error)
        arrays = {"distortion": np.concatenate(distortions)}
        if not no_rate:
            arrays["rate"] = np.concatenate(rates)
            arrays["elbo"] = -(arrays["distortion"] + arrays["rate"])
        found = self.found
        for name in ("elbo", "rate", "distortion"):
            found[name] = Quantity.over_images(arrays[name]) if name in arrays else Quantity.missing(no_rate)
        if self.unnormalised:
            if "elbo" in arrays:
                found["cross_entropy_plus_rate"] = Quantity.over_images(-arrays.pop("elbo"))
            found["cross_entropy"] = found["distortion"]
            found["elbo"] = found["distortion"] = Quantity.missing(self.unnormalised)
        self.per_image |= arrays
        self._bits("elbo", self.found["elbo"], sign=-1)
        return np.concatenate(codes), np.concatenate(sigmas) if sigmas else None

    def likelihood(self, k: int, images: int, proposal: str, precision: str) -> None:
        """nll by quadrature, nll_is by importance sampling."""
        exact, broken = ("nll", "nll_error"), self.per_image["distortion"]
        sizes = [size for size in CURVE if size < k]
        sampled = ("nll_is", *(f"nll_is_{size}" for size in sizes), "nll_is_excess", "nll_is_drift", "ess", "ess_worst",
                   "max_weight", "tail_share")  # fmt: skip
        if self.unnormalised or not np.isfinite(broken).all():
            reason = Quantity.missing(self.unnormalised) if self.unnormalised else Quantity.over_images(broken)
            self.found |= dict.fromkeys((*exact, *sampled), reason)
        else:
            self._exact(precision)
            index = evenly(images, len(self.x))
            try:
                estimate = importance_sampled(
                    self.model, self.x[index], k, c=self.labels(index), seed=self.seed, proposal=proposal,
                    precision=precision, on_progress=lambda done: self.on_progress("importance sampling", done),
                )  # fmt: skip
            except (NoDensity, UsageError) as error:
                self.found |= dict.fromkeys(sampled, Quantity.missing(str(error)))
            else:
                self._sampled(estimate, index)
        self._bits("nll", self.found["nll"])
        self._bits("nll_is", self.found["nll_is"])

    def _exact(self, precision: str) -> None:
        try:
            exact = log_likelihood(
                self.model, self.x, self.c, precision=precision if precision == "float32" else "auto",
                on_progress=lambda done: self.on_progress("exact log-likelihood", done),
            )  # fmt: skip
        except (UsageError, NoDensity) as error:
            self.found["nll"] = self.found["nll_error"] = Quantity.missing(str(error))
            return
        self.per_image["log_px"] = exact.log_px
        self.found["nll"] = Quantity.over_images(-exact.log_px)
        self.found["nll_error"] = Quantity.of(exact.error.mean(), len(self.x))

    def _sampled(self, estimate: ImportanceSampled, index: np.ndarray) -> None:
        found = self.found
        self.per_image |= {"log_px_is": estimate.log_px, "is_images": index}
        found["nll_is"] = Quantity.over_images(-estimate.log_px, index)
        for size, values in estimate.curve.items():
            if size < estimate.k:
                found[f"nll_is_{size}"] = Quantity.over_images(-values, index)
        found["nll_is_excess"] = (
            Quantity.over_images(self.per_image["log_px"][index] - estimate.log_px, index)
            if "log_px" in self.per_image
            else Quantity.missing(found["nll"].reason)
        )
        found["nll_is_drift"] = Quantity.over_images(estimate.log_px - estimate.tenth, index)
        found["ess"] = Quantity.of(estimate.median_ess, len(index))
        found["ess_worst"] = Quantity.of(estimate.worst_ess, len(index))
        found["max_weight"] = Quantity.of(float(np.median(estimate.max_weight)), len(index))
        found["tail_share"] = Quantity.of(float(estimate.suspect.mean()), len(index))
        excess = found["nll_is_excess"].mean
        if excess is not None and estimate.k >= 25:  # where the exact value is known, it decides
            if excess > DRIFT:
                self.alarms.append(
                    f"the importance-sampled -log p(x) is {excess:.2f} nats above the exact one, on the same images"
                )
        elif estimate.warning:
            self.alarms.append(estimate.warning)

    def gap(self, images: int) -> None:
        """gap, approximation_gap and amortisation_gap, on some of the images whose log p(x) is known."""
        names = ("gap", "approximation_gap", "amortisation_gap")
        if "log_px" in self.per_image:
            log_px, index = self.per_image["log_px"], np.arange(len(self.x))
        elif "log_px_is" in self.per_image:
            log_px, index = self.per_image["log_px_is"], self.per_image["is_images"]
        else:
            self.found |= dict.fromkeys(names, Quantity.missing(self.found["nll_is"].reason))
            return
        some = evenly(images, len(index))
        log_px, index = log_px[some], index[some]
        try:
            split = split_gap(
                self.model, self.x[index], log_px, c=self.labels(index), seed=self.seed,
                on_progress=lambda done: self.on_progress("gaps of the bound", done),
            )  # fmt: skip
        except (UsageError, NoDensity) as error:
            self.found |= dict.fromkeys(names, Quantity.missing(str(error)))
            if "elbo" in self.per_image:
                self.found["gap"] = Quantity.over_images(log_px - self.per_image["elbo"][index], index)
            return
        for name, values in zip(names, (split.gap, split.approximation, split.amortisation), strict=True):
            self.found[name] = Quantity.over_images(values, index)

    def _bits(self, source: str, nats: Quantity, sign: int = 1) -> None:
        """Bits per dimension of a quantity in nats per image."""
        name = "bits_per_dim" if source == "nll" else f"bits_per_dim_{source.removeprefix('nll_')}"
        offset = self.protocol.bits_offset
        if nats.mean is None or offset is None:
            reason = nats.reason or f"protocol '{self.protocol.name}' has no bits: its pixels have no reference measure"
            self.found[name] = Quantity(None, reason=reason, n=nats.n)
            return
        unit = math.log(2) * self.x[0].numel()
        se = None if nats.se is None else nats.se / unit
        self.found[name] = Quantity(sign * nats.mean / unit + offset, se, nats.n)
