"""Convolutions and transposed convolutions, which are each other's gradients, with the kernels of `convolution.c`."""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from vaelab.native.calls import address, kernels, scratch, sink, usual

Convolution = nn.Conv2d | nn.ConvTranspose2d
STEP = 16
"""The largest stride that the kernels know."""


def fits(layer: Convolution) -> bool:
    """Whether the kernels know a layer's settings, and its weights are what those say."""
    inputs, outputs = layer.in_channels, layer.out_channels
    ends = (inputs, outputs) if isinstance(layer, nn.ConvTranspose2d) else (outputs, inputs)
    if layer.weight.shape != (*ends, *layer.kernel_size) or (layer.bias is not None and layer.bias.shape != (outputs,)):
        return False
    if isinstance(layer, nn.ConvTranspose2d) and any(
        m >= s for m, s in zip(layer.output_padding, layer.stride, strict=True)
    ):
        return False
    plain = (
        max(layer.stride) <= STEP and layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    )
    return plain and isinstance(layer.padding, tuple)


def made(layer: Convolution, given: Sequence[int], more: Sequence[int] | None = None) -> tuple[int, ...]:
    """The sides of the images that a layer makes of images of given sides; `more` in place of its output_padding."""
    settings = zip(given, layer.kernel_size, layer.stride, layer.padding, strict=False)
    if isinstance(layer, nn.ConvTranspose2d):
        added = layer.output_padding if more is None else more
        return tuple((n - 1) * s - 2 * int(p) + k + m for (n, k, s, p), m in zip(settings, added, strict=True))
    return tuple((n + 2 * int(p) - k) // s + 1 for n, k, s, p in settings)


def shape_of(layer: Convolution, images: int, given: Sequence[int], sides: Sequence[int]) -> tuple[int, ...]:
    """The `Shape` of convolution.h, of a layer that makes images of some sides from those of given ones."""
    small, large = (given, sides) if isinstance(layer, nn.ConvTranspose2d) else (sides, given)
    n, c, *kernel = layer.weight.shape
    return (images, c, *large, n, *small, *kernel, *layer.stride, *layer.padding)  # type: ignore[arg-type]


def transposed(layer: nn.ConvTranspose2d, x: Tensor, output_size: list[int] | None = None) -> Tensor:
    """What replaces the forward of a transposed convolution."""
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    kernel, stride, padding, dilation = ([int(v) for v in values] for values in geometry)
    more = layer._output_padding(x, output_size, stride, padding, kernel, 2, dilation)  # type: ignore[arg-type]
    sides = made(layer, x.shape[-2:], more)
    # torch's own answers what is empty, and says what is wrong
    if not _is_usual(layer, x, sides) or any(m >= s for m, s in zip(more, stride, strict=True)):
        return nn.ConvTranspose2d.forward(layer, x, output_size)
    return _run(layer, x, sides, tuple(more))


def convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What replaces the forward of a convolution."""
    sides = made(layer, x.shape[-2:])
    return _run(layer, x, sides, (0, 0)) if _is_usual(layer, x, sides) else nn.Conv2d.forward(layer, x)


def _is_usual(layer: Convolution, x: Tensor, sides: Sequence[int]) -> bool:
    return usual(x) and x.dim() in (3, 4) and x.shape[-3] == layer.in_channels and min(sides) > 0


def _run(layer: Convolution, x: Tensor, sides: Sequence[int], more: tuple[int, ...]) -> Tensor:
    weight, back = layer.weight, isinstance(layer, nn.ConvTranspose2d)
    images = 1 if x.dim() == 3 else x.shape[0]
    shape = shape_of(layer, images, x.shape[-2:], sides)
    images_ = (x.unsqueeze(0) if x.dim() == 3 else x).contiguous().float()  # here, where autograd sees it
    y = _Convolution.apply(images_, weight, layer.bias, shape, more, back)
    return y.squeeze(0) if x.dim() == 3 else y  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    """x (images, channels, rows, columns), of the large images of `shape` or (back) the small ones, to the others."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], more: tuple[int, ...], back: bool
    ) -> Tensor:
        ctx.shape, ctx.more, ctx.back = shape, more, back
        ctx.save_for_backward(x, weight, bias)
        return _product(x, weight, bias, shape, upwards=back)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, bias = ctx.saved_tensors
        shape, back, needed = ctx.shape, ctx.back, ctx.needs_input_grad
        if torch.is_grad_enabled():  # of a gradient a gradient will be asked: as torch computes it
            stride, padding = shape[9:11], shape[11:]
            found = torch.ops.aten.convolution_backward(
                dy, x, weight, None if bias is None else bias.shape, stride, padding, (1, 1), back, ctx.more, 1, needed[:3]
            )  # fmt: skip
            return *found, None, None, None
        dy = dy.contiguous()
        dx = _product(dy, weight, None, shape, upwards=not back) if needed[0] else None
        dw = db = None
        threads = torch.get_num_threads()
        if needed[1]:
            into, dw = sink(weight)
            large, small = (dy, x) if back else (x, dy)
            room = scratch(_room(shape, threads))
            kernels().convolution_weights(
                large.data_ptr(), small.data_ptr(), into.data_ptr(), longs(shape), room.data_ptr(), threads
            )
        if bias is not None and needed[2]:
            into, db = sink(bias)
            images, channels, rows, columns = dy.shape
            kernels().convolution_bias(dy.data_ptr(), into.data_ptr(), images, channels, rows * columns, threads)
        return dx, dw, db, None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], upwards: bool) -> Tensor:
    threads = torch.get_num_threads()
    y = x.new_empty(shape[0], *(shape[1:4] if upwards else shape[4:7]))
    room = scratch(_room(shape, threads))
    kernels().convolution(
        longs(shape), upwards, x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(), room.data_ptr(), threads
    )
    return y


@cache
def longs(shape: tuple[int, ...]) -> ctypes.Array[ctypes.c_long]:
    """The `Shape` of convolution.h."""
    return (ctypes.c_long * len(shape))(*shape)


@cache
def rooms(shape: tuple[int, ...]) -> tuple[int, int]:
    """bfloat16 numbers of scratch: of all threads, and of each alone."""
    found = (ctypes.c_long * 2)()
    kernels().convolution_room(longs(shape), found)
    return found[0], found[1]


def _room(shape: tuple[int, ...], threads: int) -> int:
    shared, each = rooms(shape)
    return shared + threads * each
