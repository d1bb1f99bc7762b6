"""Modules that compute with the kernels: the linear layers of a model, whoever wrote it, inside `accelerated`."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.native.build import library

COARSE, FULL = 1, 3
"""Parts of a number that are multiplied, as in `linear.h`: bfloat16 products, or what float32 gives."""
LAYERS = (nn.Linear,)
"""Exact classes whose forward is replaced inside `accelerated`; a subclass may compute something else."""


def accelerated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that compute with the kernels now."""
    return [m for m in model.modules() if type(m) in LAYERS and "forward" in vars(m)]


@contextmanager
def accelerated(model: nn.Module) -> Iterator[None]:
    """Inside, the model's linear layers multiply bfloat16 numbers in vaelab's own kernels: float32 in, float32 out."""
    chosen = [m for m in model.modules() if type(m) in LAYERS and _fits(m)]
    if library() is None:
        chosen = []
    for layer in chosen:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward


def _fits(layer: nn.Module) -> bool:
    return all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in layer.parameters())


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.numel() == 0:
        return F.linear(x, layer.weight, layer.bias)
    return _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """x (..., K), weight (N, K), bias (N,) or None to (..., N)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous().float()
        (n, k), m = weight.shape, x.numel() // weight.shape[1]
        y = x.new_empty(*x.shape[:-1], n)
        scratch = _scratch(_up(m) * _up(k) + _up(n) * _up(k))
        _kernels().linear_forward(
            x.data_ptr(), weight.data_ptr(), _address(bias), y.data_ptr(), m, n, k, COARSE,
            scratch.data_ptr(), torch.get_num_threads(),
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
        (into, dw) = _sink(weight) if ctx.needs_input_grad[1] else (None, None)
        (to, db) = _sink(bias) if bias is not None and ctx.needs_input_grad[2] else (None, None)
        scratch = _scratch(_up(m) * (2 * _up(n) + _up(k)) + _up(n) * _up(k))
        _kernels().linear_backward(
            x.data_ptr(), weight.data_ptr(), dy.data_ptr(), _address(into), _address(to), _address(dx), m, n, k, COARSE,
            scratch.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return dx, dw, db


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sink(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a parameter's gradient is added to, and what autograd is given: its own .grad and nothing, or a new tensor.

    `vaelab.optim` keeps all gradients in one tensor, and each .grad is a part of it: no second pass adds to it.
    """
    if parameter.is_leaf and parameter.grad is not None and parameter.grad.is_contiguous():
        return parameter.grad, None
    new = torch.zeros_like(parameter)
    return new, new


_kept = threading.local()


def _scratch(size: int) -> Tensor:
    """Room for `size` bfloat16 numbers, the same for every call of a thread: new pages cost more than a layer's products."""
    held: Tensor | None = getattr(_kept, "scratch", None)
    if held is None or len(held) < size:
        held = _kept.scratch = torch.empty(size, dtype=torch.bfloat16)
    return held


def _up(n: int) -> int:
    return (n + 31) // 32 * 32


def _kernels() -> ctypes.CDLL:
    found = library()
    assert found is not None  # `accelerated` asked
    return found
