"""Several steps of native code in one call, the images that they take, and who does what in them."""

import copy
import math

import pytest
import torch
from torch import nn

from vaelab.data.protocol import protocol
from vaelab.errors import Interrupted
from vaelab.likelihoods import GreyCrossEntropy
from vaelab.models.vae import VAE
from vaelab.native import calls, layers, library, reason
from vaelab.native.layers import accelerated
from vaelab.native.step import AHEAD, fused
from vaelab.nn.mean import AroundMean, Centred
from vaelab.nn.mlp import MLP
from vaelab.objectives import ELBO
from vaelab.optim import Optimiser
from vaelab.posteriors import Gaussian
from vaelab.priors import StandardNormal
from vaelab.recipes import recipe
from vaelab.registry import build
from vaelab.rng import stream
from vaelab.training import fit, initial_model

pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {reason()}")


def noise(step):
    return stream(0, "noise", step)


def steps_of(digits, name, batch, clip=0.0, at_once=AHEAD):
    """Two hundred images in batches: the passes, and all that the optimiser knows afterwards."""
    chosen = recipe(name, digits.shape)
    model = initial_model(chosen, digits).train()
    images, index, found = torch.from_numpy(digits.train.pixels), torch.arange(500, 700), []
    with accelerated(model):
        optimiser = Optimiser(model, "adam", 1e-3, lambda done: 1 - done / 2, 100, clip=clip, bfloat16=True)
        passes = fused(model, build(chosen.objective), images, protocol(chosen.protocol), batch, 1, optimiser)
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


def test_a_call_ends_with_the_step_whose_update_is_left_to_the_optimiser(kernels, digits):
    """With a clip between the bounds of several steps some are updated in the pass and some after it."""
    free, _ = steps_of(digits, "mnist", 16)
    for clip in (min(p.gradient_norm for p in free), 8 * max(p.gradient_norm for p in free)):
        (one, state), (other, expected) = (steps_of(digits, "mnist", 16, clip, most) for most in (AHEAD, 1))
        assert one == other and all(torch.equal(value, expected[key]) for key, value in state.items())
    assert not all(p.updated for p in steps_of(digits, "mnist", 16, min(p.gradient_norm for p in free))[0])


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_training_is_the_same_however_many_steps_are_one_call(digits, same_weights, average):
    """With `keep_every` of 0 each is one."""
    chosen = recipe("mnist", digits.shape, data="digits", precision="bfloat16", epochs=2, average=average, lr=1e-3)
    models, records = [], []
    for keep_every in (math.inf, 0.0):
        models.append(initial_model(chosen))
        fitted = fit(models[-1], build(chosen.objective), digits, protocol(chosen.protocol), chosen.training,
                     keep_every=keep_every)  # fmt: skip
        records.append([(r["step"], r["train"], r["test"], r["gradient_norm"]) for r in fitted])
    assert records[0] == records[1] and same_weights(*models)


def test_a_training_stops_between_calls(digits):
    """And the model has made as many updates as it says."""
    chosen = recipe("mnist", digits.shape, data="digits", precision="bfloat16", epochs=2, batch_size=16)
    asked, kept = iter(12 * [None] + ["enough"]), []
    with pytest.raises(Interrupted, match=r"after step (\d+) of"):
        fit(initial_model(chosen), build(chosen.objective), digits, protocol(chosen.protocol), chosen.training,
            stop=lambda: next(asked), keep=kept.append)  # fmt: skip
    (snapshot,) = kept
    assert snapshot.step > 13 and (snapshot.optimiser["count"] == snapshot.step).all()


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
    grey = protocol("grey")
    assert fused(model, ELBO(), images, grey, 4, 1) is not None
    assert fused(model, ELBO(), images, protocol("levels"), 4, 1) is None
    assert fused(model, ELBO(), images.float(), grey, 4, 1) is None
    assert fused(model, ELBO(), images.transpose(2, 3).contiguous().transpose(2, 3), grey, 4, 1) is None


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
    x, layer = torch.randn(m, k, generator=stream(0, "x"), requires_grad=True), nn.Linear(k, n)
    try:
        torch.set_num_threads(threads)
        expected = copy.deepcopy(layer)(x.detach()).square().sum()
        with accelerated(layer):
            for _ in range(20):
                y = layer(x).square().sum()
                y.backward()
    finally:
        torch.set_num_threads(before)
    assert y.item() == pytest.approx(expected.item(), rel=2e-2)
    assert len(seen) == 40 and all((room[-4096:] == 7.0).all() for room in seen)
