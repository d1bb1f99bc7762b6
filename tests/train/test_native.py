"""vaelab's own kernels against float64: products, pixels, Adam, images, and a whole pass against autograd."""

import copy
import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from vaelab import pixels
from vaelab.data.protocol import protocol
from vaelab.errors import UsageError
from vaelab.likelihoods import GreyCrossEntropy
from vaelab.models.vae import VAE
from vaelab.native import build, layers, library, reason
from vaelab.native.calls import adding_gradients, linear_room
from vaelab.native.layers import accelerated
from vaelab.native.step import fused
from vaelab.nn.mean import AroundMean, Centred
from vaelab.nn.mlp import MLP, FourierMLP
from vaelab.objectives import ELBO, FreeBits
from vaelab.optim import Adam, Optimiser
from vaelab.posteriors import Gaussian, Laplace
from vaelab.priors import StandardNormal
from vaelab.recipes import recipe
from vaelab.registry import build as built
from vaelab.rng import stream
from vaelab.schedules import Linear
from vaelab.training import fit, initial_model
from vaelab.training import test_metrics as measured

pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {reason()}")
SIZES = [(1, 1, 1), (128, 784, 400), (33, 37, 129), (96, 2, 31), (5, 64, 32), (31, 33, 1)]
"""Rows, inputs, outputs."""


def rounded(t):
    return t.bfloat16().double()


def products(kernels, m, k, n, threads=1):
    """x, w, b, dy, and what the kernels make of them: y, dw (from ones), db (from ones), dx."""
    noise = stream(m, "products", n)
    x, w, b, dy = (torch.randn(*shape, generator=noise) for shape in ((m, k), (n, k), (n,), (m, n)))
    y, dw, db, dx = torch.empty(m, n), torch.ones(n, k), torch.ones(n), torch.empty(m, k)
    scratch = torch.full((linear_room(m, n, k),), math.nan, dtype=torch.bfloat16)
    at = [t.data_ptr() for t in (x, w, b, dy, y, dw, db, dx, scratch)]
    kernels.linear_forward(at[0], at[1], at[2], at[4], m, n, k, at[8], threads)
    scratch.fill_(math.nan)
    kernels.linear_backward(at[0], at[1], at[3], *at[5:8], m, n, k, at[8], threads)
    return (x, w, b, dy), (y, dw, db, dx)


@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_rounded_numbers(kernels, size):
    (x, w, b, dy), (y, dw, db, dx) = products(kernels, *size)
    scale = 1e-6 * max(size)
    assert (y - (rounded(x) @ rounded(w).T + b)).abs().max() < scale
    assert (dw - 1 - rounded(dy).T @ rounded(x)).abs().max() < scale
    assert (db - 1 - dy.double().sum(0)).abs().max() < scale
    assert (dx - rounded(dy) @ rounded(w)).abs().max() < scale


def test_products_do_not_depend_on_the_number_of_threads(kernels):
    _, one = products(kernels, 130, 100, 77)
    for threads in (2, 3):
        _, other = products(kernels, 130, 100, 77, threads)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 7, bias=False))


@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (40,)])
def test_a_layer_is_torchs_with_rounded_operands(kernels, shape):
    model, x = network(), torch.randn(*shape, generator=stream(0, "x")).requires_grad_()
    reference = copy.deepcopy(model).double()
    with accelerated(model):
        y = model(x)
        y.square().sum().backward()
    assert all("forward" not in vars(m) for m in model.modules())
    exact = x.detach().double().requires_grad_()
    reference(exact).square().sum().backward()
    assert y.dtype == torch.float32 and y.shape == (*shape[:-1], 7)
    for ours, theirs in (
        (x.grad, exact.grad),
        *((p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)),
    ):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()
        assert (ours - theirs).norm() > 0


def test_gradients_are_added_where_there_are_some(kernels):
    model, x = network(), torch.randn(5, 40, generator=stream(0, "x"))
    with accelerated(model), adding_gradients():
        model(x).sum().backward()
        once = [p.grad.clone() for p in model.parameters()]
        held = [p.grad for p in model.parameters()]
        model(x).sum().backward()
    assert all(p.grad is grad and torch.allclose(grad, 2 * first) for p, grad, first in
               zip(model.parameters(), held, once, strict=True))  # fmt: skip


def test_a_gradient_of_a_gradient(kernels):
    model, x = network(), torch.randn(5, 40, generator=stream(0, "x"), requires_grad=True)
    with accelerated(model):
        (slope,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        slope.square().sum().backward()
    reference, exact = copy.deepcopy(network()).double(), x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(exact).tanh().sum(), exact, create_graph=True)
    expected.square().sum().backward()
    assert (x.grad - exact.grad).norm() < 5e-2 * exact.grad.norm()


def test_asking_for_gradients_adds_to_none(kernels):
    """torch.autograd.grad gives what is asked for, and .grad stays as it is."""
    layer, x = nn.Linear(40, 33), torch.randn(5, 40, generator=stream(0, "x"), requires_grad=True)
    layer.weight.grad = torch.zeros_like(layer.weight)
    with accelerated(layer):
        for asked in (x, layer.weight):
            (found,) = torch.autograd.grad(layer(x).square().sum(), asked)
            assert found.any() and found.shape == asked.shape
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("kind", ["transposed", "bfloat16"])
def test_a_gradient_of_a_gradient_of_what_was_converted(kernels, kind):
    layer = nn.Linear(4, 3)
    found = []
    for own in (True, False):
        x = torch.randn(4, 4, generator=stream(0, "x"), requires_grad=True)
        given = x.T if kind == "transposed" else x.bfloat16()
        with accelerated(layer) if own else torch.autocast("cpu", enabled=False):
            y = layer(given if own else given.float())
        (slope,) = torch.autograd.grad(y.tanh().sum(), layer.weight, create_graph=True)
        slope.square().sum().backward()
        found.append(x.grad)
    assert (found[0] - found[1]).norm() < 5e-2 * found[1].norm()


def test_what_does_not_fit_a_layer_is_refused_by_torch(kernels):
    layer = nn.Linear(10, 3)
    with accelerated(layer):
        with pytest.raises(RuntimeError, match="shapes"):
            layer(torch.zeros(4, 5))
        with pytest.raises(RuntimeError):
            layer(torch.zeros(4, 10, dtype=torch.int64))


def test_contexts_inside_one_another_and_a_forward_of_ones_own(kernels):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = lambda x: x
    with accelerated(model):
        with accelerated(model):
            pass
        assert layers.accelerated_layers(model) == [model[0]]
        with layers.suspended(model):
            assert layers.accelerated_layers(model) == []
        assert layers.accelerated_layers(model) == [model[0]]
    assert "forward" not in vars(model[0]) and "forward" in vars(model[1])


def test_the_last_point_of_a_curve_is_in_float32(kernels, digits, small):
    chosen = small(precision="bfloat16", epochs=1)
    model = initial_model(chosen)
    (record,) = fit(model, built(chosen.objective), digits, protocol(chosen.protocol), chosen.training)
    exact = measured(model, protocol(chosen.protocol).test_set(digits.test.pixels), None, 0)
    assert record["test"] == exact


def test_pixels_of_another_size_are_refused(kernels):
    px = pixels.Bernoulli(torch.zeros(1, 3, 2, 4, 4))
    with pytest.raises(UsageError, match="the images have shape"):
        px.cross_log_prob(torch.zeros(1, 1, 4, 4))


def test_a_gradient_of_a_gradient_of_pixels(kernels):
    logits, x = torch.randn(1, 2, 1, 3, 3, generator=stream(0, "l")).requires_grad_(), torch.ones(2, 1, 3, 3)
    (slope,) = torch.autograd.grad(pixels.Bernoulli(logits).log_prob(x).sum(), logits, create_graph=True)
    slope.sum().backward()
    p = torch.sigmoid(logits.detach())
    assert torch.allclose(logits.grad, -p * (1 - p), atol=1e-6)


def test_images_are_float32_whatever_the_default(kernels):
    data, index = torch.full((3, 2, 2), 255, dtype=torch.uint8), torch.tensor([2, 0])
    torch.set_default_dtype(torch.float64)
    try:
        batch = protocol("grey").training_batch(data, stream(0, "x"), index)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch.dtype == torch.float32 and (batch == 1).all()
    short = protocol("grey").training_batch(data, stream(0, "x"), index.int())
    assert torch.equal(short, batch)


def test_only_plain_float32_layers_on_a_cpu_are_replaced(kernels):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4).double(), Own(4, 4), nn.Linear(4, 4))
    with accelerated(model):
        assert [m for m in model.modules() if "forward" in vars(m)] == [model[2]] == layers.accelerated_layers(model)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4, 1e30])
def test_pixels_are_exact_for_logits_of_any_size(kernels, scale):
    logits = (scale * torch.randn(3, 4, 1, 5, 27, generator=stream(0, "l"))).requires_grad_()
    x = torch.rand(4, 1, 5, 27, generator=stream(0, "x"))
    log_px = pixels.Bernoulli(logits).log_prob(x)
    log_px.square().sum().backward() if scale < 1e10 else log_px.sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = (x * exact - nn.functional.softplus(exact, threshold=50)).flatten(2).sum(-1)
    expected.square().sum().backward() if scale < 1e10 else expected.sum().backward()
    assert torch.allclose(log_px.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6 * float(exact.grad.abs().max()))


def test_images_of_many_pixels(kernels):
    """Products of up to 64 factors of at most 2 are taken together, 16 side by side: 5,000 pixels are more than one such set."""
    log_px = pixels.Bernoulli(torch.zeros(1, 1, 1, 50, 100)).log_prob(torch.ones(1, 1, 50, 100))
    assert log_px.item() == pytest.approx(-5000 * math.log(2), rel=1e-6)


def test_pixels_that_are_not_finite_say_so(kernels):
    for bad in (math.nan, math.inf):
        logits = torch.zeros(1, 2, 1, 4, 4)
        logits[0, 1, 0, 2, 2] = bad
        log_px = pixels.Bernoulli(logits).log_prob(torch.zeros(2, 1, 4, 4))
        assert log_px[0, 0].isfinite() and not log_px[0, 1].isfinite()


@pytest.mark.parametrize("nesterov", [False, True])
def test_adam_is_its_formula(kernels, nesterov):
    noise = stream(0, "adam")
    weights, gradient = torch.randn(1000, generator=noise), torch.empty(1000)
    w, m, v = weights.double(), torch.zeros(1000).double(), torch.zeros(1000).double()
    rate = torch.cat([torch.full((300,), 1e-2), torch.full((700,), 3e-2)]).double()
    adam = Adam(weights, gradient, 0.95, [(300, 1.0), (700, 3.0)], nesterov)
    for t in range(1, 9):
        gradient.copy_(torch.randn(1000, generator=noise))
        g = 0.5 * gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        ahead = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t) if nesterov else m / (1 - 0.9**t)
        w = w - rate * ahead / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        adam.step(1e-2, 0.5)
        assert not gradient.any()
        assert (weights - w).abs().max() < 1e-6
    assert adam.counts().tolist() == [8, 8]


def test_moments_that_have_decayed_are_zero(kernels):
    weights, gradient = torch.zeros(100), torch.zeros(100)
    adam = Adam(weights, gradient, 0.999, [(100, 1.0)], False)
    adam.mean.fill_(1e-39)
    adam.step(1e-3)
    assert not adam.mean.any() and not weights.any()


def test_the_norm_is_that_of_all_numbers_whatever_the_threads(kernels):
    x = torch.randn(100_001, generator=stream(0, "x"))
    sums = torch.empty(25, dtype=torch.float64)
    one, two = (kernels.squares(x.data_ptr(), sums.data_ptr(), len(x), 4096, threads) for threads in (1, 2))
    assert one == two == pytest.approx(x.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["grey", "dynamic"])
def test_a_batch_of_images_is_what_the_protocol_makes_of_it(name):
    data = torch.randint(0, 256, (300, 3, 5, 7), dtype=torch.uint8, generator=stream(0, "data"))
    data[:256] = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    index = torch.randperm(300, generator=stream(0, "index"))[:257]
    one, other = (protocol(name).training_batch(*given) for given in
                  ((data, stream(0, "bits"), index), (data[index], stream(0, "bits"))))  # fmt: skip
    assert torch.equal(one, other)


def test_a_black_pixel_is_never_lit(kernels):
    data, index = torch.zeros(1, 40, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    noise, out = torch.full((40,), -(2**15), dtype=torch.int16), torch.full((40,), math.nan)
    kernels.bits(data.data_ptr(), index.data_ptr(), noise.data_ptr(), out.data_ptr(), 1, 40, 1)
    assert not out.any()


RECIPES = {
    "grey": ("mnist", {}),
    "from the mean image": ("mnist-fast", {}),
    "waves, three samples": ("mnist-2d", {"k": 3, "beta": 0.5}),
    "odd widths": ("mnist-2d", {"hidden": (33, 65), "decoder": (17,)}),
    "seventeen dimensions": ("vae", {"latent_dim": 17}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_whole_pass_is_autograds(kernels, digits, name):
    """Value, rate, distortion and every gradient, with the same noise."""
    recipe_name, fields = RECIPES[name]
    chosen = recipe(recipe_name, digits.shape, **fields)
    objective, k = built(chosen.objective), chosen.training.k
    x = protocol(chosen.protocol).training_batch(torch.from_numpy(digits.train.pixels[:77]), stream(0, "x"))
    found = []
    for whole in (True, False):
        model = initial_model(chosen, digits).train()
        with accelerated(model):
            optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10, bfloat16=True)
            if whole:
                passes = fused(model, objective, x[0].numel(), 100, k)
                passes(x[:50], stream(0, "other"), 3)  # what a pass leaves behind must not matter
                passed = passes(x, stream(0, "noise"), 0)
                values = passed.loss, passed.rate, passed.distortion
                assert passed.gradient_norm == pytest.approx(optimiser.gradient.norm().item(), rel=1e-5)
            else:
                trace = model.trace(x, k=k, generator=stream(0, "noise"))
                loss = objective(trace, 0).loss
                loss.backward()
                values = loss.item(), trace.rate.sum().item(), trace.distortion.sum().item()
            found.append((values, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (values, gradients), (expected, others) = found
    assert values == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() < 3e-3 * others[name].norm(), name


UPDATES = {
    "adam": ("mnist", {}, {}),
    "nadam, rates of the layers": ("mnist-2d", {}, {"name": "nadam", "rates": "fan-in", "beta2": 0.98}),
    "averaged, from the mean image": ("mnist-fast", {}, {"average": 0.9}),
    "odd widths": ("mnist-2d", {"hidden": (33, 65), "decoder": (17,)}, {}),
    "a norm that is surely not clipped": ("mnist", {}, {"clip": 1e6}),
    "a norm that is clipped": ("mnist", {}, {"clip": 1e-2}),
}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_in_the_pass_is_the_one_after_it(kernels, digits, name):
    """The same bits; in the pass wherever the bound of the gradient's norm allows it."""
    recipe_name, fields, settings = UPDATES[name]
    chosen = recipe(recipe_name, digits.shape, **fields)
    objective, noise = built(chosen.objective), stream(0, "x")
    x = protocol(chosen.protocol).training_batch(torch.from_numpy(digits.train.pixels[:77]), noise)
    found = []
    for inside in (True, False):
        model = initial_model(chosen, digits).train()
        with accelerated(model):
            given = {"name": "adam", "lr": 1e-3, "schedule": lambda done: 1 - done / 2, "steps": 10, **settings}
            optimiser = Optimiser(model, **given, bfloat16=True)
            passes = fused(model, objective, x[0].numel(), 100, chosen.training.k, optimiser if inside else None)
            for step in range(4):
                passed = passes(x[: 77 - step], stream(0, "noise", step), step)
                assert passed.updated == (inside and settings.get("clip") != 1e-2)
                assert optimiser.step(step, False, passed.gradient_norm, passed.updated) == passed.gradient_norm
            found.append({key: value.clone() for key, value in optimiser.state().items()})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_pass_that_is_not_finite_updates_nothing(kernels, digits, bad):
    model = initial_model(recipe("mnist", digits.shape), digits)
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    passes = fused(model, ELBO(), 64, 8, 1, optimiser)
    x = torch.zeros(8, *digits.shape)
    assert passes(x, stream(0, "noise"), 0).updated
    before = optimiser.master.clone()
    x[3, 0, 2, 2] = bad
    passed = passes(x, stream(0, "noise"), 1)
    assert not passed.updated and not math.isfinite(passed.loss)
    optimiser.step(1, True, passed.gradient_norm, passed.updated)
    assert torch.equal(optimiser.master, before)


def test_a_value_that_overflows_beside_a_gradient_that_does_not_updates_nothing(kernels, digits):
    model = initial_model(recipe("mnist", digits.shape), digits)
    with torch.no_grad():
        model.likelihood.decoder.layers[-1].bias.fill_(3e38)
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    passed = fused(model, ELBO(), 64, 8, 1, optimiser)(torch.zeros(8, *digits.shape), stream(0, "noise"), 0)
    assert passed.loss == math.inf and math.isfinite(passed.gradient_norm) and not passed.updated


def test_weights_whose_gradient_may_overflow_are_updated_after_the_pass(kernels, digits):
    """A value that is finite, beside a gradient whose squares are not, or may not be."""
    model = initial_model(recipe("mnist", digits.shape), digits)
    with torch.no_grad():
        model.encoder.layers[0].weight.fill_(1e20)
        model.posterior.head.weight.zero_()
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    passed = fused(model, ELBO(), 64, 8, 1, optimiser)(torch.ones(8, *digits.shape), stream(0, "noise"), 0)
    assert math.isfinite(passed.loss) and not passed.updated


def test_training_in_whole_passes_has_the_same_bits_with_any_number_of_threads(digits, small, same_weights):
    chosen = small(precision="bfloat16", epochs=1)
    models = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        models.append(initial_model(chosen))
        fit(models[-1], built(chosen.objective), digits, protocol(chosen.protocol), chosen.training)
        assert torch.get_num_threads() == threads
    assert same_weights(models[0], models[1]) and same_weights(models[0], models[2])


@pytest.mark.parametrize("size", [0.0, 1.0, 100.0, 1e5])
def test_silu_of_any_size(kernels, size):
    """A whole pass through activations around +-size is what autograd makes of it."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.SiLU())
    decoder = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 64), nn.Unflatten(-1, (1, 8, 8)))
    with torch.no_grad():
        encoder[1].bias.copy_(torch.linspace(-size, size, 32))
        decoder[2].weight.mul_(1 / max(1.0, size))
    model = made(encoder=encoder, likelihood=GreyCrossEntropy(decoder))
    model.posterior.head.weight.data.mul_(1 / max(1.0, size))
    optimiser, x = (
        Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10),
        torch.rand(8, 1, 8, 8, generator=stream(0, "x")),
    )
    passed = fused(model, ELBO(), 64, 8, 1)(x, stream(0, "noise"), 0)
    found = optimiser.gradient.clone()
    optimiser.gradient.zero_()
    loss = ELBO()(model.trace(x, generator=stream(0, "noise")), 0).loss
    loss.backward()
    assert passed.loss == pytest.approx(loss.item(), rel=1e-2)
    assert (found - optimiser.gradient).norm() < 2e-2 * optimiser.gradient.norm()


def test_schedules_reach_a_whole_pass(kernels, digits):
    model = initial_model(recipe("mnist-2d", digits.shape), digits)
    Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    passes = fused(model, ELBO(beta=Linear(0, 1, 10)), 64, 8, 1)
    x = torch.zeros(8, *digits.shape)
    first, last = (passes(x, stream(0, "noise"), step) for step in (0, 10))
    assert first.loss == pytest.approx(first.distortion / 8) and last.loss == pytest.approx(
        (last.rate + last.distortion) / 8
    )


def made(**parts):
    dense = {
        "encoder": MLP((1, 8, 8), [], [32], out_activation=True), "posterior": Gaussian(32, 2), "prior": StandardNormal(2),
        "likelihood": GreyCrossEntropy(MLP([2], [32], (1, 8, 8))),
    }  # fmt: skip
    return VAE(**{**dense, **parts})


def decoder_of(*first):
    return nn.Sequential(*first, nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(-1, (1, 8, 8)))


CHAINS = {
    "an activation of the code": lambda: {"likelihood": GreyCrossEntropy(decoder_of(nn.SiLU()))},
    "a centred code": lambda: {"likelihood": GreyCrossEntropy(Centred(decoder_of(), [2]))},
    "a shifted code": lambda: {"likelihood": GreyCrossEntropy(decoder_of(AroundMean(nn.Identity(), [2])))},
    "waves in the middle of both": lambda: {
        "encoder": nn.Sequential(nn.Flatten(), nn.Linear(64, 2), FourierMLP((2,), [30], (32,), scale=1.0), nn.SiLU()),
        "likelihood": GreyCrossEntropy(nn.Sequential(nn.Linear(2, 2), FourierMLP((2,), [30], (1, 8, 8), scale=1.0))),
    },
}


@pytest.mark.parametrize("name", CHAINS)
def test_unusual_chains_are_autograds(kernels, name):
    """Their gradients; and they are not updated in the pass where the gradient is to be clipped."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(**CHAINS[name]())
    x = torch.rand(8, 1, 8, 8, generator=stream(0, "x"))
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    passed = fused(model, ELBO(), 64, 8, 1)(x, stream(0, "noise"), 0)
    found = optimiser.gradient.clone()
    optimiser.gradient.zero_()
    loss = ELBO()(model.trace(x, generator=stream(0, "noise")), 0).loss
    loss.backward()
    assert passed.loss == pytest.approx(loss.item(), rel=1e-3)
    assert (found - optimiser.gradient).norm() < 2e-2 * optimiser.gradient.norm()
    for share in (0.5, 0.99):
        optimiser.clip = share * passed.gradient_norm
        assert not fused(model, ELBO(), 64, 8, 1, optimiser)(x, stream(0, "noise"), 0).updated


def test_a_gradient_that_waves_make_large_is_clipped(kernels):
    """Nearly all of it lies before them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        waves = FourierMLP((2,), [30], (1, 8, 8), scale=3000.0)
        model = made(likelihood=GreyCrossEntropy(nn.Sequential(nn.Linear(2, 2), waves)))
        model.likelihood.decoder[0].weight.data.mul_(1e-4)
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10, clip=1.0)
    passes = fused(model, ELBO(), 64, 8, 1, optimiser)
    optimiser.clip = passes(torch.rand(8, 1, 8, 8, generator=stream(0, "x")), stream(0, "noise"), 0).gradient_norm / 5
    assert not passes(torch.rand(8, 1, 8, 8, generator=stream(0, "x")), stream(0, "noise"), 0).updated


def test_a_users_own_chain_is_a_whole_pass_too():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.SiLU())
    decoder = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(-1, (1, 8, 8)))
    model = made(encoder=encoder, likelihood=GreyCrossEntropy(decoder))
    Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    assert fused(model, ELBO(), 64, 8, 1) is not None


def test_what_is_no_known_chain_goes_through_autograd():
    shared = nn.Linear(64, 64)

    class Own(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :32]

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = made()
    hooked.encoder.register_forward_hook(lambda *a: None)
    unused = made()
    unused.extra = nn.Parameter(torch.zeros(3))
    cases = {
        "a module of one's own": made(encoder=Own()),
        "a subclass": made(encoder=nn.Sequential(nn.Flatten(), Doubled(64, 32))),
        "another activation": made(encoder=MLP((1, 8, 8), [], [32], "gelu", out_activation=True)),
        "dropout": made(encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout())),
        "weights used twice": made(encoder=nn.Sequential(nn.Flatten(), shared, shared, nn.Linear(64, 32))),
        "weights that are not used": unused,
        "another posterior": made(posterior=Laplace(32, 2)),
        "a hook": hooked,
        "logits above zero": made(likelihood=GreyCrossEntropy(nn.Sequential(MLP([2], [32], (1, 8, 8)), nn.ReLU()))),
        "an activation after another": made(
            encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.SiLU())
        ),
        "a decoder of two channels": made(likelihood=GreyCrossEntropy(MLP([2], [32], (2, 8, 8)))),
    }
    for name, model in cases.items():
        Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
        assert fused(model, ELBO(), 64, 8, 1) is None, name
    model = made()
    assert fused(model, ELBO(), 64, 8, 1) is None  # no optimiser, no place for gradients
    Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    assert fused(model, FreeBits(0.1), 64, 8, 1) is None
    assert fused(model, ELBO(), 64, 8, 1) is not None


def test_training_with_and_without_the_kernels_gives_the_same_curve(digits, small, no_kernels):
    """In bfloat16, on the digits: within a hundredth of a nat after two epochs."""
    chosen = small(precision="bfloat16", lr=1e-3)
    curves = []
    for own in (True, False):
        if not own:
            no_kernels()
        records = fit(
            initial_model(chosen), built(chosen.objective), digits, protocol(chosen.protocol), chosen.training
        )
        curves.append([record[part]["distortion"] for record in records for part in ("train", "test")])
    assert curves[0] == pytest.approx(curves[1], abs=1e-2)
    assert curves[0] != curves[1]


def test_no_compiler_no_kernels_but_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for found in (build._found, build.load):
        monkeypatch.setattr(build, found.__name__, found.__wrapped__)
    assert build.library() is None
    assert build.reason() == "torch's kernels (there is no C compiler (cc, gcc, clang))"


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc"])
def test_a_compiler_that_fails_is_no_kernels(monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    for found in (build._found, build.load):
        monkeypatch.setattr(build, found.__name__, found.__wrapped__)
    assert build.library() is None
    assert "C compiler" in build.reason()


def test_the_cache_is_used_and_a_damaged_file_in_it_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    load = build.load.__wrapped__
    assert isinstance(load(False), ctypes.CDLL)
    (kept,) = (tmp_path / "native").iterdir()
    written = kept.stat().st_mtime_ns
    load(False)
    assert kept.stat().st_mtime_ns == written
    kept.unlink()  # written over, it would change under who has it loaded
    kept.write_bytes(b"no library")
    assert isinstance(load(False), ctypes.CDLL)


def test_processes_that_begin_together_compile_once(tmp_path):
    """The second waits for the first. Each says when it found the library's file, and which."""
    code = (
        "from vaelab.native import build; from vaelab.data.store import cache_dir; build.load(False);"
        "(kept,) = (cache_dir() / 'native').iterdir(); print(kept.stat().st_ino)"
    )
    environment = {**os.environ, "VAELAB_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    one, other = (process.communicate()[0] for process in both)
    assert one and one == other


def test_what_is_compiled_is_used_again_whatever_the_umask(monkeypatch, tmp_path):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    before = os.umask(0o002)
    try:
        build.load.__wrapped__(False)
        monkeypatch.setenv("CC", "false")
        assert isinstance(build.load.__wrapped__(False), ctypes.CDLL)
    finally:
        os.umask(before)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_code_that_others_may_have_written_is_not_run(monkeypatch, tmp_path, what):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    load, opened = build.load.__wrapped__, build._open
    load(False)
    (kept,) = (tmp_path / "native").iterdir()
    (kept if what == "file" else kept.parent).chmod(0o777)
    theirs, seen = kept.stat().st_ino, []
    monkeypatch.setattr(build, "_open", lambda path: seen.append(path.stat().st_ino) or opened(path))
    assert isinstance(load(False), ctypes.CDLL)
    assert len(seen) == 1 and theirs not in seen


def test_asking_for_torchs(monkeypatch):
    monkeypatch.setenv("VAELAB_KERNELS", "torch")
    monkeypatch.setattr(build, "_found", build._found.__wrapped__)
    assert build.library() is None and "VAELAB_KERNELS" in build.reason()


@pytest.mark.parametrize("asked", ["", "auto"])
def test_asking_for_nothing_in_particular(monkeypatch, asked):
    monkeypatch.setenv("VAELAB_KERNELS", asked)
    monkeypatch.setattr(build, "_found", build._found.__wrapped__)
    assert build.library() is not None
