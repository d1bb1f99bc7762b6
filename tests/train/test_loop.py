"""What the loop records, and how it ends."""

import json
import math

import pytest
import torch

from vaelab import likelihoods, posteriors, priors
from vaelab.data.protocol import protocol
from vaelab.distributions import Delta
from vaelab.errors import Interrupted, NonFiniteError, UsageError
from vaelab.evaluation import codes_of
from vaelab.meter import Meter, Pass
from vaelab.models.vae import VAE
from vaelab.nn.mlp import MLP
from vaelab.objectives import ELBO
from vaelab.recipes import Training
from vaelab.run import Run
from vaelab.running import train
from vaelab.trace import Level, Trace
from vaelab.training import fit


def grey_vae(likelihood=likelihoods.GreyCrossEntropy):
    encoder, decoder = MLP((1, 8, 8), (), (8,), out_activation=True), MLP((2,), (), (1, 8, 8))
    return VAE(encoder, posteriors.Gaussian(8, 2), priors.StandardNormal(2), likelihood(decoder))


def test_a_record_holds_what_its_readers_need(trained):
    _, history = trained(epochs=2)
    assert [(r["epoch"], r["step"]) for r in history] == [(1, 6), (2, 12)]
    for record in history:
        assert set(record) == {"epoch", "step", "seconds", "images_per_second", "gradient_norm", "skipped_steps",
                               "train", "test"}  # fmt: skip
        for part in ("train", "test"):
            assert set(record[part]) == {"rate", "distortion"}
            assert record[part]["rate"] > 0 and 0 < record[part]["distortion"] < 64 * math.log(2) + 1
        assert 0 < record["gradient_norm"]["mean"] <= record["gradient_norm"]["max"]
        assert record["skipped_steps"] == 0 == record["gradient_norm"]["clipped"]
    assert history[0]["seconds"] <= history[1]["seconds"]


def test_each_epoch_is_told_as_it_ends(trained):
    told = []
    _, history = trained({"on_epoch": told.append})
    assert told == history


def test_the_bound_improves(trained):
    _, history = trained(epochs=15, lr=1e-2)
    bounds = [r["test"]["rate"] + r["test"]["distortion"] for r in history]
    assert bounds[-1] < bounds[0] - 5
    assert history[-1]["train"]["distortion"] < history[0]["train"]["distortion"] - 5


def test_a_short_last_batch_counts_by_its_images(trained):
    """1437 images in batches of 1000 and 437: the mean over images is not the mean over batches."""
    seen = []

    def spy(trace, step):
        seen.append((trace.rate.detach().double(), trace.distortion.detach().double()))
        return ELBO()(trace, step)

    _, history = trained({"objective": spy}, batch_size=1000, epochs=1, lr=0.05)
    rate, distortion = (torch.cat(part) for part in zip(*seen, strict=True))
    assert [len(part[0]) for part in seen] == [1000, 437]
    assert history[0]["train"]["rate"] == pytest.approx(rate.mean().item(), rel=1e-6)
    assert history[0]["train"]["distortion"] == pytest.approx(distortion.mean().item(), rel=1e-6)
    assert torch.stack([part[1].mean() for part in seen]).mean().item() != pytest.approx(
        history[0]["train"]["distortion"], rel=1e-4
    )


def test_a_meter_weighs_images_not_batches_and_knows_no_rate_of_a_dirac():
    meter = Meter()
    for distortions in ([1.0, 1.0, 1.0], [9.0]):
        q = Delta(torch.zeros(len(distortions), 2))
        meter.add(Pass.of(Trace(q, -torch.tensor([distortions]), (Level(q, q, q.rsample()),))))
    assert meter.means() == (None, 3.0)


def test_the_model_is_left_in_evaluation_mode_without_gradients(trained):
    model, _ = trained(epochs=1)
    assert not model.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_a_diverging_run_names_the_step(trained):
    with pytest.raises(NonFiniteError, match=r"step [1-9]\d* \(epoch 1\).*lower --lr") as caught:
        trained(lr=1e30, schedule="constant")
    assert caught.value.exit_code == 4


def test_weights_that_are_not_finite_are_found_at_the_first_step(digits, small):
    from vaelab.training import initial_model

    chosen = small()
    model = initial_model(chosen)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"step 0 \(epoch 1\)"):
        fit(model, ELBO(), digits, protocol("dynamic"), chosen.training)


def test_divergence_in_the_last_step_is_found_too(digits, small, tmp_path):
    """One step an epoch: the loss of step 0 is finite, the weights that it leaves are not."""
    chosen = small(batch_size=1437, epochs=1, lr=1e30, schedule="constant")
    with pytest.raises(NonFiniteError):
        train(chosen, digits, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or "NaN" not in metrics.read_text()


@pytest.mark.parametrize(("reason", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_training_saves_usable_weights(digits, small, tmp_path, reason, code, same_weights):
    from vaelab.training import initial_model

    asked = []

    def stop():
        asked.append(1)
        return reason if len(asked) == 8 else None

    chosen = small(average=0.9)
    with pytest.raises(Interrupted, match=f"{reason} after step 8 of 12") as caught:
        train(chosen, digits, tmp_path / "run", stop=stop)
    assert caught.value.exit_code == code
    run = Run.open(tmp_path / "run")
    assert not run.finished
    assert [record["epoch"] for record in run.history()] == [1]
    model = run.model()
    assert not same_weights(model, initial_model(chosen))
    assert math.isfinite(codes_of(model, protocol("dynamic").test_set(digits.test.pixels)).sum())


def test_a_finished_run_folder_is_complete(digits, small, tmp_path):
    run = train(small(epochs=1), digits, tmp_path / "run")
    assert run.finished
    names = {"config.json", "env.json", "metrics.jsonl", "model.safetensors", "run.lock"}
    assert {path.name for path in run.path.iterdir()} == names
    environment = json.loads((run.path / "env.json").read_text())
    assert {"vaelab", "code", "python", "torch", "threads", "command", "device", "precision"} <= set(environment)
    assert environment["data_fingerprint"] == digits.fingerprint


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(digits, small, tmp_path):
    with pytest.raises(UsageError, match="batch_size is 5000 and there are 1437"):
        train(small(batch_size=5000), digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "likelihood", "fitting"),
    [("dynamic", likelihoods.GreyCrossEntropy, "--protocol grey"),
     ("grey", likelihoods.Bernoulli, "--protocol dynamic or threshold")],
)  # fmt: skip
def test_a_likelihood_that_does_not_fit_the_protocol_is_told_which_do(digits, name, likelihood, fitting):
    with pytest.raises(UsageError, match=fitting):
        fit(grey_vae(likelihood), ELBO(), digits, protocol(name), Training(epochs=1))


def test_an_unknown_training_field_is_out_of_range_at_construction():
    for field, value in (("epochs", 0), ("lr", math.nan), ("lr", -1.0), ("clip", -1.0), ("average", 1.0), ("k", 0)):
        with pytest.raises(UsageError, match=f"{field} is {value}"):
            Training(**{field: value})
    with pytest.raises(UsageError, match="did you mean 'adam'"):
        Training(optimiser="adm")
