"""Modules that compute with the kernels: a model's linear layers and convolutions, whoever wrote it, inside `accelerated`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.native import convolutions
from vaelab.native.build import library
from vaelab.native.calls import address, kernels, linear_room, scratch, sink, usual


def accelerated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that compute with the kernels now."""
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), Own)]


@contextmanager
def accelerated(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers and convolutions multiply bfloat16 numbers in vaelab's own kernels: float32 in, float32 out.

    Convolutions that do not may be torch's in bfloat16, and are kept from a fault of those, see `_guarded`.
    """
    chosen = [m for m in model.modules() if type(m) in FORWARDS and fits(m) and "forward" not in vars(m)]
    if library() is None:
        chosen = []
    for layer in chosen:
        layer.forward = Own(FORWARDS[type(layer)], layer)  # type: ignore[method-assign]
    guarded = [m for m in model.modules() if type(m) is nn.Conv2d and "forward" not in vars(m)]
    for layer in guarded:
        layer.forward = partial(_guarded, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in (*chosen, *guarded):
            del layer.forward


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Inside `accelerated`: for a while the layers compute as torch does."""
    held = [(layer, vars(layer).pop("forward")) for layer in accelerated_layers(model)]
    try:
        yield
    finally:
        for layer, forward in held:
            layer.forward = forward  # type: ignore[method-assign]


class Own(partial[Tensor]):
    """A forward of ours, which a user's is told from."""


def as_written(module: nn.Module) -> bool:
    """Whether all that a module and its parts do is their class's: no hooks, and no forward of its own but ours."""
    parts = [
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        or not isinstance(vars(m).get("forward"), Own | None)
        for m in module.modules()
    ]  # fmt: skip
    return not any(parts)


def fits(layer: nn.Module) -> bool:
    """Whether a layer of `FORWARDS` has settings and weights that the kernels know."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not convolutions.fits(layer):
        return False
    return all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in layer.parameters())


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    (n, k), bias = layer.weight.shape, layer.bias
    if not usual(x) or x.shape[-1] != k or (bias is not None and bias.shape != (n,)):
        return F.linear(x, layer.weight, layer.bias)  # which answers, or says what is wrong
    # converted here, where autograd sees it
    return _Linear.apply(x.contiguous().float(), layer.weight, layer.bias)  # type: ignore[no-any-return]


def _guarded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Where the output has a single place, in float32: there torch 2.13's CPU kernel gives gradients of bfloat16 weights that are
    memory which nobody wrote to (strides of 2, 3, 16 and 20 over images of 1, 2, 8 and 20 a side)."""
    y = nn.Conv2d.forward(layer, x)
    if y.dtype != torch.bfloat16 or y.device.type != "cpu" or y.shape[-2:].numel() != 1:
        return y
    with torch.autocast("cpu", enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return layer._conv_forward(x.float(), layer.weight.float(), bias)


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _forward,
    nn.Conv2d: convolutions.convolution,
    nn.ConvTranspose2d: convolutions.transposed,
}
"""Exact classes whose forward is replaced inside `accelerated`; a subclass may compute something else."""


class _Linear(torch.autograd.Function):
    """x (..., K), weight (N, K), bias (N,) or None to (..., N)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (n, k), m = weight.shape, x.numel() // weight.shape[1]
        y = x.new_empty(*x.shape[:-1], n)
        room = scratch(linear_room(m, n, k, torch.get_num_threads()))
        kernels().linear_forward(
            x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(), m, n, k,
            room.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (dy,) = grads
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # of a gradient a gradient will be asked: as torch computes it
            rows, flat = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            return dy @ weight, rows.T @ flat, None if bias is None else rows.sum(0)
        dy = dy.contiguous()
        (n, k), m = weight.shape, x.numel() // weight.shape[1]
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        (into, dw) = sink(weight) if ctx.needs_input_grad[1] else (None, None)
        (to, db) = sink(bias) if bias is not None and ctx.needs_input_grad[2] else (None, None)
        room = scratch(linear_room(m, n, k, torch.get_num_threads()))
        kernels().linear_backward(
            x.data_ptr(), weight.data_ptr(), dy.data_ptr(), address(into), address(to), address(dx), m, n, k,
            room.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return dx, dw, db
