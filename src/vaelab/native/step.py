"""The whole pass of the most used composition, forward and backward, in one call of `step.c`.

Between two products of a network of this size Python and autograd take longer than the products. So where a model is a chain
of known operations around a diagonal Gaussian, a standard normal and Bernoulli pixels, and what is differentiated is its ELBO,
the chain is written down once (`fused`), and each pass runs it. Any other composition goes through autograd, layer by layer
(`layers.py`); the results are the same (tests/train/test_native.py).
"""

import ctypes
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.likelihoods import Bernoulli, GreyCrossEntropy
from vaelab.meter import Pass
from vaelab.models.vae import VAE
from vaelab.native.build import library
from vaelab.native.calls import COARSE, FULL, linear_room
from vaelab.nn.mean import AroundMean, Centred
from vaelab.nn.mlp import MLP, ExactLinear, FourierMLP
from vaelab.objectives import ELBO, Objective
from vaelab.posteriors import Gaussian
from vaelab.priors import StandardNormal
from vaelab.schedules import at

LINEAR, EXACT, ADD, SUBTRACT, RELU, SILU, WAVES = range(7)
"""Kinds of operations, as in `step.c`."""


class _Unknown(Exception):
    """A module that `step.c` has no operation for."""


class _Operation(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("kind", "inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("w", "b", "dw", "db", "value", "squares")),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("encoder", ctypes.POINTER(_Operation)), ("decoder", ctypes.POINTER(_Operation)),
        *((name, ctypes.c_long) for name in ("encoders", "decoders", "dim")),
        *((name, ctypes.c_void_p) for name in
          ("code", "code_gradient", "log_px", "rate", "gradient", "other", "sums", "squares")),
        ("blocks", ctypes.c_long), ("scratch", ctypes.c_void_p),
    )  # fmt: skip


def fused(model: VAE, objective: Objective, pixels: int, batch: int, k: int) -> "Fused | None":
    """The pass of a model whose parameters have their .grad (`vaelab.optim`), None where `step.c` does not have it.

    Args:
        model: in bfloat16 training on a CPU; its parameters must keep their places in memory.
        objective: what is differentiated.
        pixels: of an image.
        batch: images at most.
        k: samples of the posterior for each image.
    """
    parts: Any = model
    composed = (
        type(model) is VAE
        and type(model.posterior) is Gaussian
        and type(model.prior) is StandardNormal
        and type(model.likelihood) in (Bernoulli, GreyCrossEntropy)
        and type(objective) is ELBO
        and not any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in model.modules()
        )
        and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    )
    if not composed or not isinstance(objective, ELBO) or library() is None:
        return None
    try:
        encoder = [*_chain(parts.encoder), *_chain(parts.posterior.head)]
        decoder = _chain(parts.likelihood.decoder, model.latent_dim)
        # the pass sets gradients, it does not add to them: each must have its layer, and one only
        own = [o.dw for o in (*encoder, *decoder) if o.dw] + [o.db for o in (*encoder, *decoder) if o.db]
        if sorted(own) != sorted(_address(p.grad) for p in model.parameters() if p.requires_grad):
            return None
        if not pixels == encoder[0].inputs == decoder[-1].outputs:
            return None
        return Fused(encoder, decoder, model.latent_dim, objective, batch, k)
    except _Unknown:
        return None


class Fused:
    """Computes the mean over images of distortion + beta rate, sets the parameters' .grad to its gradient, and returns sums.

    Args:
        encoder: images to the posterior's parameters.
        decoder: codes to logits.
        dim: of a code.
        objective: whose beta is taken.
        batch: images at most.
        k: samples of the posterior for each image.
    """

    def __init__(
        self, encoder: list[_Operation], decoder: list[_Operation], dim: int, objective: ELBO, batch: int, k: int
    ) -> None:
        for chain in (encoder, decoder):
            if any(one.outputs != other.inputs for one, other in pairwise(chain)):
                raise _Unknown
        if not encoder or not decoder or encoder[-1].outputs != 2 * dim or decoder[0].inputs != dim:
            raise _Unknown
        self.objective, self.dim, self.k = objective, dim, k
        self.pixels = decoder[-1].outputs
        self.held: list[Tensor] = []
        for chain, rows in ((encoder, batch), (decoder, k * batch)):
            for operation in chain:
                operation.value = self._room(rows * operation.outputs)
        rows, widest = k * batch, max(max(o.inputs, o.outputs) for o in (*encoder, *decoder))
        scratch = max(_scratch(o, n) for chain, n in ((encoder, batch), (decoder, rows)) for o in chain)
        blocks = 0
        self.squares = torch.zeros(sum(_blocks(o) for o in (*encoder, *decoder)), dtype=torch.float64)
        for operation in (*encoder, *decoder):
            operation.squares = self.squares[blocks:].data_ptr()
            blocks += _blocks(operation)
        self.sums = torch.empty(3, dtype=torch.float64)
        self.chains = [(_Operation * len(chain))(*chain) for chain in (encoder, decoder)]
        self.plan = _Plan(
            *self.chains, len(encoder), len(decoder), dim, self._room(rows * dim), self._room(rows * dim),
            self._room(rows), self._room(batch), self._room(rows * widest), self._room(rows * widest),
            self.sums.data_ptr(), self.squares.data_ptr(), blocks, self._room(scratch),
        )  # fmt: skip

    def __call__(self, x: Tensor, generator: torch.Generator, step: int) -> Pass:
        """Of images x (B, *X), with noise from a generator."""
        x, images = x.contiguous(), len(x)
        noise = torch.randn((self.k, images, self.dim), generator=generator, dtype=torch.float32, device="cpu")
        beta = at(self.objective.beta, step)
        kernels = library()
        assert kernels is not None  # `fused` asked
        kernels.elbo_step(
            ctypes.byref(self.plan), x.data_ptr(), noise.data_ptr(), images, self.pixels, self.k, beta,
            torch.get_num_threads(),
        )  # fmt: skip
        rate, distortion, squares = self.sums.tolist()
        return Pass((distortion + beta * rate) / images, rate, distortion, images, math.sqrt(squares))

    def _room(self, numbers: int) -> int:
        """The address of so many float32 numbers, aligned to lines and with some to spare, held as long as this."""
        self.held.append(torch.empty(numbers + 64, dtype=torch.float32, device="cpu"))
        return -(-self.held[-1].data_ptr() // 64) * 64


def _scratch(operation: _Operation, rows: int) -> int:
    """float32 numbers that an operation on so many rows needs for itself, see `linear.c`."""
    return linear_room(rows, operation.outputs, operation.inputs, FULL if operation.kind == EXACT else COARSE) // 2


def _blocks(operation: _Operation) -> int:
    """Sums of squares of an operation's gradients, see `linear.h`."""
    return -(-operation.outputs // 32) * 3 if operation.kind in (LINEAR, EXACT) else 0


def _chain(module: Any, width: int = 0) -> list[_Operation]:
    """The operations of a module on rows of `width` numbers, 0 where that is not known yet. Raises _Unknown."""
    kind = type(module)
    if kind is nn.Sequential:
        found: list[_Operation] = []
        for part in module:
            found += _chain(part, found[-1].outputs if found else width)
        return found
    if kind is MLP:
        return _chain(module.layers, width)
    if kind is Centred:
        n = module.constant.numel()
        return [_Operation(SUBTRACT, n, n, _address(module.constant)), *_chain(module.network, n)]
    if kind is AroundMean:
        n = module.constant.numel()
        return [*_chain(module.network, width), _Operation(ADD, n, n, _address(module.constant))]
    if kind is FourierMLP:
        k, count = module.frequency.shape
        waves = _Operation(WAVES, k, k + count, _address(module.frequency), _address(module.phase))
        return [waves, *_chain(module.network, k + count)]
    if kind in (nn.Linear, ExactLinear):
        n, k = module.weight.shape
        own = [(None, None) if p is None else (_address(p), _address(p.grad) if p.requires_grad else None)
               for p in (module.weight, module.bias)]  # fmt: skip
        (w, dw), (b, db) = own
        return [_Operation(LINEAR if kind is nn.Linear else EXACT, k, n, w, b, dw, db)]
    if kind in (nn.ReLU, nn.SiLU) and width:
        return [_Operation(RELU if kind is nn.ReLU else SILU, width, width)]
    reshapes = (
        kind is nn.Identity
        or (kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1))
        or (kind is nn.Unflatten and module.dim == -1)
    )
    if not reshapes:
        raise _Unknown
    return []


def _address(tensor: Tensor | None) -> int:
    """Raises _Unknown where it is not plain float32 numbers."""
    if tensor is None or tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise _Unknown
    return tensor.data_ptr()
