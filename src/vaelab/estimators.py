"""Estimators over a batch of codes: the aggregate posterior's densities, and a distance between two sets of samples.

The aggregate posterior of N images is the mixture q(z) = 1/N sum_n q(z|x_n). A batch sees B of them, so that q(z) at one
of the batch's own codes z_i ~ q(z|x_i) is estimated by a weighted sum over the batch,

    q(z_i) ~ sum_j W_ij q(z_i|x_j)

    weighted     W_ij = 1 / (N B)                            (Chen et al. 2018, arXiv 1802.04942, appendix C.1, "MWS")
    stratified   W_ii = 1 / N,  W_ij = (N - 1) / (N (B - 1))  (the same, appendix C.2, "MSS")

and each marginal q(z_d) likewise, with the same weights and q(z_d|x_j). The weighted one is too small by a factor of up to
N, which shifts a term of the loss by a constant. The stratified one is unbiased for q(z_i): an image always meets its own
code, so it counts with its true share 1/N and the rest stand for the other N - 1. (The paper gives one of the others
another weight than the rest; this is the average over which one, with the same expectation and less variance.)

The maximum mean discrepancy between two distributions (Gretton et al. 2012), by its unbiased estimate,

    MMD = E k(a, a') + E k(b, b') - 2 E k(a, b)        a, a' ~ one, b, b' ~ the other, all independent
    rbf    k(a, b) = exp(-|a - b|^2 / C)
    imq    k(a, b) = C / (C + |a - b|^2)               heavier tails, so that codes far out still feel it

with the bandwidth C = 2 D, the mean squared distance of two draws of a standard normal (Tolstikhin et al. 2018,
arXiv 1711.01558, section 4). It is the square of a norm, as all these papers use it, and it can be below zero.
"""

import math

import torch
from torch import Tensor

from vaelab.distributions import Distribution
from vaelab.errors import UsageError

AGGREGATES = ("weighted", "stratified")
KERNELS = ("imq", "rbf")


def log_aggregate(q: Distribution, z: Tensor, data_size: int, estimator: str) -> tuple[Tensor, Tensor]:
    """log q(z) and log q(z_d) of the aggregate posterior at a batch's own codes, see the module.

    Args:
        q: the posteriors of B images, factorised over their dimensions.
        z: codes (K, B, *D) drawn from them.
        data_size: N, the images that the batch was drawn from, without replacement.
        estimator: one of `AGGREGATES`.

    Returns:
        (K, B) and (K, B, D) in nats.

    Raises:
        UsageError: q does not factorise, N is smaller than the batch, or one image is to be stratified.
    """
    k, b = z.shape[:2]
    # code i under the posterior of image j, in each dimension: (K, B_i, B_j, D)
    try:
        each = q.log_prob_each(z.flatten(0, 1).unsqueeze(1)).flatten(2).unflatten(0, (k, b))
    except UsageError as error:
        raise UsageError(f"{error}, and q(z_d) is needed: take a Gaussian or Laplace posterior") from None
    log_weight = _log_weights(b, data_size, estimator, each)
    joint = torch.logsumexp(each.sum(-1) + log_weight, -1)
    return joint, torch.logsumexp(each + log_weight.unsqueeze(-1), -2)


def _log_weights(b: int, n: int, estimator: str, like: Tensor) -> Tensor:
    """log W, (B, B); a row for each code, a column for each image."""
    if n < b:
        raise UsageError(f"data_size is {n} and the batch has {b} images: give the number of training images")
    if estimator == "weighted":
        return like.new_full((b, b), -math.log(n * b))
    at_least_two_images(b, "the stratified estimator")
    return like.new_full((b, b), math.log((n - 1) / (n * (b - 1)))).fill_diagonal_(-math.log(n))


def mmd(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """The unbiased estimate of the maximum mean discrepancy between samples a (K, N, D) and b (K, N, D) or (N, D): (K,).

    The mean over i != j of k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(b_i, a_j) (Gretton et al. 2012, eq. 4). That a_i
    never meets b_i either keeps it unbiased where the two share something, the label of a conditional prior.

    Raises:
        UsageError: fewer than two samples.
    """
    b = b.expand_as(a)
    n = a.shape[1]
    at_least_two_images(n, "an unbiased MMD")
    terms = _kernel(a, a, kernel) + _kernel(b, b, kernel) - 2 * _kernel(a, b, kernel)
    return (terms.sum((1, 2)) - terms.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))


def _kernel(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    # by differences: |a|^2 + |b|^2 - 2 ab would leave k(z, z) a rounding error away from 1
    squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    bandwidth = 2 * a.shape[-1]
    return torch.exp(-squared / bandwidth) if kernel == "rbf" else bandwidth / (bandwidth + squared)


def at_least_two_images(b: int, what: str) -> None:
    """Raises UsageError where a batch is too small to say anything about the aggregate posterior."""
    if b < 2:
        raise UsageError(
            f"{what} compares the images of a batch, and this one has {b}: choose a batch size that leaves no single "
            "image for the last batch"
        )
