"""The whole pass of the most used composition, forward and backward, in one call of `step.c`.

Between two products of a network of this size Python and autograd take longer than the products. So where a model is a chain
of known operations, dense or convolutional, around a diagonal Gaussian, a standard normal and Bernoulli pixels, and what is
differentiated is its ELBO, the chain is written down once (`fused`), and each pass runs it. Any other composition goes through
autograd, layer by layer (`layers.py`); the results are the same (tests/train/test_native_pass.py).
"""

import ctypes
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vaelab.data.protocol import KERNELS, Protocol, seed_of_bits
from vaelab.likelihoods import Bernoulli, GreyCrossEntropy
from vaelab.meter import Pass
from vaelab.models.vae import VAE
from vaelab.native.build import library
from vaelab.native.calls import kernels, up
from vaelab.native.chain import (
    ADD,
    CONVOLUTIONS,
    DOWN,
    EXACT,
    LINEAR,
    PRODUCTS,
    SILU,
    SUBTRACT,
    WAVES,
    Operation,
    Unknown,
    address_of,
    chain_of,
)
from vaelab.native.convolutions import rooms
from vaelab.native.layers import as_written
from vaelab.native.pace import AT_ONCE
from vaelab.objectives import ELBO, Objective
from vaelab.optim import Optimiser
from vaelab.posteriors import Gaussian
from vaelab.priors import StandardNormal
from vaelab.schedules import at

TURNS = 3 * 32
"""Room for a thread's turns at an operation, in float32 numbers, see `turns.h`."""
AHEAD, NOISE = 16, 2**18
"""Steps that are one call, at most, and numbers of noise that are drawn for them."""


class _Source(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_void_p), ("index", ctypes.c_void_p), ("kind", ctypes.c_long), ("seed", ctypes.c_uint64),
    )  # fmt: skip


class _Taken(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("across", ctypes.c_void_p), ("k", ctypes.c_long), ("width", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("minus", "columns", "inputs")),
    )  # fmt: skip


class _Pixels(ctypes.Structure):
    _fields_ = (
        ("levels", ctypes.c_void_p), ("width", ctypes.c_long), ("plus", ctypes.c_void_p), ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("linear", "product", "rows", "across", "sums")),
    )  # fmt: skip


class _Codes(ctypes.Structure):
    _fields_ = (("dim", ctypes.c_long), *((name, ctypes.c_void_p) for name in ("at", "gradient", "rate")))


class _Plan(ctypes.Structure):
    _fields_ = (
        ("encoder", ctypes.POINTER(Operation)), ("decoder", ctypes.POINTER(Operation)),
        ("encoders", ctypes.c_long), ("decoders", ctypes.c_long), ("codes", _Codes),
        *((name, ctypes.c_void_p) for name in ("log_px", "sums", "squares")),
        ("blocks", ctypes.c_long), ("scratch", ctypes.c_void_p), ("alone", ctypes.c_void_p), ("each", ctypes.c_long),
        ("source", _Source), ("pixels_of_image", ctypes.c_long), ("taken", _Taken), ("pixels", _Pixels),
    )  # fmt: skip


def fused(
    model: VAE,
    objective: Objective,
    images: Tensor,
    protocol: Protocol,
    batch: int,
    k: int,
    optimiser: Optimiser | None = None,
) -> "Fused | None":
    """The pass of a model whose parameters have their .grad (`vaelab.optim`), None where `step.c` does not have it.

    Args:
        model: in bfloat16 training on a CPU; its parameters must keep their places in memory.
        objective: what is differentiated.
        images: of the data set, bytes (N, *X).
        protocol: how they become what the model sees.
        batch: images at most.
        k: samples of the posterior for each image.
        optimiser: of the model, where a pass may make its update too.
    """
    parts: Any = model
    composed = (
        type(model) is VAE
        and type(model.posterior) is Gaussian
        and type(model.prior) is StandardNormal
        and type(model.likelihood) in (Bernoulli, GreyCrossEntropy)
        and type(objective) is ELBO
        and as_written(model)
        and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    )
    shape = tuple(images.shape[1:])
    if not composed or not isinstance(objective, ELBO) or library() is None:
        return None
    if protocol.name not in KERNELS or not images.is_contiguous() or images.dtype != torch.uint8:
        return None
    try:
        encoder: list[Operation] = []
        decoder: list[Operation] = []
        chain_of(parts.posterior.head, chain_of(parts.encoder, shape, encoder, 1), encoder, 1)
        # the axes of samples and of images
        if chain_of(parts.likelihood.decoder, (model.latent_dim,), decoder, 2) != shape:
            return None
        # the pass sets gradients, it does not add to them: each must have its layer, and one only
        own = [p.gradient for o in (*encoder, *decoder) for p in (o.w, o.b) if p.gradient]
        if sorted(own) != sorted(address_of(p.grad) for p in model.parameters() if p.requires_grad):
            return None
        if not encoder or not decoder:
            return None
        return Fused(encoder, decoder, model.latent_dim, objective, images, protocol, batch, k, optimiser)
    except Unknown:
        return None


class Fused:
    """Computes the mean over images of distortion + beta rate, sets the parameters' .grad to its gradient, and returns sums.

    With an optimiser, the parameters are updated, too: in passing wherever that does not need the gradient's norm, since a bound of
    it that is known before says that the gradient is finite and not clipped, and else afterwards. Then several steps are one call.

    Args:
        encoder: images to the posterior's parameters.
        decoder: codes to logits.
        dim: of a code.
        objective: whose beta is taken.
        images: of the data set, bytes.
        protocol: how they become what the model sees.
        batch: images at most.
        k: samples of the posterior for each image.
        optimiser: of the parameters.
    """

    def __init__(
        self,
        encoder: list[Operation],
        decoder: list[Operation],
        dim: int,
        objective: ELBO,
        images: Tensor,
        protocol: Protocol,
        batch: int,
        k: int,
        optimiser: Optimiser | None = None,
    ) -> None:
        for chain in (encoder, decoder):
            if any(one.outputs != other.inputs for one, other in pairwise(chain)):
                raise Unknown
            # who gives back the gradient of what passed an activation is a product
            if any(
                one.activation and other.kind not in PRODUCTS for one, other in pairwise((*chain, Operation(WAVES)))
            ):
                raise Unknown
        if encoder[-1].outputs != 2 * dim or decoder[0].inputs != dim:
            raise Unknown
        self.objective, self.dim, self.batch, self.k, self.optimiser = objective, dim, batch, k, optimiser
        self.images, self.protocol, self.threads = images, protocol.name, torch.get_num_threads()
        self.held: list[Tensor] = []
        rows = k * batch
        # a constant beside the images, or beside the logits, is an affair of the layer that reads or gives them
        minus = encoder.pop(0).w.at if [o.kind for o in encoder[:2]] == [SUBTRACT, LINEAR] else None
        plus = decoder.pop().w.at if [o.kind for o in decoder[-2:]] == [LINEAR, ADD] else None
        self._rooms(encoder, batch, first=True)
        self._rooms(decoder, rows, first=False)
        both = (*encoder, *decoder)
        self.squares = torch.zeros(sum(_blocks(o) for o in both), dtype=torch.float64)
        updates = optimiser.adam if optimiser and optimiser.ahead(0, 1) else None
        blocks = 0
        for operation in both:
            operation.squares, operation.turns = self.squares[blocks:].data_ptr(), self._room(TURNS * self.threads)
            blocks += _blocks(operation)
            for parameter in (operation.w, operation.b):
                if updates and parameter.gradient:
                    parameter.mean, parameter.square, parameter.multiple = updates.place(parameter.at)
        self.chains = [(Operation * len(chain))(*chain) for chain in (encoder, decoder)]
        widest = max(up(max(o.inputs, o.outputs)) for o in both)
        # in bfloat16 numbers: 32 rows of weights, or of a gradient in float32 beside as many of another, or all of a narrow layer
        shared, each = up(rows) * widest, 32 * (up(rows) + 2 * widest)
        for operation in both:
            if operation.kind == EXACT:
                each = max(each, 2 * up(operation.outputs) * operation.inputs)
            if operation.kind in CONVOLUTIONS:
                images_ = batch if operation in encoder else rows
                for_all, for_each = rooms((images_, *operation.shape[1:]))
                shared, each = max(shared, for_all), max(each, for_each)
        scratch = self._room(shared // 2)
        gradient = decoder[0].gradient if _in_place(decoder) else self._room(rows * dim)
        codes = _Codes(dim, self._room(rows * dim), gradient, self._room(batch))
        taken, pixels = self._pixels(encoder[0], decoder[-1], minus, plus, scratch)
        self.plan = _Plan(
            *self.chains, len(encoder), len(decoder), codes, self._room(rows), None, self.squares.data_ptr(), blocks,
            scratch, self._room(self.threads * each // 2), each,
            _Source(images.data_ptr(), None, KERNELS[protocol.name], 0), images[0].numel(), taken, pixels,
        )  # fmt: skip
        self.most = max(1, min(AHEAD, NOISE // (rows * dim)))
        self.noise = torch.empty((self.most, rows * dim), dtype=torch.float32, device="cpu")
        self.seeds = (ctypes.c_uint64 * self.most)()
        self.told = torch.zeros((self.most, 4), dtype=torch.float64)

    def _pixels(
        self, first: Operation, last: Operation, minus: int | None, plus: int | None, scratch: int
    ) -> tuple[_Taken, _Pixels]:
        """Room for what the first and the last layer read of images, see `images.h` and `pixels.h`."""
        rows, n = up(self.k * self.batch), last.outputs
        linear = first.kind == LINEAR, last.kind == LINEAR
        taken, pixels = _Taken(k=self.k, width=rows), _Pixels(width=rows, plus=plus)
        if linear[0]:
            taken.minus, taken.columns, taken.inputs = minus, scratch, first.inputs_kept
        if linear[1]:
            taken.across = pixels.levels = self._room(rows * up(n) // 4)
            pixels.linear, pixels.product = (self._room(rows * up(n) // 32) for _ in range(2))
            pixels.rows, pixels.across = (self._room(rows * up(n) // 2) for _ in range(2))
            pixels.sums = self._room(up(n))
        if not all(linear):
            taken.x = self._room(self.batch * n)
        return taken, pixels

    def _rooms(self, chain: list[Operation], rows: int, first: bool) -> None:
        """Give each operation of a chain room for its value, its gradient, and what is kept for the way back.

        Args:
            chain: of operations.
            rows: that go through it at most.
            first: whether nothing asks for the gradient of what it is given.
        """
        trained = [i for i, o in enumerate(chain) if o.w.gradient or o.b.gradient]
        needed = trained[0] if first and trained else 0  # the first operation whose value's gradient is asked for
        for i, operation in reversed([*enumerate(chain)]):
            scored = (
                not first and operation is chain[-1] and operation.kind == LINEAR
            )  # neither is ever written, see `_pixels`
            if not scored:
                operation.value = self._room(rows * operation.outputs)
            if operation.activation == SILU:
                operation.slopes = self._room(rows * operation.outputs)
            if i >= needed and not scored:  # in the place of the slopes, each of which is read once
                room = chain[i + 1].gradient if _in_place(chain[i + 1 :]) else operation.slopes
                operation.gradient = room or self._room(rows * operation.outputs)
            if operation.kind == LINEAR:
                operation.inputs_kept = self._room((up(rows) + 2) * up(operation.inputs) // 2)
                if i > needed or not first:
                    operation.weights_kept = self._room((up(operation.outputs) + 2) * up(operation.inputs) // 2)

    def __call__(self, index: Tensor, noise: Callable[[int], torch.Generator], step: int) -> list[Pass]:
        """The passes of the steps from `step` on, one for each batch of the images `index` (N,). There may be fewer, as many as
        `AT_ONCE` allows; and the last is the first that is not finite, whose update is left to the optimiser.

        Args:
            index: which images, of `most` batches or fewer.
            noise: the generator of a step.
            step: the first of them.
        """
        index, count = index.contiguous(), -(-len(index) // self.batch)
        sizes = [min(self.batch, len(index) - i * self.batch) for i in range(count)]
        betas = [at(self.objective.beta, step + i) for i in range(count)]
        for i, images in enumerate(sizes):
            generator = noise(step + i)
            self.seeds[i] = seed_of_bits(self.protocol, generator)
            self.noise[i, : self.k * images * self.dim].normal_(generator=generator)
        ahead = self.optimiser.ahead(step, count) if self.optimiser else None
        made = kernels().elbo_steps(
            ctypes.byref(self.plan), count, index.data_ptr(), len(index), self.batch, self.seeds, self.noise.data_ptr(),
            (ctypes.c_float * count)(*betas),
            *(ahead or (None, 0.0, 0.0)), self.told.data_ptr(), AT_ONCE,
            min(self.threads, torch.get_num_threads()),
        )  # fmt: skip
        return [
            Pass((distortion + beta * rate) / images, rate, distortion, images, math.sqrt(squares), bool(updated))
            for (rate, distortion, squares, updated), beta, images in zip(
                self.told[:made].tolist(), betas, sizes, strict=False
            )
        ]

    def _room(self, numbers: int) -> int:
        """The address of so many float32 numbers, aligned to lines and with some to spare, held as long as this."""
        self.held.append(torch.empty(numbers + 64, dtype=torch.float32, device="cpu"))
        return -(-self.held[-1].data_ptr() // 64) * 64


def _in_place(rest: list[Operation]) -> bool:
    """Whether the next operation writes the gradient of what it is given over that of what it gives."""
    return bool(rest) and rest[0].kind in (ADD, SUBTRACT)


def _blocks(operation: Operation) -> int:
    """Sums of squares of an operation's gradients, see `linear.h` and `convolution.h`."""
    if operation.kind in CONVOLUTIONS:
        channels = operation.shape[1], operation.shape[4]
        return channels[1] + channels[operation.kind == DOWN]
    return -(-operation.outputs // {LINEAR: 32, EXACT: 8}[operation.kind]) if operation.kind in PRODUCTS else 0
