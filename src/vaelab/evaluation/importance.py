"""log p(x) by importance sampling, with what tells whether to believe it.

    w_k = p(x, z_k) / r(z_k),  z_k ~ r          L_K = E log (1/K) sum_k w_k  <=  log p(x)

L_K rises with K to log p(x) (Burda et al. 2016, arXiv 1509.00519, theorem 1), where the weights have a variance like
-Var(w / p(x)) / 2K (Domke & Sheldon 2018, arXiv 1808.09856). So a number without its K says nothing, and the curve over
K is reported with it. One set of K samples gives the whole curve: L_k is averaged over all disjoint groups of k of them.

Proposals r(z)
    posterior   q(z|x) of the encoder. Fitted to be narrower than p(z|x), so its weights have a heavy tail: the estimate
                is too low, and its own spread does not show it.
    widened     q with its scale times 1.5; for posteriors with a scale.
    defensive   0.9 q(z|x) + 0.1 p(z), the density of the mixture below every weight (balance heuristic), whichever part
                drew the sample (Hesterberg 1995; Veach & Guibas 1995): no weight exceeds 10 p(x|z). Every tenth sample is
                the prior's, counted from a random place: each sample by itself is one of the mixture, so sums over any
                number of them are unbiased, and tens of them hold the exact shares.

What tells
    ess          (sum w)^2 / sum w^2, between 1 and K (Kong 1992)
    max_weight   the share of the largest weight in the sum
    tail         the Pareto index of the largest weights (Vehtari et al. 2015, arXiv 1507.02646): above 1/2 the variance of
                 the weights is not finite, above 0.7 no practical number of samples is enough
    drift        L_K - L_{K/10}: what the last tenfold of samples gained

Each image is measured by itself, with noise that depends on the seed, on the image (its pixels and label, not its place)
and on the block of samples: batch, order and `chunk` change nothing but the last bits. K is streamed: of a sample, one
number is kept.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vaelab.distributions import Delta, DiagGaussian, Distribution, FullGaussian, Laplace
from vaelab.errors import UsageError, unknown_name
from vaelab.evaluation.quantity import to_numpy
from vaelab.likelihoods import Bernoulli
from vaelab.models.vae import VAE
from vaelab.native.scoring import Scorer
from vaelab.precision import Precision, of_decoding
from vaelab.rng import stream, stream_seed
from vaelab.training import evaluating

Result = TypeVar("Result")
Score = Callable[[Tensor, Tensor | None, Tensor], Tensor]

PROPOSALS = ("posterior", "widened", "defensive")
CURVE = (1, 50, 500, 5000)
"""The K at which published numbers are given."""
BLOCK = 1000
"""Samples that share one stream of noise."""
CHUNK = 500
"""Codes of Bernoulli pixels decoded at once: many enough for fast matrix products, few enough to stay near the processor. Half
as many where a pixel has several numbers."""
WIDENING = 1.5
EVERY = 10
"""One sample in so many is the prior's, in the defensive proposal."""
DRIFT = 0.1
"""A mean gain of the last tenfold of samples above this (nats) is warned of."""
SUSPECT_SHARE = 0.05
"""A share of images with too heavy a tail above this is warned of."""


@dataclass(frozen=True)
class ImportanceSampled:
    """Estimates of log p(x), arrays (N,) in nats; not finite where a model's densities are not.

    Attributes:
        log_px: L_K with all K samples.
        curve: L_k by k, those of `CURVE` up to K, and K: means over the K // k disjoint groups of k samples.
        tenth: L_k with a tenth of the samples.
        ess: effective sample size, 1 to K.
        max_weight: share of the largest weight, 1/K to 1.
        tail: Pareto index of the weights; -inf where they have no tail, NaN where K is below 25.
        k: samples for each image.
        proposal: a name of `PROPOSALS`.
        seed: of the samples.
    """

    log_px: np.ndarray
    curve: dict[int, np.ndarray]
    tenth: np.ndarray
    ess: np.ndarray
    max_weight: np.ndarray
    tail: np.ndarray
    k: int
    proposal: str
    seed: int

    @property
    def se(self) -> float:
        """Standard error of the mean of log_px over images, in nats; NaN for one image."""
        return float(self.log_px.std(ddof=1) / math.sqrt(len(self.log_px))) if len(self.log_px) > 1 else math.nan

    @property
    def median_ess(self) -> float:
        return float(np.median(self.ess))

    @property
    def worst_ess(self) -> float:
        return float(self.ess.min())

    @property
    def drift(self) -> float:
        """What the last tenfold of samples gained, mean over images in nats."""
        return float((self.log_px - self.tenth).mean())

    @cached_property
    def suspect(self) -> np.ndarray:
        """Images (N,) whose weights have a tail too heavy for K: an index above min(1 - 1 / log10 K, 0.7).

        The threshold is that of Vehtari et al. 2015 (arXiv 1507.02646, section 3.2.4 of its last version).
        """
        return self.tail > (min(1 - 1 / math.log10(self.k), 0.7) if self.k > 10 else math.inf)

    @property
    def warning(self) -> str:
        """In words why the estimate cannot be trusted; empty where nothing speaks against it."""
        if not np.isfinite(self.log_px).all():
            return "importance weights are not finite: no estimate"
        if self.k < 25:
            return (
                f"{self.k} samples for each image are too few to tell whether the importance-sampled log p(x) is right"
            )
        reasons = []
        if self.drift > DRIFT:
            reasons.append(f"it still rose by {self.drift:.2f} nats from {self.k // 10:,} to {self.k:,} samples")
        if self.suspect.mean() > SUSPECT_SHARE:
            reasons.append(
                f"the weights of {self.suspect.mean():.0%} of the images have too heavy a tail for {self.k:,}"
            )
        if not reasons:
            return ""
        others = " or ".join(f"'{name}'" for name in PROPOSALS[1:] if name != self.proposal)
        return (
            f"the importance-sampled log p(x) {'is' if self.drift > DRIFT else 'may be'} too low: "
            f"{', and '.join(reasons)} (median effective sample size {self.median_ess:.1f}, "
            f"worst {self.worst_ess:.1f}); take more samples, or try the proposal {others}"
        )


def importance_sampled(
    model: VAE,
    x: Tensor,
    k: int = 5000,
    *,
    c: Tensor | None = None,
    seed: int = 0,
    proposal: str = "posterior",
    precision: str = "float32",
    chunk: int | None = None,
    on_progress: Callable[[float], None] = lambda done: None,
) -> ImportanceSampled:
    """log (1/K) sum_k p(x, z_k) / r(z_k) for each image: see the module's notes.

    Args:
        model: any model whose posterior and prior have densities.
        x: images (N, *X).
        k: samples for each image.
        c: labels (N,) of a conditional model; then it is log p(x|c).
        seed: of the samples.
        proposal: a name of `PROPOSALS`.
        precision: of decoding: float32, bfloat16 (Bernoulli pixels only; half the time), or auto: see `vaelab.precision`.
        chunk: codes decoded at once, `CHUNK` or half of it if None: bounds the memory, and changes no result.
        on_progress: called with the fraction done.

    Raises:
        NoDensity: a Dirac posterior, or a prior without a density.
        UsageError: k, chunk or the number of images below one, an unknown proposal, or one this posterior cannot give;
            bfloat16 for pixels that are not Bernoulli.
    """
    for name, value in (("k", k), ("chunk", chunk), ("the number of images", len(x))):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: expected an integer of 1 or more")
    if proposal not in PROPOSALS:
        raise unknown_name("proposal", proposal, PROPOSALS)
    decoding = of_decoding(precision, isinstance(model.likelihood, Bernoulli), model.device)
    x = x.to(model.device)
    curve = [*(size for size in CURVE if size < k), k]
    sizes = [*curve, max(1, k // 10)]
    with evaluating(model), decoding.networks(model.likelihood):
        labels: list[Tensor | None] = [None] * len(x) if c is None else list(c.to(model.device).split(1))
        # a prior made of pseudo-inputs costs as much as many images: one for each label
        kinds = [-1 if label is None else int(label) for label in labels]
        first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
        priors = {kind: model.latent_prior(labels[i]) for kind, i in first.items()}
        score = (Scorer.of(model.likelihood) if decoding.name == "bfloat16" else None) or partial(_score, model)
        codes = chunk or (CHUNK if isinstance(model.likelihood, Bernoulli) else CHUNK // 2)

        def measure(i: int) -> tuple[list[float], list[float]]:
            with torch.no_grad():
                log_w = _log_weights(
                    model, x[i : i + 1], labels[i], priors[kinds[i]], k, seed, proposal, codes, decoding, score
                )
                return [_bound(log_w, size) for size in sizes], [*_spread(log_w), _pareto_index(to_numpy(log_w))]

        results = []
        for result in _each(measure, len(x), model.device):
            results.append(result)
            on_progress(len(results) / len(x))
    bounds, told = zip(*results, strict=True)
    *along, tenth = np.array(bounds).T
    ess, max_weight, tail = np.array(told).T
    return ImportanceSampled(
        along[-1], dict(zip(curve, along, strict=True)), tenth, ess, max_weight, tail, k, proposal, seed
    )


def _each(measure: Callable[[int], Result], n: int, device: torch.device) -> Iterator[Result]:
    """measure(0), ..., measure(n - 1) in order, by as many threads as torch has, with one thread of torch's each.

    Images side by side instead of torch's own threads inside each product: they do not wait for each other, which on a
    processor that is shared is several times faster, and never slower.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield from map(measure, range(n))
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(measure, range(n))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _score(model: VAE, z: Tensor, c: Tensor | None, image: Tensor) -> Tensor:
    """log p(x|z) of one image (1, *X) for codes z (1, G, *D): (G,)."""
    return model.decode(z, c).cross_log_prob(image).squeeze(1)


def _log_weights(
    model: VAE,
    image: Tensor,
    label: Tensor | None,
    p: Distribution,
    k: int,
    seed: int,
    proposal: str,
    chunk: int,
    precision: Precision,
    score: Score,
) -> Tensor:
    """log w (k,) of one image (1, *X), float64."""
    pixels = image.float().cpu().numpy().tobytes() + (b"" if label is None else bytes(str(int(label)), "ascii"))
    key = int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little")
    offset = stream_seed(seed, "importance-offset", key) % EVERY
    q = model.encode(image, label)
    r = widened(q) if proposal == "widened" else q
    found = []
    for block, start in enumerate(range(0, k, BLOCK)):
        noise = stream(seed, "importance", key, block, device=image.device)
        n = min(BLOCK, k - start)
        if proposal == "defensive":
            z, log_r = _defensive(q, p, (torch.arange(start, start + n) + offset) % EVERY == 0, noise)
        else:
            z, log_r = r.draw(n, noise)
            log_r = r.log_prob(z) if log_r is None else log_r
        # one image: its samples take the place of the batch, where a likelihood may have a shorter way for all of them
        with precision.autocast(image.device):
            log_px = [
                score(part.transpose(0, 1), None if label is None else label.expand(len(part)), image)
                for part in z.split(chunk)
            ]
        found.append(((p.log_prob(z) - log_r).squeeze(1) + torch.cat(log_px)).double())
    return torch.cat(found)


def _defensive(q: Distribution, p: Distribution, of_prior: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples z (K, 1, *D) of the mixture, and its log density (K, 1); `of_prior` (K,) says who draws which."""
    theirs = int(of_prior.sum())  # a short block may hold none, and nobody draws no samples
    own = q.draw(max(1, len(of_prior) - theirs), noise)[0][: len(of_prior) - theirs]
    others = p.rsample(max(1, theirs), noise)[:theirs]
    z = own.new_empty(len(of_prior), *own.shape[1:])
    z[~of_prior.to(z.device)] = own
    z[of_prior.to(z.device)] = others.reshape(-1, *own.shape[1:]).to(z)
    of_q, of_p = q.log_prob(z) + math.log(1 - 1 / EVERY), p.log_prob(z) - math.log(EVERY)
    return z, torch.logaddexp(of_q, of_p)


def widened(q: Distribution, factor: float = WIDENING) -> Distribution:
    """A posterior with its scale times `factor`. Raises UsageError where it has none."""
    if isinstance(q, DiagGaussian):
        return replace(q, log_std=q.log_std + math.log(factor))
    if isinstance(q, Laplace):
        return replace(q, log_scale=q.log_scale + math.log(factor))
    if isinstance(q, FullGaussian):
        return replace(q, scale_tril=q.scale_tril * factor)
    if isinstance(q, Delta):
        q.log_prob(q.point)  # says that it has no density
    raise UsageError(
        f"the proposal 'widened' needs a posterior with a scale, and this one is {type(q).__name__}: "
        "choose 'posterior' or 'defensive'"
    )


def _bound(log_w: Tensor, size: int) -> float:
    """L_size: the mean over disjoint groups of `size` samples of the log of their mean weight."""
    groups = log_w[: len(log_w) // size * size].unflatten(0, (-1, size))
    return float(groups.logsumexp(1).mean()) - math.log(size)


def _spread(log_w: Tensor) -> tuple[float, float]:
    """Effective sample size, and the share of the largest weight."""
    share = torch.softmax(log_w, 0)
    return float(1 / share.square().sum()), float(share.max())


def _pareto_index(log_w: np.ndarray) -> float:
    """Index k of the generalised Pareto distribution of the largest weights (Vehtari et al. 2015).

    The tail is the largest min(K / 5, 3 sqrt K) weights; the fit is the approximate posterior mean of Zhang & Stephens
    2009, drawn towards 1/2 with the weight of ten observations.
    """
    size = int(min(len(log_w) / 5, 3 * math.sqrt(len(log_w))))
    if size < 5 or not np.isfinite(log_w.max()):
        return math.nan
    top = np.sort(np.partition(log_w, -size - 1)[-size - 1 :])
    excess = np.exp(top[1:] - top[-1]) - math.exp(top[0] - top[-1])
    quartile = excess[int(size / 4 + 0.5) - 1]
    if excess[-1] < 1e-9 or quartile <= 0:
        return -math.inf
    count = 30 + int(math.sqrt(size))
    theta = 1 / excess[-1] + (1 - np.sqrt(count / (np.arange(1, count + 1) - 0.5))) / (3 * quartile)
    index = np.log1p(-theta[:, None] * excess).mean(1)
    profile = size * (np.log(-theta / index) - index - 1)
    mean_theta = theta @ np.exp(profile - np.logaddexp.reduce(profile))
    return float((size * np.log1p(-mean_theta * excess).mean() + 10 * 0.5) / (size + 10))
