"""Optimisers by name, on flat float32 weights, beside the bfloat16 copies that the networks compute with.

`adam`   Adam (Kingma & Ba 2015, arXiv 1412.6980) on everything.
`nadam`  the same with Nesterov's momentum (Dozat 2016), of a constant beta1: the newest gradient counts at once. For short
         trainings.
`muon`   Muon (Jordan et al. 2024) on the matrices of linear layers that are wide on both sides, Adam on the rest: each
         update of a matrix is its momentum with all singular values set to one.

Rates of the layers, as multiples of the learning rate:
`equal`    one for all.
`fan-in`   sqrt(400 / inputs) for the weights of a layer, 8 for its biases. Adam moves each number by about the learning
           rate; a layer with few inputs starts with large weights and needs larger moves, and a bias is one number where
           the weights beside it are hundreds. (Yang & Hu 2021, arXiv 2011.14522, for wide networks; the constants measured
           on the 784-400-20 network.)

Three ideas make a step cheap on a CPU. All float32 weights that Adam updates lie in one tensor, so that it is one pass
instead of a dispatch for each layer. The gradients lie in one too: a layer that computes with vaelab's own kernels
(`vaelab.native`) adds to its part of it. And in bfloat16 training the weights of linear and convolutional layers that do not are
bfloat16 copies, renewed once after each update, instead of being cast by autocast in every forward pass.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import Array, Structure, byref, c_float, c_long

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from vaelab.errors import RunError
from vaelab.native import library
from vaelab.native.layers import accelerated_layers

_CASTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


BETA1, EPSILON = 0.9, 1e-8
"""Adam's decay of the mean gradient, and what keeps it from dividing by zero."""
FAN_IN = 400
"""Inputs of a layer whose weights move by the learning rate itself."""
SQUARES = 4096
"""Numbers of the gradient whose squares are summed into one first (`native/adam.c`)."""
LARGEST = 1e12
"""Norm of a gradient that is updated from before it is known exactly: its squares are float32 numbers."""
BIASES = 8.0
"""Multiple of the learning rate for biases."""


def multiples(model: nn.Module, rates: str) -> dict[int, float]:
    """id of a parameter -> multiple of the learning rate, where it is not 1."""
    found: dict[int, float] = {}
    for layer in model.modules():
        if rates == "fan-in" and isinstance(layer, _CASTABLE):
            outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            found[id(layer.weight)] = math.sqrt(FAN_IN * outputs / layer.weight.numel())
            found[id(layer.bias)] = BIASES
    return found


class Constants(Structure):
    """What one update of Adam's is made with, see `native/adam.h`."""

    _fields_ = tuple(
        (name, c_float) for name in ("lr", "scale", "beta1", "rest1", "beta2", "rest2", "of_m", "of_g", "root", "eps")
    )


class Adam:
    """Adam on one tensor, in one pass: vaelab's own kernel, or torch's fused one called by its function.

    Args:
        weights: flat.
        gradient: of them.
        beta2: decay of the squared gradient.
        parts: how many of the weights, one after the other, have which multiple of the learning rate.
        nesterov: whether to look ahead.
    """

    def __init__(
        self, weights: Tensor, gradient: Tensor, beta2: float, parts: Sequence[tuple[int, float]], nesterov: bool
    ) -> None:
        self.beta2, self.multiples, self.nesterov = beta2, [multiple for _, multiple in parts], nesterov
        self.weights, self.gradient = weights, gradient
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.count = torch.zeros(len(parts), device=weights.device)
        self.taken = 0
        self.sizes = [size for size, _ in parts]
        self.parts = (c_long * len(parts))(*self.sizes), (c_float * len(parts))(*self.multiples)
        self.kernels = library() if weights.device.type == "cpu" else None

    def step(self, lr: float, scale: float = 1.0, clear: bool = True) -> None:
        """One update from `scale` times the gradient, which is cleared afterwards, or may be."""
        if not self.sizes:
            return
        if self.kernels is None:
            self._step_of_torch(lr, scale)
            return
        constants = self.next(lr, scale)
        self.taken += 1
        self.kernels.adam(
            self.weights.data_ptr(), self.gradient.data_ptr(), self.mean.data_ptr(), self.square.data_ptr(), *self.parts,
            len(self.sizes), byref(constants), clear, torch.get_num_threads(),
        )  # fmt: skip

    def next(self, lr: float, scale: float = 1.0, after: int = 0) -> Constants:
        """Of the next update, or of that after some more."""
        t = self.taken + 1 + after
        of_mean, of_gradient = 1 / (1 - BETA1**t), 0.0
        if self.nesterov:
            of_mean, of_gradient = BETA1 / (1 - BETA1 ** (t + 1)), (1 - BETA1) * of_mean
        root = math.sqrt(1 - self.beta2**t)
        return Constants(lr, scale, BETA1, 1 - BETA1, self.beta2, 1 - self.beta2, of_mean, of_gradient, root, EPSILON)

    def place(self, weight: int) -> tuple[int, int, float]:
        """Where the moments of the weight at an address are, and its multiple of the learning rate."""
        offset = weight - self.weights.data_ptr()
        if not 0 <= offset < 4 * len(self.weights):
            raise ValueError("these are not weights of this optimiser")
        ends = itertools.accumulate(self.sizes)
        multiple = next(multiple for end, multiple in zip(ends, self.multiples, strict=True) if offset < 4 * end)
        return self.mean.data_ptr() + offset, self.square.data_ptr() + offset, multiple

    def counts(self) -> Tensor:
        """Updates of each part so far, as torch's kernel counts them."""
        return self.count if self.kernels is None else self.count.fill_(self.taken)

    def counted(self, counts: Tensor) -> None:
        """Go on after so many."""
        self.count.copy_(counts)
        self.taken = int(counts.max()) if len(counts) else 0

    def _step_of_torch(self, lr: float, scale: float) -> None:
        if scale != 1:
            self.gradient.mul_(scale)
        flat = (self.weights, self.gradient, self.mean, self.square)
        # moments of pixels that are hardly ever lit decay to numbers below 1e-38, which take 30 times as long; torch does not
        # say what it was set to, so it is off afterwards, as by default
        torch.set_flush_denormal(True)
        parts = zip(*(t.split(self.sizes) for t in flat), self.count, self.multiples, strict=True)
        for weights, gradient, mean, square, count, multiple in parts:
            adam(
                [weights], [gradient], [mean], [square], [], [count], fused=True, amsgrad=False, beta1=BETA1,
                beta2=self.beta2, lr=lr * multiple, weight_decay=0.0, eps=EPSILON, maximize=False,
            )  # fmt: skip
            if self.nesterov:
                # Adam moved by m_t / (1 - b^t), Nesterov's is b m_t / (1 - b^(t+1)) + (1 - b) g / (1 - b^t): the difference
                t = int(count)
                now, then = 1 - BETA1**t, 1 - BETA1 ** (t + 1)
                ahead = gradient.mul((1 - BETA1) / now).add_(mean, alpha=BETA1 / then - 1 / now)
                root = math.sqrt(1 - self.beta2**t)
                weights.addcdiv_(ahead, square.sqrt().add_(EPSILON * root), value=-lr * multiple * root)
        torch.set_flush_denormal(False)
        self.gradient.zero_()


class Optimiser:
    """Updates a model: float32 masters, gradients, clipping, learning rate, averaged weights.

    Between construction and `finish` the model's parameters are the optimiser's own storage.

    Args:
        model: whose parameters are updated.
        name: `adam`, `nadam` or `muon`.
        lr: the peak learning rate.
        schedule: multiplier of the learning rate from the fraction of training done.
        steps: of the whole training.
        clip: largest norm of the gradient; 0 for no clipping.
        average: decay a step of the averaged weights; 0 for none. At step s the decay is min(average, (1+s)/(10+s)),
            so that a short run is not held back by its initialisation (Polyak & Juditsky 1992).
        bfloat16: whether linear and convolutional layers compute with bfloat16 copies of their weights.
        beta2: Adam's decay of the squared gradient.
        rates: `equal` or `fan-in`.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        lr: float,
        schedule: Callable[[float], float],
        steps: int,
        clip: float = 0.0,
        average: float = 0.0,
        bfloat16: bool = False,
        beta2: float = 0.999,
        rates: str = "equal",
    ) -> None:
        self.lr, self.schedule, self.steps, self.clip, self.average = lr, schedule, steps, clip, average
        matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) >= 32}
        muon = matrices if name == "muon" else set()
        own = {id(p) for layer in accelerated_layers(model) for p in layer.parameters()}
        cast = _castable(model) - own if bfloat16 else set()
        trained = [p for p in model.parameters() if p.requires_grad]
        multiple = multiples(model, rates)
        # Adam's part of the flat tensor comes first, and in it what has the same multiple of the learning rate together
        self.parameters = sorted(trained, key=lambda p: (id(p) in muon, multiple.get(id(p), 1.0)))
        self.master = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.gradient = torch.zeros_like(self.master)
        self.squares = torch.empty(-(-len(self.master) // SQUARES), dtype=torch.float64)
        self.weights, self.gradients = self._views(self.master), self._views(self.gradient)
        self.averaged = self.master.clone() if average else None

        self.copies = [(p, w, g) for p, w, g in zip(self.parameters, self.weights, self.gradients, strict=True)
                       if id(p) in cast]  # fmt: skip
        self._bind()

        sizes: dict[float, int] = {}
        for p in self.parameters:
            if id(p) not in muon:
                rate = multiple.get(id(p), 1.0)
                sizes[rate] = sizes.get(rate, 0) + p.numel()
        rest = sum(sizes.values())
        self.adam = Adam(
            self.master[:rest],
            self.gradient[:rest],
            beta2,
            [(size, rate) for rate, size in sizes.items()],
            name == "nadam",
        )
        self.muon: torch.optim.Optimizer | None = None
        if muon:
            wide = []
            for p, weight, gradient in zip(self.parameters, self.weights, self.gradients, strict=True):
                if id(p) in muon:
                    wide.append(nn.Parameter(weight))
                    wide[-1].grad = gradient
            self.muon = torch.optim.Muon(wide, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, step: int, skip: bool = False, norm: float | None = None, updated: bool = False) -> float:
        """One update from the parameters' gradients, which are cleared; returns the gradient's norm before clipping.

        Nothing is updated where the norm is not finite, or with `skip`.

        Args:
            step: of all.
            skip: whether to leave the weights as they are.
            norm: of the gradient, where the next pass sets it rather than adds to it: then it need not be cleared.
            updated: whether the pass has made Adam's update itself, with the constants of `ahead`.
        """
        if updated and norm is not None:
            self.adam.taken += 1
            self._average(step)
            return norm
        if self.copies:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p, _, _ in self.copies]
            torch._foreach_copy_([g for _, _, g in self.copies], grads)  # type: ignore[attr-defined]
        add = norm is None
        norm = self._norm() if norm is None else norm
        if math.isfinite(norm) and not skip:
            self._update(step, norm, add)
        else:
            self.gradient.zero_()
        for p, _, _ in self.copies:
            p.grad = None
        return norm

    def _update(self, step: int, norm: float, clear: bool) -> None:
        scale = self.clip / norm if 0 < self.clip < norm else 1.0
        lr = self._lr(step)
        self.adam.step(lr, scale, clear)
        if self.muon is not None:
            rest = self.gradient[len(self.adam.gradient) :]
            rest.mul_(scale)
            self.muon.param_groups[0]["lr"] = lr
            self.muon.step()
            rest.zero_()
        if self.copies:
            torch._foreach_copy_([p for p, _, _ in self.copies], [w for _, w, _ in self.copies])  # type: ignore[attr-defined]
        self._average(step)

    def _lr(self, step: int) -> float:
        return self.lr * self.schedule(step / self.steps)

    def _average(self, step: int) -> None:
        if self.averaged is not None:
            self.averaged.lerp_(self.master, 1 - min(self.average, (1 + step) / (10 + step)))

    def ahead(self, step: int, count: int) -> tuple[Array[Constants], float, float] | None:
        """For a pass that updates the weights itself, at `count` steps one after the other: with what, the largest norm of a
        gradient that is neither clipped nor too large for its square, and the clip; None where Adam is not all there is to an
        update."""
        if self.adam.kernels is None or self.muon is not None or self.copies:
            return None
        constants = (self.adam.next(self._lr(step + i), after=i) for i in range(count))
        return (Constants * count)(*constants), min(self.clip or math.inf, LARGEST), self.clip

    def _norm(self) -> float:
        """Of the whole gradient, whatever the number of threads."""
        kernels = self.adam.kernels
        if kernels is None:
            return math.sqrt(float(torch.dot(self.gradient, self.gradient)))
        return math.sqrt(
            kernels.squares(
                self.gradient.data_ptr(), self.squares.data_ptr(), len(self.gradient), SQUARES, torch.get_num_threads()
            )
        )

    def state(self) -> dict[str, Tensor]:
        """All that the next update depends on, besides the gradient: views, not copies."""
        found = {"master": self.master, "mean": self.adam.mean, "square": self.adam.square, "count": self.adam.counts()}
        if self.averaged is not None:
            found["averaged"] = self.averaged
        return found | {f"momentum/{i}": buffer for i, buffer in enumerate(self._momenta())}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, into an optimiser of the same model and settings.

        Raises:
            RunError: a state of other names or shapes.
        """
        own = self.state()
        shapes = ({name: tuple(tensor.shape) for name, tensor in found.items()} for found in (own, state))
        if operator.ne(*shapes):
            raise RunError("this checkpoint is of another model or optimiser: train again, without --resume")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.adam.counted(state["count"])
        self._bind()

    def _momenta(self) -> list[Tensor]:
        """Muon's momentum of each of its matrices, which it makes at its first step and zero."""
        if self.muon is None:
            return []
        matrices = self.muon.param_groups[0]["params"]
        return [self.muon.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in matrices]

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the model holds the float32 weights that are evaluated and saved: the averaged ones, if any."""
        source = self.weights if self.averaged is None else self._views(self.averaged)
        for p, weight in zip(self.parameters, source, strict=True):
            p.grad = None
            p.data = weight
        try:
            yield
        finally:
            self._bind()

    def finish(self) -> None:
        """Leave the evaluated weights in the model, in storage of its own."""
        source = self.weights if self.averaged is None else self._views(self.averaged)
        for p, weight in zip(self.parameters, source, strict=True):
            p.grad = None
            p.data = weight.clone()

    def _bind(self) -> None:
        """The model's parameters become views of the masters, or bfloat16 copies of them."""
        copied = {id(p) for p, _, _ in self.copies}
        for p, weight, gradient in zip(self.parameters, self.weights, self.gradients, strict=True):
            p.grad = None
            p.data = weight.bfloat16() if id(p) in copied else weight
            if id(p) not in copied:
                p.grad = gradient  # autograd adds into the flat gradient

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


def _castable(model: nn.Module) -> set[int]:
    """Weights and biases of the layers that autocast would run in bfloat16: those exact classes, no subclass."""
    layers = [m for m in model.modules() if type(m) in _CASTABLE]
    return {id(p) for m in layers for p in m.parameters()}
