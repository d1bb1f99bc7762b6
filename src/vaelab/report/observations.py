"""Observations: sentences built from the numbers of the run at hand, so that they are true of it.

Each function says what its numbers say, whichever way they went, and returns None where one of them is missing.
"""

import math
from collections.abc import Callable
from typing import Any

Values = dict[str, dict[str, dict[str, Any]]]
"""values[metric][arm] = {"mean", "se", "n", ...}, as in report.json."""


class _Numbers:
    """Reads means, and prints them with their standard error where there is one."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def mean(self, metric: str, arm: str) -> float | None:
        return self.values.get(metric, {}).get(arm, {}).get("mean")

    def text(self, metric: str, arm: str, form: str = "{:z.2f}", scale: float = 1.0) -> str:
        value = self.values[metric][arm]
        text = form.format(scale * value["mean"])
        return f"{text} ± {form.format(scale * value['se'])}" if value.get("se") is not None else text

    def percent(self, metric: str, arm: str) -> str:
        return self.text(metric, arm, "{:.1f}", 100) + " %"

    def has(self, *pairs: tuple[str, str]) -> bool:
        return all(self.mean(*pair) is not None for pair in pairs)


def removing_kl(values: Values, n_seeds: int, k: int, is_images: int, classes: int) -> list[dict[str, Any]]:
    """What the study of that name shows, from the arms `kl` and `no_kl`.

    Args:
        values: of the report.
        n_seeds: runs of each arm.
        k: importance samples.
        is_images: how many images were importance-sampled.
        classes: how many classes the classifier knows; 0 without labels.
    """
    numbers = _Numbers(values)
    found = []
    sentences: list[tuple[Callable[..., str | None], str, tuple]] = [
        (_trade, "images/training.png", ()),
        (_explosion, "images/latent_space_comparison.png", ()),
        (_neighbours, "images/latent_space_no_kl.png", ()),
        (_generation, "images/generation_no_kl.png", (classes,)),
        (_fitted, "images/generation_no_kl_fitted.png", ()),
        (_exact, "images/reconstruction.png", ()),
        (_importance, "images/reconstruction.png", (k, is_images)),
    ]
    for sentence, figure, extra in sentences:
        text = sentence(numbers, *extra)
        if text:
            found.append({"text": f"{text} (n = {n_seeds})", "figure": figure})
    return found


def _moves(before: float, after: float) -> str:
    return "falls" if after < before else "rises" if after > before else "stays"


def _ratio(v: _Numbers, metric: str) -> float | None:
    """Without KL over with KL; None where there is nothing to divide by."""
    before, after = v.mean(metric, "kl"), v.mean(metric, "no_kl")
    return after / before if before and after is not None else None


def _trade(v: _Numbers) -> str | None:
    if not v.has(*[(m, a) for m in ("rate", "distortion", "elbo") for a in ("kl", "no_kl")]):
        return None
    ratio = _ratio(v, "rate")
    times = "" if ratio is None else f" ({ratio:.1f} times as much)"
    distortion = _moves(v.mean("distortion", "kl"), v.mean("distortion", "no_kl"))  # type: ignore[arg-type]
    cause = "Nothing pays for the code once the KL term is gone" if ratio and ratio > 1.2 else "The code hardly changes"
    return (
        f"{cause}: the rate goes from {v.text('rate', 'kl')} to "
        f"{v.text('rate', 'no_kl')} nats per image{times}, and the distortion {distortion} from "
        f"{v.text('distortion', 'kl')} to {v.text('distortion', 'no_kl')} nats. The ELBO, which counts both, "
        f"{_moves(v.mean('elbo', 'kl'), v.mean('elbo', 'no_kl'))} "  # type: ignore[arg-type]
        f"from {v.text('elbo', 'kl')} to {v.text('elbo', 'no_kl')} nats."
    )


def _explosion(v: _Numbers) -> str | None:
    pairs = [(m, a) for m in ("code_std", "outside_prior", "sigma") for a in ("kl", "no_kl")]
    if not v.has(*pairs):
        return None
    ratio = _ratio(v, "code_std")
    if ratio is None:
        return None
    sigma = _ratio(v, "sigma")
    point = ": each image becomes a point" if sigma is not None and sigma < 0.2 else ""
    grown = v.mean("code_std", "no_kl") > 1.5  # type: ignore[operator]  # the prior has 1
    verdict = (
        "explodes"
        if ratio > 1.5 and grown
        else "grows"
        if ratio > 1.5
        else "hardly grows"
        if ratio > 0.8
        else "shrinks"
    )
    return (
        f"The latent space {verdict}: the codes' standard deviation goes from {v.text('code_std', 'kl')} to "
        f"{v.text('code_std', 'no_kl')} ({ratio:.1f} times), the share of test codes outside the prior's 3-sigma circle "
        f"from {v.percent('outside_prior', 'kl')} to {v.percent('outside_prior', 'no_kl')}, and the mean sigma of "
        f"q(z|x) from {v.text('sigma', 'kl', '{:.4f}')} to {v.text('sigma', 'no_kl', '{:.4f}')}{point}."
    )


def _neighbours(v: _Numbers) -> str | None:
    if not v.has(("knn_accuracy", "kl"), ("knn_accuracy", "no_kl")):
        return None
    difference = v.mean("knn_accuracy", "no_kl") - v.mean("knn_accuracy", "kl")  # type: ignore[operator]
    verdict = "about as well" if abs(difference) < 0.02 else "better" if difference > 0 else "less well"
    return (
        f"The codes without KL tell the classes apart {verdict}: the five nearest training codes name the right class for "
        f"{v.percent('knn_accuracy', 'no_kl')} of the test images, against {v.percent('knn_accuracy', 'kl')} with KL."
    )  # fmt: skip


def _generation(v: _Numbers, classes: int) -> str | None:
    if not v.has(("legible", "kl"), ("legible", "no_kl"), ("class_entropy", "kl"), ("class_entropy", "no_kl")):
        return None
    illegible = v.mean("legible", "no_kl") < 0.8 * v.mean("legible", "kl")  # type: ignore[operator]
    drawn = {arm: math.exp(v.mean("class_entropy", arm)) for arm in ("kl", "no_kl")}  # type: ignore[arg-type]
    missing = drawn["no_kl"] < 0.8 * drawn["kl"]
    verdict = {
        (True, True): "Generation fails without KL, in legibility and in variety",
        (True, False): "Generation fails without KL: fewer samples can be read",
        (False, True): "Generation fails without KL, not in legibility but in variety: whole classes go missing",
        (False, False): "Generation does not fail in this run",
    }[illegible, missing]
    if v.mean("legible", "kl") < 0.1:  # type: ignore[operator]
        verdict = "Neither model draws samples that can be read, so this run says nothing about generation"
    return (
        f"{verdict}. Of the samples decoded from the prior the classifier reads {v.percent('legible', 'kl')} with "
        f"probability above 0.9 with KL and {v.percent('legible', 'no_kl')} without; the entropy of the classes read is "
        f"{v.text('class_entropy', 'kl')} and {v.text('class_entropy', 'no_kl')} of at most {math.log(classes):.2f} nats, "
        f"as of {drawn['kl']:.1f} and {drawn['no_kl']:.1f} equally frequent classes out of {classes}."
    )


def _fitted(v: _Numbers) -> str | None:
    if not v.has(
        ("legible", "no_kl"), ("legible_fitted", "no_kl"), ("class_entropy_fitted", "no_kl"), ("class_entropy", "no_kl")
    ):
        return None
    legible = v.mean("legible_fitted", "no_kl") - v.mean("legible", "no_kl")  # type: ignore[operator]
    variety = v.mean("class_entropy_fitted", "no_kl") - v.mean("class_entropy", "no_kl")  # type: ignore[operator]
    if (legible > 0.05 and variety > -0.1) or (variety > 0.1 and legible > -0.05):
        lesson = "what was lost is the match between codes and prior, more than the decoder"
    else:
        lesson = "in this run a Gaussian does not describe the codes better than the prior does"
    return (
        f"Drawing the same decoder's codes from a Gaussian fitted to its own codes makes "
        f"{v.percent('legible_fitted', 'no_kl')} of the samples legible (from the prior {v.percent('legible', 'no_kl')}), "
        f"with a class entropy of {v.text('class_entropy_fitted', 'no_kl')} nats (from the prior "
        f"{v.text('class_entropy', 'no_kl')}): {lesson}."
    )


def _exact(v: _Numbers) -> str | None:
    if not v.has(("nll", "kl"), ("nll", "no_kl"), ("elbo", "kl"), ("elbo", "no_kl")):
        return None
    gaps = [-v.mean("nll", arm) - v.mean("elbo", arm) for arm in ("kl", "no_kl")]  # type: ignore[operator]
    return (
        f"The exact log-likelihood of the test set is -{v.text('nll', 'kl')} nats per image with KL and "
        f"-{v.text('nll', 'no_kl')} without. The ELBO lies {gaps[0]:.2f} and {gaps[1]:.2f} nats below it: that gap is "
        "KL(q(z|x) || p(z|x)), how far the encoder's posterior is from the true one."
    )


def _importance(v: _Numbers, k: int, is_images: int) -> str | None:
    if not v.has(("nll_is_excess", "kl"), ("nll_is_excess", "no_kl"), ("ess", "kl"), ("ess", "no_kl")):
        return None
    excess = v.mean("nll_is_excess", "kl")
    lesson = (
        " Samples of a posterior that is narrower than the true one miss part of the integral, and the standard error "
        "does not show it."
        if max(excess, v.mean("nll_is_excess", "no_kl")) > 0.1  # type: ignore[type-var]
        else ""
    )
    verdict = (
        "is too pessimistic with KL"
        if excess > 0.1  # type: ignore[operator]
        else "is too optimistic with KL"
        if excess < -0.1  # type: ignore[operator]
        else "agrees with it with KL"  # type: ignore[operator]
    )
    return (
        f"The importance-sampled estimate ({k:,} samples of the encoder's posterior for each of {is_images:,} evenly spaced "
        f"test images) {verdict}: its -log p(x) is {v.text('nll_is_excess', 'kl')} nats above the exact one with KL and "
        f"{v.text('nll_is_excess', 'no_kl')} without, on the same images, with an effective sample size of "
        f"{v.text('ess', 'kl', '{:.0f}')} and {v.text('ess', 'no_kl', '{:.0f}')} of {k:,}.{lesson}"
    )
