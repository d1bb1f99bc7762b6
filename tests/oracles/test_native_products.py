"""Products of float32 logits in three parts, sums over groups of codes and over rows: against float64 and torch."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from vaelab import likelihoods, pixels, posteriors, priors
from vaelab.errors import UsageError
from vaelab.models.vae import VAE
from vaelab.native import library, reason
from vaelab.native.decoder import FINE, FULL, Decoder
from vaelab.native.shares import CHUNK, BinaryImages, Undecoded, log_sums
from vaelab.nn import MLP, AroundMean, FourierMLP, WithLabel
from vaelab.quadrature import log_likelihood
from vaelab.rng import stream

pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {reason()}")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "normal"))


def bits(n, size, seed=0):
    return (torch.rand(n, size, generator=stream(seed, "bits")) < 0.3).float()


def measured(logits, weight, x, groups, images=None):
    px = pixels.Bernoulli(logits.unsqueeze(0), 1)
    return BinaryImages.of(x).shares(px, weight, groups, np.arange(len(x)) if images is None else images)


def expected(logits, weight, x, groups):
    log_px = logits.double() @ x.double().T - nn.functional.softplus(logits.double(), threshold=80).sum(1, True)
    return (log_px + weight.double()[:, None]).unflatten(0, (groups, -1)).logsumexp(1), log_px.amax(0)


@pytest.mark.parametrize("images", [1, 32, 77])
@pytest.mark.parametrize("group", [2, 8, 32, 64])
@pytest.mark.parametrize("size", [1, 64, 785])
def test_shares_are_those_of_float64(kernels, size, group, images):
    logits, weight, x = 5 * normal(3 * group, size), 3 * normal(3 * group, seed=1), bits(images, size)
    for found, exact in zip(measured(logits, weight, x, 3), expected(logits, weight, x, 3), strict=True):
        assert torch.allclose(found.double(), exact, rtol=5e-7, atol=1e-6)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e6, 1e30])
def test_a_product_in_three_parts_is_more_exact_than_torchs(kernels, scale):
    """Of 784 terms, seen by itself where logits are so far below 0 that log(1 + e^l) is none, in groups of one code."""
    logits, x = -scale * (1 + torch.exp(normal(64, 784))), bits(320, 784)
    exact = logits.double() @ x.double().T
    wrong = measured(logits, torch.zeros(64), x, 64)[0].double() - exact
    theirs = (logits @ x.T).double() - exact
    for size in (lambda t: t.square().mean().sqrt(), lambda t: t.abs().max()):
        assert size(wrong) < 0.6 * size(theirs)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 5.0, 30.0])
def test_log_px_is_as_exact_as_torchs(kernels, scale):
    logits, x = scale * normal(64, 784) - min(scale, 2.0), bits(320, 784)
    exact = expected(logits, torch.zeros(64), x, 64)[0]
    wrong = measured(logits, torch.zeros(64), x, 64)[0].double() - exact
    theirs = pixels._cross(logits, x, pixels._bernoulli).double() - exact
    for size in (lambda t: t.square().mean().sqrt(), lambda t: t.abs().max()):
        assert size(wrong) < 1.3 * size(theirs)


def test_neither_threads_nor_company_are_of_any_matter(kernels):
    logits, weight, x = 5 * normal(128, 50), normal(128, seed=1), bits(200, 50)
    share, best = measured(logits, weight, x, 2)
    some = np.array([150, 3, 77])
    alone, alone_best = measured(logits[64:], weight[64:], x, 1, some)
    torch.set_num_threads(3)
    again = measured(logits, weight, x, 2)
    assert torch.equal(again[0], share) and torch.equal(again[1], best)
    assert torch.equal(alone[0], share[1, some]) and (alone_best <= best[some]).all()


SHAPE = (1, 7, 5)
DECODERS = {
    "one layer": lambda: MLP((2,), (), SHAPE, exact_input=False),
    "relu": lambda: MLP((2,), (40,), SHAPE),
    "deep": lambda: MLP((2,), (20, 65, 33), SHAPE, "silu"),
    "sines": lambda: AroundMean(FourierMLP((2,), (70, 33), SHAPE), SHAPE),
    "labelled": lambda: WithLabel(MLP((2 + 4,), (64,), SHAPE), 4),
}


@torch.no_grad()
def dense(name, scale=3.0):
    """A likelihood with a dense decoder whose logits are large, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        likelihood = likelihoods.Bernoulli(DECODERS[name]()).eval()
    for part in likelihood.modules():
        if isinstance(part, AroundMean):
            part.start_at(torch.linspace(0, 1, 35).view(SHAPE))
        if isinstance(part, nn.Linear):
            part.weight.mul_(scale)
    return likelihood


@torch.no_grad()
def decoded(likelihood, z, c, weight, x, groups, parts):
    """What the kernels find of codes that they decode themselves, and what float64 does."""
    decoder = Decoder.of(likelihood, parts)
    found = BinaryImages.of(x).shares(Undecoded(decoder, decoder.inputs(z, c)), weight, groups, np.arange(len(x)))
    logits = copy.deepcopy(likelihood).double()(z.double(), c).logits[0].flatten(1)
    return found, expected(logits, weight, x.flatten(1), groups), decoder


@pytest.mark.parametrize("parts, within", [(FINE, 1e-3), (FULL, 2e-5)])
@pytest.mark.parametrize("groups, group", [(3, 8), (3, 32), (5, 64), (1, 3 * CHUNK), (2, 96)])
@pytest.mark.parametrize("name", DECODERS)
def test_codes_that_are_decoded_on_the_way_have_the_shares_of_float64(kernels, name, groups, group, parts, within):
    """Also where codes are more than a thread takes at a time, or do not fill what it takes."""
    z, weight, x = normal(1, groups * group, 2), 3 * normal(groups * group, seed=1), bits(41, 35).view(-1, *SHAPE)
    c = torch.arange(groups * group) % 4 if name == "labelled" else None
    found, exact, decoder = decoded(dense(name), z, c, weight, x, groups, parts)
    assert torch.allclose(found[0].double(), exact[0], rtol=1e-6, atol=within)
    assert torch.allclose(found[1].double(), exact[1], rtol=1e-6, atol=within)
    assert decoder.parts == parts and decoder.pixels == 35


def test_three_parts_decode_as_exactly_as_torch_and_two_a_tenth_as_exactly(kernels):
    likelihood, z, x = dense("deep"), normal(1, 640, 2), bits(64, 35).view(-1, *SHAPE)
    exact = decoded(likelihood, z, None, torch.zeros(640), x, 640, FULL)[1][0]
    off = {parts: (decoded(likelihood, z, None, torch.zeros(640), x, 640, parts)[0][0] - exact).square().mean().sqrt()
           for parts in (FINE, FULL)}  # fmt: skip
    theirs = (likelihood(z).cross_log_prob(x)[:, :].double() - exact).square().mean().sqrt()
    assert off[FULL] < 1.3 * theirs
    assert 2 * off[FULL] < off[FINE] < 30 * theirs


def test_neither_threads_nor_company_are_of_any_matter_to_what_is_decoded(kernels):
    decoder, x, z, weight = (
        Decoder.of(dense("sines"), FINE),
        BinaryImages.of(bits(200, 35)),
        normal(1, 640, 2),
        normal(640),
    )
    inputs = decoder.inputs(z, None).detach()
    one = x.shares(Undecoded(decoder, inputs), weight, 10, np.arange(200))
    some = np.array([150, 3, 77])
    alone, _ = x.shares(Undecoded(decoder, inputs).select(slice(64, 192)), weight[64:192], 2, some)
    assert torch.equal(alone, one[0][1:3, some])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = x.shares(Undecoded(decoder, inputs), weight, 10, np.arange(200))
        assert all(map(torch.equal, again, one))


@pytest.mark.parametrize("tolerance, scale, parts", [(1e-3, 1.0, FINE), (1e-6, 1.0, FULL), (1e-3, 10.0, FULL)])
def test_quadrature_decodes_in_16_bits_where_that_is_enough(monkeypatch, tolerance, scale, parts):
    if not library().vaelab_tiles():
        pytest.skip("without tiles torch decodes")
    model, x = two_dimensional(dense("deep", scale)), bits(50, 35).view(-1, *SHAPE)
    made, of = [], Decoder.of
    monkeypatch.setattr(Decoder, "of", classmethod(lambda cls, *given: made.append(of(*given)) or made[-1]))
    found = log_likelihood(model, x, tolerance=tolerance, precision="auto")
    assert [decoder.parts for decoder in made] == (
        [FINE] if parts == FINE else [FINE, FULL]
    ) and found.bits == 8 * parts
    assert log_likelihood(model, x, tolerance=tolerance).bits == 24
    assert [decoder.parts for decoder in made[parts == FULL :]] == [parts, FULL]
    made.clear()
    monkeypatch.setattr(BinaryImages, "decoder", lambda *_: None)
    by_torch = log_likelihood(model, x, tolerance=tolerance, precision="auto")
    assert not made and by_torch.bits == 24
    assert np.abs(found.log_px - by_torch.log_px).max() < (2e-4 if parts == FINE else 1e-4)


def two_dimensional(likelihood):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = MLP(SHAPE, (), (8,), out_activation=True)
        return VAE(encoder, posteriors.Gaussian(8, 2), priors.StandardNormal(2), likelihood)


def test_weights_of_nothing_and_logits_that_are_no_numbers(kernels):
    logits, weight, x = normal(16, 20), normal(16), bits(5, 20)
    weight[:8] = -math.inf
    weight[9] = -math.inf
    share, _ = measured(logits, weight, x, 2)
    assert (share[0] == -math.inf).all()
    assert torch.allclose(share[1].double(), expected(logits, weight, x, 2)[0][1], rtol=1e-6)
    logits[12, 3] = math.nan
    share, _ = measured(logits, weight, x, 2)
    assert share[1].isnan().all() and not share[0].isnan().any()


def test_images_that_bfloat16_does_not_hold_are_left_to_torch():
    assert BinaryImages.of(bits(3, 9)) is not None
    assert BinaryImages.of(bits(3, 9) / 3) is None
    assert BinaryImages.of(bits(3, 9).double()) is None
    served = BinaryImages.of(bits(3, 9))
    assert served.serve(pixels.Bernoulli(normal(1, 64, 9), 1), 64)
    assert not served.serve(pixels.Bernoulli(normal(1, 24, 9), 1), 24)
    assert not served.serve(pixels.Bernoulli(normal(1, 64, 9).double(), 1), 64)
    assert not served.serve(pixels.ContinuousBernoulli(normal(1, 64, 9), 1), 64)


@pytest.mark.parametrize("dim", [1, 2])
def test_quadrature_finds_the_same_with_and_without(kernels, no_kernels, dim):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VAE(
            MLP((1, 5, 5), (), (8,), out_activation=True), posteriors.Gaussian(8, dim), priors.StandardNormal(dim),
            likelihoods.Bernoulli(MLP((dim,), (16,), (1, 5, 5), "tanh")),
        )  # fmt: skip
    x = bits(40, 25).view(-1, 1, 5, 5)
    own = log_likelihood(model, x)
    with pytest.raises(UsageError, match="precision is 'bfloat16': choose auto or float32"):
        log_likelihood(model, x, precision="bfloat16")
    no_kernels()
    theirs = log_likelihood(model, x)
    assert abs(own.log_px - theirs.log_px).max() < 1e-5 and own.points == theirs.points
    assert not np.array_equal(own.log_px, theirs.log_px)


# --- rows ---


@pytest.mark.parametrize("n", [1, 16, 33, 10_000])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_sums_of_rows_are_those_of_float64(kernels, n, scale):
    x = scale * normal(2, 7, n)
    assert torch.allclose(log_sums(x).double(), x.double().logsumexp(-1), rtol=3e-7, atol=2e-6)


def test_rows_of_nothing_and_of_no_numbers(kernels, no_kernels):
    x = normal(3, 40)
    x[0], x[1, 3], x[2, 38] = -math.inf, -math.inf, math.nan
    found = log_sums(x)
    assert found[0] == -math.inf and found[2].isnan() and found[1] == pytest.approx(float(x[1].logsumexp(0)), rel=1e-6)
    no_kernels()
    assert torch.allclose(log_sums(x), found, equal_nan=True)
