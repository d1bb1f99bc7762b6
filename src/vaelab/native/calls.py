"""What calls of the kernels share: addresses, where gradients go, scratch."""

import ctypes
import threading

import torch
from torch import Tensor

from vaelab.native.build import library

COARSE, FULL = 1, 3
"""Parts of a number that are multiplied, as in `tiles.h`: bfloat16 products, or what float32 gives."""


def address(tensor: Tensor | None) -> int:
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def sink(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a parameter's gradient is added to, and what autograd is given: its own .grad and nothing, or a new tensor.

    `vaelab.optim` keeps all gradients in one tensor, and each .grad is a part of it: no second pass adds to it.
    """
    if parameter.is_leaf and parameter.grad is not None and parameter.grad.is_contiguous():
        return parameter.grad, None
    new = torch.zeros_like(parameter)
    return new, new


def up(n: int) -> int:
    """The next multiple of 32."""
    return (n + 31) // 32 * 32


_kept = threading.local()


def scratch(size: int) -> Tensor:
    """Room for `size` bfloat16 numbers, the same for every call of a thread: new pages cost more than a layer's products."""
    held: Tensor | None = getattr(_kept, "scratch", None)
    if held is None or len(held) < size:
        held = _kept.scratch = torch.empty(size, dtype=torch.bfloat16)
    return held


def kernels() -> ctypes.CDLL:
    """The library, where `accelerated` found that there is one."""
    found = library()
    assert found is not None
    return found
