"""Objectives: what training differentiates, from a trace. Each is a frozen dataclass, its own configuration.

Every known objective is a reading of the same trace. With R the distortion, KL the rate, log w_k the log-weights of
`vaelab.trace`, w~_k = w_k / sum w, and everything a mean over images, in nats:

    ELBO       R + beta KL                       VAE (beta 1), beta-VAE, warm-up, plain autoencoder (beta 0)
    FreeBits   R + beta sum_j max(floor, KL_j)   each dimension may spend `floor` nats for nothing
    Capacity   R + gamma |KL - C|                the rate is steered to C
    IWAE       -log 1/K sum_k w_k                tighter with each sample
    MIWAE      -1/M sum_m log M/K sum_k w_mk     M independent IWAE bounds, averaged
    PIWAE      IWAE of all for the decoder, MIWAE for the encoder
    CIWAE      beta ELBO + (1 - beta) IWAE
    STL        ELBO, its gradient without the score of q
    DReG       IWAE, its encoder's gradient with weights w~^2 and without the score of q
    BetaTC     R + alpha I(x; z) + beta TC + gamma sum_j KL(q(z_j) || p(z_j))
    DIP        R + KL + a penalty on the covariance of the codes
    InfoVAE    R + (1 - alpha) KL + (alpha + scale - 1) MMD
    WAE        R + scale MMD
    RAE        R + l2 |z|^2 / 2 + gradient_penalty |d mean(x|z) / dz|^2

The estimate's `bound` is always a true lower bound on log p(x) of the trace's own likelihood (which must be one: grey
levels have a cross-entropy only, and a scale made of the batch is a training loss), whatever the loss: the ELBO, or the
importance-weighted bound that the objective is about. It is never what happens to have the right gradient: -sum w~_k log
w_k, which does for IWAE, is too optimistic by up to log K.

Most losses are sums over images: the loss of a batch is the mean of the losses of its halves. `FreeBits` and `Capacity` are
not (they ask about the mean rate of a batch), nor `BetaTC`, `DIP`, `InfoVAE` and `WAE` (they ask how the codes of a batch
lie); their results depend on the batch size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vaelab.distributions import DiagGaussian, Distribution, Laplace, Transformed
from vaelab.errors import NoDensity, UsageError, unknown_name
from vaelab.estimators import AGGREGATES, KERNELS, at_least_two_images, log_aggregate, mmd
from vaelab.schedules import Schedule, at
from vaelab.trace import Estimate, Level, Trace, log_mean_exp

Objective = Callable[[Trace, int], Estimate]
"""What training differentiates, from a trace and the number of the step."""


@dataclass(frozen=True)
class ELBO:
    """loss = mean over images of distortion + beta * rate; bound = -(distortion + rate).

    VAE (Kingma & Welling 2014, arXiv 1312.6114): ``ELBO()``; beta-VAE (Higgins et al. 2017): ``ELBO(beta=4)``; KL warm-up
    (Bowman et al. 2016, arXiv 1511.06349): ``ELBO(beta=Linear(0, 1, steps))``; the lab's ablation, and with a Delta
    posterior a plain autoencoder: ``ELBO(beta=0)``.

    Args:
        beta: weight of the rate, a number >= 0 or a schedule over steps.
    """

    beta: float | Schedule = 1.0

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, "the weight of the KL term")

    def __call__(self, trace: Trace, step: int) -> Estimate:
        loss = _distortion_and_rate(trace, at(self.beta, step))
        return _estimate(trace, loss, _elbo(trace))


@dataclass(frozen=True)
class FreeBits:
    """loss = distortion + beta * sum_j max(floor, mean over the batch of KL_j) (Kingma et al. 2016, arXiv 1606.04934, eq. 15).

    Below the floor a latent dimension costs nothing more, so that none is given up early in training. The maximum is of
    the mean over the batch: an image may use less than the floor where another uses more. A rate that is known only as
    a sum over the D dimensions (no closed form, or one that does not factorise) is one group with the floor D * floor.

    Args:
        floor: nats for each latent dimension, >= 0; 0 is the ELBO wherever the rate is exact.
        beta: weight of the rate, a number >= 0 or a schedule over steps.
    """

    floor: float
    beta: float | Schedule = 1.0

    def __post_init__(self) -> None:
        _check_number("floor", self.floor, "the nats that each latent dimension may spend for nothing", schedule=False)
        _check_number("beta", self.beta, "the weight of the KL term")

    def __call__(self, trace: Trace, step: int) -> Estimate:
        rate = torch.zeros_like(trace.distortion).sum()
        for level in trace.levels:
            kl = level.kl.flatten(1).mean(0)  # (D,), or (1,) for all dimensions together
            dimensions = level.z[0, 0].numel() / len(kl)
            rate = rate + kl.clamp_min(self.floor * dimensions).sum()
        return _estimate(trace, trace.distortion.mean() + at(self.beta, step) * rate, _elbo(trace))


@dataclass(frozen=True)
class Capacity:
    """loss = distortion + gamma * |rate - C|, with the mean rate of the batch (Burgess et al. 2018, arXiv 1804.03599, eq. 8).

    The mean, not each image's own rate: C is the capacity of the channel, an average over images, and a plain image is
    not made to spend as much as an intricate one. C = 0 is the beta-VAE with beta = gamma.

    Args:
        capacity: C in nats per image, a number >= 0 or a schedule over steps (in the paper from 0 to 25, linearly).
        gamma: weight of the difference, >= 0.
    """

    capacity: float | Schedule
    gamma: float = 1000.0

    def __post_init__(self) -> None:
        _check_number("capacity", self.capacity, "the rate to be reached, in nats per image,")
        _check_number("gamma", self.gamma, "the weight of the distance from the capacity", schedule=False)

    def __call__(self, trace: Trace, step: int) -> Estimate:
        excess = (trace.rate.mean() - at(self.capacity, step)).abs()
        return _estimate(trace, trace.distortion.mean() + self.gamma * excess, _elbo(trace))


@dataclass(frozen=True)
class IWAE:
    """loss = -log mean_k w_k over the K samples of an image (Burda et al. 2016, arXiv 1509.00519, eq. 8).

    The bound rises to log p(x) with K, its gap falling like var(w) / 2K. With K = 1 it is the ELBO, its rate by Monte
    Carlo. Each w_k counts by its share w~_k in the gradient, and the encoder's gradient drowns in noise as K grows
    (Rainforth et al. 2018, arXiv 1802.04537): see `DReG` and `PIWAE`.
    """

    def __call__(self, trace: Trace, step: int) -> Estimate:
        bound = log_mean_exp(trace.log_w())
        return _estimate(trace, -bound.mean(), bound)


@dataclass(frozen=True)
class MIWAE:
    """loss = -mean_m log mean_k w_mk: `m` groups of K / m samples (Rainforth et al. 2018, arXiv 1802.04537, section 4).

    m = 1 is `IWAE`, m = K the ELBO. Samples 0 to K / m - 1 of the trace are the first group.

    Args:
        m: number of groups; the trace's K is a multiple of it.
    """

    m: int

    def __post_init__(self) -> None:
        _check_count("m", self.m, "the number of groups of samples")

    def __call__(self, trace: Trace, step: int) -> Estimate:
        bound = log_mean_exp(_grouped(self, trace.log_w(), self.m), 1).mean(0)
        return _estimate(trace, -bound.mean(), bound)


@dataclass(frozen=True)
class PIWAE:
    """Decoder and prior follow IWAE's gradient over all K samples, the encoder `MIWAE`'s (Rainforth et al. 2018, section 4).

    The bound is IWAE's. What makes z follows the one, what reads it the other, so a prior that is made of the encoder
    (VampPrior) follows IWAE as a prior. Needs a posterior of one level, with a density that can be asked anywhere.

    Args:
        m: number of groups for the encoder; the trace's K is a multiple of it.
    """

    m: int

    def __post_init__(self) -> None:
        _check_count("m", self.m, "the number of groups of samples")

    def __call__(self, trace: Trace, step: int) -> Estimate:
        level, stopped = _stopped_log_q(self, trace)
        log_w = trace.log_w().detach()
        whole = torch.softmax(log_w, 0).clamp_min(_TINY)
        groups = _grouped(self, log_w, self.m)
        part = torch.softmax(groups, 1).flatten(0, 1) / self.m
        # the score of q stays in, with the encoder's weights; its path through z has the encoder's weights by the hook
        score = level.q.log_prob(level.z.detach())
        surrogate = -(whole * (trace.log_px + level.log_p - stopped) - part * score).sum(0).mean()
        bound = log_mean_exp(log_w)
        return _steered(trace, surrogate, bound, level.z, part / whole)


@dataclass(frozen=True)
class CIWAE:
    """loss = -(beta * ELBO + (1 - beta) * IWAE) (Rainforth et al. 2018, arXiv 1802.04537, section 4).

    The bound is the same mean of two bounds. The ELBO has its closed-form rate, where there is one.

    Args:
        beta: share of the ELBO, in [0, 1].
    """

    beta: float

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, "the share of the ELBO", at_most=1, schedule=False)

    def __call__(self, trace: Trace, step: int) -> Estimate:
        elbo = -(trace.distortion + trace.rate)
        bound = self.beta * elbo + (1 - self.beta) * log_mean_exp(trace.log_w())
        return _estimate(trace, -bound.mean(), bound)


@dataclass(frozen=True)
class STL:
    """The ELBO's gradient without the score of q, "sticking the landing" (Roeder et al. 2017, arXiv 1703.09194).

    loss = -mean_k (log p(x, z_k) - log q(z_k|x)), with the parameters inside log q stopped. What is left out,
    d log q(z|x) / d parameters at a fixed z, is zero in the mean; without it the encoder's gradient is zero for every single
    sample once q is the exact posterior. A prior that is made of the encoder keeps its own gradient.
    """

    def __call__(self, trace: Trace, step: int) -> Estimate:
        level, stopped = _stopped_log_q(self, trace)
        loss = -(trace.log_px + level.log_p - stopped).mean()
        return _estimate(trace, loss, _elbo(trace))


@dataclass(frozen=True)
class DReG:
    """IWAE with the doubly reparameterised gradient for the encoder (Tucker et al. 2019, arXiv 1810.04152).

    encoder           sum_k w~_k^2  d log w_k / d z_k  d z_k / d parameters      (parameters inside log q stopped)
    decoder, prior    sum_k w~_k    d log w_k / d parameters                     as in `IWAE`

    Both are unbiased for the gradient of the IWAE bound, which is what is reported; the encoder's signal-to-noise
    ratio rises like sqrt(K), where that of `IWAE` falls. With K = 1 it is `STL`. A prior that is made of the encoder keeps the
    second gradient, for its own part.
    """

    def __call__(self, trace: Trace, step: int) -> Estimate:
        level, stopped = _stopped_log_q(self, trace)
        log_w = trace.log_px + level.log_p - stopped
        weight = torch.softmax(log_w.detach(), 0)
        bound = log_mean_exp(log_w.detach())
        return _steered(trace, -(weight * log_w).sum(0).mean(), bound, level.z, weight)


@dataclass(frozen=True)
class BetaTC:
    """loss = distortion + alpha * I + beta * TC + gamma * KL of the marginals (Chen et al. 2018, arXiv 1802.04942, eq. 2, 4).

    The rate, taken apart over the aggregate posterior q(z) = mean over images of q(z|x):

        I  = E log q(z|x) / q(z)            what a code says about its image
        TC = E log q(z) / prod_j q(z_j)     total correlation, how far the dimensions are from independent
        KL = E log prod_j q(z_j) / p(z)     sum of the marginals' KL, for a prior that factorises

    with q(z) and q(z_j) from the batch (`vaelab.estimators`). At 1, 1, 1 the three are the rate, by Monte Carlo, whatever the
    estimator. The posterior must factorise over its dimensions.

    Args:
        alpha, beta, gamma: the three weights, >= 0.
        data_size: N, number of training images; must be given.
        estimator: `weighted` or `stratified`.
    """

    alpha: float = 1.0
    beta: float = 6.0
    gamma: float = 1.0
    data_size: int = 0
    estimator: str = "weighted"

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha, "the weight of the mutual information", schedule=False)
        _check_number("beta", self.beta, "the weight of the total correlation", schedule=False)
        _check_number("gamma", self.gamma, "the weight of the marginals' KL", schedule=False)
        _check_count("data_size", self.data_size, "the number of training images")
        if self.estimator not in AGGREGATES:
            raise unknown_name("estimator of q(z)", self.estimator, AGGREGATES)

    def __call__(self, trace: Trace, step: int) -> Estimate:
        level = _only_level(self, trace)
        log_q = level.log_q
        try:
            log_qz, log_qz_each = log_aggregate(level.q, level.z, self.data_size, self.estimator)
        except UsageError as error:
            raise UsageError(f"BetaTC: {error}") from None
        log_marginals = log_qz_each.sum(-1)
        information, correlation = log_q - log_qz, log_qz - log_marginals
        terms = self.alpha * information + self.beta * correlation + self.gamma * (log_marginals - level.log_p)
        return _estimate(trace, (trace.distortion + terms.mean(0)).mean(), _elbo(trace))


@dataclass(frozen=True)
class DIP:
    """loss = distortion + rate + off_diagonal * sum_{i != j} C_ij^2 + diagonal * sum_i (C_ii - 1)^2.

    Disentangled inferred prior (Kumar et al. 2018, arXiv 1711.00848, eq. 6 and 7): the codes of all images together should
    have covariance I. Kind 1 takes C = Cov_x(E[z|x]), of the posterior means; kind 2 C = Cov(z) = Cov_x(E[z|x]) +
    E_x Cov(z|x), of the codes, from the samples where the posterior's own covariance is not a diagonal one that is known.
    Covariances are over the images of the batch, the unbiased estimate.

    Args:
        kind: 1 or 2.
        diagonal, off_diagonal: the two weights, >= 0.
    """

    kind: int
    diagonal: float
    off_diagonal: float

    def __post_init__(self) -> None:
        if self.kind not in (1, 2):
            raise UsageError(f"kind is {self.kind!r}: DIP has kind 1 (the posterior means) and kind 2 (the codes)")
        _check_number("diagonal", self.diagonal, "the weight of the variances' distance from 1", schedule=False)
        _check_number("off_diagonal", self.off_diagonal, "the weight of the covariances", schedule=False)

    def __call__(self, trace: Trace, step: int) -> Estimate:
        level = _only_level(self, trace)
        at_least_two_images(level.z.shape[1], "DIP")
        covariance = self._covariance(level)
        variances = covariance.diagonal()
        penalty = self.diagonal * (variances - 1).square().sum()
        penalty = penalty + self.off_diagonal * (covariance.square().sum() - variances.square().sum())
        return _estimate(trace, _distortion_and_rate(trace, 1.0) + penalty, _elbo(trace))

    def _covariance(self, level: Level) -> Tensor:
        """C, (D, D)."""
        q = level.q
        if self.kind == 2 and not isinstance(q, DiagGaussian | Laplace):
            return torch.stack([_covariance(z) for z in level.z]).mean(0)
        if isinstance(q, Transformed):
            raise UsageError("DIP(kind=1) needs the posterior's mean, which a flow does not tell: choose kind=2")
        of_means = _covariance(q.mean)
        return of_means if self.kind == 1 else of_means + q.std.square().flatten(1).mean(0).diag()  # type: ignore[attr-defined]


def _covariance(codes: Tensor) -> Tensor:
    """The unbiased covariance of codes (B, *D) over images, (D, D)."""
    centred = (codes - codes.mean(0)).flatten(1)
    return centred.T @ centred / (len(codes) - 1)


@dataclass(frozen=True)
class InfoVAE:
    """loss = distortion + (1 - alpha) * rate + (alpha + scale - 1) * MMD (Zhao et al. 2017, arXiv 1706.02262).

    MMD is between the batch's codes and as many draws of the prior (`vaelab.estimators.mmd`), whose noise is that of the
    step. alpha = 0, scale = 1 is the ELBO; alpha = 1 is the MMD-VAE, without a rate.

    Args:
        alpha: what is taken off the rate's weight, at most 1.
        scale: lambda of the paper, at least 1 - alpha.
        kernel: `imq` or `rbf`.
    """

    alpha: float
    scale: float
    kernel: str = "imq"

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("scale", self.scale)):
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise UsageError(f"{name} is {value}: InfoVAE takes a finite number")
        if self.alpha > 1 or self._mmd_weight < -1e-9:
            raise UsageError(
                f"alpha is {self.alpha} and scale {self.scale}: the weights 1 - alpha of the rate and "
                "alpha + scale - 1 of the MMD must be 0 or more"
            )
        if self.kernel not in KERNELS:
            raise unknown_name("kernel", self.kernel, KERNELS)

    @property
    def _mmd_weight(self) -> float:
        return self.scale - (1 - self.alpha)

    def __call__(self, trace: Trace, step: int) -> Estimate:
        loss = _distortion_and_rate(trace, 1 - self.alpha)
        divergence = _weighted_mmd(self, trace, self._mmd_weight, self.kernel)
        return _estimate(trace, loss + divergence, _elbo(trace))


@dataclass(frozen=True)
class WAE:
    """loss = distortion + scale * MMD(q(z), p(z)) (Tolstikhin et al. 2018, arXiv 1711.01558, algorithm 2).

    The posterior may be a Dirac, as in the paper; then there is no bound. Its cost, a squared error, is the distortion
    of a Gaussian likelihood of fixed scale, up to a constant.

    Args:
        scale: lambda of the paper, >= 0.
        kernel: `imq` or `rbf`.
    """

    scale: float
    kernel: str = "imq"

    def __post_init__(self) -> None:
        _check_number("scale", self.scale, "the weight of the MMD", schedule=False)
        if self.kernel not in KERNELS:
            raise unknown_name("kernel", self.kernel, KERNELS)

    def __call__(self, trace: Trace, step: int) -> Estimate:
        loss = _distortion_and_rate(trace, 0.0) + _weighted_mmd(self, trace, self.scale, self.kernel)
        return _estimate(trace, loss, _elbo(trace))


@dataclass(frozen=True)
class RAE:
    """loss = distortion + l2 / 2 * |z|^2 + gradient_penalty * |d mean(x|z) / dz|^2 (Ghosh et al. 2020, arXiv 1903.12436).

    Regularised autoencoders: a Dirac posterior and no noise, the decoder kept smooth instead. The norm is Frobenius's, over
    all pixels and latent dimensions, by its unbiased estimate |J^T s|^2 with random signs s for the pixels (Hutchinson 1990).
    With s = 1, which saves the draw, only changes of an image's total brightness would be penalised. Weight decay of the
    decoder, the paper's third variant, is the optimiser's affair.

    Args:
        l2: weight of the squared norm of the codes, >= 0.
        gradient_penalty: weight of the decoder's squared Jacobian, >= 0.
    """

    l2: float
    gradient_penalty: float = 0.0

    def __post_init__(self) -> None:
        _check_number("l2", self.l2, "the weight of the codes' squared norm", schedule=False)
        _check_number("gradient_penalty", self.gradient_penalty, "the weight of the squared Jacobian", schedule=False)

    def __call__(self, trace: Trace, step: int) -> Estimate:
        z = _only_level(self, trace).z
        loss = _distortion_and_rate(trace, 0.0) + 0.5 * self.l2 * _squared_norm(z)
        if self.gradient_penalty:
            if not z.requires_grad:
                raise UsageError(
                    "RAE's gradient penalty differentiates with respect to the codes: train the encoder too, outside "
                    "torch.no_grad(), or take gradient_penalty=0"
                )
            mean = trace.px.mean
            signs = torch.empty_like(mean).bernoulli_(0.5, generator=trace.noise).mul_(2).sub_(1)
            (pulled,) = torch.autograd.grad(mean, z, signs, create_graph=True)
            loss = loss + self.gradient_penalty * _squared_norm(pulled)
        return _estimate(trace, loss, _elbo(trace))


def _squared_norm(z: Tensor) -> Tensor:
    """|z|^2, the mean over samples and images of (K, B, *D)."""
    return z.square().flatten(2).sum(-1).mean()


def _distortion_and_rate(trace: Trace, beta: float) -> Tensor:
    """Mean over images of distortion + beta * rate; without the rate where beta is 0, for a Dirac has none."""
    return trace.distortion.mean() if beta == 0 else (trace.distortion + beta * trace.rate).mean()


def _elbo(trace: Trace) -> Tensor | None:
    """The ELBO of each image (B,), None for a Dirac posterior."""
    try:
        return -(trace.distortion + trace.rate)
    except NoDensity:
        return None


def _estimate(trace: Trace, loss: Tensor, bound: Tensor | None) -> Estimate:
    return Estimate(bound, loss if trace.aux is None else loss + trace.aux)


# Below the rounding error of a sum of weights that is 1, and far above the smallest float32: a weight that underflowed
# would take the encoder's gradient with it.
_TINY = 1e-20


def _steered(trace: Trace, surrogate: Tensor, bound: Tensor, z: Tensor, factor: Tensor) -> Estimate:
    """An estimate with the value of -bound and the gradient of `surrogate`, times `factor` (K, B) where it passes z.

    z is where the encoder's gradient is told from the decoder's: the sum of all that reads z arrives there. The hook acts in
    the backward pass of this loss only, so that other objectives may share the trace; but not in a pass of their sum, nor
    after one of this loss that was asked for the decoder's gradients alone and so never came by z.
    """
    loss = surrogate + (-bound.mean() - surrogate).detach()
    if loss.requires_grad and z.requires_grad:
        passing: list[bool] = []

        def enter(gradient: Tensor) -> None:
            passing.append(True)

        def scale(gradient: Tensor) -> Tensor:
            if not passing:
                return gradient
            passing.clear()
            return gradient * factor.reshape(factor.shape + (1,) * (z.dim() - 2))

        loss.register_hook(enter)
        z.register_hook(scale)
    return _estimate(trace, loss, bound)


def _stopped_log_q(objective: Objective, trace: Trace) -> tuple[Level, Tensor]:
    """The only level, and log q(z|x) (K, B) with the parameters of q stopped: it depends on them through z alone."""
    level = _only_level(objective, trace)
    try:
        q = level.q.detach()
    except UsageError as error:
        raise UsageError(f"{type(objective).__name__} cannot be used with this posterior: {error}") from None
    return level, q.log_prob(level.z)


def _only_level(objective: Objective, trace: Trace) -> Level:
    if len(trace.levels) != 1:
        raise UsageError(
            f"{type(objective).__name__} is for models with one stochastic layer, and this one has {len(trace.levels)}: "
            "choose ELBO or IWAE"
        )
    return trace.levels[0]


def _grouped(objective: Objective, log_w: Tensor, m: int) -> Tensor:
    """(K, B) to (m, K / m, B)."""
    if len(log_w) % m:
        raise UsageError(
            f"{objective} splits the samples of each image into {m} groups of equal size, and there are {len(log_w)}: "
            f"choose k a multiple of {m}"
        )
    return log_w.unflatten(0, (m, -1))


def _weighted_mmd(objective: Objective, trace: Trace, weight: float, kernel: str) -> Tensor | float:
    """weight * MMD between the codes of the batch and draws of the prior, a mean over the K samples."""
    if weight == 0:
        return 0.0
    level = _only_level(objective, trace)
    at_least_two_images(level.z.shape[1], type(objective).__name__)
    drawn = _prior_codes(level.p, level.z, trace.noise)
    return weight * mmd(level.z.flatten(2), drawn.flatten(1), kernel).mean()


def _prior_codes(p: Distribution, z: Tensor, noise: torch.Generator | None) -> Tensor:
    """As many codes from the prior as images in the batch, (B, *D); one for each label where the prior depends on it."""
    drawn = p.rsample(1, noise)
    return drawn[0] if drawn.dim() == z.dim() else torch.cat([drawn, p.rsample(z.shape[1] - 1, noise)])


def _check_number(
    name: str, value: float | Schedule, what: str, at_most: float = math.inf, schedule: bool = True
) -> None:
    """Refuse what is not a finite number of 0 or more, nor a schedule between two. Raises UsageError."""
    numbers = (value.start, value.end) if schedule and isinstance(value, Schedule) else (value,)
    for number in numbers:
        if not (isinstance(number, int | float) and 0 <= number <= at_most and number < math.inf):
            limits = "of 0 or more" if at_most == math.inf else f"from 0 to {at_most:g}"
            raise UsageError(f"{name} is {number}: {what} must be a finite number {limits}")


def _check_count(name: str, value: int, what: str) -> None:
    if not (isinstance(value, int) and value >= 1):
        raise UsageError(f"{name} is {value}: {what} must be an integer of 1 or more")
