"""Likelihoods: what they read from the decoder, their scales, the measures they fit, and labels."""

import math

import pytest
import torch

from vaelab import likelihoods
from vaelab.data.protocol import PROTOCOLS, check
from vaelab.errors import UsageError
from vaelab.nn import MLP, ConvDecoder, WithLabel
from vaelab.registry import COMPONENTS, build, to_spec
from vaelab.rng import stream

F64 = torch.float64
SHAPE = (2, 3, 5)
MEMBERS = {
    "Bernoulli": {},
    "GreyCrossEntropy": {},
    "ContinuousBernoulli": {},
    "Gaussian": {"scale": "fixed", "std": 0.3},
    "Gaussian shared": {"scale": "shared", "std": 0.3},
    "Gaussian optimal": {"scale": "optimal", "std": 0.3},
    "Gaussian per-pixel": {"scale": "per-pixel", "std": 0.3},
    "Laplace": {"scale": "fixed", "b": 0.3},
    "Laplace shared": {"scale": "shared", "b": 0.3},
    "Laplace per-pixel": {"scale": "per-pixel", "b": 0.3},
    "DiscretisedLogistic": {},
    "DiscretisedLogisticMixture": {"components": 3},
    "Categorical": {},
}
MEASURES = {
    "Bernoulli": "binary", "GreyCrossEntropy": "grey", "ContinuousBernoulli": "continuous", "Gaussian": "continuous",
    "Laplace": "continuous", "DiscretisedLogistic": "levels256", "DiscretisedLogisticMixture": "levels256",
    "Categorical": "levels256",
}  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "test"), dtype=F64)


def images(n, shape=SHAPE):
    """Bytes / 255 that are bits for one half: inside every measure's range."""
    x = torch.randint(256, (n, *shape), generator=stream(1, "images")).double() / 255
    return torch.where(x > 0.5, x.round(), x)


def member(name, decoder="conv", shape=SHAPE, inputs=4, **changed):
    cls, arguments = getattr(likelihoods, name.split()[0]), {**MEMBERS.get(name, {}), **changed}
    out = cls.outputs(shape, **{k: v for k, v in arguments.items() if k in ("scale", "components")})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ConvDecoder((inputs,), (6,), out) if decoder == "conv" else MLP((inputs,), (6,), out, "tanh")
    return cls(net, **arguments).double().eval()


def of_tensor(name, outputs, **arguments):
    """The member whose decoder says `outputs` (K, B, *) for any code."""

    class Says(torch.nn.Module):
        def forward(self, z):
            return outputs

    return getattr(likelihoods, name)(Says(), **arguments)


@pytest.mark.parametrize("decoder", ["conv", "dense"])
@pytest.mark.parametrize("name", MEMBERS)
def test_outputs_size_the_decoder_and_one_event_is_an_image(name, decoder):
    px = member(name, decoder)(normal(3, 4, 4))
    assert px.mean.shape == (3, 4, *SHAPE) and px.rsample(2, stream(0, "noise")).shape == (2, 3, 4, *SHAPE)
    assert px.log_prob(images(4)).shape == (3, 4)
    assert px.select(slice(1, 3)).mean.shape == (3, 2, *SHAPE)
    assert torch.equal(px.select(slice(1, 3)).log_prob(images(4)[1:3]), px.log_prob(images(4))[:, 1:3])


@pytest.mark.parametrize("name", MEMBERS)
def test_vectors_are_images_too(name):
    px = member(name, "dense", (7,))(normal(3, 2, 4))
    assert px.mean.shape == (3, 2, 7) and px.log_prob(images(2, (7,))).shape == (3, 2)


@pytest.mark.parametrize("name", MEMBERS)
def test_channels_are_the_slow_axis_of_each_parameter(name):
    """A decoder of one more channel order: what the vector form and the image form say of the same pixel agrees."""
    image = member(name, "dense", (2, 1, 1))
    vector = member(name, "dense", (2,))
    z, x = normal(3, 4, 4), images(4, (2, 1, 1))
    assert torch.allclose(image(z).log_prob(x), vector(z).log_prob(x.flatten(1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("decoder", ["conv", "dense"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_label_conditions_every_member(name, decoder):
    plain = member(name, decoder, inputs=7)
    labelled = type(plain)(WithLabel(plain.decoder, 3), **MEMBERS[name]).double().eval()
    z, c = normal(2, 4, 4), torch.tensor([0, 2, 1, 2])
    hot = torch.eye(3, dtype=F64)[c].expand(2, 4, 3)
    expected = plain(torch.cat([z, hot], -1)).log_prob(images(4))
    assert torch.equal(labelled(z, c).log_prob(images(4)), expected)
    assert (labelled(z, 2 - c).log_prob(images(4)) - expected)[:, [0, 1, 3]].abs().min() > 1e-6


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_survives_its_spec_and_its_weights_a_copy(name):
    one = member(name)
    other = build(to_spec(one)).double().eval()
    assert to_spec(other) == to_spec(one)
    other.load_state_dict(one.state_dict())
    z = normal(1, 2, 4)
    assert torch.equal(one(z).log_prob(images(2)), other(z).log_prob(images(2)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", MEASURES)
def test_every_member_fits_a_protocol_or_is_refused_with_those_that_fit(name, protocol):
    likelihood = member(name)
    if PROTOCOLS[protocol].measure == MEASURES[name]:
        return check(PROTOCOLS[protocol], likelihood)
    with pytest.raises(UsageError) as caught:
        check(PROTOCOLS[protocol], likelihood)
    message = str(caught.value)
    fitting = [p.name for p in PROTOCOLS.values() if p.measure == MEASURES[name]]
    others = [n for n, measure in MEASURES.items() if measure == PROTOCOLS[protocol].measure]
    assert fitting and f"--protocol {' or '.join(fitting)}, or the likelihood {' or '.join(others)}" in message
    assert f"'{protocol}' gives {PROTOCOLS[protocol].measure} pixels" in message and name in message
    return None


def test_all_members_of_the_registry_are_tested_and_all_but_the_cross_entropy_are_normalised():
    registered = {name.split(".")[1] for name in COMPONENTS if name.startswith("likelihoods.")}
    assert registered == set(MEASURES) == {cls.__name__ for cls in likelihoods.MEMBERS}
    assert {cls.__name__ for cls in likelihoods.MEMBERS if not cls.normalised} == {"GreyCrossEntropy"}


# --- scales ---


def test_a_gaussian_of_std_one_is_half_the_squared_error():
    mean, x = normal(3, 4, *SHAPE), images(4)
    log_p = of_tensor("Gaussian", mean)(normal(3, 4, 2)).log_prob(x)
    expected = -0.5 * (x - mean).square().flatten(2).sum(-1) - 15 * math.log(2 * math.pi)
    assert (log_p - expected).abs().max() < 1e-11


@pytest.mark.parametrize("name", ["Gaussian", "Laplace"])
def test_a_shared_scale_is_learned_and_best_at_the_mean_error(name):
    mean, x = normal(1, 50, *SHAPE), images(50)
    error = (x - mean).abs()
    best = error.square().mean().sqrt() if name == "Gaussian" else error.mean()
    size = {"std" if name == "Gaussian" else "b": best.item()}
    likelihood = of_tensor(name, mean, scale="shared", **size).double()
    with torch.no_grad():
        likelihood.log_scale.copy_(best.log())  # the constructor rounds to float32
    log_p = likelihood(mean).log_prob(x).mean()
    log_p.backward()
    assert [n for n, _ in likelihood.named_parameters()] == ["log_scale"]
    assert likelihood.log_scale.grad is not None and likelihood.log_scale.grad.abs() < 1e-10
    for factor in (0.9, 1.1):
        with torch.no_grad():
            likelihood.log_scale.add_(math.log(factor))
            assert likelihood(mean).log_prob(x).mean() < log_p - 0.1
            likelihood.log_scale.sub_(math.log(factor))


def test_the_optimal_scale_is_the_mean_squared_error_and_beats_every_fixed_one():
    mean, x = normal(2, 50, *SHAPE), images(50)
    error = (x - mean).square().mean().item()
    likelihood = of_tensor("Gaussian", mean, scale="optimal").double().train()
    best = likelihood(mean).log_prob(x).mean().item()
    assert best == pytest.approx(-15 * (1 + math.log(2 * math.pi * error)), abs=1e-10)
    for factor in (0.5, 0.97, 1.03, 2.0):
        fixed = of_tensor("Gaussian", mean, scale="fixed", std=factor * math.sqrt(error)).double()
        assert fixed(mean).log_prob(x).mean().item() < best - 1e-3
    evaluated = likelihood.eval()(mean).log_prob(x).mean().item()  # one batch seen: the same number
    assert evaluated == pytest.approx(best, abs=1e-10)


def test_the_followed_scale_is_the_mean_of_the_first_batches_and_fixed_in_evaluation():
    likelihood = of_tensor("Gaussian", torch.zeros(1, 4, *SHAPE, dtype=F64), scale="optimal", std=7.0).double().train()
    assert likelihood.log_scale.exp().item() == pytest.approx(7.0, rel=1e-6)
    errors = []
    for step in range(60):
        x = images(4) * (step + 1) / 60
        likelihood(normal(1, 4, 2)).log_prob(x)
        errors.append(x.square().mean().item())
        if step == 49:
            assert likelihood.log_scale.exp().item() ** 2 == pytest.approx(sum(errors) / 50, rel=1e-12)
    followed = sum(errors[:50]) / 50
    for error in errors[50:]:
        followed += 0.02 * (error - followed)
    assert likelihood.log_scale.exp().item() ** 2 == pytest.approx(followed, rel=1e-12)

    state = {name: value.clone() for name, value in likelihood.state_dict().items()}
    assert set(state) == {"log_scale", "batches"} and state["batches"] == 60
    px, x = likelihood.eval()(normal(1, 4, 2)), images(4)
    together = px.log_prob(x)
    alone = torch.stack([px.select(slice(i, i + 1)).log_prob(x[i : i + 1])[0, 0] for i in range(4)])
    assert torch.equal(together[0], alone)  # a density: it does not depend on the other images
    assert all(torch.equal(likelihood.state_dict()[name], value) for name, value in state.items())


def test_looking_without_gradients_does_not_move_the_followed_scale():
    likelihood = member("Gaussian optimal").train()
    with torch.no_grad():
        likelihood(normal(1, 4, 4)).log_prob(images(4))
    assert likelihood.batches == 0


@pytest.mark.parametrize(("name", "size"), [("Gaussian", "std"), ("Laplace", "b")])
def test_a_scale_per_pixel_is_the_least_one_plus_the_exponential(name, size):
    raw = torch.tensor([-1e4, -80.0, -5.0, 0.0, 2.0, 80.0], dtype=F64)
    outputs = torch.cat([torch.zeros(6, dtype=F64), raw]).reshape(1, 1, 12)
    px = of_tensor(name, outputs, scale="per-pixel", **{size: 0.3}).double()(normal(1, 1, 2))
    log_scale = px.log_std if name == "Gaussian" else px.log_scale
    assert torch.allclose(log_scale.flatten(), torch.log(2.0**-12 + 0.3 * raw.exp()), rtol=1e-6, atol=0)
    assert log_scale.min() >= math.log(2.0**-12)


# --- logistics ---


def test_a_mixture_of_one_is_a_discretised_logistic():
    outputs, x = 3 * normal(2, 3, 4, 3, 5), images(3)
    one = of_tensor("DiscretisedLogistic", outputs)(normal(2, 3, 2))
    weight = normal(2, 3, 2, 3, 5, seed=1)
    other = of_tensor("DiscretisedLogisticMixture", torch.cat([weight, outputs], 2), components=1)(normal(2, 3, 2))
    assert torch.equal(one.log_prob(x), other.log_prob(x)) and torch.equal(one.mean, other.mean)


def test_a_mixture_of_equal_components_is_one_of_them():
    """Three components that the decoder moves to one place, whatever their weights."""
    centre, log_scale, x = normal(1, 4, *SHAPE), normal(1, 4, *SHAPE, seed=1), images(4)
    shift = torch.tensor([1 / 3, 0.0, -1 / 3], dtype=F64).repeat_interleave(2)[:, None, None] * 2
    outputs = torch.cat(
        [normal(1, 4, 6, 3, 5, seed=2), centre.repeat(1, 1, 3, 1, 1) + shift, log_scale.repeat(1, 1, 3, 1, 1)], 2
    )
    mixed = of_tensor("DiscretisedLogisticMixture", outputs, components=3)(centre)
    one = of_tensor("DiscretisedLogistic", torch.cat([centre, log_scale], 2))(centre)
    assert (mixed.log_prob(x) - one.log_prob(x)).abs().max() < 1e-4  # starting centres are float32


def test_fresh_components_differ():
    px = of_tensor("DiscretisedLogisticMixture", torch.zeros(1, 1, 30, 3, 5))(torch.zeros(1, 1, 2))
    assert px.centre[0, 0, ::2, 0, 0].tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: likelihoods.Gaussian(d, scale="per-pixl"), "did you mean 'per-pixel'"),
        (lambda d: likelihoods.Laplace(d, scale="optimal"), "unknown scale 'optimal'"),
        (lambda d: likelihoods.Gaussian(d, std=0.0), "std is 0.0: expected a finite number above 0"),
        (lambda d: likelihoods.Laplace(d, b=math.nan), "b is nan"),
        (lambda d: likelihoods.DiscretisedLogisticMixture(d, 0), "components is 0"),
        (lambda d: likelihoods.Categorical(d)(torch.zeros(1, 2, 4)), "gives 3 channels, expected a multiple of 256"),
        (
            lambda d: likelihoods.DiscretisedLogistic(d)(torch.zeros(1, 2, 4)),
            "gives 3 channels, expected a multiple of 2",
        ),
        (lambda d: likelihoods.Gaussian(d, "per-pixel")(torch.zeros(1, 2, 4)), "outputs(image_shape)"),
        (lambda d: likelihoods.DiscretisedLogisticMixture(d, 2)(torch.zeros(1, 2, 4)), "a multiple of 6"),
    ],
)
def test_bad_input_is_told(make, message):
    with pytest.raises(UsageError) as caught:
        make(ConvDecoder((4,), (6,), (3, 3, 5)))
    assert message in str(caught.value)


def test_what_a_bfloat16_decoder_says_is_scored_in_float32():
    for name in MEMBERS:
        likelihood = member(name).float()
        z, x = normal(2, 3, 4).float(), images(3).float()
        exact = likelihood(z).log_prob(x)
        with torch.autocast("cpu", torch.bfloat16):
            px = likelihood(z)
            log_p = px.log_prob(x)
        assert log_p.dtype == px.mean.dtype == torch.float32
        assert (log_p - exact).abs().max() < 0.03 * exact.abs().max()
