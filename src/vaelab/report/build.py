"""From evaluated runs to a folder a student would hand in: images, report.json and report.html."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from vaelab.data.datasets import Dataset
from vaelab.data.protocol import protocol as protocol_named
from vaelab.evaluation import Evaluation, codes_of, decoded, fitted_codes, prior_codes
from vaelab.models.vae import VAE
from vaelab.report import figures, page
from vaelab.report.metrics import rows_of
from vaelab.run import Run, environment

SHOWN = 100
"""Samples in a generation figure."""

Drawn = list[dict[str, str] | None]
"""Entries of a report's figures, in its order; None where another part of them is drawn."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a key for files, a label for people, and what sets it apart."""

    key: str
    label: str
    description: str


@dataclass(frozen=True)
class Cell:
    """One trained run of an arm, and its evaluation where there is one already."""

    arm: Arm
    run: Run
    model: VAE
    evaluation: Evaluation | None


def aggregate(cells: Sequence[Cell]) -> dict[str, dict[str, dict[str, Any]]]:
    """values[metric][arm]: mean and standard error over the runs of the arm, none where there is one run; n counts runs.

    `se_over_images` holds each run's standard error over images.
    """
    values: dict[str, dict[str, dict[str, Any]]] = {}
    for arm in dict.fromkeys(cell.arm for cell in cells):
        runs = [_evaluation(cell).quantities for cell in cells if cell.arm == arm]
        for key in runs[0]:
            found = [q[key].mean for q in runs]
            numbers = np.array([x for x in found if x is not None])
            if len(numbers) < len(runs):
                entry: dict[str, Any] = {
                    "mean": None,
                    "se": None,
                    "reason": next(q[key].reason for q in runs if q[key].reason),
                }
            else:
                se = float(numbers.std(ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else None
                entry = {"mean": float(numbers.mean()), "se": se}
            entry |= {"n": len(runs), "values": found, "se_over_images": [q[key].se for q in runs]}
            values.setdefault(key, {})[arm.key] = entry
    return values


def draw(
    folder: Path,
    cells: Sequence[Cell],
    data: Dataset,
    *,
    seed: int = 0,
    evaluated: bool | None = None,
    share: tuple[int, int] = (0, 1),
) -> Drawn:
    """Draw the figures of the first run of each arm; returns their entries for the report.

    The first arm's files have plain names, those of an arm `x` end in `_x`.

    Args:
        folder: of the report.
        cells: the runs.
        data: what they were trained on.
        seed: of the samples.
        evaluated: only the figures that show an evaluation, or only those that do not: the same list, with None in the
            place of the others. So two processes can draw, one of them before there are evaluations; see `together`.
        share: (i, n) for the i-th of those and each n-th after it, the others None as well.
    """
    first = {}
    for cell in cells:
        first.setdefault(cell.arm, cell)
    shown = list(first.values())
    made: Drawn = []
    asked = 0
    for of_evaluation, make in _Figures(shown, data, seed).all():
        if evaluated in (None, of_evaluation):
            asked += 1
        if evaluated not in (None, of_evaluation) or (asked - 1) % share[1] != share[0]:
            made.append(None)
            continue
        figure, name, title, caption = make()
        figures.save(figure, folder / "images" / f"{name}.png")
        made.append({"file": f"images/{name}.png", "title": title, "caption": caption, "alt": f"{title}. {caption}"})
    return made


def together(*drawn: Drawn) -> list[dict[str, str]]:
    """The entries of one list of figures that was drawn in parts."""
    return [next(entry for entry in entries if entry is not None) for entries in zip(*drawn, strict=True)]


class _Figures:
    """The figures of a report, each made when it is asked for."""

    def __init__(self, shown: Sequence[Cell], data: Dataset, seed: int) -> None:
        self.shown, self.data, self.seed = shown, data, seed
        self.protocol = protocol_named(shown[0].run.recipe().protocol)
        self.conditional = shown[0].model.classes is not None and data.test.labels is not None

    def all(self) -> Iterator[tuple[bool, Callable[[], tuple[Figure, str, str, str]]]]:
        """Whether it shows an evaluation, and what makes it and its name, title and caption."""
        yield False, self.reconstruction
        for index, cell in enumerate(self.shown):
            suffix = f"_{cell.arm.key}" if index else ""
            yield False, partial(self.generation, cell, suffix)
            if index and not self.conditional:
                yield False, partial(self.fitted, cell, suffix)
        for index, cell in enumerate(self.shown):
            yield True, partial(self.latent_space, cell, f"_{cell.arm.key}" if index else "")
        if len(self.shown) == 2:
            yield True, self.comparison
        if self.shown[0].model.latent_dim >= 2 and not self.conditional:
            yield True, self.manifold
        yield False, self.training

    def reconstruction(self) -> tuple[Figure, str, str, str]:
        cell, data = self.shown[0], self.data
        test = self.protocol.test_set(data.test.pixels)
        pick = _of_every_class(data)
        labels = None if data.test.labels is None else data.test.labels[pick]
        c = torch.from_numpy(labels) if self.conditional and labels is not None else None
        means = decoded(cell.model, torch.from_numpy(codes_of(cell.model, test[pick], c=c)).float(), c=c)
        return (
            figures.reconstruction(test[pick].numpy(), means.numpy(), labels, data.classes),
            "reconstruction", "Reconstructions",
            f"Test images as the model sees them, and the decoder's mean at their codes; {cell.arm.label}.",
        )  # fmt: skip

    def generation(self, cell: Cell, suffix: str) -> tuple[Figure, str, str, str]:
        asked = None if cell.model.classes is None else torch.arange(SHOWN) % cell.model.classes
        images, title = (
            decoded(cell.model, prior_codes(cell.model, SHOWN, self.seed, asked), c=asked),
            "Samples of the prior",
        )
        return (
            figures.generation(images.numpy(), f"{title}, {cell.arm.label}", f"{prior_of(cell.model)}, decoder mean"),
            f"generation{suffix}", f"{title}, {cell.arm.label}",
            "The decoder's mean at codes drawn from the prior: its expectation of each pixel, not a sample of pixels."
            + ("" if asked is None else " The labels are asked for in turn."),
        )  # fmt: skip

    def fitted(self, cell: Cell, suffix: str) -> tuple[Figure, str, str, str]:
        z = fitted_codes(cell.model, self.protocol.test_set(self.data.train.pixels[:10_000]), SHOWN, self.seed)
        title = f"Samples of a fitted Gaussian, {cell.arm.label}"
        return (
            figures.generation(decoded(cell.model, z).numpy(), title, "z ~ Gaussian fitted to the model's own codes"),
            f"generation{suffix}_fitted", title,
            "The same decoder, at codes drawn from a Gaussian fitted to its own codes.",
        )  # fmt: skip

    def latent_space(self, cell: Cell, suffix: str) -> tuple[Figure, str, str, str]:
        points, axes, how = _plane(_evaluation(cell).codes)
        title, data = f"Latent space, {cell.arm.label}", self.data
        return (
            figures.latent_space(points, data.test.labels, data.classes, title, axis_labels=axes),
            f"latent_space{suffix}", title,
            f"Posterior means of the test set{how}; {'lines' if points.shape[1] == 1 else 'circles'}: 1, 2 and 3 sigma of the prior.",
        )  # fmt: skip

    def comparison(self) -> tuple[Figure, str, str, str]:
        (a, axes, _), (b, _, _) = (_plane(_evaluation(cell).codes) for cell in self.shown)
        one, other = (cell.arm.label for cell in self.shown)
        return (
            figures.latent_space_comparison(
                a, b, self.data.test.labels, self.data.classes, one, other, axis_labels=axes),
            "latent_space_comparison", "Both latent spaces on one scale",
            "The same test images under both models, with the prior's circles.",
        )  # fmt: skip

    def manifold(self) -> tuple[Figure, str, str, str]:
        quantiles = np.linspace(0.02, 0.98, 17)
        _, axes, how = _plane(_evaluation(self.shown[0]).codes)
        grids = {cell.arm.label: _manifold(cell.model, _evaluation(cell).codes, quantiles) for cell in self.shown}
        return (
            figures.manifold(grids, quantiles, axis_labels=axes),
            "manifold", "The decoder over the prior",
            f"Decoder means over a grid of quantiles of the prior{how}.",
        )  # fmt: skip

    def training(self) -> tuple[Figure, str, str, str]:
        return (
            figures.training({cell.arm.label: cell.run.history() for cell in self.shown}),
            "training", "Training", "Rate and distortion in nats per image against seconds of training, train and test.",
        )  # fmt: skip


def write(
    folder: Path,
    title: str,
    lead: str,
    arms: Sequence[Arm],
    cells: Sequence[Cell],
    drawn: list[dict[str, str]],
    observations: list[dict[str, Any]],
    facts: Mapping[str, Any],
    values: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compose the report and write report.json and report.html; returns the report."""
    values = aggregate(cells) if values is None else values
    recipe = cells[0].run.recipe()
    measured = {key for key, entries in values.items() if any(e.get("mean") is not None for e in entries.values())}
    # a bound that this likelihood does not have is another row of the same section, not an empty one
    rows = [m for m in rows_of(values) if m["key"] in measured or m["section"] != "Bound"]
    report = {
        "format": 1,
        "title": title,
        "lead": lead,
        "n_seeds": max(sum(cell.arm == arm for cell in cells) for arm in arms),
        "arms": [
            {
                "key": arm.key,
                "label": arm.label,
                "description": arm.description,
                "runs": [_relative(cell.run.path, folder) for cell in cells if cell.arm == arm],
            }
            for arm in arms
        ],
        "metrics": rows,
        "values": {row["key"]: values[row["key"]] for row in rows},
        "observations": observations,
        "figures": drawn,
        "protocol": {
            **_evaluation(cells[0]).protocol,
            "epochs": recipe.training.epochs,
            "batch_size": recipe.training.batch_size,
            "optimiser": f"{recipe.training.optimiser}, lr {recipe.training.lr:g}, {recipe.training.schedule}",
            **facts,
        },
        "environment": environment(),
        "command": environment()["command"],
    }
    page.write_report(folder, report)
    return report


def _evaluation(cell: Cell) -> Evaluation:
    assert cell.evaluation is not None
    return cell.evaluation


def prior_of(model: VAE) -> str:
    """Where a model's codes are drawn from, for the line under a figure."""
    name = type(model.prior).__name__
    return "z ~ N(0, I)" if name == "StandardNormal" else f"z ~ {name} prior"


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.name


def _of_every_class(data: Dataset, each: int = 2) -> np.ndarray:
    """Indices of the first test images of every class, in order of the classes."""
    if data.test.labels is None:
        return np.arange(min(20, len(data.test)))
    return np.concatenate([np.flatnonzero(data.test.labels == c)[:each] for c in np.unique(data.test.labels)[:12]])


def _plane(codes: np.ndarray) -> tuple[np.ndarray, tuple[str, str], str]:
    """One or two columns to draw codes in, the names of the axes, and how they were chosen.

    Under an orthonormal projection a standard normal stays one, so the prior's circles hold in every case.
    """
    dim = codes.shape[1]
    if dim == 1:
        return codes, ("z", ""), ""
    if dim == 2:
        return codes, ("z₀", "z₁"), ""
    return codes @ _principal(codes).T, ("first principal axis", "second principal axis"), ", on their principal plane"


def _principal(codes: np.ndarray) -> np.ndarray:
    """The two principal axes (2, D) of the codes; the coordinate axes themselves in two dimensions."""
    if codes.shape[1] == 2:
        return np.eye(2)
    return np.linalg.svd(codes - codes.mean(0), full_matrices=False)[2][:2]


def _manifold(model: VAE, codes: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Decoder means (n, n, C, H, W) over prior quantiles: columns follow the first axis, rows the second."""
    a = torch.special.ndtri(torch.from_numpy(quantiles)).numpy()
    second, first = np.meshgrid(a, a, indexing="ij")
    z = np.stack([first.ravel(), second.ravel()], 1) @ _principal(codes)
    images = decoded(model, torch.from_numpy(z).float()).numpy()
    return images.reshape(len(a), len(a), *images.shape[1:])
