"""Exact log-likelihoods in one or two latent dimensions, by adaptive quadrature over z.

    log p(x) = log of the integral of p(z) p(x|z) over z,   for every image at once

Importance sampling with the encoder's posterior can miss most of this integral (the posterior is fitted to be narrow);
where z has at most two dimensions there is no need to sample. But the integrand needs care: without the KL term the
codes lie twenty prior deviations out, and near the origin p(x|z) changes within a few hundredths. No fixed grid serves.

What is done
    The plane is cut into unit tiles, each with a tensor Gauss-Legendre rule of 8 points a side. Rings of tiles are added
    outwards until, for every image, the ring adds less than 1e-6 of the integral and nothing beyond can matter: the
    prior's tail times the best p(x|z) seen, with 10 nats of slack (an estimate, not a proof), is e^-15 of it. So the
    extent follows the prior, the model and the image. Then each tile that matters to an image (within a margin of its
    total, or containing its code) is split into four, until no split changes an image's integral by more than
    `tolerance`.
How exact the integrand is
    Where the kernels decode (`vaelab.native.shares`), they do so in numbers of 16 bits, if that is allowed and moves log p(x|z) of
    the images at their codes by little (`_decoder`); else, and where torch decodes, in float32.
What remains
    `resolution_error` is the summed change of the last splits, `extent_error` the share of the last ring and the bound on
    what lies beyond, `decoding_error` what the kernels' numbers change at the image's own code. All are reported, in nats, for
    every image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vaelab.distributions import Distribution
from vaelab.errors import UsageError
from vaelab.models.vae import VAE
from vaelab.native.decoder import FINE, FULL, Decoder
from vaelab.native.shares import BinaryImages, Undecoded
from vaelab.priors import StandardNormal
from vaelab.training import evaluating

POINTS = 8
MARGINS = (40.0, 25.0, 15.0)
"""How far below an image's total (nats) a tile may lie and still be split for it: wide while the grid is coarse."""
LOOK = 7.0
"""A tile within so many nats of an image's total is split at least twice for it, whatever the first split changed."""
TOGETHER = 16
"""Split tiles whose nodes are decoded in one go."""
CHECKED = 256
"""Images whose codes are decoded at once to see how exact that is."""
FLOAT32 = 1e-3
"""Nats, as `tolerance`, that float32 may be off by in the kernels: torch is as well."""
BEYOND = 15.0
RESOLVED = 1e-3
"""How far from one a prior's mass on fine tiles may be."""
SLACK = 10.0


@dataclass(frozen=True)
class Quadrature:
    """Exact log-likelihoods with what remains of the error, arrays (N,) in nats.

    Attributes:
        log_px: log p(x) for each image.
        resolution_error: change of log p(x) by the last splitting of the tiles.
        extent_error: share of the outermost ring, and the bound on what lies beyond it.
        decoding_error: how far log p(x|z) at the image's code is from what the model says, where the kernels decode.
        radius: how far from the origin the tiles reach.
        points: decoder evaluations.
        levels: how often the finest tile was split.
        bits: of the numbers that the decoder computed with: 16, or 24 as float32 has.
    """

    log_px: np.ndarray
    resolution_error: np.ndarray
    extent_error: np.ndarray
    decoding_error: np.ndarray
    radius: float
    points: int
    levels: int
    bits: int

    @property
    def error(self) -> np.ndarray:
        """The remaining error of each image, (N,) nats."""
        return self.resolution_error + self.extent_error + self.decoding_error


def log_likelihood(
    model: VAE,
    x: Tensor,
    c: Tensor | None = None,
    *,
    tolerance: float = 1e-3,
    max_levels: int = 7,
    max_radius: float = 60.0,
    precision: str = "float32",
    on_progress: Callable[[float], None] = lambda done: None,
) -> Quadrature:
    """log p(x) of each image (N, *X) under a model with one or two latent dimensions; log p(x|c) in a conditional one.

    Args:
        model: with a prior whose tail has a known bound (Gaussians, Laplace, mixtures of them; no flows).
        x: the images, float32, as the protocol gives them.
        c: labels (N,) of a conditional model; each label is integrated on its own.
        tolerance: largest change of one image's log p(x), in nats, by one split that is accepted.
        max_levels: how often a tile may be split; the error that is left is reported.
        max_radius: where the outward search gives up; the error that is left is reported.
        precision: of the decoder: float32, or auto for 16 bits where they are enough, which takes two thirds of the time.
        on_progress: called with a rough fraction done.

    Raises:
        UsageError: more than two latent dimensions, a prior of unknown tail or without a density, or an unknown precision.
    """
    if model.latent_dim > 2:
        raise UsageError(
            f"quadrature needs one or two latent dimensions and this model has {model.latent_dim}: "
            "use the importance-sampled estimate"
        )
    if precision not in ("auto", "float32"):
        raise UsageError(f"precision is {precision!r}: choose auto or float32")
    x = x.to(model.device)
    with evaluating(model):
        if c is None:
            return _Integral(model, x, None, tolerance, max_levels, precision).run(max_radius, on_progress)
        labels = c.to(x.device)
        parts: dict[int, Quadrature] = {}
        kinds = labels.unique().tolist()
        for label in kinds:
            chosen = labels == label

            def show(done: float, before: int = len(parts)) -> None:
                on_progress((before + done) / len(kinds))

            one = _Integral(model, x[chosen], labels[chosen][:1], tolerance, max_levels, precision)
            parts[label] = one.run(max_radius, show)
        return _together(labels.cpu().numpy(), parts)


def _together(labels: np.ndarray, parts: dict[int, Quadrature]) -> Quadrature:
    """The integrals of all images from those of each label's."""
    arrays = {name: np.empty(len(labels)) for name in ("log_px", "resolution_error", "extent_error", "decoding_error")}
    for label, part in parts.items():
        for name, array in arrays.items():
            array[labels == label] = getattr(part, name)
    return Quadrature(
        **arrays,
        radius=max(part.radius for part in parts.values()),
        points=sum(part.points for part in parts.values()),
        levels=max(part.levels for part in parts.values()),
        bits=min(part.bits for part in parts.values()),
    )


class _Integral:
    """The state of one adaptive integration; sums are kept relative to `reference`, in float64."""

    def __init__(
        self, model: VAE, x: Tensor, label: Tensor | None, tolerance: float, max_levels: int, precision: str
    ) -> None:
        self.precision = precision
        self.model, self.x, self.label, self.tolerance, self.max_levels = model, x, label, tolerance, max_levels
        self.dim, self.n = model.latent_dim, len(x)
        self.prior = model.latent_prior(label)
        self.prior.log_prob(torch.zeros(1, 1, self.dim).to(x))  # raises where there is no density …
        self.prior.log_tail(6.0)  # … or no bound on its tail
        nodes, weights = np.polynomial.legendre.leggauss(POINTS)
        mesh = np.meshgrid(*[nodes] * self.dim, indexing="ij")
        self.nodes = np.stack([m.ravel() for m in mesh], 1) / 2  # in units of the tile's side
        product = np.prod(np.meshgrid(*[weights] * self.dim, indexing="ij"), 0).ravel()
        self.log_weights = np.log(product / 2**self.dim)
        corners = np.meshgrid(*[(-0.25, 0.25)] * self.dim, indexing="ij")
        self.children = np.stack([c.ravel() for c in corners], 1)
        self.points = 0
        self.bits = BinaryImages.of(x)
        self.decoder: Decoder | None = None
        if not isinstance(model.prior, StandardNormal):
            self._check_resolved(x)

    def _check_resolved(self, x: Tensor) -> None:
        """Refuse a prior with peaks that the tiles could fall between: its mass, on tiles of an eighth, must be one.

        Nodes of a tile of an eighth are 0.01 to 0.02 apart. Tiles that look empty are not split, so a mixture with a
        component of deviation 0.004 lost a nat while the error that was told was 1e-4.
        """
        extent, side = 6.0, 1 / 8
        while extent < 40 and self.prior.log_tail(extent) > -12:
            extent += 2
        axis = np.arange(-extent, extent, side) + side / 2
        strips = [axis[:, None]] if self.dim == 1 else [np.stack([axis, np.full_like(axis, y)], 1) for y in axis]
        total = 0.0
        for centres in strips:
            z = torch.from_numpy((centres[:, None, :] + side * self.nodes).reshape(-1, self.dim)).to(x)
            log_pz = _numpy(self.prior.log_prob(z.unsqueeze(1))).ravel()
            log_weights = np.tile(self.log_weights, len(centres)) + self.dim * math.log(side)
            total += float(np.exp(log_pz + log_weights).sum())
        if abs(total - 1) > RESOLVED:
            raise UsageError(
                f"the prior is too sharply peaked for quadrature (on fine tiles its mass is {total:.3f} in place of 1): "
                "use the importance-sampled estimate"
            )

    def run(self, max_radius: float, on_progress: Callable[[float], None]) -> Quadrature:
        codes, best = self._codes()
        self.decoder, decoding = self._decoder(codes, best)
        tiles, values, ring_share, beyond, radius = self._expand(codes, best, max_radius)
        on_progress(0.5)
        reference = np.full(self.n, -np.inf)
        for _, images, value in zip(tiles, *values, strict=True):
            reference[images] = np.logaddexp(reference[images], value)
        total, error = np.zeros(self.n), np.zeros(self.n)
        for images, value in zip(*values, strict=True):
            total[images] += np.exp(value - reference[images])

        side, level = 1.0, 0
        work = [
            (centre, *self._important(centre, side, images, value, reference, codes, MARGINS[0]))
            for centre, images, value in zip(tiles, *values, strict=True)
        ]
        while level < self.max_levels:
            work = [w for w in work if len(w[1])]
            if not work:
                break
            level += 1
            work = self._split(work, side, level, total, error, reference, codes)
            side /= 2
            on_progress(0.5 + 0.5 * level / self.max_levels)
        for _, images, value in work:  # not converged within max_levels: the whole contribution counts as error
            if len(images):
                error[images] += np.exp(value - reference[images])
        log_px = reference + np.log(total)
        extent = np.log1p(ring_share) + np.exp(np.minimum(beyond - log_px, 0.0))
        bits = 24 if self.decoder is None else 8 * self.decoder.parts
        return Quadrature(log_px, error / total, extent, decoding, radius, self.points, level, bits)

    def _codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Posterior means (N, D), and log p(x|z) there, (N,)."""
        codes, best = [], []
        for part in self.x.split(1000):
            label = None if self.label is None else self.label.expand(len(part))
            mean = self.model.encode(part, label).mean
            codes.append(_numpy(mean))
            best.append(_numpy(self.model.decode(mean.unsqueeze(0), label).log_prob(part)[0]))
        return np.concatenate(codes), np.concatenate(best)

    def _decoder(self, codes: np.ndarray, best: np.ndarray) -> tuple[Decoder | None, np.ndarray]:
        """What decodes in the kernels, None for torch, and how far log p(x|z) of each image at its code is off then, (N,).

        Numbers of 16 bits, where that is at most a quarter of `tolerance` (root mean square) and four times that for each image;
        else of float32, which torch rounds no better.
        """
        for parts in (FULL,) if self.precision == "float32" else (FINE, FULL):
            if self.bits is None or (found := self.bits.decoder(self.model.likelihood, len(self.nodes), parts)) is None:
                break
            off = np.abs(self._own(found, codes) - best)
            within = self.tolerance if parts < FULL else max(self.tolerance, FLOAT32)
            if np.sqrt(np.square(off).mean()) <= within / 4 and off.max() <= 4 * within:
                return found, off
        return None, np.zeros(self.n)

    def _own(self, decoder: Decoder, codes: np.ndarray) -> np.ndarray:
        """log p(x|z) of each image at its code, (N,), as a decoder of the kernels finds it."""
        assert self.bits is not None
        found = []
        for some in np.array_split(np.arange(self.n), math.ceil(self.n / CHECKED)):
            z = torch.from_numpy(codes[some]).to(self.x)
            label = None if self.label is None else self.label.expand(len(z))
            here = Undecoded(decoder, decoder.inputs(z.unsqueeze(0), label))
            log_px, _ = self.bits.shares(here, z.new_zeros(len(z)), len(z), some)
            found.append(_numpy(log_px.diagonal()))
        return np.concatenate(found)

    def _expand(
        self, codes: np.ndarray, best: np.ndarray, max_radius: float
    ) -> tuple[list[np.ndarray], tuple[list[np.ndarray], list[np.ndarray]], np.ndarray, np.ndarray, float]:
        """Rings of unit tiles outwards from the origin, each for the images that may still gain from it."""
        tiles: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        values: list[np.ndarray] = []
        total = np.full(self.n, -np.inf)
        share = np.zeros(self.n)
        beyond = np.full(self.n, np.inf)
        best = best.copy()
        inner, outer = 0.0, 6.0
        open_ = np.arange(self.n)
        while True:
            ring_total = np.full(self.n, -np.inf)
            for centres in np.array_split(ring := self._ring(inner, outer), max(1, len(ring) // 32)):
                value, top = self._share(*self._decode(centres, 1.0), len(centres), open_)
                best[open_] = np.maximum(best[open_], top)
                ring_total[open_] = np.logaddexp(ring_total[open_], np.logaddexp.reduce(value, 0))
                tiles.extend(centres)
                owners.extend([open_] * len(centres))
                values.extend(value)
            total = np.logaddexp(total, ring_total)
            share[open_] = np.exp(ring_total - total)[open_]
            beyond[open_] = (self._log_prior_beyond(outer) + best + SLACK)[open_]
            open_ = np.flatnonzero((beyond > total - BEYOND) | (share > 1e-6))
            if not len(open_) or outer >= max_radius:
                return tiles, (owners, values), share, beyond, outer
            inner, outer = outer, outer + 2.0

    def _ring(self, inner: float, outer: float) -> np.ndarray:
        """Centres of the unit tiles whose own centre lies at a distance in [inner, outer)."""
        axis = np.arange(-math.ceil(outer), math.ceil(outer)) + 0.5
        centres = np.stack([m.ravel() for m in np.meshgrid(*[axis] * self.dim, indexing="ij")], 1)
        distance = np.linalg.norm(centres, axis=1)
        return centres[(distance >= inner) & (distance < outer)]

    def _log_prior_beyond(self, radius: float) -> float:
        """log of the prior's mass outside the ball that the tiles certainly cover: their centres reach `radius`."""
        return self.prior.log_tail(radius - math.sqrt(self.dim) / 2)

    def _decode(self, centres: np.ndarray, side: float) -> tuple[Distribution | Undecoded, Tensor]:
        """p(x|z) at the nodes of tiles, batch shape (1, G), and log of p(z) times the node's weight, (G,)."""
        z = torch.from_numpy((centres[:, None, :] + side * self.nodes).reshape(-1, self.dim)).to(self.x)
        self.points += len(z)
        weights = torch.from_numpy(np.tile(self.log_weights, len(centres)) + self.dim * math.log(side))
        label = None if self.label is None else self.label.expand(len(z))
        log_pz = self.prior.log_prob(z.unsqueeze(1)).flatten()  # (G, 1, D) to (G,)
        if self.decoder is not None:
            return Undecoded(self.decoder, self.decoder.inputs(z.unsqueeze(0), label)), log_pz + weights.to(z)
        return self.model.decode(z.unsqueeze(0), label), log_pz + weights.to(z)

    def _share(
        self, px: Distribution | Undecoded, log_pz: Tensor, tiles: int, images: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """log of each tile's share of each image's integral, (T, I), and the largest log p(x|z) seen, (I,)."""
        if self.bits is not None and self.bits.serve(px, len(self.nodes)):
            share, best = self.bits.shares(px, log_pz, tiles, images)
            return _numpy(share), _numpy(best)
        assert isinstance(px, Distribution)  # whatever is undecoded is served
        chosen = self.x if len(images) == self.n else self.x[torch.from_numpy(images).to(self.x.device)]
        log_px = px.cross_log_prob(chosen)
        joint = (log_px + log_pz[:, None]).unflatten(0, (tiles, -1))
        return _numpy(torch.logsumexp(joint, 1)), _numpy(log_px.amax(0))

    def _important(
        self, centre: np.ndarray, side: float, images: np.ndarray, value: np.ndarray, total: np.ndarray,
        codes: np.ndarray, margin: float,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Those images to which a tile matters: by its size, or because their code lies in it."""
        holds_code = np.all(np.abs(codes[images] - centre) <= 0.5 * side, axis=1)
        keep = (value > total[images] - margin) | holds_code
        return images[keep], value[keep]

    def _split(
        self, work: list[tuple[np.ndarray, np.ndarray, np.ndarray]], side: float, level: int, total: np.ndarray,
        error: np.ndarray, reference: np.ndarray, codes: np.ndarray,
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:  # fmt: skip
        """Split each tile in 2^D for the images it matters to; returns the children that need another split."""
        found = []
        per_tile = len(self.children) * len(self.nodes)
        for start in range(0, len(work), TOGETHER):  # decoded together, since small matrix products are slow
            some = work[start : start + TOGETHER]
            children = [centre + side * self.children for centre, _, _ in some]
            px, log_pz = self._decode(np.concatenate(children), side / 2)
            for i, (centres, (_, images, value)) in enumerate(zip(children, some, strict=True)):
                own = slice(i * per_tile, (i + 1) * per_tile)
                parts, _ = self._share(px.select(own), log_pz[own], len(centres), images)
                change = np.exp(np.logaddexp.reduce(parts, 0) - reference[images]) - np.exp(value - reference[images])
                total[images] += change
                found.append((centres, images, parts, np.abs(change)))
        log_total = reference + np.log(np.maximum(total, 1e-300))
        margin = MARGINS[min(level, len(MARGINS) - 1)]
        again = []
        for centres, images, parts, change in found:
            coarse = change > self.tolerance * total[images]
            if level == 1:
                coarse |= np.logaddexp.reduce(parts, 0) > log_total[images] - LOOK
            error[images[~coarse]] += change[~coarse]
            for centre, part in zip(centres, parts, strict=True):
                again.append(
                    (centre, *self._important(
                        centre, side / 2, images[coarse], part[coarse], log_total, codes, margin))
                )  # fmt: skip
        return again


def _numpy(value: Tensor) -> np.ndarray:
    return value.double().cpu().numpy()
