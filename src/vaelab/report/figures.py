"""Arrays to figures: what a variational autoencoder looks like from outside.

Every function takes numpy arrays and returns a `matplotlib.figure.Figure`; nothing here knows torch, touches pyplot's
global state or heeds the user's matplotlibrc. What each picture is for, in the terms of -elbo = distortion + rate:

    reconstruction            x beside its decoded code: what the distortion buys
    generation                z ~ p(z), decoded: what the rate buys, for a decoder is trained only where q(z|x) has mass
    latent_space              the match of the codes to the prior: test codes over the prior's circles
    latent_space_comparison   two of them on one scale
    manifold                  the decoder over a grid of equal prior probability (arXiv:1312.6114, figure 4)
    training                  rate and distortion against time, never summed

The unit of a latent axis is the prior's standard deviation. Under a two-dimensional standard normal the circle of
radius s holds 1 - exp(-s^2 / 2) of the mass: 39.3 %, 86.5 % and 98.9 % for s = 1, 2, 3.

Colours are Petroff's ten (arXiv:2107.02270), chosen to stay apart for colour-blind readers; past ten classes the marker
changes too, and each class is named at its median, so that nobody depends on colour alone.
"""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike

from vaelab.report.canvas import (
    GREY,
    INK,
    MARKERS,
    PALE,
    PALETTE,
    Array,
    Group,
    all_finite,
    as_images,
    groups_of,
    legend_width,
    new_axes,
    new_figure,
    picture,
    put_legend,
    put_suptitle,
    put_title,
    shorten,
    styled_figure,
)

HALO = [withStroke(linewidth=3, foreground="white")]

Limits = tuple[float, float, float, float]


def save(figure: Figure, path: str | Path, dpi: int = 160) -> Path:
    """Writes `figure` to `path` (its suffix names the format) through a temporary name, and returns the path.

    The same figure gives the same PNG, byte for byte: neither date nor version is written into it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with matplotlib.rc_context(), warnings.catch_warnings():
            matplotlib.rcdefaults()
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a class name in another script
            figure.savefig(temporary, dpi=dpi, metadata={"Software": None} if path.suffix == ".png" else None)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@styled_figure
def reconstruction(
    originals: ArrayLike,
    reconstructions: ArrayLike,
    labels: ArrayLike | None = None,
    classes: Sequence[str] | None = None,
    title: str = "Reconstructions",
    columns: int | None = None,
) -> Figure:
    """Test images of every class above their reconstructions.

    Args:
        originals: (n,C,H,W) in [0, 1], C of 1 or 3.
        reconstructions: the same shape, in the same order.
        labels: (n,) integers; without them the first images are shown in the order given.
        classes: the name of each label; its number without them.
        columns: images per class (the first ones given); 4 by default, more where there are few classes.
    """
    above, below = as_images(originals, "originals"), as_images(reconstructions, "reconstructions")
    if above.shape != below.shape:
        raise ValueError(f"originals {above.shape} and reconstructions {below.shape} differ in shape")
    if labels is None:
        shown = min(len(above), columns or 24)
        per_band = math.ceil(shown / math.ceil(shown / 12))
        bands = [[("", np.arange(start, min(start + per_band, shown)))] for start in range(0, shown, per_band)]
    else:
        groups = groups_of(labels, len(above), classes)
        each = columns or max(4, 12 // len(groups))
        per_band = math.ceil(len(groups) / math.ceil(len(groups) * each / 20))
        named = [(shorten(group.name, 18), group.members[:each]) for group in groups]
        bands = [named[start : start + per_band] for start in range(0, len(named), per_band)]

    # One unit is the height of an image.
    cell, gap, between, header, apart = above.shape[3] / above.shape[2], 0.08, 0.35, 0.62 * (labels is not None), 0.45
    width = max(sum(len(m) * (cell + gap) - gap for _, m in band) + between * (len(band) - 1) for band in bands)
    height = len(bands) * (header + 2 + gap) + apart * (len(bands) - 1)
    scale = min(10.4 / width, 1.6)
    room = max(width * scale, 4.0)
    figure, axes = new_axes(room + 2.2, height * scale + 0.9)
    ticks: list[float] = []
    for row, band in enumerate(bands):
        left, top = 0.0, row * (header + 2 + gap + apart) + header
        ticks += [top + 0.5, top + 1.5 + gap]
        for name, members in band:
            middle = left + (len(members) * (cell + gap) - gap) / 2
            axes.text(middle, top - 0.1, name, ha="center", va="bottom", weight="bold", size=14)
            for index in members:
                picture(axes, above[index], left, top, cell)
                picture(axes, below[index], left, top + 1 + gap, cell)
                left += cell + gap
            left += between - gap
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=[])
    axes.set_yticks(ticks, ["test image", "reconstruction"] * len(bands))
    put_title(axes, room, title)
    return figure


@styled_figure
def generation(images: ArrayLike, title: str, subtitle: str = "", columns: int | None = None) -> Figure:
    """A grid of decoded prior samples, (n,C,H,W) in [0, 1], row by row; nearly square unless `columns` is given."""
    shown = as_images(images, "images")
    cell, gap = shown.shape[3] / shown.shape[2], 0.06
    across = min(columns or math.ceil(math.sqrt(len(shown) / cell)), len(shown))
    width, height = across * (cell + gap) - gap, math.ceil(len(shown) / across) * (1 + gap) - gap
    scale = min(7.6 / max(width, height), 3.0)
    room = max(width * scale, 4.5)
    figure, axes = new_axes(room + 0.4, height * scale + 1.15)
    for index, image in enumerate(shown):
        row, column = divmod(index, across)
        picture(axes, image, column * (cell + gap), row * (1 + gap), cell)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=[], yticks=[])
    put_title(axes, room, title, subtitle)
    return figure


@styled_figure
def latent_space(
    codes: ArrayLike,
    labels: ArrayLike | None = None,
    classes: Sequence[str] | None = None,
    title: str = "Latent space",
    prior_sigmas: Sequence[float] = (1, 2, 3),
    axis_labels: tuple[str, str] = ("z₀", "z₁"),
    limits: Limits | None = None,
) -> Figure:
    """Test codes coloured by class, over the prior's circles.

    The frame is square and holds the codes and the circles. Where a few strays would shrink all the other codes to a
    dot, they are left out and the figure says how many.

    Args:
        codes: (N,2), the posterior means; or (N,1), which are spread along a second axis without a meaning.
        labels: (N,) integers, or None.
        limits: (left, right, bottom, top), to override the frame.

    Raises:
        NonFiniteError: a code is not finite.
    """
    points, line = _codes(codes, "codes")
    groups = groups_of(labels, len(points), classes)
    figure, axes = new_axes(8.0 + legend_width(groups), 8.4)
    put_title(axes, 7.0, title, _scatter(axes, points, groups, prior_sigmas, axis_labels, limits, line=line))
    put_legend(figure, groups)
    return figure


@styled_figure
def latent_space_comparison(
    codes_a: ArrayLike,
    codes_b: ArrayLike,
    labels: ArrayLike | None = None,
    classes: Sequence[str] | None = None,
    label_a: str = "with KL",
    label_b: str = "without KL",
    title: str = "Two latent spaces on one scale",
    prior_sigmas: Sequence[float] = (1, 2, 3),
    axis_labels: tuple[str, str] = ("z₀", "z₁"),
) -> Figure:
    """The codes (N,2) or (N,1) that two models give the same images, side by side on one scale; see `latent_space`.

    Codes too small to be seen on the common scale are shown enlarged in an inset as well.
    """
    (a, line), (b, line_b) = _codes(codes_a, "codes_a"), _codes(codes_b, "codes_b")
    both = a, b
    if line != line_b:
        raise ValueError("codes_a and codes_b: both have one dimension or both two")
    if len(both[0]) != len(both[1]):
        raise ValueError(f"codes_a and codes_b are of the same images: {len(both[0])} and {len(both[1])} codes given")
    groups = groups_of(labels, len(both[0]), classes)
    limits = _frame(np.concatenate(both), prior_sigmas)
    figure = new_figure(14 + legend_width(groups), 8.1)
    for axes, points, label in zip(figure.subplots(1, 2), both, (label_a, label_b), strict=True):
        put_title(
            axes, 6.7, label, _scatter(axes, points, groups, prior_sigmas, axis_labels, limits, line=line), size=15
        )
        own, (left, right, bottom, _) = _frame(points, prior_sigmas), limits
        if right - left > 5 * (own[1] - own[0]):
            x, y = -left / (right - left), -bottom / (right - left)  # where the prior lies: the inset keeps clear of it
            inset = axes.inset_axes((0.56 if x < 0.6 else 0.03, 0.03 if y > 0.4 else 0.4, 0.41, 0.41), zorder=8)
            _scatter(inset, points, groups, prior_sigmas, axis_labels, own, small=True, line=line)
            times = 0.41 * (right - left) / (own[1] - own[0])
            inset.set_title(f"enlarged {times:,.0f} times", size=12, loc="center", pad=5)
    put_suptitle(figure, title)
    put_legend(figure, groups)
    return figure


@styled_figure
def manifold(
    grids: Mapping[str, ArrayLike],
    quantiles: ArrayLike,
    title: str = "Decoded over a grid of prior quantiles",
    axis_labels: tuple[str, str] = ("z₀", "z₁"),
) -> Figure:
    """Images decoded on a grid of equal prior probability, one panel per model.

    Args:
        grids: label -> (n,n,C,H,W) in [0, 1]; entry [i, j] is decoded from z = (value of quantile j, value of quantile
            i), and both axes grow as in a plot: row 0 is drawn at the bottom.
        quantiles: (n,) in (0, 1), increasing.
    """
    levels = np.asarray(quantiles, dtype=float)
    n = len(levels)
    if not (np.all((levels > 0) & (levels < 1)) and np.all(np.diff(levels) > 0)):
        raise ValueError("quantiles: expected increasing numbers strictly between 0 and 1")
    count = n if n < 7 else 3 if n == 7 else 5 if n % 2 else 4  # few, and symmetric about the median
    ticks = np.linspace(0, n - 1, count).round().astype(int)
    values = [NormalDist().inv_cdf(float(levels[tick])) for tick in ticks]
    names = [f"{z:.2f}\n{100 * levels[tick]:.3g} %".replace("-", "−") for tick, z in zip(ticks, values, strict=True)]
    figure = new_figure(6.75 * len(grids), 7.4)
    for axes, (label, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        cells = np.asarray(grid)
        if cells.ndim != 5 or cells.shape[:2] != (n, n):
            raise ValueError(f"grid '{label}': expected ({n},{n},C,H,W) for {n} quantiles, got {cells.shape}")
        channels, high, wide = cells.shape[2:]
        cells = as_images(cells.reshape(-1, channels, high, wide), f"grid '{label}'").reshape(cells.shape)
        sheet = cells[::-1].transpose(2, 0, 3, 1, 4).reshape(channels, n * high, n * wide)
        cell = high / wide
        picture(axes, sheet, 0, n * cell, n, -n * cell)
        axes.set(xlim=(0, n), ylim=(0, n * cell), aspect="equal")
        axes.set_xticks(ticks + 0.5, names)
        axes.set_yticks((ticks + 0.5) * cell, names)
        axes.set_xlabel(f"{axis_labels[0]}: value, and quantile of the prior")
        axes.set_ylabel(f"{axis_labels[1]}: value, and quantile of the prior")
        axes.tick_params(length=4)
        put_title(axes, 5.8, label, size=15)
    put_suptitle(figure, title)
    return figure


@styled_figure
def training(histories: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "Training") -> Figure:
    """Rate and distortion against training time, train (dashed) and test (solid).

    Args:
        histories: label -> records such as {"epoch": 1, "seconds": 3.2, "train": {"rate": 5.1, "distortion": 140.2},
            "test": {...}}. A value that is missing or not finite is a gap in its line.
    """
    figure = new_figure(13.5, 5.4 + 0.12 * len(histories))
    panels = figure.subplots(1, 2)
    legend: dict[str, Line2D] = {}
    for axes, quantity in zip(panels, ("rate", "distortion"), strict=True):
        seen: list[float] = []
        for index, (label, records) in enumerate(histories.items()):
            color, marker = PALETTE[(0, 6, 4, 2, 8)[index % 5]], MARKERS[index % len(MARKERS)]
            for part, line, fill in (("test", "-", color), ("train", "--", "white")):
                values = [_number(record, part, quantity) for record in records]
                seen += [value for value in values if math.isfinite(value)]
                (legend[f"{shorten(label, 30)}, {part}"],) = axes.plot(
                    [float(record["seconds"]) for record in records], values, line, color=color, lw=2.2,
                    marker=marker if part == "test" or len(values) == 1 else "", ms=6, mfc=fill,
                )  # fmt: skip
        scale = ""
        if not seen:
            axes.text(0.5, 0.5, "not available", transform=axes.transAxes, ha="center", color=GREY)
        elif quantity == "rate" and max(seen) > 30 * max(min(seen), 0.1):
            axes.set_yscale("symlog" if min(seen) <= 0 else "log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
            axes.yaxis.set_minor_formatter("")
            scale = ", logarithmic scale"
        axes.set_xlim(left=0)
        axes.set(xlabel="training time (s)", ylabel=f"nats per image{scale}", axisbelow=True)
        axes.grid(axis="y", color=PALE, lw=0.8)
    put_title(panels[0], 6.0, "Rate: KL(q(z|x) ‖ p(z))", size=15)
    put_title(panels[1], 6.0, "Distortion: −E log p(x|z)", size=15)
    columns = max(1, min(len(legend), 4, int(12.5 / (0.9 + 0.11 * max(map(len, legend), default=0)))))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, handlelength=3)
    put_suptitle(figure, title)
    return figure


def _codes(codes: ArrayLike, name: str) -> tuple[Array, bool]:
    """The codes as points (N,2), and whether they have one dimension: then a second one spreads them."""
    array = np.asarray(codes, dtype=float)
    if array.ndim != 2 or array.shape[1] not in (1, 2) or not len(array):
        raise ValueError(f"{name}: expected (N,2) or (N,1), got {array.shape}")
    all_finite(array, name)
    if array.shape[1] == 2:
        return array, False
    spread = np.random.default_rng(0).uniform(-1, 1, len(array)) * max(1.0, 0.3 * np.abs(array).max())
    return np.column_stack([array[:, 0], spread]), True


def _number(record: Mapping[str, Any], part: str, quantity: str) -> float:
    value = (record.get(part) or {}).get(quantity)
    return float(value) if value is not None and math.isfinite(float(value)) else math.nan


def _frame(points: Array, sigmas: Sequence[float]) -> Limits:
    """A square that holds the prior's circles and the codes, or all but a few strays that would more than double it."""
    circle = 1.1 * max(sigmas, default=0.5)
    low, high = np.minimum(points.min(0), -circle), np.maximum(points.max(0), circle)
    inner, outer = np.percentile(points, [0.25, 99.75], axis=0)
    inner, outer = np.minimum(inner, -circle), np.maximum(outer, circle)
    if np.max(high - low) > 2.5 * np.max(outer - inner):
        margin = 0.25 * np.max(outer - inner)
        low, high = np.maximum(low, inner - margin), np.minimum(high, outer + margin)
    centre, half = (low + high) / 2, 0.52 * np.max(high - low)
    return centre[0] - half, centre[0] + half, centre[1] - half, centre[1] + half


def _scatter(
    axes: Axes,
    points: Array,
    groups: Sequence[Group],
    sigmas: Sequence[float],
    names: tuple[str, str],
    limits: Limits | None,
    small: bool = False,
    line: bool = False,
) -> str:
    """Draws codes and circles (lines, in one dimension); returns in words how many codes lie outside, and off the frame."""
    left, right, bottom, top = limits or _frame(points, sigmas)
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.locator_params(nbins=7)
    axes.set_xlabel(f"{names[0]} (prior standard deviations)")
    axes.set_ylabel("spread, without a meaning" if line else f"{names[1]} (prior standard deviations)")
    if line:
        axes.set_yticks([])
    size = float(np.clip(60_000 / len(points), 7, 40)) * (0.3 if small else 1)
    colors = np.empty(len(points), dtype=object)
    for group in groups:
        colors[group.members] = group.color
    for marker in {group.marker: None for group in groups}:
        members = np.concatenate([group.members for group in groups if group.marker == marker])
        members = np.random.default_rng(0).permutation(members)  # so that no class is painted over the others
        axes.scatter(*points[members].T, s=size, c=list(colors[members]), marker=marker, alpha=0.75, lw=0)
    (_lines if line else _circles)(axes, points, sigmas)
    _medians(axes, points, groups)
    if small:
        axes.spines[:].set_visible(True)
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
        for text in axes.texts:
            text.set_fontsize(10)
    said = []
    if sigmas:
        far = max(sigmas)
        outside = np.abs(points[:, 0]) > far if line else np.hypot(*points.T) > far
        of_prior = math.erfc(far / math.sqrt(2)) if line else math.exp(-far * far / 2)
        said.append(
            f"{np.mean(outside):.1%} of {len(points):,} codes outside the {far:g}σ {'lines' if line else 'circle'} "
            f"(prior: {of_prior:.1%})".replace("%", "\N{NO-BREAK SPACE}%")
        )
    if beyond := int(np.sum((points < (left, bottom)).any(1) | (points > (right, top)).any(1))):
        said.append(f"beyond this frame: {beyond:,}")
    return "; ".join(said)


def _lines(axes: Axes, points: Array, sigmas: Sequence[float]) -> None:
    """The prior's 1, 2, 3 sigma of a single dimension, on both sides."""
    del points
    room = float(np.ptp(axes.get_xlim())) < 5 * max(sigmas, default=0)  # for a name at each
    for sigma in sigmas:
        for z in (-sigma, sigma):
            axes.axvline(z, color=INK, lw=1.4 if room else 0.8, zorder=3, path_effects=HALO)
        if not room and sigma < max(sigmas):
            continue
        axes.text(sigma, 0.97, f"{sigma:g}σ", transform=axes.get_xaxis_transform(), ha="center", va="center", zorder=4,
                  path_effects=HALO, clip_on=True)  # fmt: skip


def _circles(axes: Axes, points: Array, sigmas: Sequence[float]) -> None:
    """The prior's circles with their names; where they are tiny, one arrow from the emptiest corner."""
    (left, right), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    share = max(sigmas, default=0) / (right - left)
    for sigma in sigmas:
        style = {"lw": 1.6, "path_effects": HALO} if share > 0.08 else {"lw": 0.7}
        axes.add_patch(Circle((0, 0), sigma, fill=False, ec=INK, zorder=3, **style))
        if share > 0.08:
            axes.text(0, sigma, f"{sigma:g}σ", ha="center", va="center", zorder=4, path_effects=HALO, clip_on=True)
    if 0 < share <= 0.08:
        text = f"the prior's circles: {', '.join(f'{sigma:g}' for sigma in sigmas)}σ"
        if share < 0.004:
            text += "\n(a point on this scale)"
        place = (np.concatenate([points, np.zeros_like(points)]) - (left, bottom)) / (right - left)
        sides = (
            (0.03, 0.97) if place[-1, 0] < 0.6 else (0.97, 0.03)
        )  # the prior's own side first: an inset has the other
        corners = [(x, y) for y in (0.93, 0.07) for x in sides]
        crowd = [np.sum((abs(place[:, 0] - x) < 0.4) & (abs(place[:, 1] - y) < 0.15)) for x, y in corners]
        x, y = corners[int(np.argmin(crowd))]
        arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.4, "shrinkB": max(500 * share, 1.0)}
        axes.annotate(
            text, (0, 0), (x, y), textcoords="axes fraction", ha="left" if x < 0.5 else "right", va="center",
            arrowprops=arrow, bbox={"fc": "white", "ec": GREY, "boxstyle": "round,pad=0.3"}, zorder=6,
        )  # fmt: skip


def _medians(axes: Axes, points: Array, groups: Sequence[Group]) -> None:
    """Each class's name at its median, pushed apart where medians meet; none where nearly all of them would."""
    width = float(np.ptp(axes.get_xlim()))
    places = np.array([np.median(points[group.members], axis=0) for group in groups])
    if not groups[0].name or len(groups) > 30 or (len(groups) > 1 and np.max(np.ptp(places, axis=0)) < 0.1 * width):
        return
    for _ in range(60):
        apart = places[:, None] - places[None]
        distance = np.maximum(np.hypot(apart[..., 0], apart[..., 1]), 1e-9 * width)
        places += 0.5 * (np.maximum(0.045 * width / distance - 1, 0)[..., None] * apart).clip(-width, width).sum(1)
    for group, (x, y) in zip(groups, places, strict=True):
        style = {"weight": "bold", "size": 16, "ha": "center", "va": "center", "zorder": 5, "path_effects": HALO}
        axes.text(x, y, shorten(group.name, 12), clip_on=True, **style)
