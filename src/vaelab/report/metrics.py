"""The rows of the table: name, unit and one sentence for each quantity that `vaelab.evaluation` measures."""

from collections.abc import Collection
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
         "The estimate with K samples of the proposal, on evenly spaced images of the test set; too high where K is too small."),
    *(
        _row("Likelihood", f"nll_is_{k}", f"with {k} sample{'s' if k > 1 else ''}", "nats", 2,
             "The same images, the same samples: means over groups of so many.")
        for k in (500, 50, 1)
    ),
    _row("Likelihood", "nll_is_excess", "how far it is too high", "nats", 2,
         "Importance-sampled minus exact, on the same images."),
    _row("Likelihood", "nll_is_drift", "what the last tenfold of samples gained", "nats", 3,
         "Estimate with a tenth of the samples minus the one with all: what it still falls by."),
    _row("Likelihood", "ess", "effective sample size", "samples", 1,
         "Median over images of (sum w)² / sum w²: how many of the K samples really count."),
    _row("Likelihood", "ess_worst", "the worst image's", "samples", 1, "Least effective sample size of an image."),
    _row("Likelihood", "max_weight", "share of the largest weight", "", 3, "Median over images; 1/K where all count alike."),
    _row("Likelihood", "tail_share", "images with too heavy a tail", "", 3,
         "Share whose weights have a Pareto index above 0.7 (less for few samples): their estimate is not to be trusted."),
    _row("Likelihood", "bits_per_dim", "bits per dimension, exact", "bits", 4, "Exact -log p(x) over the number of pixels."),
    _row("Likelihood", "bits_per_dim_is", "bits per dimension, importance-sampled", "bits", 4,
         "The same of the importance-sampled estimate."),
    _row("Likelihood", "bits_per_dim_elbo", "bits per dimension, bound", "bits", 4, "The same of -ELBO: what a code would take."),
    _row("Gap", "gap", "gap of the bound", "nats", 2,
         "log p(x) - ELBO on some images; where log p(x) is importance-sampled, too small by what that is too low."),
    _row("Gap", "approximation_gap", "of the posterior's family", "nats", 2,
         "What is left with the best posterior of the family for each image, as far as it was found."),
    _row("Gap", "amortisation_gap", "of the encoder", "nats", 2, "What the encoder loses to the best posterior of its family."),
    _row("Latent space", "active_units", "active units", "", 0,
         "Latent dimensions whose posterior mean has a variance over images above 0.01."),
    _row("Latent space", "mutual_information", "mutual information I(x; z)", "nats", 2,
         "What a code tells about which test image it came from; at most the log of their number."),
    _row("Latent space", "mutual_information_upper", "its upper bound", "nats", 2,
         "With the image's own component left out of the mixture: the two bracket it for the images' distribution."),
    _row("Latent space", "aggregate_kl", "KL of the aggregate posterior from the prior", "nats", 2,
         "KL(q(z) || p(z)): the part of the rate that tells nothing about the image."),
    _row("Latent space", "aggregate_kl_lower", "its lower bound", "nats", 2,
         "For the images' distribution, not for these images alone."),
    _row("Latent space", "total_correlation", "total correlation", "nats", 2,
         "KL of the aggregate posterior from the product of its marginals."),
    _row("Codes", "code_mean", "distance of their mean from 0", "", 3, "Norm of the mean of the test codes (posterior means)."),
    _row("Codes", "code_std", "standard deviation", "", 3, "Of the test codes, root mean square over dimensions; the prior has 1."),
    _row("Codes", "sigma", "mean sigma of q(z|x)", "", 5, "Mean over images and dimensions; the prior has 1."),
    _row("Codes", "outside_prior", "share outside the prior's 3 sigma", "", 4,
         "Test codes outside the ball that holds 98.9 % of the prior: its 3-sigma circle in two dimensions."),
    _row("Codes", "knn_accuracy", "nearest-neighbour accuracy", "", 4,
         "Share of test images whose 5 nearest training codes vote for the right class."),
    _row("Codes", "linear_accuracy", "linear-probe accuracy", "", 4,
         "Share of test images whose class a logistic regression on the codes gets right."),
    _row("Samples", "legible", "legible samples of the prior", "", 3,
         "Share of decoded prior samples that the classifier reads with probability above 0.9."),
    _row("Samples", "class_entropy", "entropy of their classes", "nats", 3,
         "Of the classes read: log of the number of classes where all are drawn equally often."),
    _row("Samples", "legible_fitted", "legible samples of a fitted Gaussian", "", 3,
         "The same for codes drawn from a Gaussian fitted to the model's own codes instead of the prior."),
    _row("Samples", "class_entropy_fitted", "entropy of their classes", "nats", 3, "Of the classes read in those samples."),
    _row("Samples", "legible_test", "legible test images", "", 3, "The same for real images: what a perfect model gets."),
    _row("Samples", "class_entropy_test", "entropy of their classes", "nats", 3, "Of the classes read in the real images."),
    _row("Samples", "frechet", "Fréchet distance of means", "", 2,
         "Decoder means against test images, in the features of the lab's classifier; not the FID."),
    _row("Samples", "frechet_heldout", "of training images", "", 2, "The same for as many real images: what a perfect model gets."),
    _row("Samples", "frechet_drawn", "Fréchet distance of drawn pixels", "", 2,
         "Pixels drawn from p(x|z) against test images as the protocol gives them."),
    _row("Samples", "frechet_drawn_heldout", "of training images", "", 2, "The same for as many real images."),
    _row("Disentanglement", "mig", "mutual information gap", "", 3, "Chen et al. 2018; 0 to 1."),
    _row("Disentanglement", "dci_disentanglement", "DCI disentanglement", "", 3, "Eastwood & Williams 2018; 0 to 1."),
    _row("Disentanglement", "dci_completeness", "DCI completeness", "", 3, "Of the same; 0 to 1."),
    _row("Disentanglement", "dci_informativeness", "DCI informativeness", "", 3, "Of the same; 0 to 1."),
    _row("Disentanglement", "sap", "SAP", "", 3, "Separated attribute predictability (Kumar et al. 2018); 0 to 1."),
    _row("Disentanglement", "factor_vae_score", "FactorVAE score", "", 3, "Kim & Mnih 2018; chance is one over the factors."),
]  # fmt: skip


def rows_of(keys: Collection[str]) -> list[dict[str, Any]]:
    """The rows of the quantities that are there, in the order of the table; each latent dimension's rate has its own."""
    rows = [row for row in METRICS if row["key"] in keys]
    at = next((i for i, row in enumerate(rows) if row["key"] == "mutual_information"), len(rows))
    rates = [
        _row("Latent space", key, f"rate of dimension {key.removeprefix('rate_dim_')}", "nats", 3,
             "Mean over images of KL(q(z_d|x) || p(z_d)).")
        for key in keys if key.startswith("rate_dim_")
    ]  # fmt: skip
    return rows[:at] + rates + rows[at:]
