"""Every model class of pythae that the pieces span, as a composition: built, trained, evaluated, saved, reloaded, sampled."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vaelab.compositions import NOT_HERE, PYTHAE, outputs, parse
from vaelab.data.datasets import Dataset, Images, load
from vaelab.data.protocol import protocol
from vaelab.errors import UsageError
from vaelab.evaluation import evaluate
from vaelab.recipes import recipe
from vaelab.registry import COMPONENTS, build, spec
from vaelab.rng import stream
from vaelab.run import Run
from vaelab.running import train

ROOT = Path(__file__).parents[2]
SMALL = {"latent_dim": 4, "hidden": (32,), "epochs": 1, "batch_size": 50}


@pytest.fixture(scope="module")
def digits():
    data = load("digits")
    return Dataset(
        data.name, Images(data.train.pixels[:300], data.train.labels[:300]),
        Images(data.test.pixels[:60], data.test.labels[:60]), data.classes, data.source,
    )  # fmt: skip


@pytest.mark.parametrize("name", PYTHAE)
def test_a_row_of_the_table(name, digits, tmp_path):
    wanted = recipe("vae", digits.shape, **{"images": len(digits.train), **SMALL, **PYTHAE[name]})
    run = train(wanted, digits, tmp_path / "run")
    record = run.history()[-1]
    assert math.isfinite(record["test"]["distortion"])
    found = evaluate(run.model(), digits, protocol(wanted.protocol), k=20)
    posterior = wanted.model["posterior"]["class"]
    assert (found.quantities["elbo"].mean is None) == (posterior == "posteriors.Delta")
    assert math.isfinite(found.quantities["distortion"].mean)

    again = Run.open(tmp_path / "run")
    assert again.recipe() == wanted
    x = protocol(wanted.protocol).test_set(digits.test.pixels[:5])
    first, second = run.model(), again.model()
    with torch.no_grad():
        assert torch.equal(first.encode(x).mean, second.encode(x).mean)
        samples = second.sample(7, generator=stream(0, "sample")).mean
    assert samples.shape == (1, 7, *digits.shape)
    assert torch.isfinite(samples).all()


def test_the_documented_table_is_this_table():
    text = (ROOT / "docs" / "compositions.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("## Arguments")[0].splitlines() if line.startswith("| `")]
    for name, fields in PYTHAE.items():
        (row,) = [line for line in rows if line.startswith(f"| `{name}` |")]
        for value in fields.values():
            assert f"`{value}`" in row or f" {value} " in row, (name, value)
    for name in NOT_HERE:
        assert f"`{name}`" in text


LIKELIHOODS = [path.split(".")[1] for path in COMPONENTS if path.startswith("likelihoods.")]


@pytest.mark.parametrize(
    "expression",
    [
        *LIKELIHOODS,
        "Gaussian(scale='per-pixel')",
        "Laplace(scale='per-pixel')",
        "DiscretisedLogisticMixture(components=3)",
    ],
)
def test_a_decoder_is_as_wide_as_its_likelihood_reads(expression):
    wanted = parse(expression, "likelihoods")
    shape = (3, 5, 4)
    decoder = spec("nn.MLP", in_shape=[2], hidden=[8], out_shape=[outputs(wanted) * 3, 5, 4])
    px = build({**wanted, "decoder": decoder})(torch.zeros(1, 6, 2))
    assert px.mean.shape == (1, 6, *shape)
    assert px.log_prob(torch.zeros(6, *shape)).shape == (1, 6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ELBO(4)", "name the arguments"),
        ("ELBO(beta=__import__('os'))", "unknown schedule"),
        ("ELBO(**{})", "is not one of"),
        ("ELBO(beta=[[1]])", "is not one of"),
        ("ELBO.mean", "is not one of"),
        ("lambda: 1", "is not one of"),
        ("", "is not one of"),
        ("(" * 10_000, "is not one of"),
        ("ELBE", "did you mean 'ELBO'"),
    ],
)
def test_what_is_not_an_expression_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse(text, "objectives")


def test_case_does_not_matter_and_schedules_may_stand_inside():
    assert parse("elbo(beta=linear(0, 1, 500))", "objectives") == spec(
        "objectives.ELBO", beta=spec("schedules.Linear", start=0, end=1, steps=500)
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"objective": "STL", "posterior": "Planar"}, "flow"),
        ({"objective": "DReG", "posterior": "Delta", "k": 4}, "Dirac"),
        ({"objective": "ELBO", "posterior": "Delta"}, "Dirac"),
        ({"objective": "MIWAE(m=3)", "k": 4}, "m"),
        ({"objective": "BetaTC", "posterior": "FullGaussian"}, "factoris"),
        ({"prior": "VampPrior", "posterior": "Delta", "objective": "ELBO(beta=0)"}, "VampPrior"),
        ({"likelihood": "Gaussian"}, "measure|protocol"),
        ({"prior": "LabelGaussian"}, "classes"),
        ({"classes": 3}, "label"),
        ({"objective": "ELBO(bta=2)"}, "cannot be built"),
        ({"objective": "ELBO(beta='a')"}, "beta"),
        ({"objective": "IWAE", "k": 0}, "k is 0"),
    ],
)
def test_what_does_not_combine_says_why_and_leaves_nothing(fields, said, digits, tmp_path):
    with pytest.raises(Exception, match=said) as caught:
        train(recipe("vae", digits.shape, **{**SMALL, **fields}), digits, tmp_path / "run")
    assert getattr(caught.value, "exit_code", None) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("network", ["dense", "conv", "residual"])
def test_a_conditional_model_end_to_end(network, digits, tmp_path):
    wanted = recipe("vae", digits.shape, **SMALL, network=network, channels=(8, 8), classes=10, prior="LabelGaussian")
    run = train(wanted, digits, tmp_path / "run")
    model = run.model()
    with pytest.raises(UsageError, match="conditional"):
        model.sample(3)
    found = evaluate(model, digits, protocol("dynamic"), k=20)
    assert np.isfinite(found.quantities["elbo"].mean)
    c = torch.arange(10)
    a, b = (model.sample(10, c.roll(i), generator=stream(0, "sample")).mean for i in (0, 1))
    assert a.shape == (1, 10, *digits.shape)
    assert not torch.allclose(a, b)


def test_a_decoder_gives_logits_and_the_likelihood_applies_the_only_sigmoid(digits):
    """Others end the decoder in a sigmoid and apply another: all-zero weights would then decode to 0.62, not to 1/2."""
    model = build(recipe("vae", digits.shape, **SMALL).model)
    with torch.no_grad():
        for parameter in model.likelihood.parameters():
            parameter.zero_()
        assert torch.equal(model.decode(torch.ones(1, 2, 4)).mean, torch.full((1, 2, *digits.shape), 0.5))
        last = list(model.likelihood.parameters())[-1]
        last.fill_(3.0)
        torch.testing.assert_close(model.decode(torch.ones(1, 2, 4)).mean.mean(), torch.sigmoid(torch.tensor(3.0)))


def test_training_sees_no_test_image(digits, tmp_path):
    """Other test images give the same weights, bit for bit."""
    wanted = recipe("vae", digits.shape, **SMALL)
    turned = Dataset(
        digits.name, digits.train, Images(255 - digits.test.pixels, digits.test.labels), digits.classes, digits.source
    )
    one, other = (train(wanted, data, tmp_path / str(i)).model() for i, data in enumerate((digits, turned)))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
