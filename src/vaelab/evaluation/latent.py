"""The latent space as a whole: what the codes carry, and how their aggregate differs from the prior.

The aggregate posterior of N images is the mixture q(z) = 1/N sum_j q(z|x_j). With n an image's number, drawn uniformly,
the rate splits in two ("ELBO surgery", Hoffman & Johnson 2016), and the second part again (Chen et al. 2018,
arXiv 1802.04942, eq. 2):

    rate  =  I_q(x; z)  +  KL(q(z) || p(z))              I_q = E log q(z|x) - log q(z)
    total correlation   =  KL(q(z) || prod_d q(z_d))

I_q is what a code tells about which image it came from; KL(q(z) || p(z)) is the cost of a prior that is not the
aggregate, paid in the bound and seen in samples from where no image is coded ("prior holes"). A unit is *active* where
the posterior mean moves with the image: Var_x E_q[z_d] > 0.01 (Burda et al. 2016, arXiv 1509.00519, section 5.2).

How it is measured
    One z is drawn for an image, and log q(z) is the exact mixture over the N evaluated images, the image's own component
    included: no minibatch estimate (which for N = 10^4 and a batch of 100 is wrong by nats). All four terms are means
    over the same z, so that rate = I + KL to rounding.
What it says about other images
    For these N images the numbers are exact but for the noise of z. For the distribution the images come from, they are
    biased: I_q cannot exceed log N, and is in expectation a lower bound on the population's (it is InfoNCE with the true
    conditional); leaving the image's own component out gives an upper bound (Poole et al. 2019, arXiv 1905.06922, eqs. 12
    and 13). So the two bracket I_q, and with their signs turned KL(q(z) || p(z)), since the rate has no such bias. With 20
    dimensions and a rate of 25 nats the upper end is useless for any N one can pay for. A second lower bound on the KL
    has no such trouble: KL(q(z) || p(z)) >= E_q log r(z) - log p(z) for any density r, here ten Gaussians fitted to half
    of the samples, with the mean over the other half. The larger of the two is reported, and decides the alarm.

A conditional model has q(z|c) and p(z|c): each mixture runs over the images of one label, and all terms are means over
labels and images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from vaelab import fitted
from vaelab.distributions import DiagGaussian, Distribution, FullGaussian, Transformed, closed_form_kl
from vaelab.errors import NoDensity, UsageError
from vaelab.evaluation.codes import features_of, outside_prior
from vaelab.evaluation.quantity import Quantity, evenly, to_numpy
from vaelab.models.vae import VAE
from vaelab.native.shares import log_sums
from vaelab.rng import stream
from vaelab.training import evaluating

ACTIVE = 0.01
"""A unit is active where the variance over images of its posterior mean is above this (in a prior of variance 1)."""
WORK = 4 * 10**8
"""At most so many one-dimensional log densities are computed for the marginals' mixtures: some 2 s of one core."""
WORK_JOINT = 2 * 10**6
"""At most so many joint log densities of posteriors that do not factorise."""
COLLAPSED = 0.1
"""A mean rate below this many nats is called a collapse."""
HOLE = 1.0
"""KL(q(z) || p(z)) of at least so many nats is called a hole: what the bound would gain from a prior that fits."""
OUTSIDE = 0.05
"""A share of codes above this outside the region that holds 98.9 % of the prior raises an alarm."""

ROWS, ROWS_JOINT = 16, 100
"""Samples whose densities under all components are held at once: of one dimension, in the processor's cache; of all."""
COMPONENTS = 10
"""Of the mixture that bounds KL(q(z) || p(z)) from below; fewer for few samples."""

NAMES = ("mutual_information", "mutual_information_upper", "aggregate_kl", "aggregate_kl_lower", "total_correlation")


@dataclass(frozen=True, eq=False)
class Aggregate:
    """Log densities of M samples z_i ~ q(z|x_i), in float64 nats, (M,) each; z is (M, D).

    Attributes:
        given_x: log q(z_i | x_i).
        mixture: log q(z_i), over all images of the group.
        others: the same without the image's own component.
        prior: log p(z_i); None where the prior has no density.
        factors: sum over d of log q(z_{i,d}), of the first samples only; None where the marginals are not known.
        z: the samples.
    """

    given_x: np.ndarray
    mixture: np.ndarray
    others: np.ndarray
    prior: np.ndarray | None
    factors: np.ndarray | None
    z: np.ndarray


def measure(
    model: VAE,
    x: Tensor,
    c: Tensor | None = None,
    *,
    seed: int = 0,
    images: int = 10_000,
    on_progress: Callable[[float], None] = lambda done: None,
) -> tuple[dict[str, Quantity], list[str]]:
    """What the codes of images (N, *X) carry, and alarms in words.

    Args:
        model: in any state; measured in evaluation mode.
        x: the test images, as the protocol gives them.
        c: labels (N,) of a conditional model.
        seed: of the posterior samples.
        images: at most so many of the images, evenly spaced, make the aggregate posterior.
        on_progress: called with the fraction done.

    Returns:
        Quantities `active_units`, `rate_dim_0` ... (nats, over images), `mutual_information` and its upper bound,
        `aggregate_kl` and its lower bound, `total_correlation` (nats; s.e. over the samples z), each n/a with the reason
        where it does not exist; and the alarms, one sentence each.
    """
    x, c = x.to(model.device), None if c is None else c.to(model.device)
    with evaluating(model):
        features = features_of(model, x, c)
        means = to_numpy(model.posterior(features).mean)
        dims = [f"rate_dim_{d}" for d in range(means.shape[1])]
        names = ("active_units", *dims, *NAMES)
        if not np.isfinite(means).all():
            return dict.fromkeys(names, Quantity.over_images(means.sum(1))), []
        groups = np.zeros(len(x), int) if c is None else c.cpu().numpy()
        found = {"active_units": active_units(*_means(model, features, seed), groups)}
        found |= _rate_of_each(model, features, c, dims)
        parts, reason = [], ""
        try:
            some = evenly(images, len(x))
            parts = aggregates(model, features[some], groups[some], seed, on_progress)
        except (NoDensity, UsageError) as error:
            reason = str(error)
        found |= _surgery(parts, seed) if parts else dict.fromkeys(NAMES, Quantity.missing(reason))
        return found, alarms(found, parts, outside_prior(model, means, c, seed))


def active_units(one: np.ndarray, other: np.ndarray, groups: np.ndarray) -> Quantity:
    """How many latent dimensions have a posterior mean that varies by more than `ACTIVE` within each group of images.

    Args:
        one: posterior means (N, D), or independent estimates of them, whose noise the covariance with `other` leaves out.
        other: the same again.
        groups: labels (N,), or zeros.
    """
    covariance = np.zeros(one.shape[1])
    for label in np.unique(groups):
        a, b = one[groups == label], other[groups == label]
        covariance += ((a - a.mean(0)) * (b - b.mean(0))).sum(0) / len(one)
    return Quantity.of(int((covariance > ACTIVE).sum()), len(one))


def _means(model: VAE, features: Tensor, seed: int, draws: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """E_q[z] of each image twice; of a flow, where it has no closed form, two independent means of draws."""
    q = model.posterior(features)
    if not isinstance(q, Transformed):
        return to_numpy(q.mean), to_numpy(q.mean)
    noise = stream(seed, "means", device=features.device)
    one, other = (to_numpy(torch.stack([q.rsample(1, noise)[0] for _ in range(draws)]).mean(0)) for _ in range(2))
    return one, other


def _rate_of_each(model: VAE, features: Tensor, c: Tensor | None, names: list[str]) -> dict[str, Quantity]:
    kl = closed_form_kl(model.posterior(features), model.latent_prior(c))
    if kl is None or kl.shape[-1] != len(names):
        reason = "the rate of this posterior and this prior has no closed form that is a sum over latent dimensions"
        return dict.fromkeys(names, Quantity.missing(reason))
    each = to_numpy(kl)
    return {name: Quantity.over_images(each[:, d]) for d, name in enumerate(names)}


def aggregates(
    model: VAE,
    features: Tensor,
    groups: np.ndarray,
    seed: int,
    on_progress: Callable[[float], None] = lambda done: None,
) -> list[Aggregate]:
    """The densities of samples of q(z|x) under their mixture, one `Aggregate` for each group of images.

    Where all pairs would be more than `WORK`, fewer samples are drawn; the mixtures always run over all images.

    Args:
        model: in evaluation mode.
        features: of all images (N, F), see `features_of`.
        groups: labels (N,), or zeros; a group of one image has no mixture and is left out.
        seed: of the samples.
        on_progress: called with the fraction done.

    Raises:
        NoDensity: a Dirac posterior.
        UsageError: no group of at least two images.
    """
    factorised = _factorises(model, features)
    if not factorised:
        some = evenly(math.isqrt(WORK_JOINT), len(features))
        features, groups = features[some], groups[some]
    labels, sizes = np.unique(groups, return_counts=True)
    labels, sizes = labels[sizes > 1], sizes[sizes > 1]
    if not len(labels):
        raise UsageError("the aggregate posterior needs at least two images (of one label, in a conditional model)")
    work = int((sizes.astype(float) ** 2).sum()) * model.latent_dim
    noise, parts = stream(seed, "aggregate", device=features.device), []
    for i, (label, size) in enumerate(zip(labels, sizes, strict=True)):
        index = torch.from_numpy(np.flatnonzero(groups == label)).to(features.device)
        # in random order: samples are of the first images only where all would take too long
        q = model.posterior(features[index[torch.randperm(len(index), generator=noise, device=index.device)]])
        z = q.draw(1, noise)[0][0]
        few = int(max(2, min(size, size * WORK / work)))
        if factorised and not isinstance(q, DiagGaussian):  # which alone has its joint densities as a matrix product
            z = z[:few]
        c = torch.full((len(z),), int(label), device=z.device) if model.classes is not None else None
        try:
            prior = to_numpy(model.latent_prior(c).log_prob(z.unsqueeze(0))[0])
        except NoDensity:
            prior = None
        joint = _mixture(q, z)
        marginal = _marginals(q, factorised)
        factors = None if marginal is None else _factors(marginal, z[:few])
        parts.append(Aggregate(*joint, prior, factors, to_numpy(z)))
        on_progress((i + 1) / len(labels))
    return parts


def _factorises(model: VAE, features: Tensor) -> bool:
    """Whether the posterior is a product over dimensions. Raises NoDensity for a Dirac."""
    q = model.posterior(features[:2])
    z, log_q = q.draw(1, stream(0, "probe", device=features.device))
    if log_q is None:
        q.log_prob(z)
    try:
        q.log_prob_each(z)
    except UsageError:
        return False
    return True


def _mixture(q: Distribution, z: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of z (M, D), drawn from the first M of the N components of q: log densities under its own component, under the
    mixture of all and under that of all others."""
    n, rows = len(q.mean), []
    for start in range(0, len(z), ROWS_JOINT):
        pairs = q.log_prob_all(z[start : start + ROWS_JOINT])
        own = (torch.arange(len(pairs)), torch.arange(start, start + len(pairs)))
        given_x, mixture = pairs[own], log_sums(pairs)
        pairs[own] = -math.inf
        columns = (given_x, mixture - math.log(n), log_sums(pairs) - math.log(n - 1))
        rows.append(torch.stack([column.double().cpu() for column in columns]))
    given_x, mixture, others = torch.cat(rows, 1).numpy()
    return given_x, mixture, others


def _factors(marginal: Distribution, z: Tensor) -> np.ndarray:
    """sum over d of log q(z_d) for z (M, D), each the mixture of N one-dimensional components."""
    total = np.full(len(z), -z.shape[1] * math.log(len(marginal.mean)))
    for d in range(z.shape[1]):
        one = _dimension(marginal, d)
        parts = z[:, None, d : d + 1].split(ROWS)
        total += to_numpy(torch.cat([log_sums(one.log_prob_each(part)[..., 0]) for part in parts]))
    return total


def _marginals(q: Distribution, factorised: bool) -> Distribution | None:
    """The marginals of each dimension, as one distribution that factorises; None where they are not known."""
    if isinstance(q, FullGaussian):
        return DiagGaussian(q.mean, q.scale_tril.tril().square().sum(-1).sqrt().log())
    return q if factorised else None


def _dimension(q: Distribution, d: int) -> Distribution:
    """One dimension of a distribution that factorises, (N, 1)."""
    tensors = [f.name for f in fields(q) if isinstance(getattr(q, f.name), Tensor)]
    return replace(q, **{name: getattr(q, name)[..., d : d + 1].contiguous() for name in tensors})


def _surgery(parts: list[Aggregate], seed: int) -> dict[str, Quantity]:
    given_x, mixture, others = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("given_x", "mixture", "others")
    )
    # the density that bounds: whichever of the two gives the samples that both can judge more mass
    bounding, rows = others, np.full(len(others), True)
    fits = [_held_out(part, seed) for part in parts]
    if all(fit is not None for fit in fits):
        held = np.concatenate([fit for fit in fits if fit is not None])
        if held[~np.isnan(held)].mean() > others[~np.isnan(held)].mean():
            bounding, rows = held, ~np.isnan(held)
    factors = [part.mixture[: len(part.factors)] - part.factors for part in parts if part.factors is not None]
    found = {
        "mutual_information": Quantity.over_images(given_x - mixture),
        "mutual_information_upper": Quantity.over_images((given_x - bounding)[rows]),
        "total_correlation": Quantity.over_images(np.concatenate(factors))
        if factors
        else Quantity.missing("the marginals of this posterior's dimensions are not known in closed form"),
    }
    priors = [part.prior for part in parts if part.prior is not None]
    if len(priors) < len(parts):
        reason = "the prior has no density, so how far the aggregate posterior is from it is not known"
        return found | dict.fromkeys(("aggregate_kl", "aggregate_kl_lower"), Quantity.missing(reason))
    prior = np.concatenate(priors)
    found["aggregate_kl"] = Quantity.over_images(mixture - prior)
    found["aggregate_kl_lower"] = Quantity.over_images((bounding - prior)[rows])
    return found


def _held_out(part: Aggregate, seed: int) -> np.ndarray | None:
    """log r(z) of the half of the samples that the mixture r was not fitted to, NaN for the half it was; None where
    there are too few samples for a fit."""
    half, dim = len(part.z) // 2, part.z.shape[1]
    components = min(COMPONENTS, half // (20 * dim))
    if components < 1 or not np.isfinite(part.z).all():
        return None
    try:
        r = fitted.maximum_likelihood(part.z[:half], components, seed)
    except (np.linalg.LinAlgError, ValueError):  # codes on a line or a point
        return None
    log_r = r.log_prob(torch.from_numpy(part.z[half:]).unsqueeze(0))[0].numpy()
    return np.concatenate([np.full(half, np.nan), log_r])


def alarms(found: dict[str, Quantity], parts: list[Aggregate], outside: Quantity) -> list[str]:
    """What is wrong with the latent space, a sentence each.

    Collapse: a rate below `COLLAPSED`, or no active unit; fewer than half of the units active is said, too. Hole: the
    lower bound on KL(q(z) || p(z)) is above `HOLE` by two standard errors. Codes outside: a share above `OUTSIDE`.
    """
    said = []
    dims = sum(name.startswith("rate_dim_") for name in found)
    rates = [part.given_x - part.prior for part in parts if part.prior is not None]
    rate = float(np.concatenate(rates).mean()) if rates else math.inf
    active, hole = found["active_units"].mean, found["aggregate_kl_lower"]
    if active == 0 or rate < COLLAPSED:
        said.append(
            f"posterior collapse: {active:.0f} of {dims} latent dimensions are active"
            + (f" and the rate is {rate:z.2f} nats" if rates else "")
            + ", so the code says next to nothing about the image; try KL warm-up, free bits or a weaker decoder"
        )
    elif active is not None and active < dims / 2:
        said.append(f"only {active:.0f} of {dims} latent dimensions are active: the others carry nothing")
    if hole.mean is not None and hole.mean - 2 * (hole.se or 0.0) > HOLE:
        said.append(
            f"prior hole: KL(q(z) || p(z)) is at least {hole.mean:.1f} nats, so samples of the prior fall where no image "
            "is coded; fit a prior to the codes (vaelab fit-prior), or give the KL term more weight"
        )
    if outside.mean is not None and outside.mean > OUTSIDE:
        said.append(
            f"codes outside the prior: {100 * outside.mean:.0f} % of them lie outside the region that holds 98.9 % of its "
            "mass (1.1 % would)"
        )
    return said
