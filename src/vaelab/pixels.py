"""Distributions over images: what likelihoods return.

Each is normalised over its measure (`vaelab.likelihoods`), and tested by summing or integrating it to one.

    Bernoulli            x in {0, 1}           log p = x l - log(1 + e^l)
    ContinuousBernoulli  density on [0, 1]     log p = x l - log((e^l - 1) / l)
    Gaussian, Laplace    densities on R        one scale for all pixels, or one for each
    LogisticMixture      x in {0, 1/255, …, 1} log p = log sum_j pi_j (F_j(x + 1/510) - F_j(x - 1/510))
    Categorical          x in {0, 1/255, …, 1} log p = l_x - log sum_k e^l_k

All compute in float32 (in float64 where the parameters are), also where a network that ran in bfloat16 gives the
parameters: a sum over 784 pixels in bfloat16 would be off by nats. (The gradient of bfloat16 logits is itself rounded: a
pixel that is right with a logit of 8 gives none.) Values are images x (..., B, *X) that broadcast to
(K, B, *X); pixels are independent given the parameters, so also the channels of one pixel.
"""

import math
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab.distributions import LOG_2PI, Distribution, full_precision, sum_event
from vaelab.errors import UsageError
from vaelab.native import library

LEVELS = 256


def wide(t: Tensor) -> Tensor:
    """The same numbers in float32 where they are narrower."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def _check_event(value: Tensor, parameter: Tensor, event_dim: int) -> None:
    """Refuse what would broadcast over pixels: an image of one channel under a decoder of two."""
    given, expected = tuple(value.shape[-event_dim:]), tuple(parameter.shape[-event_dim:])
    if given != expected:
        raise UsageError(
            f"the images have shape {given} and the decoder describes {expected}: "
            "build the decoder with out_shape = the likelihood's outputs(image_shape)"
        )


# --- natural exponential families: log p(x) = x l - A(l), whose mean is A'(l) ---


Family = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
"""From logits (..., P): A summed over pixels, (...), and A' of each pixel where it is asked for."""


class _NaturalLogProb(torch.autograd.Function):
    """Row sums of x * l - A(l), with the backward written by hand: (x - A'(l)) * grad.

    Autograd through log-sigmoid keeps several tensors of the size of the images and does not vectorise well; this keeps
    two, and computes A' where it is nearly free, beside A.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, x: Tensor, family: Family) -> Tensor:
        wider = wide(logits)  # (..., P), x broadcast to it
        normaliser, mean = family(wider, ctx.needs_input_grad[0])
        ctx.save_for_backward(mean, x)
        ctx.dtype = logits.dtype
        return (wider * x).sum(-1) - normaliser

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        mean, x = ctx.saved_tensors
        if mean is None:
            return None, None, None
        return (x - mean).mul_(grads[0].unsqueeze(-1)).to(ctx.dtype), None, None


class _BernoulliLogProb(torch.autograd.Function):
    """The same for Bernoulli pixels in one pass of vaelab's own kernel: logits (R, P), x (R', P), where R' divides R."""

    @staticmethod
    def forward(ctx, logits: Tensor, x: Tensor, kernels: CDLL) -> Tensor:
        log_p = logits.new_empty(len(logits))
        residual = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        kernels.bernoulli(
            logits.data_ptr(), x.data_ptr(), log_p.data_ptr(), 0 if residual is None else residual.data_ptr(),
            len(logits), len(x), logits.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(logits, x, residual)
        return log_p

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        logits, x, residual = ctx.saved_tensors
        if residual is None:
            return None, None, None
        if torch.is_grad_enabled():  # of a gradient a gradient will be asked: as torch computes it
            residual = x.repeat(len(logits) // len(x), 1) - torch.sigmoid(logits)
        return residual * grads[0].unsqueeze(-1), None, None


def _bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x) of logits (..., P), for x that broadcasts to them: (...)."""
    plain = logits.device.type == x.device.type == "cpu" and logits.dtype == x.dtype == torch.float32
    fits = logits.dim() > 1 and logits.numel() > 0 and logits.shape[-1] == x.shape[-1]
    kernels = library() if plain and fits and not torch.compiler.is_exporting() else None
    if kernels is None:
        return _NaturalLogProb.apply(logits, x, _bernoulli)  # type: ignore[no-any-return]
    if x.shape[:-1] != logits.shape[logits.dim() - x.dim() : -1]:
        logits, x = torch.broadcast_tensors(logits, x)
    rows = _BernoulliLogProb.apply(logits.contiguous().flatten(0, -2), x.contiguous().view(-1, x.shape[-1]), kernels)
    return rows.view(logits.shape[:-1])  # type: ignore[no-any-return]


_TOGETHER = 16, 8, 4
"""Pixels of whose product one logarithm is taken, where it is a normal float32."""


def _bernoulli(logits: Tensor, with_mean: bool) -> tuple[Tensor, Tensor | None]:
    """A(l) = log(1 + e^l) = -log sigmoid(-l), and A'(l) = 1 - sigmoid(-l).

    The logarithm costs most. In float32 on a CPU it is taken of products of pixels: what that rounds away, 1e-7 a pixel,
    the sum over pixels would lose too.
    """
    exported = torch.compiler.is_exporting()  # a graph has no values to look at
    if logits.dtype != torch.float32 or logits.device.type != "cpu" or exported:
        return F.softplus(logits, threshold=40).sum(-1), torch.sigmoid(logits) if with_mean else None
    off = logits.neg().sigmoid_()
    mean = 1 - off if with_mean else None
    for count in _TOGETHER:
        if off.numel() and off.shape[-1] % count == 0:
            product = off.unflatten(-1, (count, -1)).prod(-2)
            if (
                float(product.detach().amin()) >= torch.finfo(torch.float32).tiny
            ):  # not where one of them is not a number
                return -product.log().sum(-1), mean
    return F.softplus(logits, threshold=40).sum(-1), mean


def _continuous_bernoulli(logits: Tensor, with_mean: bool) -> tuple[Tensor, Tensor | None]:
    mean = continuous_bernoulli_mean(logits) if with_mean else None
    return continuous_bernoulli_normaliser(logits).sum(-1), mean


def _cross(logits: Tensor, values: Tensor, family: Family) -> Tensor:
    """x l - A(l) of every pair, logits (G, P) and values (N, P), in one matrix product: (G, N)."""
    with full_precision(logits):
        # summed in float64 the second term would be 5e-5 nats better, and importance sampling a tenth slower
        return logits @ values.T - family(logits, False)[0].unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Bernoulli(Distribution):
    """Independent binary values with the given `logits` (*batch, *event).

    log p(x) = x * l - log(1 + e^l), so grey levels in [0, 1] give the cross-entropy that many labs minimise; that is not
    the log of a probability (see `vaelab.likelihoods.GreyCrossEntropy`).
    """

    logits: Tensor
    event_dim: int = 3

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(wide(self.logits))

    def log_prob(self, value: Tensor) -> Tensor:
        _check_event(value, self.logits, self.event_dim)
        logits, x = self.logits.flatten(-self.event_dim), value.flatten(-self.event_dim)
        return _bernoulli_log_prob(logits, x)

    def cross_log_prob(self, values: Tensor) -> Tensor:
        _check_event(values, self.logits, self.event_dim)
        logits, values = wide(self.logits).flatten(-self.event_dim)[0], values.flatten(1)
        if len(values) == 1:  # one pass over the logits; with more values, one over their products
            return _bernoulli_log_prob(logits, values[0]).unsqueeze(1)
        return _cross(logits, values, _bernoulli)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Samples in {0, 1}; they carry no gradient."""
        p = self.mean.detach()
        return (_uniform((k, *p.shape), p, generator) < p).to(p.dtype)


_BERNOULLI_NUMBERS = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730)
_SERIES = [b / (2 * n * math.factorial(2 * n)) for n, b in enumerate(_BERNOULLI_NUMBERS, 1)]


def continuous_bernoulli_normaliser(logits: Tensor) -> Tensor:
    """A(l) = log((e^l - 1) / l), elementwise.

    For |l| < 1/2, lambda within 0.12 of 1/2, the series l/2 + sum_n B_2n l^2n / (2n (2n)!) up to l^12 (B: Bernoulli
    numbers), since the formula is 0/0 at l = 0. What the series leaves out is below 6e-17.
    """
    size = logits.abs()
    near = size < 0.5
    square, series = logits.square(), torch.zeros_like(logits)
    for coefficient in reversed(_SERIES):
        series = (series + coefficient) * square
    size = torch.where(near, 1.0, size)
    return torch.where(near, 0.5 * logits + series, F.relu(logits) + torch.log(-torch.expm1(-size)) - torch.log(size))


def continuous_bernoulli_mean(logits: Tensor) -> Tensor:
    """A'(l) = 1 / (1 - e^-l) - 1 / l, elementwise; for |l| < 1/2 by the derivative of the series, to 2e-15.

    Of -|l| first, 1 / |l| - e^-|l| / (1 - e^-|l|), and mirrored for l > 0: neither it nor its derivative overflows.
    """
    logits = wide(logits)
    near = logits.abs() < 0.5
    square, series = logits.square(), torch.zeros_like(logits)
    for n in range(len(_SERIES), 0, -1):
        series = series * square + 2 * n * _SERIES[n - 1]
    size = torch.where(near, 1.0, logits.abs())
    below = 1 / size + torch.exp(-size) / torch.expm1(-size)
    return torch.where(near, 0.5 + logits * series, torch.where(logits > 0, 1 - below, below))


def continuous_bernoulli_quantile(logits: Tensor, u: Tensor) -> Tensor:
    """The inverse distribution function log(1 + u (e^l - 1)) / l, elementwise, differentiable.

    For l > 0 that of -l, mirrored, which cannot overflow. For |l| < 0.02 the inverse is the cumulant series of a
    Bernoulli(u) variable to l^3: the formula's derivative cancels there. Its error is below 2e-10.
    """
    near = logits.abs() < 0.02
    size = torch.where(near, 1.0, logits.abs())
    turned = torch.where(logits > 0, 1 - u, u).clamp(max=1 - torch.finfo(u.dtype).eps)  # log(0) where it is 1
    below = -torch.log1p(turned * torch.expm1(-size)) / size
    far = torch.where(logits > 0, 1 - below, below)
    variance = u * (1 - u)
    third, fourth = variance * (1 - 2 * u), variance * (1 - 6 * variance)
    series = u + logits * (variance / 2 + logits * (third / 6 + logits * fourth / 24))
    return torch.where(near, series, far)


@dataclass(frozen=True, eq=False)
class ContinuousBernoulli(Distribution):
    """Independent values in [0, 1] of density C(lambda) lambda^x (1 - lambda)^(1 - x), `logits` = logit lambda.

    It is the cross-entropy made a density, by the normaliser that most code leaves out (Loaiza-Ganem & Cunningham 2019,
    arXiv 1907.06845, eq. 5). In the logit l, C (1 - lambda) = l / (e^l - 1). lambda is not the mean: see `mean` (eq. 8).
    """

    logits: Tensor
    event_dim: int = 3

    @property
    def mean(self) -> Tensor:
        return continuous_bernoulli_mean(self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        _check_event(value, self.logits, self.event_dim)
        logits, x = self.logits.flatten(-self.event_dim), value.flatten(-self.event_dim)
        return _NaturalLogProb.apply(logits, x, _continuous_bernoulli)  # type: ignore[no-any-return]

    def cross_log_prob(self, values: Tensor) -> Tensor:
        logits = wide(self.logits).flatten(-self.event_dim)[0]
        return _cross(logits, values.flatten(1), _continuous_bernoulli)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Samples in [0, 1], differentiable."""
        logits = wide(self.logits)
        return continuous_bernoulli_quantile(logits, _uniform((k, *logits.shape), logits, generator))


# --- densities on the real line ---


@dataclass(frozen=True, eq=False)
class Gaussian(Distribution):
    """Independent normals: `mean_` (*batch, *event), `log_std` () for all pixels, or of the mean's shape.

    A density on R: what lies outside [0, 1] is lost to the image, which costs likelihood and is no error.
    """

    mean_: Tensor
    log_std: Tensor
    event_dim: int = 3

    @property
    def mean(self) -> Tensor:
        return wide(self.mean_)

    def log_prob(self, value: Tensor) -> Tensor:
        _check_event(value, self.mean_, self.event_dim)
        log_std = wide(self.log_std)
        scaled = (value - self.mean) * torch.exp(-log_std)
        return sum_event(-0.5 * scaled.square() - log_std - 0.5 * LOG_2PI, self.event_dim)

    def cross_log_prob(self, values: Tensor) -> Tensor:
        # sum_i -(x_i - m_i)^2 w_i / 2 as matrix products, in float64: in float32 the squares cancel, to 0.05 nats on
        # 28x28 pixels of scale 0.01
        mean, x = self.mean.double().flatten(-self.event_dim)[0], values.double().flatten(1)
        log_std = self.log_std.double()
        log_std = log_std.flatten(-self.event_dim)[0] if log_std.dim() else log_std.expand_as(mean)
        weight = torch.exp(-2 * log_std)
        own = (mean.square() * weight / 2 + log_std + 0.5 * LOG_2PI).sum(-1, True)
        return ((mean * weight) @ x.T - weight @ (x.square() / 2).T - own).to(self.mean.dtype)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        mean = self.mean
        eps = torch.randn((k, *mean.shape), generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + wide(self.log_std).exp() * eps


@dataclass(frozen=True, eq=False)
class BatchScaledGaussian(Distribution):
    """`Gaussian` with one scale, the root mean squared error of the very images that are scored (sigma-VAE training).

    Because the scale is made of the images, this is a training loss and no density; `vaelab.likelihoods.Gaussian`
    returns it in training mode only.

    Attributes:
        mean_: (*batch, *event).
        log_std: (), the scale that samples and `cross_log_prob` have.
        event_dim: axes of an image.
        floor: the least scale.
        follow: is told the mean squared error of the images scored, where gradients are taken.
    """

    mean_: Tensor
    log_std: Tensor
    event_dim: int
    floor: float
    follow: Callable[[Tensor], None]

    @property
    def mean(self) -> Tensor:
        return wide(self.mean_)

    def log_prob(self, value: Tensor) -> Tensor:
        _check_event(value, self.mean_, self.event_dim)
        error = (value - self.mean).square().mean().clamp(min=self.floor**2)
        if torch.is_grad_enabled():
            self.follow(error.detach())
        return Gaussian(self.mean_, 0.5 * error.log(), self.event_dim).log_prob(value)

    def cross_log_prob(self, values: Tensor) -> Tensor:
        return self._fixed().cross_log_prob(values)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        return self._fixed().rsample(k, generator)

    def _fixed(self) -> Gaussian:
        return Gaussian(self.mean_, self.log_std, self.event_dim)


@dataclass(frozen=True, eq=False)
class Laplace(Distribution):
    """Independent Laplace variables, density exp(-|x - m| / b) / 2b: `mean_`, and `log_scale` = log b, () or as the mean.

    The median error: absolute instead of squared, so a few wrong pixels cost less than under a `Gaussian`.
    """

    mean_: Tensor
    log_scale: Tensor
    event_dim: int = 3

    @property
    def mean(self) -> Tensor:
        return wide(self.mean_)

    def log_prob(self, value: Tensor) -> Tensor:
        _check_event(value, self.mean_, self.event_dim)
        log_scale = wide(self.log_scale)
        elements = -(value - self.mean).abs() * torch.exp(-log_scale) - log_scale - math.log(2)
        return sum_event(elements, self.event_dim)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        # the difference of two exponentials: unlike the inverse distribution function it is finite for every u in [0, 1)
        mean = self.mean
        u = _uniform((2, k, *mean.shape), mean, generator)
        return mean + wide(self.log_scale).exp() * (torch.log1p(-u[1]) - torch.log1p(-u[0]))


# --- masses on the 256 levels ---

HALF = 0.5 / (LEVELS - 1)
"""Half the distance of two levels."""


def log_logistic_mass(x: Tensor, centre: Tensor, log_scale: Tensor) -> Tensor:
    """log of F(x + 1/510) - F(x - 1/510) for the logistic F, where level 0 takes the lower tail and 1 the upper one.

    With a, b the two edges in units of the scale, F(a) - F(b) = F(a) F(-b) (1 - e^(b - a)): a product, so its log is a
    sum that nothing cancels in, however small the scale or far the level; the density times the bin's width, which others
    fall back on there, is not needed.
    """
    inverse = torch.exp(-log_scale.clamp(max=30))  # beyond, the width of a bin underflows in float32
    distance = x - centre
    below_upper = F.logsigmoid((distance + HALF) * inverse)
    above_lower = F.logsigmoid((HALF - distance) * inverse)
    inside = below_upper + above_lower + torch.log(-torch.expm1(-2 * HALF * inverse))
    return torch.where(x < HALF, below_upper, torch.where(x > 1 - HALF, above_lower, inside))


@dataclass(frozen=True, eq=False)
class LogisticMixture(Distribution):
    """Independent levels k/255, each from a mixture of discretised logistics (Salimans et al. 2017, arXiv 1701.05517).

    Each channel of each pixel has a mixture of its own: the paper's model, where the channels of a pixel share the
    component and green sees red, needs an order of the channels and gives colour images a better likelihood.

    Attributes:
        weight: log of the components' weights but for a constant, (*batch, J C, H, W): J components, the component the
            slow index of the channel axis.
        centre: centres, in units of the image, the same shape.
        log_scale: log of the logistics' scales, the same shape.
        components: J.
    """

    weight: Tensor
    centre: Tensor
    log_scale: Tensor
    components: int = 1
    event_dim: int = 3

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """log weights, centres and log scales, (*batch, J, *event)."""
        parts = [wide(t).unflatten(-self.event_dim, (self.components, -1))
                 for t in (self.weight, self.centre, self.log_scale)]  # fmt: skip
        return torch.log_softmax(parts[0], self._axis), parts[1], parts[2]

    @property
    def _axis(self) -> int:
        return -self.event_dim - 1

    @property
    def mean(self) -> Tensor:
        """E[x] = sum over the 255 inner edges of P(x above the edge) / 255, exactly."""
        weight, centre, log_scale = self._parts()
        weight, inverse = weight.exp(), torch.exp(-log_scale)
        total = torch.zeros_like(centre)
        for k in range(LEVELS - 1):
            total = total + torch.sigmoid((centre - (2 * k + 1) * HALF) * inverse)
        return (weight * total).sum(self._axis) / (LEVELS - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        weight, centre, log_scale = self._parts()
        value = value.unsqueeze(self._axis)
        _check_event(value, centre, self.event_dim)
        mass = log_logistic_mass(value, centre, log_scale)
        if self.components == 1:
            return sum_event(mass.squeeze(self._axis), self.event_dim)
        return sum_event(torch.logsumexp(weight + mass, self._axis), self.event_dim)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Samples in {0, 1/255, …, 1}; they carry no gradient."""
        weight, centre, log_scale = (t.detach() for t in self._parts())
        gumbel = -torch.log(-torch.log(_uniform((k, *weight.shape), weight, generator)))
        chosen = (weight + gumbel).argmax(self._axis, keepdim=True)
        centre, log_scale = (t.expand(k, *t.shape).gather(self._axis, chosen) for t in (centre, log_scale))
        u = _uniform(tuple(chosen.shape), centre, generator)
        x = (centre + log_scale.exp() * torch.logit(u)).squeeze(self._axis)
        return (x.clamp(0, 1) * (LEVELS - 1)).round() / (LEVELS - 1)


@dataclass(frozen=True, eq=False)
class Categorical(Distribution):
    """Independent levels k/255 with a probability of its own for each: `logits` (*batch, 256 C, H, W), level slow."""

    logits: Tensor
    event_dim: int = 3

    @property
    def _axis(self) -> int:
        return -self.event_dim - 1

    def _each(self) -> Tensor:
        """Logits (*batch, 256, *event)."""
        return wide(self.logits).unflatten(-self.event_dim, (LEVELS, -1))

    @property
    def mean(self) -> Tensor:
        p = torch.softmax(self._each(), self._axis).movedim(self._axis, -1)
        return (p * torch.arange(LEVELS, device=p.device)).sum(-1) / (LEVELS - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self._each()
        index = _level(value).unsqueeze(self._axis)
        _check_event(index, logits, self.event_dim)
        batch = torch.broadcast_shapes(logits.shape[: self._axis], index.shape[: self._axis])
        index = index.expand(*batch, *index.shape[self._axis :])
        chosen = logits.expand(*batch, *logits.shape[self._axis :]).gather(self._axis, index).squeeze(self._axis)
        return sum_event(chosen - torch.logsumexp(logits, self._axis), self.event_dim)

    def cross_log_prob(self, values: Tensor) -> Tensor:
        # one table of all levels of all pixels, normalised once; each value reads P entries a row
        table = torch.log_softmax(self._each()[0], self._axis).flatten(1)
        index = _level(values).flatten(1)
        pixels = index.shape[1]
        index = index * pixels + torch.arange(pixels, device=index.device)
        return torch.stack([table.index_select(1, one).sum(1) for one in index], 1)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Samples in {0, 1/255, …, 1}; they carry no gradient."""
        p = torch.softmax(self._each().detach(), self._axis).movedim(self._axis, -1)
        drawn = torch.multinomial(p.reshape(-1, LEVELS), k, replacement=True, generator=generator)
        return drawn.T.reshape(k, *p.shape[:-1]).to(p.dtype) / (LEVELS - 1)


def _level(value: Tensor) -> Tensor:
    return (value * (LEVELS - 1)).round().long()
