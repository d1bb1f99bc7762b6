"""Decoding that scores without logits, against float64 and against the decoder itself."""

import numpy as np
import pytest
import torch
from torch import nn

from vaelab import likelihoods, posteriors, priors
from vaelab.evaluation import importance_sampled
from vaelab.models.vae import VAE
from vaelab.native import layers, library, reason
from vaelab.native.decoder import COARSE, Decoder
from vaelab.native.scoring import Scorer
from vaelab.nn import MLP, AroundMean, ConvDecoder, FourierMLP, WithLabel
from vaelab.rng import stream

pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {reason()}")
SHAPE = (1, 7, 5)


@pytest.fixture(autouse=True)
def _fixed_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def rounded(t):
    return t.detach().bfloat16().double()


def bernoulli(decoder):
    return likelihoods.Bernoulli(decoder).eval()


@torch.no_grad()
@pytest.mark.parametrize("codes", [1, 31, 500])
@pytest.mark.parametrize("width", [1, 32, 41])
@pytest.mark.parametrize("pixels", [1, 32, 64, 785])
def test_a_score_is_the_sum_over_pixels_in_float64(kernels, codes, width, pixels):
    """Of bfloat16 numbers, whose products float32 holds; logits of tens, of both signs, and images of grey levels."""
    last = nn.Linear(width, pixels)
    last.weight.mul_(10)
    constant = torch.linspace(-30, 30, pixels)
    score = Scorer(Decoder(likelihoods.Bernoulli(nn.Identity()), [last], constant, COARSE))
    z, x = 4 * torch.randn(1, codes, width), torch.rand(1, 1, 1, pixels)
    logits = rounded(z[0]) @ rounded(last.weight).T + (last.bias + constant).double()
    expected = (x.flatten() * logits - torch.nn.functional.softplus(logits, threshold=40)).sum(1)
    assert torch.allclose(score(z, None, x).double(), expected, rtol=1e-6, atol=3e-5)


@torch.no_grad()
def test_threads_are_of_no_matter(kernels):
    score = Scorer.of(bernoulli(MLP((3,), (20,), SHAPE)))
    z, x = torch.randn(1, 333, 3), torch.rand(1, *SHAPE).round()
    one = score(z, None, x)
    torch.set_num_threads(3)
    assert torch.equal(score(z, None, x), one)


DECODERS = {
    "dense": lambda: MLP((3,), (20, 9), SHAPE, "tanh"),
    "deep": lambda: MLP((3,), (20, 65, 9), SHAPE, "relu"),
    "sines": lambda: FourierMLP((3,), (20, 70, 33), SHAPE),
    "around a mean": lambda: AroundMean(FourierMLP((3,), (20,), SHAPE), SHAPE),
    "labelled": lambda: WithLabel(MLP((3 + 4,), (20,), SHAPE), 4),
    "linear": lambda: MLP((3,), (), SHAPE, exact_input=False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_a_scorer_says_what_its_decoder_says(name, kernels):
    """To the rounding of sums, and the decoder is left as it was."""
    likelihood, x, z = bernoulli(DECODERS[name]()), torch.rand(1, *SHAPE).round(), torch.randn(1, 50, 3)
    for part in likelihood.modules():
        if isinstance(part, AroundMean):
            part.start_at(torch.rand(SHAPE))
    c = torch.arange(50) % 4 if name == "labelled" else None
    score = Scorer.of(likelihood)
    assert score is not None
    with layers.accelerated(likelihood):
        expected = likelihood(z, c).cross_log_prob(x)[:, 0]
        assert torch.allclose(score(z, c, x), expected, rtol=0, atol=2e-5)
    assert likelihood(z, c).logits.shape == (1, 50, *SHAPE)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def subclassed():
    decoder = MLP((3,), (20,), SHAPE)
    decoder.layers[-1] = Doubled(20, 35)
    return decoder


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Bernoulli(MLP((3,), (20,), SHAPE, out_activation=True)),
        likelihoods.Bernoulli(MLP((3,), (), SHAPE)),  # its one layer is exact
        likelihoods.Bernoulli(ConvDecoder((3,), (4,), SHAPE)),
        likelihoods.Bernoulli(subclassed()),
        likelihoods.Bernoulli(nn.Linear(3, 35)),
        likelihoods.Bernoulli(MLP((3,), (20,), SHAPE).double()),
        likelihoods.GreyCrossEntropy(MLP((3,), (20,), SHAPE)),
        likelihoods.ContinuousBernoulli(MLP((3,), (20,), SHAPE)),
    ],
)
def test_what_is_not_known_to_end_in_logits_is_decoded(likelihood):
    assert Scorer.of(likelihood) is None


@pytest.mark.parametrize("what", ["hook", "forward"])
def test_a_decoder_that_does_more_than_its_class_is_asked_itself(what):
    likelihood = bernoulli(MLP((3,), (20,), SHAPE))
    assert Scorer.of(likelihood) is not None
    last = likelihood.decoder.layers[-1]
    if what == "hook":
        held = last.register_forward_hook(lambda module, given, found: found + 0.5)
    else:
        last.forward = lambda x: 2 * nn.Linear.forward(last, x)
    assert Scorer.of(likelihood) is None
    if what == "hook":
        held.remove()
        assert Scorer.of(likelihood) is not None


def test_an_estimate_does_not_depend_on_how_it_was_scored(monkeypatch, no_kernels):
    """Scored without logits, decoded by the kernels' layers, and by torch's bfloat16, which rounds the logits too."""
    model = VAE(
        MLP((1, 8, 8), (), (16,), "tanh", out_activation=True), posteriors.Gaussian(16, 3), priors.StandardNormal(3),
        likelihoods.Bernoulli(MLP((3,), (16,), (1, 8, 8), "tanh")),
    )  # fmt: skip
    x = (torch.rand(5, 1, 8, 8, generator=stream(3, "bits")) < 0.3).float()

    def found():
        return importance_sampled(model, x, 300, precision="bfloat16").log_px

    def refuse(*_):
        raise AssertionError("logits were asked for")

    with monkeypatch.context() as patched:
        patched.setattr(likelihoods.Bernoulli, "forward", refuse)
        fused = found()
    monkeypatch.setattr(Scorer, "of", lambda likelihood: None)
    layered = found()
    assert np.abs(fused - layered).max() < 2e-5
    no_kernels()
    assert 0 < np.abs(fused - found()).max() < 0.05
