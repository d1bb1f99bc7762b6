"""The rows of the table: name, unit and one sentence for each quantity that `vaelab.evaluation` measures."""

from typing import Any


def _row(section: str, key: str, label: str, unit: str, decimals: int, help: str) -> dict[str, Any]:
    return {"section": section, "key": key, "label": label, "unit": unit, "decimals": decimals, "help": help}


METRICS = [
    _row("Bound", "elbo", "ELBO", "nats", 2, "Lower bound on log p(x), per test image: -(distortion + rate)."),
    _row("Bound", "rate", "rate", "nats", 2, "KL(q(z|x) || p(z)): what the code tells beyond the prior."),
    _row("Bound", "distortion", "distortion", "nats", 2, "-E log p(x|z): how badly the code's decoding explains the image."),
    _row("Bound", "cross_entropy_plus_rate", "cross-entropy + KL", "nats", 2,
         "What the classic examples minimise on grey levels; not a bound on a likelihood."),
    _row("Bound", "cross_entropy", "cross-entropy", "nats", 2, "Bernoulli cross-entropy on grey levels, summed over pixels."),
    _row("Likelihood", "nll", "exact -log p(x)", "nats", 2, "Negative log-likelihood of the test set, by adaptive quadrature over z."),
    _row("Likelihood", "nll_error", "its remaining error", "nats", 6,
         "Mean over images of what finer tiles changed last and what could lie outside the tiles."),
    _row("Likelihood", "nll_is", "importance-sampled -log p(x)", "nats", 2,
         "The usual estimate, with samples of the encoder's posterior, on the first images of the test set."),
    _row("Likelihood", "nll_is_excess", "how far it is too high", "nats", 2,
         "Importance-sampled minus exact, on the same images."),
    _row("Likelihood", "ess", "effective sample size", "samples", 1,
         "Median over images of (sum w)² / sum w²: how many of the K samples really count."),
    _row("Codes", "code_mean", "distance of their mean from 0", "", 3, "Norm of the mean of the test codes (posterior means)."),
    _row("Codes", "code_std", "standard deviation", "", 3, "Of the test codes, root mean square over dimensions; the prior has 1."),
    _row("Codes", "sigma", "mean sigma of q(z|x)", "", 5, "Mean over images and dimensions; the prior has 1."),
    _row("Codes", "outside_prior", "share outside the prior's 3 sigma", "", 4,
         "Test codes outside the ball that holds 98.9 % of the prior: its 3-sigma circle in two dimensions."),
    _row("Codes", "knn_accuracy", "nearest-neighbour accuracy", "", 4,
         "Share of test images whose 5 nearest training codes vote for the right class."),
    _row("Samples", "legible", "legible samples of the prior", "", 3,
         "Share of decoded prior samples that the classifier reads with probability above 0.9."),
    _row("Samples", "class_entropy", "entropy of their classes", "nats", 3,
         "Of the classes read: log of the number of classes where all are drawn equally often."),
    _row("Samples", "legible_fitted", "legible samples of a fitted Gaussian", "", 3,
         "The same for codes drawn from a Gaussian fitted to the model's own codes instead of the prior."),
    _row("Samples", "class_entropy_fitted", "entropy of their classes", "nats", 3, "Of the classes read in those samples."),
]  # fmt: skip
