"""Convolutions in vaelab's own kernels, against torch's of the same rounded numbers, in both forms of the kernels."""

import copy

import pytest
import torch
from torch import nn

import vaelab.native.layers as layers

SHAPES = [  # images, channels in, channels out, (rows, columns), kernel, stride, padding
    (2, 1, 32, (28, 28), 3, 2, 1),
    (3, 32, 64, (14, 14), 3, 2, 1),
    (1, 3, 5, (7, 9), 3, 1, 1),
    (129, 2, 3, (5, 4), 2, 2, 0),
    (2, 33, 35, (1, 1), 3, 1, 1),
    (2, 4, 4, (1, 1), 3, 2, 1),
    (1, 1, 1, (1, 1), 1, 1, 0),
    (4, 3, 2, (2, 3), 5, 1, 2),
    (2, 3, 6, (11, 8), (3, 5), (3, 1), (0, 2)),
    (2, 5, 7, (10, 13), (1, 2), (3, 2), (0, 1)),
    (2, 2, 3, (6, 6), 1, 1, 2),
    (2, 65, 3, (17, 17), 3, 1, 1),
    (2, 3, 4, (37, 70), 3, 2, 1),
    (2, 2, 3, (20, 55), 4, 3, 1),
    (20, 16, 33, (9, 20), 3, (1, 2), 1),
    (40, 3, 4, (33, 33), 3, 1, 1),
    (9, 24, 8, (9, 7), 3, 1, 1),
    (9, 96, 32, (5, 5), 3, 1, 2),
    (2, 48, 16, (6, 40), 3, (16, 3), 1),
]
BACK = [  # the same, and output padding
    (2, 32, 1, (14, 14), 4, 2, 1, 0),
    (3, 64, 32, (7, 7), 4, 2, 1, 0),
    (1, 3, 5, (7, 9), 3, 1, 1, 0),
    (129, 2, 3, (3, 4), 2, 2, 0, 1),
    (2, 33, 35, (1, 1), 3, 2, 1, 1),
    (1, 1, 1, (1, 1), 1, 1, 0, 0),
    (2, 3, 4, (5, 3), 2, 3, 0, 2),
    (2, 3, 6, (4, 8), (3, 5), (3, 1), (0, 2), (2, 0)),
    (2, 2, 3, (6, 6), 1, 1, 2, 0),
    (2, 3, 2, (5, 6), 3, 2, 3, 0),
    (2, 65, 3, (9, 9), 3, 1, 1, 0),
    (2, 3, 4, (20, 35), 4, 2, 1, 0),
    (2, 3, 2, (5, 20), 4, 3, 2, 1),
    (9, 32, 33, (5, 9), 5, (1, 3), 2, (0, 2)),
    (20, 64, 48, (4, 17), 3, 1, 1, 0),
]


def rounded(t):
    return t.detach().bfloat16().float()


def make(images, n_in, n_out, sides, kernel, stride, padding, more=None, bias=True):
    """A layer and an input of numbers that are bfloat16 already."""
    if more is None:
        layer = nn.Conv2d(n_in, n_out, kernel, stride, padding, bias=bias)
    else:
        layer = nn.ConvTranspose2d(n_in, n_out, kernel, stride, padding, more, bias=bias)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(rounded(p))
    return layer, rounded(torch.randn(images, n_in, *sides))


def gradients(layer, x, dy, own):
    """Output and gradients of input, weights and bias."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    if own:
        with layers.accelerated(layer):
            assert layers.accelerated_layers(layer) == [layer]
            y = layer(x)
            y.backward(dy)
    else:
        y = layer(x)
        y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5 * float(b.abs().max()) + 1e-6)


def both(layer, x):
    dy = rounded(torch.randn_like(layer(x)))
    close(gradients(layer, x, dy, own=True), gradients(layer, x, dy, own=False))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, *BACK], ids=str)
def test_output_and_gradients_are_torchs(kernels, shape, bias):
    both(*make(*shape, bias=bias))


def test_an_image_of_any_length_has_room(kernels):
    """What is laid out for a row lies in scratch, not on a thread's stack."""
    layer, x = make(1, 1, 1, (1, 1_300_000), (1, 3), (1, 2), (0, 1))
    dy = torch.ones_like(layer(x))
    close(gradients(layer, x, dy, own=True)[:2], gradients(layer, x, dy, own=False)[:2])


def test_weights_that_were_cut_are_torchs(kernels):
    layer, _ = make(*SHAPES[2])
    layer.weight, layer.bias = (nn.Parameter(p.detach()[:2]) for p in (layer.weight, layer.bias))
    with layers.accelerated(layer):
        assert layers.accelerated_layers(layer) == []


@pytest.mark.parametrize("own", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("side, stride", [(1, 2), (2, 3), (8, 16), (8, 20)])
def test_a_single_place_has_the_weights_gradient_of_float32(no_kernels, own, side, stride):
    """torch 2.13's own, in bfloat16, is memory that nobody wrote to."""
    if not own:
        no_kernels()
    layer, x = make(9, 16, 32, (side, side), 3, stride, 1)
    for fill in (float("nan"), 7.0, 0.0):
        wanted = gradients(layer, x, torch.ones_like(layer(x)), own=False)[2]
        used = [torch.full((n,), fill) for n in (400, 720, 1000, 4608, 9216)]
        del used  # what the kernel would find
        with layers.accelerated(layer), torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        layer.zero_grad()
        y.float().sum().backward()
        assert (layer.weight.grad - wanted).norm() < 0.01 * wanted.norm()


def test_numbers_are_rounded_to_bfloat16(kernels):
    layer, x = make(*SHAPES[1])
    fine = x + 1e-3 * torch.randn_like(x)
    dy = torch.randn_like(layer(x))
    found, wanted = gradients(layer, fine, dy, own=True), gradients(layer, rounded(fine), rounded(dy), own=False)
    wanted[3] = dy.sum((0, 2, 3))  # but for the bias, which is added and summed as it is
    close(found, wanted)


def test_input_in_any_layout_and_without_a_batch(kernels):
    for shape in (SHAPES[2], BACK[2]):
        layer, x = make(*shape)
        both(layer, x.mT.contiguous().mT)
        both(layer, x.contiguous(memory_format=torch.channels_last))
        both(layer, x[0])


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3], BACK[0], BACK[3]], ids=str)
def test_threads_change_no_bit(kernels, shape):
    layer, x = make(*shape)
    dy = torch.randn_like(layer(x))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(layer, x, dy, own=True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_gradients_are_added_to_those_there(kernels):
    layer, x = make(*SHAPES[2])
    with layers.accelerated(layer):
        layer(x).sum().backward()
        first, kept = [p.grad.clone() for p in layer.parameters()], [p.grad for p in layer.parameters()]
        layer(x).sum().backward()
    for p, once, same in zip(layer.parameters(), first, kept, strict=True):
        assert p.grad is same
        torch.testing.assert_close(p.grad, 2 * once)


@pytest.mark.parametrize("shape", [SHAPES[2], BACK[3]], ids=str)
def test_gradients_of_gradients_are_torchs(kernels, shape):
    layer, x = make(*shape)
    x.requires_grad_()

    def penalty():
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, layer.weight])

    wanted = penalty()
    with layers.accelerated(layer):
        found = penalty()
    for a, b in zip(found, wanted, strict=True):  # a quarter of what is between is rounded
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(b.abs().max()))


def test_only_what_is_asked_for(kernels):
    layer, x = make(*SHAPES[2])
    layer.weight.requires_grad_(False)
    with layers.accelerated(layer):
        layer(x).sum().backward()
        assert layer.weight.grad is None and layer.bias.grad is not None
        assert layers.accelerated_layers(layer) == [layer]
    assert layers.accelerated_layers(layer) == []


def test_images_do_not_touch_each_other(kernels):
    layer, x = make(*SHAPES[1])
    x[1] = torch.nan
    with layers.accelerated(layer), torch.no_grad():
        y = layer(x)
        x[1] = 0
        assert torch.equal(layer(x)[[0, 2]], y[[0, 2]])
    assert y[1].isnan().all()


def test_other_settings_are_torchs(kernels):
    others = [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.ConvTranspose2d(4, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3).double(),
        nn.Conv1d(4, 4, 3),
    ]
    model = nn.ModuleList(others)
    with layers.accelerated(model):
        assert layers.accelerated_layers(model) == []


def test_what_is_empty_or_wrong_is_torchs(kernels):
    layer, back = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, stride=2)
    with layers.accelerated(nn.ModuleList([layer, back])):
        assert layer(torch.zeros(0, 4, 5, 5)).shape == (0, 6, 3, 3)
        assert back(torch.zeros(1, 4, 5, 5), output_size=[12, 11]).shape == (1, 6, 12, 11)
        for wrong in (torch.zeros(1, 3, 5, 5), torch.zeros(1, 4, 2, 2), torch.zeros(5, 5)):
            with pytest.raises(RuntimeError):
                layer(wrong)


@pytest.mark.parametrize("shape", [(2, 3, 4, (7, 7), 3, 2, 1), (2, 3, 4, (7, 40), 3, 1, 1)], ids=str)
def test_channels_do_not_touch_each_others_weights(kernels, shape):
    layer, x = make(*shape)
    x[:, 1] = torch.nan
    with layers.accelerated(layer):
        layer(x).backward(torch.ones_like(layer(x)))
    assert layer.weight.grad[:, [0, 2]].isfinite().all() and layer.weight.grad[:, 1].isnan().all()
