"""Networks: shapes of every size, no dependence on the rest of the batch, codes in float32, labels."""

import pytest
import torch
from torch import nn

from vaelab import likelihoods, posteriors, priors
from vaelab.errors import UsageError
from vaelab.models.vae import VAE
from vaelab.nn import MLP, ConvDecoder, ConvEncoder, ExactLinear, FourierMLP, WithLabel
from vaelab.registry import build, to_spec
from vaelab.rng import stream

SIZES = [(1, 1, 1), (1, 28, 28), (1, 28, 20), (3, 7, 13), (2, 1, 9), (5, 33, 2)]


@pytest.fixture(autouse=True)
def _fixed_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "test"))


def perturbed(network):
    """All weights moved, so that a block that is zero at first takes part."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [(4,), (3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("shape", SIZES)
def test_images_of_any_size_become_features_and_codes_images(shape, channels, residual):
    encoder = ConvEncoder(shape, channels, features=6, residual=residual)
    decoder = ConvDecoder((3,), channels[::-1], shape, residual)
    x = normal(2, *shape)
    assert encoder(x).shape == (2, 6)
    assert decoder(normal(2, 3)).shape == (2, *shape)
    for network in (encoder, decoder):
        assert to_spec(build(to_spec(network))) == to_spec(network)
        output = network(x if network is encoder else normal(2, 3))
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_every_output_pixel_and_every_input_pixel_counts():
    """Also the last row and column of odd sides, which strides and crops could miss."""
    shape = (2, 7, 5)
    x = normal(1, *shape).requires_grad_()
    perturbed(ConvEncoder(shape, (4, 4), 6))(x).square().sum().backward()
    assert x.grad is not None and (x.grad != 0).all()
    decoder = perturbed(ConvDecoder((3,), (4, 4), shape))
    one, other = decoder(normal(1, 3)), decoder(normal(1, 3, seed=1))
    assert (one != other).all()


@pytest.mark.parametrize("residual", [False, True])
def test_leading_axes_are_batches(residual):
    encoder, decoder = ConvEncoder((1, 7, 5), (3, 4), 6, residual), ConvDecoder((3,), (4, 3), (2, 7, 5), residual)
    z, x = normal(4, 5, 3), normal(4, 5, 1, 7, 5)
    assert decoder(z).shape == (4, 5, 2, 7, 5)
    assert torch.allclose(decoder(z)[2], decoder(z[2]), atol=1e-6)
    assert torch.allclose(encoder(x)[2], encoder(x[2]), atol=1e-6)
    assert decoder(z[0, 0]).shape == (2, 7, 5) and decoder(z[:, :0]).shape == (4, 0, 2, 7, 5)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_an_image_does_not_see_the_others_in_its_batch(residual, mode):
    """In training mode too: batch normalisation would make the likelihood depend on the composition of the batch."""
    encoder = perturbed(ConvEncoder((1, 7, 5), (3, 4), 6, residual)).double().train(mode)
    decoder = perturbed(ConvDecoder((6,), (4, 3), (2, 7, 5), residual)).double().train(mode)
    x = normal(8, 1, 7, 5).double()
    together = decoder(encoder(x))
    turned = decoder(encoder(x.flip(0))).flip(0)
    alone = torch.cat([decoder(encoder(one[None])) for one in x])
    assert (together - turned).abs().max() < 1e-12 and (together - alone).abs().max() < 1e-12
    assert not [
        m for net in (encoder, decoder) for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


def test_residual_blocks_are_the_identity_at_first_and_learn():
    torch.manual_seed(1)
    encoder = ConvEncoder((1, 8, 8), (3, 4), 6, residual=True)
    plain = ConvEncoder((1, 8, 8), (3, 4), 6)
    own = [p for p in encoder.parameters() if p.shape[:2] not in ((3, 3), (4, 4)) and p.shape not in ((3,), (4,))]
    assert len(own) < len(list(encoder.parameters()))
    layers = [m for m in encoder.layers if not type(m).__name__.startswith("_")]
    for mine, theirs in zip(plain.layers, layers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    x = normal(2, 1, 8, 8)
    assert torch.equal(encoder(x), plain(x))
    assert not torch.equal(perturbed(encoder)(x), plain(x))


@pytest.mark.parametrize(
    "decoder",
    [ConvDecoder((3,), (4,), (1, 8, 8)), ConvDecoder((3,), (4,), (1, 8, 8), True), MLP((3,), (4,), (1, 8, 8)),
     FourierMLP((3,), (4,), (1, 8, 8))],
    ids=["conv", "residual", "dense", "fourier"],
)  # fmt: skip
def test_codes_are_read_in_float32_under_autocast(decoder):
    """Two codes that bfloat16 cannot tell apart are told apart."""
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(decoder, ConvDecoder):
            assert isinstance(decoder.first, ExactLinear)
            assert decoder.first(normal(2, 3)).dtype == torch.float32
        near = [decoder(1 + torch.full((1, 3), eps)) for eps in (0.0, 2.0**-9)]
        assert all(out.isfinite().all() for out in near)
    if not isinstance(decoder, FourierMLP):
        hidden = decoder.first if isinstance(decoder, ConvDecoder) else decoder.layers[0]
        with torch.autocast("cpu", torch.bfloat16):
            moved = hidden(torch.ones(1, 3)) - hidden(torch.full((1, 3), 1 + 2.0**-9))
        assert torch.allclose(moved, -(2.0**-9) * hidden.weight.sum(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvEncoder((28, 28)), r"in_shape is \(28, 28\): expected 3 integers, each 1 or more"),
        (lambda: ConvEncoder((1, 0, 28)), r"in_shape is \(1, 0, 28\)"),
        (lambda: ConvEncoder((1, 8, 8), ()), r"channels is \(\): expected one or more integers"),
        (lambda: ConvEncoder((1, 8, 8), (4, 0)), r"channels is \(4, 0\)"),
        (lambda: ConvEncoder((1, 8, 8), features=0), r"features is \(0,\)"),
        (lambda: ConvEncoder((1, 8, 8), activation="sliu"), "did you mean 'silu'"),
        (lambda: ConvDecoder((1, 8, 8)), r"in_shape is \(1, 8, 8\): expected 1 integer, each"),
        (lambda: ConvDecoder((2,), out_shape=(64,)), r"out_shape is \(64,\): expected 3 integers"),
        (lambda: ConvDecoder((2,), (4, -1)), r"channels is \(4, -1\)"),
        (lambda: ConvDecoder((2,), activation="tahn"), "did you mean 'tanh'"),
        (lambda: WithLabel(MLP((2,), (), (3,)), 0), "classes is 0"),
    ],
)
def test_bad_arguments_are_told(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# --- labels ---

CLASSES = 3
X_SHAPE = (1, 5, 6)


def conditional(network):
    """Encoder and decoder that read labels: dense on flat pixels, dense on images and planes, or convolutional."""
    if network == "dense-flat":
        encoder = MLP((30 + CLASSES,), (), (8,), "tanh", out_activation=True)
    elif network == "dense":
        encoder = MLP((1 + CLASSES, 5, 6), (), (8,), "tanh", out_activation=True)
    else:
        encoder = ConvEncoder((1 + CLASSES, 5, 6), (4,), 8, residual=network == "residual")
    if network.startswith("dense"):
        decoder = MLP((2 + CLASSES,), (8,), X_SHAPE, "tanh")
    else:
        decoder = ConvDecoder((2 + CLASSES,), (4,), X_SHAPE, residual=network == "residual")
    likelihood = likelihoods.Bernoulli(WithLabel(decoder, CLASSES))
    model = VAE(WithLabel(encoder, CLASSES), posteriors.Gaussian(8, 2), priors.LabelGaussian(2, CLASSES), likelihood)
    return perturbed(model).double()


@pytest.mark.parametrize("network", ["dense-flat", "dense", "conv", "residual"])
def test_labels_of_several_samples_go_with_their_images(network):
    model = conditional(network)
    x, c = (normal(4, *X_SHAPE) > 0).double(), torch.tensor([0, 2, 1, 2])
    trace = model.trace(x, c, k=3, generator=stream(0, "noise"))
    assert trace.log_px.shape == (3, 4) and trace.log_w().shape == (3, 4)
    z = trace.levels[0].z
    for i in range(4):
        alone = model.decode(z[:, i : i + 1], c[i : i + 1]).log_prob(x[i : i + 1])
        assert torch.allclose(alone[:, 0], trace.log_px[:, i], rtol=0, atol=1e-12)
        mean = model.encode(x[i : i + 1], c[i : i + 1]).mean
        assert torch.allclose(mean[0], trace.levels[0].q.mean[i], rtol=0, atol=1e-12)
    other = (c + 1) % CLASSES
    assert (model.encode(x, other).mean - trace.levels[0].q.mean).abs().min() > 1e-6
    assert (model.decode(z, other).log_prob(x) - trace.log_px).abs().min() > 1e-6
    assert model.sample(4, c, generator=stream(0, "noise")).mean.shape == (1, 4, *X_SHAPE)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("c", [[0, 3], [-1, 0]])
def test_a_label_out_of_range_is_refused(c, mode):
    network = WithLabel(MLP((2 + CLASSES,), (), (3,)), CLASSES).train(mode)
    with pytest.raises(UsageError, match=r"a label lies outside 0 to 2.*labels from"):
        network(normal(5, 2, 2), torch.tensor(c))


@pytest.mark.parametrize("shape", [(4, 2), (5, 4, 2)])
def test_another_number_of_labels_is_refused(shape):
    network = WithLabel(MLP((2 + CLASSES,), (), (3,)), CLASSES)
    for c in (torch.tensor([1]), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([[0], [1], [2], [0]])):
        with pytest.raises(UsageError, match="were given for 4 inputs: give one for each"):
            network(normal(*shape), c)
    with pytest.raises(UsageError, match="for 2 inputs"):
        WithLabel(ConvEncoder((1 + CLASSES, 5, 6)), CLASSES)(normal(2, *X_SHAPE), torch.tensor([0, 1, 2]))


def test_an_image_that_has_shrunk_to_one_pixel_keeps_its_gradients_in_bfloat16():
    """Stride 2 on a side of 1 left the bfloat16 weight gradient of torch's CPU kernel unwritten."""
    torch.manual_seed(0)
    network = ConvEncoder((1, 8, 8), (8, 16, 32, 64, 64), 16)
    x = torch.rand(32, 1, 8, 8)
    found = []
    for reduced in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            network(x).float().square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters()])
    for exact, rounded in zip(*found, strict=True):
        assert torch.isfinite(rounded).all()
        assert (exact - rounded).norm() <= 0.1 * exact.norm() + 1e-6
