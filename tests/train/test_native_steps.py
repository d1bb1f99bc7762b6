"""Several steps of native code in one call, the images that they take, and who does what in them."""

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from vaelab.data.protocol import protocol
from vaelab.errors import Interrupted, NonFiniteError
from vaelab.likelihoods import GreyCrossEntropy
from vaelab.meter import Meter
from vaelab.models.vae import VAE
from vaelab.native import calls, layers, library, pace, reason
from vaelab.native import step as step_module
from vaelab.native.layers import accelerated
from vaelab.native.step import AHEAD, fused
from vaelab.nn.conv import ConvDecoder, ConvEncoder
from vaelab.nn.mean import AroundMean, Centred
from vaelab.nn.mlp import MLP, ExactLinear
from vaelab.objectives import ELBO
from vaelab.optim import Optimiser
from vaelab.posteriors import Gaussian
from vaelab.priors import StandardNormal
from vaelab.recipes import recipe
from vaelab.registry import build
from vaelab.rng import stream
from vaelab.schedules import Linear
from vaelab.training import fit, initial_model

pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {reason()}")


GREY = protocol("grey")


def noise(step):
    return stream(0, "noise", step)


def steps_of(digits, name, batch, clip=0.0, at_once=AHEAD):
    """Two hundred images in batches: the passes, and all that the optimiser knows afterwards."""
    chosen = recipe(name, digits.shape)
    model = initial_model(chosen, digits).train()
    images, index, found = torch.from_numpy(digits.train.pixels), torch.arange(500, 700), []
    with accelerated(model):
        optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1 - done / 2, 100, clip=clip, bfloat16=True)
        passes = fused(model, ELBO(Linear(0.0, 1.0, 8)), images, protocol(chosen.protocol), batch, 1, optimiser)
        while len(found) * batch < len(index):
            begin = len(found) * batch
            made = passes(index[begin : begin + at_once * batch], noise, len(found))
            assert 1 <= len(made) <= at_once and all(passed.updated for passed in made[:-1])
            for passed in made:
                optimiser.step(len(found), not math.isfinite(passed.loss), passed.gradient_norm, passed.updated)
                found.append(passed)
        return found, {key: value.clone() for key, value in optimiser.state().items()}


@pytest.mark.parametrize("name", ["mnist", "mnist-2d", "mnist-fast"])
@pytest.mark.parametrize("batch", [16, 32, 77])
def test_steps_that_are_one_call_are_those_one_after_the_other(kernels, digits, name, batch):
    """The same bits, with fewer images in the last."""
    (one, state), (other, expected) = (steps_of(digits, name, batch, at_once=most) for most in (AHEAD, 1))
    assert one == other and len(one) == -(-200 // batch)
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


@pytest.mark.parametrize("name", ["mnist", "mnist-2d"])
def test_steps_that_are_clipped_are_one_call_as_well(kernels, digits, name):
    """With a clip below all norms, between them, and between the bounds of several steps: the bits of single steps."""
    norms = sorted(p.gradient_norm for p in steps_of(digits, name, 16)[0])
    for clip in (0.9 * norms[0], norms[len(norms) // 2], 8 * norms[-1]):
        (one, state), (other, expected) = (steps_of(digits, name, 16, clip, most) for most in (AHEAD, 1))
        assert one == other and all(torch.equal(value, expected[key]) for key, value in state.items())
        assert all(passed.updated for passed in one)


def test_a_call_ends_with_the_step_that_is_not_finite(kernels, digits):
    model = initial_model(recipe("mnist", digits.shape), digits).train()
    images = torch.from_numpy(digits.train.pixels)
    with accelerated(model):
        optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 100, clip=1e-3, bfloat16=True)
        passes = fused(model, ELBO(), images, GREY, 16, 1, optimiser)
        with torch.no_grad():
            model.posterior.head.weight[3, 2] = math.nan
        (passed,) = passes(torch.arange(64), noise, 0)
        assert not passed.updated and not math.isfinite(passed.loss)


@pytest.fixture
def calls_of(monkeypatch):
    """Calls of as many steps as there may be, whatever they take; returns how many each made."""
    made, step = [], pace.Pace.step

    def counted(self, count=1, asked=1):
        made.append(count)
        step(self, count, asked)

    monkeypatch.setattr(pace.Pace, "ahead", lambda self, most: most)
    monkeypatch.setattr(pace.Pace, "step", counted)
    monkeypatch.setattr(step_module, "AT_ONCE", math.inf)
    return made


@pytest.mark.parametrize("clip", [0.0, 30.0, 200.0])
def test_a_training_is_the_same_however_many_steps_are_one_call(digits, same_weights, calls_of, clip):
    """With `keep_every` of 0 each is one."""
    chosen = recipe("mnist", digits.shape, data="digits", precision="bfloat16", epochs=2, batch_size=16, clip=clip)
    models, records, longest = [], [], []
    for keep_every in (math.inf, 0.0):
        calls_of.clear()
        models.append(initial_model(chosen))
        fitted = fit(models[-1], build(chosen.objective), digits, protocol(chosen.protocol), chosen.training,
                     keep_every=keep_every)  # fmt: skip
        records.append([(r["step"], r["train"], r["test"], r["gradient_norm"]) for r in fitted])
        longest.append(max(calls_of))
    assert records[0] == records[1] and same_weights(*models)
    assert longest == [AHEAD, 1]


@pytest.mark.parametrize("clip", [0.0, 30.0])
def test_a_training_that_stops_between_calls_goes_on_as_if_it_had_not(digits, same_weights, calls_of, clip):
    chosen = recipe("mnist", digits.shape, data="digits", precision="bfloat16", epochs=2, batch_size=16, clip=clip)

    def trained(**given):
        model = initial_model(chosen)
        return model, fit(model, build(chosen.objective), digits, protocol(chosen.protocol), chosen.training, **given)

    asked, kept = iter(2 * [None] + ["enough"]), []
    with pytest.raises(Interrupted, match=r"after step \d+ of 180"):
        trained(stop=lambda: next(asked), keep=kept.append)
    (snapshot,) = kept
    assert snapshot.step == 3 * AHEAD and (snapshot.optimiser["count"] == snapshot.step).all()
    (one, _), (other, _) = trained(start=copy.deepcopy(snapshot)), trained()
    assert same_weights(one, other)


@pytest.mark.parametrize("what", ["skip", "stop"])
def test_a_step_that_is_not_finite_ends_a_call(digits, calls_of, what):
    """And is left out, or ends the training, at the same step as one by one."""
    chosen = recipe("mnist", digits.shape, data="digits", precision="bfloat16", epochs=1, batch_size=16, lr=1e9)
    training, said, made = replace(chosen.training, on_nonfinite=what), [], []
    for keep_every in (math.inf, 0.0):
        calls_of.clear()
        with pytest.raises(NonFiniteError) as error:
            fit(initial_model(chosen), build(chosen.objective), digits, protocol(chosen.protocol), training,
                keep_every=keep_every)  # fmt: skip
        said.append(str(error.value))
        made.append(sum(calls_of))
    assert said[0] == said[1]
    assert what == "stop" or made == [90, 90]


def test_progress_of_an_epoch_of_which_all_was_left_out(digits, monkeypatch):
    """There is none to show, and the error says so."""
    chosen = recipe("mnist", digits.shape, data="digits", precision="bfloat16", epochs=1, batch_size=16)
    model = initial_model(chosen)
    with torch.no_grad():
        model.encoder.layers[0].weight.fill_(math.nan)
    monkeypatch.setattr(Meter, "due", lambda self: True)
    with pytest.raises(NonFiniteError, match="all steps of epoch 1 were skipped"):
        fit(
            model,
            build(chosen.objective),
            digits,
            protocol(chosen.protocol),
            replace(chosen.training, on_nonfinite="skip"),
        )


def test_a_team_that_is_smaller_than_asked_for_does_all_of_it():
    """OpenMP may give fewer threads than it is asked for."""
    code = (
        "import torch; from torch import nn; from vaelab.native.layers import accelerated; torch.manual_seed(0)\n"
        "torch.set_num_threads(2); layer, x = nn.Linear(784, 400), torch.randn(64, 784); expected = layer(x)\n"
        "with accelerated(layer): y = layer(x)\n"
        "assert (y - expected).abs().max() < 0.05, (y - expected).abs().max()"
    )
    for limit in ({"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | limit, capture_output=True, text=True)
        assert not done.returncode, done.stderr


def around(shape, latent_dim=3):
    """A model whose images and logits have a constant beside them, of odd sizes everywhere."""
    constant = torch.rand(shape, generator=stream(0, "constant"))
    model = VAE(
        encoder=Centred(MLP(shape, [], [33], out_activation=True), shape),
        posterior=Gaussian(33, latent_dim),
        prior=StandardNormal(latent_dim),
        likelihood=GreyCrossEntropy(AroundMean(MLP([latent_dim], [17], shape), shape)),
    )
    model.encoder.constant.copy_(constant)
    model.likelihood.decoder.constant.copy_(constant - 0.5)
    return model


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (1, 4, 8), (1, 7, 11)])
@pytest.mark.parametrize("name", ["grey", "dynamic", "threshold"])
@pytest.mark.parametrize("k", [1, 3])
def test_images_of_any_size_are_taken_as_the_protocol_says(kernels, name, shape, k):
    """Value and gradient are what autograd makes of the protocol's own batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = around(shape)
    images = torch.randint(0, 256, (60, *shape), dtype=torch.uint8, generator=stream(0, "images"))
    index = torch.randperm(60, generator=stream(0, "index"))[:37]
    with accelerated(model):
        optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10, bfloat16=True)
        (passed,) = fused(model, ELBO(), images, protocol(name), 40, k)(index, noise, 0)
        found = optimiser.gradient.clone()
        optimiser.gradient.zero_()
        drawn = noise(0)
        x = protocol(name).training_batch(images, drawn, index)
        loss = ELBO()(model.trace(x, k=k, generator=drawn), 0).loss
        loss.backward()
    assert passed.loss == pytest.approx(loss.item(), rel=1e-5)
    assert (found - optimiser.gradient).norm() < 3e-3 * optimiser.gradient.norm()


def test_what_no_kernel_takes_goes_through_autograd():
    model = around((1, 4, 8))
    images = torch.zeros(9, 1, 4, 8, dtype=torch.uint8)
    Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10)
    assert fused(model, ELBO(), images, GREY, 4, 1) is not None
    assert fused(model, ELBO(), images, protocol("levels"), 4, 1) is None
    assert fused(model, ELBO(), images.float(), GREY, 4, 1) is None
    assert fused(model, ELBO(), images.transpose(2, 3).contiguous().transpose(2, 3), GREY, 4, 1) is None


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("size", [(1, 33, 1), (16, 784, 20), (40, 20, 400), (5, 1, 97)])
def test_no_layer_writes_past_its_scratch(kernels, monkeypatch, threads, size):
    """Whichever thread takes which strip."""
    m, k, n = size
    before = torch.get_num_threads()
    seen = []

    def guarded(numbers):
        seen.append(torch.full((numbers + 4096,), 7.0, dtype=torch.bfloat16))
        return seen[-1]

    monkeypatch.setattr(calls, "scratch", guarded)
    monkeypatch.setattr(layers, "scratch", guarded)
    x = torch.randn(m, k, generator=stream(0, "x"), requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(k, n)
    expected = layer(x).detach()
    try:
        torch.set_num_threads(threads)
        with accelerated(layer):
            for _ in range(20):
                y = layer(x)
                y.sum().backward()
    finally:
        torch.set_num_threads(before)
    assert (y - expected).abs().max() < 0.05
    assert len(seen) == 40 and all((room[-4096:] == 7.0).all() for room in seen)


def flat(shape):
    return nn.Flatten(), math.prod(shape)


ENCODERS = {
    "dense": lambda shape: (MLP(shape, [17], [33], out_activation=True), 33),
    "one layer": flat,
    "centred, in float32": lambda shape: (
        Centred(nn.Sequential(nn.Flatten(), ExactLinear(77, 19), nn.SiLU()), shape),
        19,
    ),
    "convolutional": lambda shape: (encoder := ConvEncoder(shape, (8,)), encoder.features),
}
DECODERS = {
    "dense": lambda shape: AroundMean(MLP([3], [17], shape), shape),
    "one layer": lambda shape: nn.Sequential(nn.Linear(3, math.prod(shape)), nn.Unflatten(-1, shape)),
    "in float32": lambda shape: nn.Sequential(ExactLinear(3, math.prod(shape)), nn.Unflatten(-1, shape)),
    "convolutional": lambda shape: ConvDecoder((3,), (8,), shape),
}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_pass_stays_in_its_rooms_and_reads_only_what_it_wrote(kernels, monkeypatch, encoder, decoder):
    """Rooms are full of NaN, with a guard on both sides; three samples of fewer images than there may be."""
    rooms, shape, guard = [], (1, 7, 11), 1024

    def room(self, numbers):
        held = torch.full((numbers + 2 * guard + 16,), math.nan)
        begin = (-(-(held.data_ptr() + 4 * guard) // 64) * 64 - held.data_ptr()) // 4
        held[:begin] = held[begin + numbers :] = 7.0
        rooms.append((held[:begin], held[begin + numbers :], held))
        return held.data_ptr() + 4 * begin

    monkeypatch.setattr(step_module.Fused, "_room", room)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, features = ENCODERS[encoder](shape)
        model = VAE(first, Gaussian(features, 3), StandardNormal(3), GreyCrossEntropy(DECODERS[decoder](shape)))
    images = torch.randint(0, 256, (60, *shape), dtype=torch.uint8, generator=stream(0, "images"))
    with accelerated(model):
        optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1.0, 10, bfloat16=True)
        (passed,) = fused(model, ELBO(), images, GREY, 33, 3)(torch.arange(29), noise, 0)
        found = optimiser.gradient.clone()
        optimiser.gradient.zero_()
        loss = ELBO()(model.trace(images[:29] / 255, k=3, generator=noise(0)), 0).loss
        loss.backward()
        assert passed.loss == pytest.approx(loss.item(), rel=1e-4)
        assert (found - optimiser.gradient).norm() < 1e-2 * optimiser.gradient.norm()
        fused(model, ELBO(), images, GREY, 33, 3, optimiser)(torch.arange(60), noise, 0)
    assert all((before == 7.0).all() and (after == 7.0).all() for before, after, _ in rooms)
