"""Networks that start from the mean image: what they compute, and that runs keep it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vaelab.data.datasets import Images
from vaelab.data.protocol import protocol
from vaelab.errors import Interrupted, UsageError
from vaelab.nn import MLP, AroundMean, Centred
from vaelab.recipes import recipe
from vaelab.run import Run
from vaelab.running import resume, train
from vaelab.training import initial_model


def test_the_mean_is_taken_from_the_input_and_its_logit_added_to_the_output():
    inside, mean = nn.Linear(3, 3), torch.tensor([0.25, 0.5, 1.0])
    x = torch.rand(5, 3)
    centred, around = Centred(inside, (3,)), AroundMean(inside, (3,))
    assert torch.equal(centred(x), inside(x)) and torch.equal(around(x), inside(x))
    centred.start_at(mean)
    around.start_at(mean)
    assert torch.equal(centred(x), inside(x - mean))
    # a pixel that is always on is taken to be on 999 times of 1000
    expected = inside(x) + torch.tensor([-1.0986123, 0.0, 6.9067548])
    assert (around(x) - expected).abs().max() < 1e-4  # 1 - 0.999 in float32
    assert [name for name, _ in centred.named_parameters()] == ["network.weight", "network.bias"]


@pytest.mark.parametrize("name", ["grey", "dynamic"])
def test_an_untrained_model_shows_the_mean_image_of_its_protocol(digits, name):
    chosen = recipe("mnist-fast", digits.shape, data="digits", protocol=name)
    model = initial_model(chosen, digits)
    with torch.no_grad():  # the network inside says nothing
        for parameter in model.likelihood.decoder.parameters():
            parameter.zero_()
        shown = model.decode(torch.randn(1, 7, 20)).mean
    mean = torch.from_numpy(digits.train.pixels).float().mean(0) / 255
    bound = 1.1e-3 if name == "grey" else 5 * (mean * (1 - mean) / len(digits.train)).sqrt() + 1.1e-3  # drawn bits
    assert ((shown[0, 0] - mean).abs() <= bound).all()
    assert ((model.encoder.constant - shown[0, 0]).abs() <= 1.1e-3).all()


def test_the_start_reads_training_images_alone(digits):
    chosen = recipe("mnist-fast", digits.shape, data="digits")
    other = replace(digits, test=Images(255 - digits.test.pixels, digits.test.labels))
    assert torch.equal(initial_model(chosen, digits).encoder.constant, initial_model(chosen, other).encoder.constant)


def test_a_run_keeps_its_start_and_goes_on_from_it_exactly(digits, tmp_path):
    chosen = recipe("mnist-fast", digits.shape, data="digits", batch_size=256, epochs=3)
    whole = train(chosen, digits, tmp_path / "whole")
    steps = iter([None, None, None, "SIGTERM"])
    with pytest.raises(Interrupted):
        train(chosen, digits, tmp_path / "broken", stop=lambda: next(steps))
    broken = resume(Run.open(tmp_path / "broken"), digits)
    a, b = whole.model().state_dict(), broken.model().state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(a["encoder.constant"], initial_model(chosen, digits).encoder.constant)
    assert a["encoder.constant"].abs().max() > 0.1 and a["likelihood.decoder.constant"].min() < -3
    x = protocol("grey").test_set(digits.test.pixels[:4])
    with torch.no_grad():
        assert torch.equal(whole.model().encode(x).mean, broken.model().encode(x).mean)


def test_a_start_from_the_mean_is_worth_nats(digits, tmp_path):
    values = {}
    for start in ("random", "mean"):
        chosen = recipe("mnist-fast", digits.shape, data="digits", start=start, batch_size=256, epochs=1)
        test = train(chosen, digits, tmp_path / start).history()[-1]["test"]
        values[start] = test["rate"] + test["distortion"]
    assert values["mean"] < values["random"] - 3


def test_an_unknown_start_or_rate_is_refused(digits):
    with pytest.raises(UsageError, match="start"):
        recipe("mnist-fast", digits.shape, start="median")
    with pytest.raises(UsageError, match="rates"):
        recipe("mnist-fast", digits.shape, rates="square")
    with pytest.raises(UsageError, match="beta2"):
        recipe("mnist-fast", digits.shape, beta2=1.0)


def test_any_network_can_be_centred():
    network = Centred(MLP((1, 4, 4), (8,), (3,)), (1, 4, 4))
    network.start_at(torch.full((1, 4, 4), 0.5))
    assert network(torch.rand(2, 5, 1, 4, 4)).shape == (2, 5, 3)
