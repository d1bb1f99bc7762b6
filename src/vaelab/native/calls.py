"""What calls of the kernels share: addresses, where gradients go, scratch."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vaelab.native.build import library


def address(tensor: Tensor | None) -> int:
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


_own = threading.local()


@contextmanager
def adding_gradients() -> Iterator[None]:
    """Inside, a backward pass of this thread adds to the .grad of parameters itself: see `sink`."""
    _own.adding = True
    try:
        yield
    finally:
        _own.adding = False


def sink(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a parameter's gradient is added to, and what autograd is given: its own .grad and nothing, or a new tensor.

    `vaelab.optim` keeps all gradients in one tensor, and each .grad is a part of it: no second pass adds to it. Only inside
    `adding_gradients`, since torch.autograd.grad asks for gradients that must not be added to anything.
    """
    adding = getattr(_own, "adding", False)
    if adding and parameter.is_leaf and parameter.grad is not None and parameter.grad.is_contiguous():
        return parameter.grad, None
    new = torch.zeros_like(parameter)
    return new, new


def usual(x: Tensor) -> bool:
    """Whether the kernels read such an input: some float numbers on the CPU."""
    return x.numel() > 0 and x.device.type == "cpu" and x.is_floating_point() and x.dtype != torch.float64


def linear_room(m: int, n: int, k: int, threads: int) -> int:
    """bfloat16 numbers of scratch that a linear layer of k inputs and n outputs needs for m rows, forward or back: `linear.c`."""
    m, n, k = up(m), up(n), up(k)
    return max(m * k + threads * 32 * k, m * n + (m + 2) * k + (n + 2) * k + threads * 32 * m)


def up(n: int) -> int:
    """The next multiple of 32."""
    return (n + 31) // 32 * 32


def scratch(size: int) -> Tensor:
    """Room for `size` bfloat16 numbers, the same for every call of a thread: new pages cost more than a layer's products."""
    held: Tensor | None = getattr(_own, "scratch", None)
    if held is None or len(held) < size:
        held = _own.scratch = torch.empty(size, dtype=torch.bfloat16, device="cpu")
    return held


def kernels() -> ctypes.CDLL:
    """The library, where `accelerated` found that there is one."""
    found = library()
    assert found is not None
    return found
