"""What the bound loses, and to what: the gap of the ELBO and its two parts.

    gap            =  log p(x) - elbo  =  KL(q(z|x) || p(z|x))
    approximation  =  log p(x) - max over q of the posterior's family of elbo(q)      the family cannot do better
    amortisation   =  gap - approximation                                             the encoder could

(Cremer, Li & Duvenaud 2018, arXiv 1801.03558, eqs. 5 to 7). The first falls with a richer posterior (full covariance, a
flow), the second with a larger encoder or a longer training. The bound falls short for other reasons that are not here:
the decoder is what it is, since log p(x) is that of this model.

The best q of the family is searched for each image by Adam, from the encoder's: shifts in units of its own scale, and
factors on the scale. Gradients are those of sticking the landing (Roeder et al. 2017, arXiv 1703.09194): their noise
vanishes where q is the true posterior. One set of fresh samples decides for each image whether the end or the start is
better, another gives the two bounds, as means of log p(x, z) - log q(z|x), with the same noise for both. What the search
misses counts as approximation: so that part is an upper bound, and amortisation a lower one, up to their noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vaelab.distributions import Delta, DiagGaussian, Distribution, FullGaussian, Laplace
from vaelab.errors import NoDensity, UsageError
from vaelab.evaluation.quantity import to_numpy
from vaelab.models.vae import VAE
from vaelab.rng import stream
from vaelab.training import evaluating

TOGETHER = 50
"""Images whose posteriors are optimised at once."""
AT_ONCE = 20
"""Samples of each that are decoded at once for the final bounds."""


@dataclass(frozen=True)
class Gaps:
    """Gaps of N images, arrays (N,) in nats.

    Attributes:
        gap: log p(x) - elbo of the encoder's posterior.
        approximation: log p(x) - elbo of the best posterior found.
        amortisation: their difference.
        se: standard error of each image's elbo of the best posterior, from its samples.
    """

    gap: np.ndarray
    approximation: np.ndarray
    amortisation: np.ndarray
    se: np.ndarray


def split_gap(
    model: VAE,
    x: Tensor,
    log_px: np.ndarray,
    *,
    c: Tensor | None = None,
    seed: int = 0,
    steps: int = 300,
    samples: int = 8,
    lr: float = 0.05,
    fresh: int = 500,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Gaps:
    """Split the gap of the bound for each image.

    Args:
        model: with a Gaussian (diagonal or full) or Laplace posterior.
        x: images (N, *X).
        log_px: log p(x) of each (N,), exact or well estimated; log p(x|c) in a conditional model.
        c: labels (N,) of a conditional model.
        seed: of all samples.
        steps: of Adam for each image.
        samples: of the posterior in each step.
        lr: of the first step, in the encoder's own scales; falls linearly to zero.
        fresh: samples of each posterior for the bounds; half as many choose between start and end.
        on_progress: called with the fraction done.

    Raises:
        NoDensity: a Dirac posterior, or a prior without a density.
        UsageError: a posterior whose family is not searched, or a number below one.
    """
    for name, value in (("steps", steps), ("samples", samples), ("fresh", fresh), ("the number of images", len(x))):
        if value < 1:
            raise UsageError(f"{name} is {value}: expected an integer of 1 or more")
    x = x.to(model.device)
    found = []
    with evaluating(model):
        for i, part in enumerate(x.split(TOGETHER)):
            label = None if c is None else c[i * TOGETHER : i * TOGETHER + len(part)].to(x.device)
            joint = _Joint(model, part, label)
            start = model.encode(part, label)

            def told(done: float, i: int = i, n: int = len(part)) -> None:
                on_progress((i * TOGETHER + n * done) / len(x))

            noise = stream(seed, "gap-search", i, device=x.device)
            end = _search(start, joint, steps, samples, lr, noise, told)
            better = _mean(joint, end, fresh // 2 + 1, seed, "gap-choose", i) > _mean(
                joint, start, fresh // 2 + 1, seed, "gap-choose", i
            )
            at_start = _log_w(joint, start, fresh, seed, "gap-value", i)
            at_best = torch.where(better, _log_w(joint, end, fresh, seed, "gap-value", i), at_start)
            se = at_best.std(0) / fresh**0.5 if fresh > 1 else torch.full_like(at_best[0], torch.nan)
            found.append(np.stack([to_numpy(at_start.mean(0)), to_numpy(at_best.mean(0)), to_numpy(se)]))
    start_bound, best_bound, se = np.concatenate(found, 1)
    return Gaps(log_px - start_bound, log_px - best_bound, best_bound - start_bound, se)


@dataclass(frozen=True, eq=False)
class _Joint:
    """p(x, z) of some images as a function of z."""

    model: VAE
    x: Tensor
    c: Tensor | None

    def __call__(self, z: Tensor) -> Tensor:
        """log p(x, z) at codes z (K, B, *D), (K, B)."""
        return self.model.decode(z, self.c).log_prob(self.x) + self.model.latent_prior(self.c).log_prob(z)


def _search(
    start: Distribution, joint: _Joint, steps: int, samples: int, lr: float, noise: torch.Generator,
    told: Callable[[float], None],
) -> Distribution:  # fmt: skip
    """The posterior of start's family with the highest bound for each image that Adam finds."""
    moves = [torch.zeros_like(t).requires_grad_() for t in _coordinates(start)]
    # near the optimum the bound's curvature is 1 to 2 nats in units of the scale: with this eps steps of lr / eps = 1/2
    # times a small gradient converge, where Adam's own would make full steps of gradients that are only rounding
    adam = torch.optim.Adam(moves, lr=lr, betas=(0.9, 0.99), eps=2 * lr)
    with torch.enable_grad():
        for step in range(steps):
            q = _moved(start, *moves)
            z = q.rsample(samples, noise)
            bound = (joint(z) - q.detach().log_prob(z)).mean(0).sum()
            for move, grad in zip(moves, torch.autograd.grad(-bound, moves), strict=True):
                move.grad = grad
            adam.param_groups[0]["lr"] = lr * (1 - step / steps)
            adam.step()
            told((step + 1) / steps)
    return _moved(start, *(move.detach() for move in moves))


def _coordinates(q: Distribution) -> tuple[Tensor, ...]:
    """Tensors of the shapes of a family's coordinates: of the location and of the scale."""
    if isinstance(q, DiagGaussian):
        return q.mean_, q.log_std.expand_as(q.mean_)
    if isinstance(q, Laplace):
        return q.loc, q.log_scale.expand_as(q.loc)
    if isinstance(q, FullGaussian):
        return q.mean_, q.scale_tril
    if isinstance(q, Delta):
        q.log_prob(q.point)  # says that it has no density
    raise UsageError(
        f"the best posterior of the family {type(q).__name__} is not searched for: the gap is split for diagonal and full "
        "Gaussians and for Laplace posteriors"
    )


def _moved(q: Distribution, shift: Tensor, scale: Tensor) -> Distribution:
    """q with its location shifted by so many of its scales, and its scale changed; zeros change nothing."""
    if isinstance(q, DiagGaussian):
        return replace(q, mean_=q.mean_ + q.std * shift, log_std=q.log_std + scale)
    if isinstance(q, Laplace):
        return replace(q, loc=q.loc + q.log_scale.exp() * shift, log_scale=q.log_scale + scale)
    if isinstance(q, FullGaussian):
        factor = scale.tril(-1) + torch.diag_embed(scale.diagonal(dim1=-2, dim2=-1).exp())
        mean = q.mean_ + (q.scale_tril @ shift.unsqueeze(-1)).squeeze(-1)
        return replace(q, mean_=mean, scale_tril=q.scale_tril.tril() @ factor)
    raise NoDensity(f"{type(q).__name__} has no scale")


def _log_w(joint: _Joint, q: Distribution, k: int, seed: int, name: str, i: int) -> Tensor:
    """log p(x, z) - log q(z|x) (K, B) at fresh samples, float64; the same noise for every q of a family."""
    noise = stream(seed, name, i, device=joint.x.device)
    found = []
    for start in range(0, k, AT_ONCE):
        z = q.rsample(min(AT_ONCE, k - start), noise)
        found.append((joint(z) - q.log_prob(z)).double())
    return torch.cat(found)


def _mean(joint: _Joint, q: Distribution, k: int, seed: int, name: str, i: int) -> Tensor:
    return _log_w(joint, q, k, seed, name, i).mean(0)
