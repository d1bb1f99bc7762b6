"""What every figure is drawn on: the style, the colours of classes, titles that wrap, and the checks of arrays.

Colours are Petroff's ten (arXiv:2107.02270), chosen to stay apart for colour-blind readers; past ten classes the marker
changes too, so that nobody depends on colour alone.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from vaelab.errors import NonFiniteError

PALETTE = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]  # fmt: skip
MARKERS = "o^sDvP"
SIZE = 13
INK, GREY, PALE = "#1c1c1c", "#555555", "#dddddd"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
    "font.size": SIZE,
    "text.parse_math": False,  # a class may be called "$5"
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
}

Array = NDArray[Any]
P = ParamSpec("P")


def styled_figure(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws under matplotlib's own defaults and `STYLE`; the caller's settings come back whatever happens."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            figure = draw(*args, **kwargs)
            for axes in figure.axes:  # ticks are chosen anew at each drawing: by these settings, not by the user's
                axes.tick_params(labelsize=SIZE, color=GREY, labelcolor=INK)
            with _unseen([image for axes in figure.axes for image in axes.images]):
                for _ in range(3):  # axes of fixed aspect settle on the third pass (to 0.001 of the figure) ...
                    if (engine := figure.get_layout_engine()) is not None:
                        engine.execute(figure)
            # ... and stay: the layout would follow the resolution and the last save. Without a layout engine, for one that
            # does nothing makes `savefig` draw twice
            figure.set_layout_engine(None)
            return figure

    return styled


@contextmanager
def _unseen(images: Sequence[AxesImage]) -> Iterator[None]:
    """Pictures take no part in the layout of their axes, and resampling a hundred of them at each pass took most of it."""
    for image in images:
        image.set_visible(False)
    yield
    for image in images:
        image.set_visible(True)


class Group(NamedTuple):
    """The images of one class: how it is called and drawn, and which they are."""

    name: str
    color: str
    marker: str
    members: Array


def groups_of(labels: ArrayLike | None, n: int, classes: Sequence[str] | None) -> list[Group]:
    """The classes that occur, in order; without labels one nameless group of everything."""
    if labels is None:
        return [Group("", PALETTE[0], MARKERS[0], np.arange(n))]
    given = np.asarray(labels)
    if given.shape != (n,) or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"labels: expected ({n},) integers, got {given.dtype} {given.shape}")
    found = np.unique(given).tolist()
    if classes is not None and not 0 <= found[0] <= found[-1] < len(classes):
        raise ValueError(f"labels run from {found[0]} to {found[-1]}, but {len(classes)} classes are named")
    groups = []
    for place, label in enumerate(found):
        turn, name = (place, label) if classes is None else (label, classes[label])  # a class keeps its colour
        color, marker = PALETTE[turn % len(PALETTE)], MARKERS[turn // len(PALETTE) % len(MARKERS)]
        groups.append(Group(str(name), color, marker, np.flatnonzero(given == label)))
    return groups


def as_images(images: ArrayLike, name: str) -> Array:
    """`images` as (n,C,H,W) in [0, 1]; what lies outside is clipped, as an unbounded decoder's mean may."""
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape or array.dtype.kind != "f":
        raise ValueError(f"{name}: expected floats (n,C,H,W) with C of 1 or 3, got {array.dtype} {array.shape}")
    return np.clip(all_finite(array, name), 0, 1)


def all_finite(array: Array, name: str) -> Array:
    if bad := array.size - int(np.isfinite(array).sum()):
        raise NonFiniteError(
            f"{name}: {bad:,} of {array.size:,} values are not finite, so there is nothing true to draw; "
            "metrics.jsonl tells where the run left the finite numbers"
        )
    return array


def legend_width(groups: Sequence[Group]) -> float:
    longest = min(max(len(group.name) for group in groups), 16)
    return math.ceil(len(groups) / 20) * (0.7 + 0.11 * longest) if longest else 0.0


def put_legend(figure: Figure, groups: Sequence[Group]) -> None:
    if groups[0].name:
        handles = [
            Line2D([], [], ls="", marker=g.marker, color=g.color, ms=9, label=shorten(g.name, 16)) for g in groups
        ]
        columns = math.ceil(len(groups) / 20)
        figure.legend(handles=handles, loc="outside right center", ncols=columns, title="class")


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = new_figure(width, height)
    return figure, figure.add_subplot()


def picture(axes: Axes, image: Array, left: float, top: float, width: float, height: float = 1.0) -> None:
    """One image (C,H,W) with its upper left corner at (left, top), in axes that grow downwards."""
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    extent = (left, left + width, top + height, top)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def put_title(axes: Axes, inches: float, title: str, subtitle: str = "", size: float = 18) -> None:
    """A bold title over a lighter subtitle, flush with the left edge of the axes and wrapped to `inches`."""
    small = textwrap.fill(subtitle, int(inches * 9.5)) if subtitle else ""
    axes.set_title(small, size=12, color=GREY, pad=8)
    lift = 12 + 15 * (small.count("\n") + 1 if small else 0)
    text = textwrap.fill(title, int(inches * 100 / size))
    axes.annotate(text, (0, 1), (0, lift), "axes fraction", "offset points", size=size, weight="bold", va="bottom")
    axes.set_anchor("W")


def put_suptitle(figure: Figure, title: str) -> None:
    width = int(figure.get_size_inches()[0] * 6.2)
    figure.suptitle(textwrap.fill(title, width), x=0.012, ha="left", size=17, weight="bold")


def shorten(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
