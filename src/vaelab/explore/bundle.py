"""The bundle: all that the page knows, as one manifest and named pieces of bytes.

    manifest                  plain data: names, shapes, measured numbers, and what is missing with the reason
    test.u8, labels.u8        up to 2000 test images (8 MiB) as the model sees them, evenly spaced, and their labels
    a/encoder.onnx            graphs (`vaelab.explore.export`) of the first run; b/ of a second
    a/decoder.onnx
    a/mean.f32                posterior means of those images (N, D), little-endian
    a/log_sigma.f32           and the logs of their standard deviations, where there are any
    a/scale_tril.f32          L (N, D, D) of their covariances L L^T, of a full Gaussian only

Two runs share the images, so they must be of the same data and protocol; their latent spaces may differ.

Images are bytes: pixel * 255, rounded. That is exact for bits, for levels and for grey levels; dequantised pixels lose the
noise below a level, and all that the page shows of them, codes too, is of the rounded images. So every number on the page
can be had again from what the page holds.

The page tests itself at load against `golden`: what torch makes of eight codes and of one image.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaelab import __version__
from vaelab.data.datasets import Dataset, Images
from vaelab.data.protocol import TEST_DRAW_SEED, Protocol
from vaelab.data.protocol import protocol as protocol_named
from vaelab.distributions import Delta, DiagGaussian, FullGaussian, Laplace, closed_form_kl
from vaelab.errors import RunError, UsageError
from vaelab.evaluation import evenly
from vaelab.evaluation.compare import load as load_evaluation
from vaelab.explore import export
from vaelab.explore.graph import Graph, NoGraph, require
from vaelab.models.vae import VAE
from vaelab.priors import StandardNormal
from vaelab.report.metrics import METRICS
from vaelab.rng import stream
from vaelab.run import Run, read_json
from vaelab.training import evaluating, labels_for

FORMAT = 1
"""Version of the manifest; the page refuses a newer one."""
SHOWN = 2000
"""At most so many test images,"""
PIXELS = 8 << 20
"""and at most so many bytes of them."""
GOLDEN = 8
"""Codes of the page's self-test."""
KINDS: dict[type, str] = {DiagGaussian: "gaussian", FullGaussian: "gaussian", Laplace: "laplace", Delta: "point"}
"""What the page calls a posterior; of any other it shows the codes alone."""
HEADLINES = (
    "nll", "nll_is", "elbo", "cross_entropy_plus_rate", "cross_entropy", "rate", "distortion", "bits_per_dim",
    "active_units", "mutual_information", "aggregate_kl", "code_std", "sigma", "outside_prior", "knn_accuracy", "legible",
)  # fmt: skip
"""The quantities that the page shows, in its order; a report has all."""
ROWS = sorted((row for row in METRICS if row["key"] in HEADLINES), key=lambda row: HEADLINES.index(row["key"]))

OnProgress = Callable[[float, str], None]


@dataclass(frozen=True)
class Exhibit:
    """A run that is shown, and what it is called beside another."""

    label: str
    run: Run


@dataclass(frozen=True)
class Bundle:
    """What the page knows; `vaelab.explore.pack` adds what it runs on.

    Attributes:
        manifest: plain data.
        pieces: bytes by name.
    """

    manifest: dict[str, Any]
    pieces: dict[str, bytes] = field(repr=False)


def build(
    exhibits: Sequence[Exhibit],
    data: Dataset,
    *,
    title: str = "",
    ahead: export.Graphs | None = None,
    on_progress: OnProgress = lambda done, text: None,
) -> Bundle:
    """The bundle of one run, or of two on the same images.

    Args:
        exhibits: one or two trained runs.
        data: what they were trained on; its test images are shown.
        title: of the page.
        ahead: what `export.graphs` made of these runs; without it they are made here.
        on_progress: called with the fraction done and what is next.

    Raises:
        UsageError: the packages for ONNX are missing, the runs do not belong together, or codes are not finite.
        RunError: a run without a trained model.
    """
    if not ahead:
        require()
    check(exhibits, data)
    graphs = ahead or export.graphs(
        [exhibit.run for exhibit in exhibits], lambda done, text: on_progress(0.8 * done, f"{text} to ONNX")
    )
    protocol = protocol_named(exhibits[0].run.recipe().protocol)
    index = evenly(min(SHOWN, max(1, PIXELS // math.prod(data.shape))), len(data.test))
    pixels = _bytes(protocol, data, index)
    labels = None if data.test.labels is None else data.test.labels[index]
    classes = data.classes if data.classes and len(data.classes) <= 256 else None
    pieces = {"test.u8": pixels.tobytes()}
    if classes and labels is not None:
        pieces["labels.u8"] = labels.astype(np.uint8).tobytes()
    x = torch.from_numpy(pixels).float().div_(255)
    runs = []
    for i, (key, exhibit) in enumerate(zip("ab", exhibits, strict=False)):

        def tell(done: float, text: str, i: int = i, label: str = exhibit.label) -> None:
            on_progress(0.8 + 0.2 * (i + done) / len(exhibits), f"{label}: {text}")

        described, made = _exhibit(key, exhibit, protocol, x, labels, graphs[exhibit.run.path], tell)
        runs.append(described)
        pieces |= made
    manifest = {
        "format": FORMAT,
        "vaelab": __version__,
        "title": title or f"{' and '.join(exhibit.label for exhibit in exhibits)}, {data.name}",
        "data": {
            "name": data.name,
            "shape": list(data.shape),
            "classes": list(classes) if classes else None,
            "n": len(index),
            "pixels": "test.u8",
            "labels": "labels.u8" if "labels.u8" in pieces else None,
            "binary": protocol.measure == "binary",
        },
        "runs": runs,
    }
    return Bundle(manifest, pieces)


def labels(runs: Sequence[Run]) -> list[str]:
    """What runs are called side by side: the names of their folders, with as much of the path before as tells them apart."""
    paths = [run.path.resolve() for run in runs]
    depth = 1
    while depth < min(len(path.parts) for path in paths) and len({path.parts[-depth:] for path in paths}) < len(
        set(paths)
    ):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def check(exhibits: Sequence[Exhibit], data: Dataset | None = None) -> None:
    """Refuse runs that one page cannot show.

    Raises:
        UsageError: no run or more than two, or two of different data or protocol.
        RunError: a run without a trained model.
    """
    if not 1 <= len(exhibits) <= 2:
        raise UsageError(f"{len(exhibits)} runs were given: the explorer shows one run, or two side by side")
    facts = []
    for exhibit in exhibits:
        fingerprint = exhibit.run.environment().get("data_fingerprint")
        if data is not None and fingerprint not in (None, data.fingerprint):
            raise UsageError(
                f"'{exhibit.run.path}' was trained on data with fingerprint {fingerprint}, and that given has "
                f"{data.fingerprint}: give the run's own data"
            )
        exhibit.run.model()  # whose errors should come now, not after the first run's graphs
        recipe = exhibit.run.recipe()
        facts.append({"data": (recipe.data, fingerprint), "protocol": recipe.protocol})
    for key in ("data", "protocol"):
        one, other = facts[0][key], facts[-1][key]
        same = one == other if key == "protocol" else None in (one[1], other[1]) or one[1] == other[1]
        if not same:
            one, other = (f"'{value if key == 'protocol' else value[0]}'" for value in (one, other))
            raise UsageError(
                f"these runs cannot be shown side by side: the {key} is {one} for '{exhibits[0].run.path}' and {other} for "
                f"'{exhibits[-1].run.path}'; both must see the same images: give each a page of its own"
            )


def _bytes(protocol: Protocol, data: Dataset, index: np.ndarray) -> np.ndarray:
    """The test images of some indices as the protocol gives them, as bytes (N, C, H, W)."""
    # all test images first: which bits are drawn for one depends on its place among them
    return np.rint(protocol.test_set(data.test.pixels)[index].numpy() * 255).astype(np.uint8)


def _exhibit(
    key: str,
    exhibit: Exhibit,
    protocol: Protocol,
    x: Tensor,
    labels: np.ndarray | None,
    graphs: Mapping[str, Graph | NoGraph],
    tell: OnProgress,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """One run's part of the manifest, and its pieces."""
    run, recipe = exhibit.run, exhibit.run.recipe()
    model = run.model()
    shape, given = export.image_shape(model), tuple(x.shape[1:])
    if shape != given:
        raise UsageError(
            f"'{run.path}' decodes images of shape {shape} and the data has {given}: give the run's own data"
        )
    c = labels_for(model, Images(np.empty((len(x), 0), np.uint8), labels))
    tell(0.0, "codes")
    codes = _codes(model, x, c)
    if not np.isfinite(codes.mean).all():
        bad = int((~np.isfinite(codes.mean)).any(1).sum())
        raise UsageError(f"the codes of {bad} of {len(x)} test images of '{run.path}' are not finite: train it again")
    missing: dict[str, str] = {}
    pieces = {f"{key}/mean.f32": codes.mean.astype("<f4").tobytes()}
    names = {"log_sigma": codes.log_sigma, "scale_tril": codes.scale_tril}
    pieces |= {f"{key}/{name}.f32": found.astype("<f4").tobytes() for name, found in names.items() if found is not None}
    for part, graph in graphs.items():
        if isinstance(graph, NoGraph):
            missing[part] = graph.reason
        else:
            pieces[f"{key}/{part}.onnx"] = graph.content
    tell(0.5, "numbers")
    metrics, not_measured, how = _metrics(run, protocol)
    described = {
        "key": key,
        "label": exhibit.label,
        "run": run.path.resolve().name,
        "weights": export.weights_of(run),
        "recipe": recipe.name,
        "protocol": protocol.name,
        "latent_dim": model.latent_dim,
        "prior": _prior(model),
        "posterior": codes.kind,
        "encoder": _name(key, "encoder", missing),
        "encoder_missing": missing.get("encoder", ""),
        "decoder": _name(key, "decoder", missing),
        "decoder_missing": missing.get("decoder", ""),
        "kl": codes.has_kl and "encoder" not in missing,
        "likelihood": _likelihood(model),
        "normalised": bool(model.likelihood.normalised),
        "classes": model.classes or 0,
        "codes": {
            "mean": f"{key}/mean.f32",
            **{name: None if found is None else f"{key}/{name}.f32" for name, found in names.items()},
        },
        "rates": codes.rates,
        "components": _components(codes.mean),
        "interrupted": run.interrupted,
        "metrics": metrics,
        "metrics_missing": not_measured,
        "protocol_text": how,
        "golden": _golden(model, x, c, codes.mean),
    }
    return described, pieces


@dataclass(frozen=True)
class _Codes:
    """Posterior means and log sigmas (N, D) and factors of covariances (N, D, D) float32, the kind of posterior, and the
    mean KL of each dimension."""

    mean: np.ndarray
    log_sigma: np.ndarray | None
    scale_tril: np.ndarray | None
    kind: str
    has_kl: bool
    rates: list[float] | None


def _codes(model: VAE, x: Tensor, c: Tensor | None, batch_size: int = 500) -> _Codes:
    """What the posteriors of images (N, *X) with labels c (N,) say."""
    means, sigmas, factors, rates = [], [], [], []
    kind = "none"
    with evaluating(model):
        for index in torch.arange(len(x)).split(batch_size):
            labels = None if c is None else c[index]
            q = model.encode(x[index], labels)
            means.append(q.mean)
            kind = KINDS.get(type(q), "none")
            if kind == "none":
                continue
            kl = closed_form_kl(q, model.latent_prior(labels))
            for found, kept in ((export.log_sigma(q), sigmas), (export.scale_tril(q), factors), (kl, rates)):
                if found is not None:
                    kept.append(found)
    each = torch.cat(rates).double() if rates else None
    factorised = each is not None and each.shape[1] == model.latent_dim and bool(each.isfinite().all())
    log_sigma, scale_tril = (torch.cat(kept).numpy() if kept else None for kept in (sigmas, factors))
    return _Codes(
        torch.cat(means).numpy(), log_sigma, scale_tril, kind, each is not None,
        each.mean(0).tolist() if factorised and each is not None else None,
    )  # fmt: skip


def _name(key: str, part: str, missing: Mapping[str, str]) -> str | None:
    return None if part in missing else f"{key}/{part}.onnx"


def _prior(model: VAE) -> dict[str, str]:
    if isinstance(model.prior, StandardNormal):
        return {"kind": "standard-normal"}
    return {"kind": "other", "text": f"{_words(type(model.prior).__name__)}, which this page does not draw"}


def _likelihood(model: VAE) -> str:
    return _words(type(model.likelihood).__name__).replace(" ", "-")


def _words(name: str) -> str:
    """CamelCase as words: "ContinuousBernoulli" to "continuous bernoulli"."""
    return "".join(f" {letter.lower()}" if letter.isupper() and i else letter.lower() for i, letter in enumerate(name))


def _components(codes: np.ndarray) -> dict[str, Any] | None:
    """The plane of largest variance of codes (N, D), for D > 2; each axis points where its largest entry is positive."""
    if codes.shape[1] <= 2:
        return None
    mean = codes.astype(np.float64).mean(0)
    _, sizes, axes = np.linalg.svd(codes - mean, full_matrices=False)
    axes = np.array([axis * math.copysign(1, axis[np.abs(axis).argmax()]) for axis in axes[:2]])
    total = float(np.square(sizes).sum()) or 1.0
    return {"mean": mean.tolist(), "axes": axes.tolist(), "share": (np.square(sizes[:2]) / total).tolist()}


def _metrics(run: Run, protocol: Protocol) -> tuple[list[dict[str, Any]], str, str]:
    """Rows for the page, why there are none, and how they were measured."""
    seed = f", drawn once with seed {TEST_DRAW_SEED}" if protocol.redrawn else ""
    images = f"Images: protocol '{protocol.name}'{seed}."
    advice = f"run `vaelab evaluate {shlex.quote(str(run.path))}`, then make this page again"
    written = run.path / "evaluation.json"
    try:
        kept = load_evaluation(run)
        if kept is None:
            why = "it was trained again since it was evaluated" if written.is_file() else "not evaluated"
            return [], f"{why}: {advice}", images
        quantities, how = read_json(written)["quantities"], kept.protocol
        shown = [_row(row, quantities[row["key"]]) for row in ROWS if row["key"] in quantities]
        return (
            shown,
            "",
            (
                f"{images} Measured on {how['test_images']:,} test images ({how['density']}, seed {how['seed']}); "
                f"importance-sampled with K = {how['importance_samples']:,} on {how['importance_sampled_images']:,} of them."
            ),
        )
    except (RunError, KeyError, TypeError, ValueError):  # the page goes on without, and so does another run beside it
        return [], f"its evaluation cannot be read: {advice}", images


def _row(about: Mapping[str, Any], quantity: Mapping[str, Any]) -> dict[str, Any]:
    """A quantity as the page shows it: numbers as text, "" for those that are not there."""
    form = f".{about['decimals']}f"
    value, se = ("" if number is None else format(number, form) for number in (quantity["mean"], quantity["se"]))
    return {
        **{name: about[name] for name in ("key", "label", "unit", "help")},
        **{name: quantity[name] for name in ("n", "reason")},
        "value": value,
        "se": se,
    }


def _golden(model: VAE, x: Tensor, c: Tensor | None, codes: np.ndarray) -> dict[str, Any]:
    """What torch makes of some codes, with label 0 where there are labels, and of one image."""
    half = GOLDEN // 2
    some = torch.from_numpy(codes[evenly(half, len(codes))].astype(np.float32))
    z = torch.cat([some, torch.randn(GOLDEN - len(some), model.latent_dim, generator=stream(0, "golden"))])
    image = len(x) // 2
    with evaluating(model):
        px = model.decode(z.unsqueeze(0), None if c is None else torch.zeros(len(z), dtype=torch.long))
        mean_sum = px.mean[0].double().flatten(1).sum(1)
        log_px = px.log_prob(torch.zeros(len(z), *x.shape[1:]))[0]
        one = slice(image, image + 1)
        mean = model.encode(x[one], None if c is None else c[one]).mean[0]
    return {
        "z": z.tolist(), "mean_sum": _plain(mean_sum), "log_px_zero": _plain(log_px), "image": image, "mean": mean.tolist(),
    }  # fmt: skip


def _plain(values: Tensor) -> list[float | None]:
    """Numbers for JSON, which has no word for one that is not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
