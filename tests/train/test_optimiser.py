"""The flat optimiser against torch's own, and what its copies, clipping and averages do."""

import copy

import pytest
import torch
from torch import nn

from vaelab.data.protocol import protocol
from vaelab.likelihoods import GreyCrossEntropy
from vaelab.models.vae import VAE
from vaelab.nn.mlp import ExactLinear
from vaelab.objectives import ELBO
from vaelab.optim import Optimiser
from vaelab.posteriors import Gaussian
from vaelab.priors import StandardNormal
from vaelab.rng import stream
from vaelab.training import initial_model


def constant(done):
    return 1.0


class Flat(nn.Module):
    """Codes as images of 9 channels, (K, B, 9, 2, 2), to logits (K, B, 1, 8, 8) by one transposed convolution."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(9, 1, 4, stride=4)

    def forward(self, h):
        return self.up(h.flatten(0, 1)).unflatten(0, h.shape[:2])


@pytest.fixture
def model(small):
    return initial_model(small(hidden=(32, 32), decoder=(32, 32)))


@pytest.fixture
def backward(digits):
    """Gradients of the ELBO of 64 images, with the noise of a step."""
    x = protocol("threshold").test_set(digits.train.pixels[:64])

    def run(model, step, bfloat16=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            trace = model.trace(x, generator=stream(0, "noise", step))
        loss = ELBO()(trace, step).loss
        loss.backward()
        return loss.item()

    return run


def weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def in_step(model, ours, reference, theirs, backward, steps):
    """Both models are trained, each by its optimiser, and hold the same weights after every step."""
    for step in range(steps):
        backward(model, step)
        backward(reference, step)
        theirs.step()
        theirs.zero_grad()
        ours.step(step)
        assert (weights(model) - weights(reference)).abs().max() < 1e-6


def test_flat_adam_is_torchs_adam_step_by_step(model, backward):
    reference = copy.deepcopy(model)
    ours = Optimiser(model, "adam", 1e-3, constant, 10)
    theirs = torch.optim.Adam(reference.parameters(), 1e-3)
    in_step(model, ours, reference, theirs, backward, 10)
    ours.finish()
    assert (weights(model) - weights(reference)).abs().max() < 1e-6


def test_each_layer_moves_at_its_own_multiple(backward):
    """`fan-in` is torch's Adam with a group of parameters for each layer's weights, and one for all biases."""
    model = VAE(
        nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Flatten(), nn.Linear(27, 16)), Gaussian(16, 2), StandardNormal(2),
        GreyCrossEntropy(nn.Sequential(ExactLinear(2, 36), nn.Unflatten(-1, (9, 2, 2)), Flat())),
    )  # fmt: skip
    reference = copy.deepcopy(model)
    inputs = {nn.Conv2d: 9, nn.Linear: None, ExactLinear: None, nn.ConvTranspose2d: 9 * 16}
    groups = []
    for layer in reference.modules():
        if type(layer) in inputs:
            fan_in = inputs[type(layer)] or layer.in_features
            groups.append({"params": [layer.weight], "lr": 1e-3 * (400 / fan_in) ** 0.5})
            groups.append({"params": [layer.bias], "lr": 8e-3})
    assert sum(len(group["params"]) for group in groups) == len(list(reference.parameters())) == 10
    ours = Optimiser(model, "adam", 1e-3, constant, 6, beta2=0.9, rates="fan-in")
    theirs = torch.optim.Adam(groups, betas=(0.9, 0.9))
    in_step(model, ours, reference, theirs, backward, 6)


def test_nadam_is_its_formula_step_by_step(model, backward):
    reference = copy.deepcopy(model)
    ours = Optimiser(model, "nadam", 1e-3, constant, 8, beta2=0.98)
    mean = square = torch.zeros_like(weights(model)).double()
    expected = weights(model).double()
    for t in range(1, 9):
        backward(model, t)
        torch.nn.utils.vector_to_parameters(expected.float(), reference.parameters())
        backward(reference, t)
        gradient = torch.cat([p.grad.flatten() for p in reference.parameters()]).double()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.98 * square + 0.02 * gradient**2
        ahead = 0.9 * mean / (1 - 0.9 ** (t + 1)) + 0.1 * gradient / (1 - 0.9**t)
        expected = expected - 1e-3 * ahead / ((square / (1 - 0.98**t)).sqrt() + 1e-8)
        reference.zero_grad()
        ours.step(t)
        assert (weights(model) - expected).abs().max() < 2e-6


def test_the_schedule_scales_the_learning_rate(model, backward):
    """Adam's first step moves every weight that has a gradient by lr x schedule."""
    before = weights(model)
    optimiser = Optimiser(model, "adam", 1e-2, lambda done: 0.25, 10)
    backward(model, 0)
    optimiser.step(0)
    assert (weights(model) - before).abs().max().item() == pytest.approx(0.25e-2, rel=1e-3)


def test_the_schedule_is_given_the_fraction_of_training_done(model, backward):
    asked = []
    optimiser = Optimiser(model, "adam", 1e-3, lambda done: asked.append(done) or 1.0, 4)
    for step in range(4):
        backward(model, step)
        optimiser.step(step)
    assert asked == [0, 0.25, 0.5, 0.75]


def linears(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    exact = [m for m in layers if isinstance(m, ExactLinear)]
    return exact, [m for m in layers if m not in exact]


def test_bfloat16_copies_beside_float32_masters(model, backward):
    exact, plain = linears(model)
    assert exact and plain
    optimiser = Optimiser(model, "adam", 1e-3, constant, 10, bfloat16=True)
    for step in range(3):
        assert all(m.weight.dtype == torch.bfloat16 for m in plain)
        assert all(p.dtype == torch.float32 for m in exact for p in m.parameters())
        assert optimiser.master.dtype == optimiser.gradient.dtype == torch.float32
        with optimiser.evaluated():
            assert all(p.dtype == torch.float32 for p in model.parameters())
        backward(model, step, bfloat16=True)
        optimiser.step(step)
    for parameter, master, _ in optimiser.copies:
        assert torch.equal(parameter, master.bfloat16())
    master = optimiser.master.clone()
    optimiser.finish()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    held = torch.cat([p.detach().flatten() for p in optimiser.parameters])
    assert torch.equal(held, master)


def test_updates_too_small_for_bfloat16_are_not_lost(model, backward):
    """bfloat16 has 8 bits: a step of 1e-6 on a weight of 0.1 vanishes in the copy, and must add up in the master."""
    before = weights(model)
    optimiser = Optimiser(model, "adam", 1e-6, constant, 20, bfloat16=True)
    for _ in range(20):
        backward(model, 0, bfloat16=True)
        optimiser.step(0)
    optimiser.finish()
    moved = (weights(model) - before).abs()
    assert 1e-5 < moved.max() < 3e-5


def test_the_bfloat16_gradient_reaches_the_masters(model, backward):
    """Every weight that has a float32 gradient is moved in bfloat16 training too."""
    reference = copy.deepcopy(model)
    backward(reference, 0)
    optimiser = Optimiser(model, "adam", 1e-3, constant, 10, bfloat16=True)
    order = [p for p in model.parameters() if p.requires_grad]
    before = weights(model)
    backward(model, 0, bfloat16=True)
    norm = optimiser.step(0)
    optimiser.finish()
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()
    assert norm == pytest.approx(expected, rel=0.02)
    parts = (weights(model) - before).split([p.numel() for p in order])
    assert all(part.abs().max() > 5e-4 for part in parts)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_clipping_limits_the_norm_and_keeps_the_direction(model, backward, bfloat16):
    """After one step Adam's first moment is 0.1 of the gradient it was given."""
    moments, norms = [], []
    for clip in (0.0, 0.5):
        one = copy.deepcopy(model)
        optimiser = Optimiser(one, "adam", 1e-3, constant, 10, clip=clip, bfloat16=bfloat16)
        backward(one, 0, bfloat16)
        norms.append(optimiser.step(0))
        moments.append(optimiser.adam.mean)
    assert norms[0] == norms[1] > 0.5
    assert moments[0].norm().item() == pytest.approx(0.1 * norms[0], rel=1e-4)
    assert moments[1].norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert torch.cosine_similarity(*moments, dim=0).item() == pytest.approx(1, abs=1e-5)


def test_a_gradient_below_the_limit_is_not_scaled(model, backward):
    optimiser = Optimiser(model, "adam", 1e-3, constant, 10, clip=1e6)
    backward(model, 0)
    norm = optimiser.step(0)
    moment = optimiser.adam.mean
    assert moment.norm().item() == pytest.approx(0.1 * norm, rel=1e-4)


def test_averaged_weights_are_the_moving_average(model, backward):
    """Few steps: the decay grows over the first three, and then stays at 0.3."""
    optimiser = Optimiser(model, "adam", 1e-2, constant, 6, average=0.3)
    expected = optimiser.master.double().clone()
    for step in range(6):
        backward(model, step)
        optimiser.step(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * optimiser.master.double()
    last = weights(model)
    with optimiser.evaluated():
        inside = torch.cat([p.detach().flatten() for p in optimiser.parameters]).double()
        assert (inside - expected).abs().max() < 1e-6
    assert torch.equal(weights(model), last)
    assert (weights(model) - weights(model).mean()).abs().max() > 0
    optimiser.finish()
    held = torch.cat([p.detach().flatten() for p in optimiser.parameters]).double()
    assert (held - expected).abs().max() < 1e-6
    assert not torch.equal(weights(model), last)


def test_without_averaging_the_last_weights_are_kept(model, backward):
    optimiser = Optimiser(model, "adam", 1e-2, constant, 3)
    for step in range(3):
        backward(model, step)
        optimiser.step(step)
    last = weights(model)
    optimiser.finish()
    assert torch.equal(weights(model), last)


def test_finish_gives_the_model_storage_of_its_own(model, backward):
    optimiser = Optimiser(model, "adam", 1e-2, constant, 3)
    optimiser.finish()
    before = weights(model)
    optimiser.master.zero_()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_muon_sets_singular_values_equal_where_adam_does_not(model, backward, bfloat16):
    spread = {}
    for name in ("adam", "muon"):
        one = copy.deepcopy(model)
        hidden = next(m for m in one.modules() if type(m) is nn.Linear and m.weight.shape == (32, 32))
        before = hidden.weight.detach().clone()
        optimiser = Optimiser(one, name, 1e-3, constant, 10, bfloat16=bfloat16)
        backward(one, 0, bfloat16)
        optimiser.step(0)
        optimiser.finish()
        values = torch.linalg.svdvals(hidden.weight.detach() - before)
        spread[name] = (values[0] / values[8]).item()
    assert spread["muon"] < 2.5 and spread["adam"] > 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_trains(trained, precision):
    _, history = trained(optimiser="muon", hidden=(32, 32), epochs=6, lr=1e-2, precision=precision, average=0.5)
    assert history[-1]["test"]["distortion"] < history[0]["test"]["distortion"] - 1


def test_frozen_parameters_are_left_alone(model, backward):
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.clone()
    optimiser = Optimiser(model, "adam", 1e-2, constant, 3, bfloat16=True)
    backward(model, 0, bfloat16=True)
    optimiser.step(0)
    optimiser.finish()
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_layer_without_a_gradient_in_one_step_does_not_keep_the_last(bfloat16):
    layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    optimiser = Optimiser(layers, "adam", 1e-3, constant, 10, bfloat16=bfloat16)
    x = torch.ones(1, 3, dtype=layers[0].weight.dtype)
    for used, expected in ((layers, 4.0), (layers[:1], 8**0.5)):
        sum((layer.weight @ x.T).sum() for layer in used).float().backward()
        sum(layer.bias.sum() for layer in used).backward()
        assert optimiser.step(0) == pytest.approx(expected, rel=1e-3)
