"""Whole passes in native code (`native/step.py`) against autograd, and the updates that they make."""

import copy
import math

import pytest
import torch
from torch import nn

from vaelab.data.protocol import protocol
from vaelab.likelihoods import GreyCrossEntropy
from vaelab.models.vae import VAE
from vaelab.native import library, reason
from vaelab.native.layers import accelerated
from vaelab.native.step import fused
from vaelab.nn.conv import ConvDecoder, ConvEncoder, Double
from vaelab.nn.mean import AroundMean, Centred
from vaelab.nn.mlp import MLP, FourierMLP
from vaelab.objectives import ELBO, FreeBits
from vaelab.optim import Optimiser
from vaelab.posteriors import Gaussian, Laplace
from vaelab.priors import StandardNormal
from vaelab.recipes import recipe
from vaelab.registry import build as built
from vaelab.rng import stream
from vaelab.schedules import Linear
from vaelab.training import fit, initial_model

GREY = protocol("grey")


def noise(step):
    return stream(0, "noise", step)


EIGHT = torch.arange(8)


def eight(shape=(1, 8, 8)):
    """Images that are made up."""
    return torch.randint(0, 256, (8, *shape), dtype=torch.uint8, generator=stream(0, "x"))


def passes_of(model, optimiser=None, images=None, k=1, objective=None):
    images = eight() if images is None else images
    return fused(model, objective or ELBO(), images, GREY, len(images), k, optimiser)


def one(passes, step=0):
    (passed,) = passes(EIGHT, noise, step)
    return passed


pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {reason()}")


RECIPES = {
    "grey": ("mnist", {}),
    "from the mean image": ("mnist-fast", {}),
    "waves, three samples": ("mnist-2d", {"k": 3, "beta": 0.5}),
    "odd widths": ("mnist-2d", {"hidden": (33, 65), "decoder": (17,)}),
    "seventeen dimensions": ("vae", {"latent_dim": 17}),
    "convolutions": ("vae", {"network": "conv"}),
    "three convolutions, three samples": ("vae", {"network": "conv", "channels": (5, 33, 17), "k": 3}),
    "convolutions and ReLU": ("vae", {"network": "conv", "channels": (16,), "activation": "relu"}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_whole_pass_is_autograds(kernels, digits, name):
    """Value, rate, distortion and every gradient, with the same noise."""
    recipe_name, fields = RECIPES[name]
    chosen = recipe(recipe_name, digits.shape, **fields)
    objective, k, shown = built(chosen.objective), chosen.training.k, protocol(chosen.protocol)
    images, index = torch.from_numpy(digits.train.pixels), torch.arange(1000, 1077)
    found = []
    for whole in (True, False):
        model = initial_model(chosen, digits).train()
        with accelerated(model):
            optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10, bfloat16=True)
            if whole:
                passes = fused(model, objective, images, shown, 100, k)
                passes(index[:50], noise, 3)  # what a pass leaves behind must not matter
                (passed,) = passes(index, noise, 0)
                values = passed.loss, passed.rate, passed.distortion
                assert passed.gradient_norm == pytest.approx(optimiser.gradient.norm().item(), rel=1e-5)
            else:
                drawn = noise(0)
                trace = model.trace(shown.training_batch(images, drawn, index), k=k, generator=drawn)
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
    "convolutions": ("vae", {"network": "conv", "channels": (5, 33)}, {}),
    "a norm that is surely not clipped": ("mnist", {}, {"clip": 1e6}),
    "a norm that is clipped": ("mnist", {}, {"clip": 1e-2}),
    "one that is sometimes, nadam": ("mnist-2d", {}, {"name": "nadam", "rates": "fan-in", "clip": 0.7}),
    "one of convolutions": ("vae", {"network": "conv", "channels": (5, 33)}, {"clip": 0.1}),
    "one of odd widths": ("mnist-2d", {"hidden": (33, 65), "decoder": (17,)}, {"clip": 0.1}),
    "one that may be, and is not": ("mnist", {}, {"clip": 16.0}),
}
AFTER = 1
"""What `told` says of an update that was not made in passing."""


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_in_the_pass_is_the_one_after_it(kernels, digits, name):
    """The same bits; in passing wherever the bound of the gradient's norm allows it, else once it is known."""
    recipe_name, fields, settings = UPDATES[name]
    chosen = recipe(recipe_name, digits.shape, **fields)
    objective, images = built(chosen.objective), torch.from_numpy(digits.train.pixels)
    shown, found, norms, where = protocol(chosen.protocol), [], [], list[int]()
    for inside in (True, False):
        model = initial_model(chosen, digits).train()
        with accelerated(model):
            given = {"name": "adam", "lr": 1e-3, "schedule": lambda done: 1 - done / 2, "steps": 10, **settings}
            optimiser = Optimiser(model, **given, bfloat16=True)
            passes = fused(model, objective, images, shown, 100, chosen.training.k, optimiser if inside else None)
            for step in range(4):
                (passed,) = passes(torch.arange(step, 77), noise, step)
                assert passed.updated == inside
                norms.append(passed.gradient_norm)
                where.append(int(passes.told[0, 3]))
                assert optimiser.step(step, False, passed.gradient_norm, passed.updated) == passed.gradient_norm
            found.append({key: value.clone() for key, value in optimiser.state().items()})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    clip = settings.get("clip", math.inf)
    assert {norm > clip for norm in norms} == ({True, False} if "sometimes" in name else {clip < 10})
    assert where[:4] == 4 * [2 if clip > 100 else AFTER] and where[4:] == 4 * [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_pass_that_is_not_finite_updates_nothing(kernels, digits, bad):
    model = initial_model(recipe("mnist", digits.shape), digits)
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    passes = passes_of(model, optimiser)
    assert one(passes).updated
    with torch.no_grad():
        model.posterior.head.weight[3, 2] = bad
    before = optimiser.master.clone()
    passed = one(passes, 1)
    assert not passed.updated and not math.isfinite(passed.loss)
    optimiser.step(1, True, passed.gradient_norm, passed.updated)
    assert torch.equal(optimiser.master.nan_to_num(), before.nan_to_num())


def test_a_value_that_overflows_beside_a_gradient_that_does_not_updates_nothing(kernels, digits):
    model = initial_model(recipe("mnist", digits.shape), digits)
    with torch.no_grad():
        model.likelihood.decoder.layers[-1].bias.fill_(3e38)
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    passed = one(passes_of(model, optimiser, torch.zeros_like(eight())))
    assert passed.loss == math.inf and math.isfinite(passed.gradient_norm) and not passed.updated


def test_weights_whose_gradient_may_overflow_are_updated_after_the_pass(kernels, digits):
    """A value that is finite, beside a gradient whose squares are not, or may not be."""
    model = initial_model(recipe("mnist", digits.shape), digits)
    with torch.no_grad():
        model.encoder.layers[0].weight.fill_(1e20)
        model.posterior.head.weight.zero_()
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    before = optimiser.master.clone()
    passes = passes_of(model, optimiser, torch.full_like(eight(), 255))
    passed = one(passes)
    assert math.isfinite(passed.loss) and passes.told[0, 3] != 2
    assert passed.updated == math.isfinite(passed.gradient_norm) != torch.equal(optimiser.master, before)


@pytest.mark.parametrize("network", ["dense", "conv"])
def test_training_in_whole_passes_has_the_same_bits_with_any_number_of_threads(digits, same_weights, network):
    fields = {"channels": (5, 32)} if network == "conv" else {"hidden": (24,)}
    chosen = recipe("vae", digits.shape, data="digits", network=network, precision="bfloat16", epochs=1, **fields)
    model = initial_model(chosen)
    Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    assert passes_of(model, objective=built(chosen.objective)) is not None
    models = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        models.append(initial_model(chosen))
        fit(models[-1], built(chosen.objective), digits, protocol(chosen.protocol), chosen.training)
        assert torch.get_num_threads() == threads
    assert same_weights(models[0], models[1]) and same_weights(models[0], models[2])


def way(passes):
    """How the weights were updated after one pass: 0 not at all, 2 in passing."""
    one(passes)
    return int(passes.told[0, 3])


def against_autograd(model, rel, shape=(1, 8, 8), k=1):
    """Of eight images: the value, and all of the gradient. Returns the pass, the optimiser and the images."""
    optimiser, images = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10), eight(shape)
    passed = one(passes_of(model, images=images, k=k))
    found = optimiser.gradient.clone()
    optimiser.gradient.zero_()
    loss = ELBO()(model.trace(images / 255, k=k, generator=noise(0)), 0).loss
    loss.backward()
    assert passed.loss == pytest.approx(loss.item(), rel=rel)
    assert (found - optimiser.gradient).norm() < 2e-2 * optimiser.gradient.norm()
    return passed, optimiser, images


CONVOLUTIONS = {  # the encoder's layers, whose 7 x 11 images have an odd side at each stage of the decoder
    "of one channel": [nn.Conv2d(1, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()],
    "without biases": [nn.Conv2d(1, 33, 3, bias=False), nn.Conv2d(33, 5, (2, 3), (1, 3), bias=False), nn.SiLU()],
    "transposed": [nn.Conv2d(1, 16, 3, 2), nn.SiLU(), nn.ConvTranspose2d(16, 2, 4, 3, (1, 2), (1, 0)), nn.SiLU()],
    "that nothing is learnt of": [nn.Conv2d(1, 32, 3, 2, 1).requires_grad_(False), nn.SiLU(), nn.Conv2d(32, 3, 1)],
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_ones_own_are_autograds(kernels, name):
    """And, in the decoder, transposed convolutions whose last rows and columns are cut off."""
    shape = (1, 7, 11)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(*copy.deepcopy(CONVOLUTIONS[name]), nn.Flatten())
        features = layers(torch.zeros(1, *shape)).numel()
        model = made(
            encoder=layers,
            posterior=Gaussian(features, 2),
            likelihood=GreyCrossEntropy(ConvDecoder((2,), (32, 5), shape)),
        )
    passed, optimiser, images = against_autograd(model, 1e-3, shape, k=3)
    optimiser.clip = 0.99 * passed.gradient_norm
    assert way(passes_of(model, optimiser, images, k=3)) == AFTER


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_gradient_that_is_as_large_as_it_can_be_is_clipped(kernels, part):
    """A transposed convolution of equal numbers, whose gradients are equal too: its bound is met, but for the border."""
    model = made(likelihood=GreyCrossEntropy(ConvDecoder((2,), (1,), (1, 8, 8))))
    first, last = model.likelihood.decoder.first, model.likelihood.decoder.layers[-1].convolution
    model.requires_grad_(False)
    with torch.no_grad():
        for tensor in (first.weight, last.weight, last.bias):
            tensor.zero_()
        first.bias.fill_(3.0 if part == "weight" else 0.0)
    getattr(last, part).requires_grad_()
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10, clip=1.0)
    before = optimiser.master.clone()
    passes = passes_of(model, optimiser, torch.zeros_like(eight()))
    norm = one(passes).gradient_norm
    for share, expected in ((0.99, AFTER), (1.5, 2)):
        optimiser.master.copy_(before)
        optimiser.clip = share * norm
        assert way(passes) == expected


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
    against_autograd(model, 1e-2)


def test_schedules_reach_a_whole_pass(kernels, digits):
    model = initial_model(recipe("mnist-2d", digits.shape), digits)
    Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    passes = passes_of(model, objective=ELBO(beta=Linear(0, 1, 10)))
    first, last = (one(passes, step) for step in (0, 10))
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
    "a centred code": lambda: {"likelihood": GreyCrossEntropy(Centred(decoder_of(), [2]))},
    "a shifted code": lambda: {"likelihood": GreyCrossEntropy(decoder_of(AroundMean(nn.Identity(), [2])))},
    "waves in the middle of both": lambda: {
        "encoder": nn.Sequential(nn.Flatten(), nn.Linear(64, 2), FourierMLP((2,), [30], (32,), scale=1.0), nn.SiLU()),
        "likelihood": GreyCrossEntropy(nn.Sequential(nn.Linear(2, 2), FourierMLP((2,), [30], (1, 8, 8), scale=1.0))),
    },
}


@pytest.mark.parametrize("name", CHAINS)
def test_unusual_chains_are_autograds(kernels, name):
    """Their gradients; and they are not updated in passing where the gradient is to be clipped."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(**CHAINS[name]())
    passed, optimiser, images = against_autograd(model, 1e-3)
    for share in (0.5, 0.99):
        held = optimiser.master.clone()
        optimiser.clip = share * passed.gradient_norm
        assert way(passes_of(model, optimiser, images)) == AFTER
        optimiser.master.copy_(held)


def test_a_gradient_that_waves_make_large_is_clipped(kernels):
    """Nearly all of it lies before them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        waves = FourierMLP((2,), [30], (1, 8, 8), scale=3000.0)
        model = made(likelihood=GreyCrossEntropy(nn.Sequential(nn.Linear(2, 2), waves)))
        model.likelihood.decoder[0].weight.data.mul_(1e-4)
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10, clip=1.0)
    passes = passes_of(model, optimiser)
    before = optimiser.master.clone()
    optimiser.clip = one(passes).gradient_norm / 5
    optimiser.master.copy_(before)
    assert way(passes) == AFTER


def test_a_users_own_chain_is_a_whole_pass_too():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.SiLU())
    decoder = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(-1, (1, 8, 8)))
    model = made(encoder=encoder, likelihood=GreyCrossEntropy(decoder))
    Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    assert passes_of(model) is not None


def test_what_is_no_known_chain_goes_through_autograd():
    shared = nn.Linear(64, 64)

    class Own(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :32]

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Scaled(nn.ConvTranspose2d):
        def forward(self, x):
            return 2 * super().forward(x)

    cropped, scaled, doubled = (ConvDecoder((2,), (8, 4), (1, 8, 8)) for _ in range(3))
    scaled.layers[-1].convolution = Scaled(4, 1, 4, 2, 1)
    doubled.layers[-1].convolution = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 1, 4, 2, 1))
    pruned = nn.Conv2d(1, 8, 3, 2, 1)
    pruned.weight, pruned.bias = (nn.Parameter(p.detach()[:2]) for p in (pruned.weight, pruned.bias))
    own_forward = nn.Sequential(nn.Flatten(), nn.Linear(64, 32))
    own_forward.forward = lambda x: 3 * nn.Sequential.forward(own_forward, x)
    cropped.layers[1].rows = 5
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
        "an activation of the code": made(likelihood=GreyCrossEntropy(decoder_of(nn.SiLU()))),
        "a residual network": made(encoder=ConvEncoder((1, 8, 8), (4,), 32, residual=True)),
        "holes in a kernel": made(encoder=nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2), nn.Flatten())),
        "a torus": made(encoder=nn.Sequential(nn.Conv2d(1, 2, 5, padding_mode="circular"), nn.Flatten())),
        "a transposed convolution of another class": made(likelihood=GreyCrossEntropy(scaled)),
        "two layers in place of one": made(likelihood=GreyCrossEntropy(doubled)),
        "a doubling where there are samples": made(
            likelihood=GreyCrossEntropy(
                nn.Sequential(nn.Linear(2, 16), nn.Unflatten(-1, (1, 4, 4)), Double(1, 1, 8, 8))
            )
        ),
        "fewer weights than a layer says": made(encoder=nn.Sequential(pruned, nn.Flatten())),
        "a forward of its own": made(encoder=own_forward),
        "one constant for all pixels": made(encoder=Centred(MLP((1, 8, 8), [], [32]), (1,))),
        "features that the head does not read": made(posterior=Gaussian(100, 2)),
        "more pixels than there are": made(encoder=nn.Sequential(nn.Flatten(), nn.Linear(100, 32))),
        "fewer": made(encoder=nn.Sequential(nn.Flatten(), nn.Linear(4, 32))),
        "a network of larger images": made(encoder=MLP((1, 28, 28), [], [32])),
        "a network of rows": made(encoder=MLP((64,), [], [32])),
        "a network of images, of rows": made(encoder=nn.Sequential(nn.Flatten(), ConvEncoder((1, 8, 8), (4,), 32))),
        "codes of five dimensions": made(likelihood=GreyCrossEntropy(MLP([5], [32], (1, 8, 8)))),
        "rows for an image": made(likelihood=GreyCrossEntropy(nn.Linear(2, 64))),
        "an image of other numbers": made(
            likelihood=GreyCrossEntropy(nn.Sequential(nn.Linear(2, 64), nn.Unflatten(-1, (1, 4, 4))))
        ),
        "more rows to keep than there are": made(likelihood=GreyCrossEntropy(cropped)),
        "steps of 17": made(encoder=nn.Sequential(nn.Conv2d(1, 32, 8, 17), nn.Flatten())),
        "images where there are samples of them, which torch refuses": made(
            likelihood=GreyCrossEntropy(
                nn.Sequential(nn.Linear(2, 64), nn.Unflatten(-1, (1, 8, 8)), nn.Conv2d(1, 1, 1))
            )
        ),
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
        assert passes_of(model) is None, name
    model = made()
    assert passes_of(model) is None  # no optimiser, no place for gradients
    Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    assert passes_of(model, objective=FreeBits(0.1)) is None
    assert passes_of(model) is not None


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
