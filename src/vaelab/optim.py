"""Optimisers by name, and the running average of the weights.

`adam`   Adam (Kingma & Ba 2015, arXiv 1412.6980) on everything.
`muon`   Muon (Jordan et al. 2024) on the matrices between hidden layers, Adam on the rest: each update of a matrix is
         its momentum with all singular values set to one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class Optimiser:
    """One or two torch optimisers driven as one, with a schedule.

    Args:
        model: whose parameters are updated.
        name: `adam` or `muon`.
        lr: the peak learning rate.
        schedule: multiplier of the learning rate from the fraction of training done.
        steps: of the whole training.
    """

    def __init__(self, model: nn.Module, name: str, lr: float, schedule: Callable[[float], float], steps: int) -> None:
        self.lr, self.schedule, self.steps = lr, schedule, steps
        parameters = list(model.parameters())
        hidden = _hidden_matrices(model) if name == "muon" else []
        ids = {id(p) for p in hidden}
        rest = [p for p in parameters if id(p) not in ids]
        self.members: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr, fused=True)]
        if hidden:
            self.members.append(torch.optim.Muon(hidden, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))

    def step(self, step: int) -> None:
        """Update the parameters from their gradients, at the learning rate of this step, and clear the gradients."""
        lr = self.lr * self.schedule(step / self.steps)
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = lr
            member.step()
            member.zero_grad(set_to_none=True)


def _hidden_matrices(model: nn.Module) -> Sequence[nn.Parameter]:
    """Weights of linear layers that are wide on both sides: Muon's orthogonal update is made for those."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) >= 32]


class Average:
    """Exponential moving average of a model's parameters (Polyak & Juditsky 1992), with a warm-up of the decay.

    At step s the decay is min(decay, (1 + s) / (10 + s)), so that a short run is not held back by its initialisation.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters = list(model.parameters())
        self.decay = decay
        self.values = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and their average; call it twice around an evaluation."""
        if self.values:
            held = [p.detach().clone() for p in self.parameters]
            torch._foreach_copy_(self.parameters, self.values)
            torch._foreach_copy_(self.values, held)
