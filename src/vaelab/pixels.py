"""Distributions over images: what likelihoods return.

Each is normalised over its measure (`vaelab.likelihoods`), and tested by summing or integrating it to one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab.distributions import Distribution


class _BernoulliLogProb(torch.autograd.Function):
    """Row sums of x * l - log(1 + e^l), with the backward written by hand: (x - sigmoid(l)) * grad.

    Autograd through log-sigmoid keeps several tensors of the size of the images and does not vectorise well; this keeps
    one and reads each pixel once in each direction.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, x: Tensor) -> Tensor:  # logits (..., P), x broadcast to it
        ctx.save_for_backward(logits, x)
        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return (wide * x - F.softplus(wide, threshold=40)).sum(-1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, None]:
        logits, x = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None
        return ((x - torch.sigmoid(logits)) * grads[0].unsqueeze(-1)).to(logits.dtype), None


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
        return torch.sigmoid(self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self.logits.flatten(-self.event_dim)
        return _BernoulliLogProb.apply(logits, value.flatten(-self.event_dim))  # type: ignore[no-any-return]

    def cross_log_prob(self, values: Tensor) -> Tensor:
        # one matrix product: sum_i x_i l_i for every pair, minus what depends on l alone
        logits = self.logits.flatten(-self.event_dim)[0]
        return logits @ values.flatten(1).T - F.softplus(logits, threshold=40).double().sum(-1, True).to(logits)

    def rsample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Samples in {0, 1}; they carry no gradient."""
        p = self.mean.detach()
        u = torch.rand((k, *p.shape), generator=generator, dtype=p.dtype, device=p.device)
        return (u < p).to(p.dtype)
