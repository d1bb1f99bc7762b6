"""Modules as chains of the operations that `step.c` knows: which module is which, and whether its sizes are what it says."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.native.convolutions import Convolution, fits, made, shape_of
from vaelab.nn.conv import ConvDecoder, ConvEncoder, Double
from vaelab.nn.mean import AroundMean, Centred
from vaelab.nn.mlp import MLP, ExactLinear, FourierMLP

LINEAR, EXACT, DOWN, UP, ADD, SUBTRACT, WAVES = range(7)
"""Kinds of operations, as in `step.c`."""
CONVOLUTIONS = (DOWN, UP)
PRODUCTS = (LINEAR, EXACT, *CONVOLUTIONS)
IDENTITY, RELU, SILU = range(3)
"""Activations, as in `activations.h`."""
ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: RELU, nn.SiLU: SILU}


class Unknown(Exception):
    """A module that `step.c` has no operation for."""


class Parameter(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("at", "gradient", "mean", "square")),
        ("multiple", ctypes.c_float),
    )


class Operation(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("kind", "inputs", "outputs", "activation")),
        ("w", Parameter), ("b", Parameter),
        *((name, ctypes.c_void_p) for name in ("value", "slopes", "gradient", "squares")),
        ("size", ctypes.c_double), ("slope", ctypes.c_double),
        ("inputs_kept", ctypes.c_void_p), ("weights_kept", ctypes.c_void_p), ("shape", ctypes.c_long * 13),
        ("turns", ctypes.c_void_p),
    )  # fmt: skip


def chain_of(module: Any, shape: tuple[int, ...], chain: list[Operation], axes: int) -> tuple[int, ...]:
    """Add a module's operations on inputs (..., *shape) to a chain, and return the shape of what it gives. Raises Unknown.

    Args:
        module: of `VAE`.
        shape: of its input.
        chain: what comes before it, and then it too.
        axes: how many there are before the shape, which are the rows.
    """
    kind, n = type(module), math.prod(shape)
    if kind in ACTIVATIONS and chain and chain[-1].kind in PRODUCTS and not chain[-1].activation:
        chain[-1].activation = ACTIVATIONS[kind]  # a product's own affair
    elif kind is nn.Sequential:
        for part in module:
            shape = chain_of(part, shape, chain, axes)
    elif kind is MLP and len(shape) == len(module.in_shape):
        (width,) = chain_of(module.layers, (n,), chain, axes)
        shape = _same(module.out_shape, width == math.prod(module.out_shape))
    elif kind is ConvEncoder and shape == module.in_shape:
        shape = _same((module.features,), chain_of(module.layers, shape, chain, 1) == (module.features,))
    elif kind is ConvDecoder:
        _same((), chain_of(module.first, shape, chain, axes) == (math.prod(module.start),))
        shape = _same(module.out_shape, chain_of(module.layers, module.start, chain, 1) == module.out_shape)
    elif kind is Double and axes == 1 and type(module.convolution) is nn.ConvTranspose2d:
        shape = _convolution(module.convolution, shape, chain, (module.rows, module.columns))
    elif kind in (nn.Conv2d, nn.ConvTranspose2d) and axes == 1:
        shape = _convolution(module, shape, chain)
    elif kind is Centred and shape == module.constant.shape:
        chain.append(Operation(SUBTRACT, n, n, IDENTITY, Parameter(address_of(module.constant))))
        shape = chain_of(module.network, shape, chain, axes)
    elif kind is AroundMean:
        shape = chain_of(module.network, shape, chain, axes)
        n = math.prod(_same(shape, shape == module.constant.shape))
        chain.append(Operation(ADD, n, n, IDENTITY, Parameter(address_of(module.constant))))
    elif kind is FourierMLP:
        k, count = module.frequency.shape
        _same((), shape == (k,) and module.phase.shape == (count,))
        constants = Parameter(address_of(module.frequency)), Parameter(address_of(module.phase))
        chain.append(Operation(WAVES, k, k + count, IDENTITY, *constants))
        shape = chain_of(module.network, (k + count,), chain, axes)
    elif kind in (nn.Linear, ExactLinear) and shape == module.weight.shape[1:]:
        shape = tuple(module.weight.shape[:1])
        chain.append(Operation(LINEAR if kind is nn.Linear else EXACT, n, *shape, IDENTITY, *_own(module, shape)))
    elif kind is nn.Flatten and (module.start_dim, module.end_dim) == (axes, -1):
        shape = (n,)
    elif kind is nn.Unflatten and module.dim == -1:
        sizes = tuple(module.unflattened_size)
        shape = _same((*shape[:-1], *sizes), math.prod(sizes) == shape[-1] and min(sizes) > 0)
    elif kind is not nn.Identity:
        raise Unknown
    return shape


def _same(shape: tuple[int, ...], is_so: bool) -> tuple[int, ...]:
    """A shape, where torch would not object. Raises Unknown."""
    if not is_so:
        raise Unknown
    return shape


def _convolution(
    layer: Convolution, shape: tuple[int, ...], chain: list[Operation], cropped: tuple[int, int] | None = None
) -> tuple[int, ...]:
    """The same for a convolution, of whose sides the last numbers may be cut off."""
    _same(shape, len(shape) == 3 and shape[0] == layer.in_channels and fits(layer))
    sides = made(layer, shape[1:])
    _same(shape, cropped is None or all(few <= all_ for few, all_ in zip(cropped, sides, strict=True)))
    sides = _same(cropped or sides, min(cropped or sides) > 0)
    given, outputs = math.prod(shape), layer.out_channels * math.prod(sides)
    kind = UP if isinstance(layer, nn.ConvTranspose2d) else DOWN
    operation = Operation(kind, given, outputs, IDENTITY, *_own(layer, (layer.out_channels,)))
    operation.shape[:] = shape_of(layer, 0, shape[1:], sides)
    chain.append(operation)
    return (layer.out_channels, *sides)


def _own(layer: Any, outputs: tuple[int, ...]) -> list[Parameter]:
    """Weights and biases, of which there is one for each of the outputs."""
    _same(outputs, layer.bias is None or layer.bias.shape == outputs)
    return [
        Parameter() if p is None else Parameter(address_of(p), address_of(p.grad) if p.requires_grad else None)
        for p in (layer.weight, layer.bias)
    ]


def address_of(tensor: Tensor | None) -> int:
    """Raises Unknown where it is not plain float32 numbers."""
    if tensor is None or tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise Unknown
    return tensor.data_ptr()
