"""A resumed training has the bits of an uninterrupted one: for every optimiser, precision and kind of objective."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vaelab import likelihoods, objectives, posteriors, priors
from vaelab.checkpoint import Checkpoints
from vaelab.data.datasets import load
from vaelab.data.protocol import protocol
from vaelab.errors import DataError, Interrupted, NonFiniteError, RunError, UsageError
from vaelab.models.vae import VAE
from vaelab.nn.mlp import MLP
from vaelab.objectives import ELBO
from vaelab.recipes import OPTIMISERS, recipe
from vaelab.run import OWNER, Run, locked
from vaelab.running import resume, train
from vaelab.training import fit

TIMES = ("seconds", "images_per_second")


class Stop:
    """A reason to stop after so many steps, counted over all calls."""

    def __init__(self, *steps):
        self.steps, self.made = steps, 0

    def __call__(self):
        self.made += 1
        return "SIGTERM" if self.made in self.steps else None


def timeless(history):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in history]


def same(one: Run, other: Run) -> bool:
    """Weights bit for bit, and records but for their times."""
    a, b = one.model().state_dict(), other.model().state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a) and timeless(one.history()) == timeless(other.history())


@pytest.fixture
def whole(digits, tmp_path):
    """Trains a recipe without an interruption."""
    return lambda chosen: train(chosen, digits, tmp_path / "whole")


@pytest.fixture
def broken(digits, tmp_path):
    """Trains a recipe that is interrupted after some of its steps, and goes on each time."""

    def run(chosen, *steps, keep_every=math.inf):
        stop, path, told = Stop(*steps), tmp_path / "broken", []
        with pytest.raises(Interrupted, match=f"vaelab train --resume {path}"):
            train(chosen, digits, path, stop=stop, keep_every=keep_every)
        for _ in steps[1:]:
            with pytest.raises(Interrupted):
                resume(Run.open(path), digits, stop=stop, keep_every=keep_every)
        return resume(Run.open(path), digits, keep_every=keep_every, tell=told.append)

    return run


# twelve steps of two epochs: the first, within an epoch, the last of one, the last but one
STEPS = (1, 4, 6, 11)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_optimiser_and_precision_goes_on_with_the_same_bits(small, whole, broken, optimiser, precision):
    chosen = small(optimiser=optimiser, precision=precision, average=0.9, clip=1.0, hidden=(32, 32), decoder=(32, 32),
                   schedule="one-cycle")  # fmt: skip
    assert same(whole(chosen), broken(chosen, *STEPS))


KINDS = {
    "ELBO(beta=Linear(0, 1, 12))": {},
    "FreeBits(floor=0.1)": {},
    "Capacity(capacity=Linear(0, 5, 12), gamma=10.0)": {},
    "IWAE()": {"k": 4},
    "MIWAE(m=2)": {"k": 4},
    "PIWAE(m=2)": {"k": 4},
    "CIWAE(beta=0.5)": {"k": 4},
    "STL()": {},
    "DReG()": {"k": 4},
    "BetaTC(beta=4)": {},
    "DIP(kind=2, diagonal=1.0, off_diagonal=1.0)": {},
    "InfoVAE(alpha=0.5, scale=10.0)": {},
    "WAE(scale=10.0)": {"posterior": "Delta"},
    "RAE(l2=0.01, gradient_penalty=0.01)": {"posterior": "Delta"},
}


def test_every_kind_of_objective_is_here():
    kinds = {name for name, found in vars(objectives).items() if isinstance(found, type) and "__call__" in vars(found)
             and found.__module__ == objectives.__name__}  # fmt: skip
    assert {kind.partition("(")[0] for kind in KINDS} == kinds


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_objective_goes_on_with_the_same_bits(digits, whole, broken, kind):
    chosen = recipe("vae", digits.shape, data="digits", objective=kind, images=1437, latent_dim=2, hidden=(16,),
                    epochs=2, batch_size=256, **KINDS[kind])  # fmt: skip
    assert same(whole(chosen), broken(chosen, 3, 9))


@pytest.mark.parametrize(
    "fields",
    [
        {"likelihood": "Gaussian(scale='optimal')", "protocol": "dequantised"},  # a buffer that training changes
        {"prior": "VampPrior(pseudo_inputs=5)", "posterior": "InverseAutoregressive(layers=2)"},
        {"classes": 10, "prior": "LabelGaussian"},
        {"network": "conv", "channels": (4, 8)},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_learned_priors_buffers_labels_and_convolutions_go_on(digits, whole, broken, fields):
    chosen = recipe("vae", digits.shape, data="digits", latent_dim=2, hidden=(16,), epochs=2, batch_size=256, **fields)
    assert same(whole(chosen), broken(chosen, 5))


def test_mnist_goes_on_with_the_same_bits(tmp_path):
    data = load("mnist")
    part = replace(data, train=replace(data.train, pixels=data.train.pixels[:1500], labels=data.train.labels[:1500]),
                   test=replace(data.test, pixels=data.test.pixels[:100], labels=data.test.labels[:100]))  # fmt: skip
    chosen = recipe("mnist-2d", part.shape, epochs=2, hidden=(64, 64), decoder=(64, 64))
    one = train(chosen, part, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(chosen, part, tmp_path / "broken", stop=Stop(8))
    assert same(one, resume(Run.open(tmp_path / "broken"), part))


def test_checkpoints_change_nothing_and_are_gone_afterwards(small, digits, whole, tmp_path):
    kept = train(small(average=0.9), digits, tmp_path / "kept", keep_every=0.0)
    assert same(whole(small(average=0.9)), kept)
    assert sorted(p.name for p in kept.path.iterdir()) == [
        "config.json", "env.json", "metrics.jsonl", "model.safetensors", "run.lock"
    ]  # fmt: skip


class Dropping(nn.Module):
    """An encoder of a user's own, whose noise is torch's global one."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = MLP((1, 8, 8), (), (8,), out_activation=True), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.inner(x))


def test_a_network_that_draws_from_the_global_generator_goes_on_too(digits, small):
    def model():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return VAE(Dropping(), posteriors.Gaussian(8, 2), priors.StandardNormal(2),
                       likelihoods.Bernoulli(MLP((2,), (), (1, 8, 8))))  # fmt: skip

    training, found, kept = small().training, [], []
    for seed in (1, 2):  # whatever the global generator was
        torch.manual_seed(seed)
        found.append(model())
        fit(found[-1], ELBO(), digits, protocol("dynamic"), training)
        assert torch.initial_seed() == seed  # and it is as it was
    third = model()
    with pytest.raises(Interrupted):
        fit(third, ELBO(), digits, protocol("dynamic"), training, stop=Stop(5), keep=kept.append)
    found.append(model())
    fit(found[-1], ELBO(), digits, protocol("dynamic"), training, start=kept[-1])
    one, *others = ([p.detach() for p in m.parameters()] for m in found)
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


# --- what can be wrong with a folder ---


@pytest.fixture
def interrupted(small, digits, tmp_path):
    """A training that was interrupted, with a checkpoint of step 4 and one of step 5."""
    with pytest.raises(Interrupted):
        train(small(), digits, tmp_path / "run", stop=Stop(5), keep_every=0.0)
    return Run.open(tmp_path / "run")


def test_the_last_two_checkpoints_are_kept(interrupted):
    names = sorted(p.name for p in (interrupted.path / "checkpoint").iterdir())
    assert [name[:10] for name in names] == ["000000004-", "000000005-"]


@pytest.mark.parametrize("harm", ["cut", "bit", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(interrupted, digits, small, whole, harm):
    newest = max((interrupted.path / "checkpoint").iterdir())
    data = bytearray(newest.read_bytes())
    if harm == "bit":
        data[len(data) // 2] ^= 1
    newest.write_bytes({"cut": data[:-1], "bit": data, "empty": b""}[harm])
    told = []
    found = resume(interrupted, digits, tell=told.append, warn=told.append)
    assert len(told) == 2 and newest.name in told[0] and "the checkpoint before it is used" in told[0]
    assert told[1] == "from step 4" and same(whole(small()), found)


def test_a_damaged_one_does_not_push_out_those_that_are_made_after_it(interrupted, digits, small, whole):
    for path in (interrupted.path / "checkpoint").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(Interrupted):
        resume(interrupted, digits, stop=Stop(3))
    told = []
    found = resume(interrupted, digits, tell=told.append)
    assert told == ["from step 3"] and same(whole(small()), found)


def test_weights_of_the_moment_are_not_taken_for_the_last_ones(interrupted, digits, small, whole, monkeypatch):
    """Interrupted, which saves weights; resumed to the last record, and killed before its own are saved."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_model", lambda run, model: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(RunError, match="no room"):
            resume(interrupted, digits)
    assert len(interrupted.history()) == 2 and not interrupted.finished
    assert same(whole(small()), resume(interrupted, digits))


def test_what_a_killed_process_was_writing_is_removed(interrupted, digits):
    left = interrupted.path / "checkpoint" / ".000000009-ab.safetensors.1.tmp"
    left.write_bytes(b"half")
    with pytest.raises(Interrupted):
        resume(interrupted, digits, stop=Stop(1))
    assert not left.exists()
    (entry,) = interrupted.environment()["resumed"]
    assert entry["step"] == 5 and entry["torch"] == torch.__version__


def test_a_folder_that_was_not_yet_a_run_can_be_begun_again(digits, small, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "env.json").write_text("{}")
    (folder / ".config.json.77.tmp").write_text("{")
    assert train(small(), digits, folder).finished


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"epochs": 1}, {"precision": "bfloat16"}])
def test_another_configuration_is_refused(interrupted, digits, small, change):
    interrupted.configure(small(**change))
    with pytest.raises(RunError, match=r"the configuration of .* changed since its checkpoint"):
        resume(interrupted, digits)


def test_a_finished_run_is_never_begun_anew(digits, small, whole):
    run = whole(small())
    before = run.weights.read_bytes()
    records = (run.path / "metrics.jsonl").read_text()
    for damaged in (records[:-40], "nonsense\n" + records):
        (run.path / "metrics.jsonl").write_text(damaged)
        with pytest.raises(RunError, match="holds weights and no checkpoint"):
            resume(run, digits)
    (run.path / "metrics.jsonl").write_text(records)
    run.configure(small(epochs=3))
    with pytest.raises(RunError, match="holds weights and no checkpoint"):
        resume(run, digits)
    assert run.weights.read_bytes() == before
    run.configure(small())
    run.weights.write_bytes(before[:-1])
    with pytest.raises(RunError, match=r"model\.safetensors"):
        resume(run, digits)


def test_damaged_records_and_a_lost_environment_are_made_again(interrupted, digits, small, whole):
    (interrupted.path / "metrics.jsonl").write_text("nonsense\n")
    (interrupted.path / "env.json").unlink()
    assert same(whole(small()), resume(interrupted, digits))
    assert interrupted.environment()["torch"] == torch.__version__


def test_other_data_is_refused(interrupted, digits):
    other = replace(digits, train=replace(digits.train, pixels=255 - digits.train.pixels))
    with pytest.raises(DataError, match="other data"):
        resume(interrupted, other)
    (interrupted.path / "env.json").unlink()
    with pytest.raises(RunError, match=r"the data of .* changed"):
        resume(interrupted, other)


def test_it_goes_on_in_the_precision_it_was_begun_with(interrupted, digits, small, whole, monkeypatch):
    import vaelab.training as training

    asked = []
    choose = training.choose
    monkeypatch.setattr(training, "choose", lambda name, device: asked.append(name) or choose(name, device))
    resume(interrupted, digits)
    assert asked == ["float32"] == [interrupted.environment()["precision"]]


def test_without_a_whole_checkpoint_it_begins_again(interrupted, digits, small, whole):
    for path in (interrupted.path / "checkpoint").iterdir():
        path.write_bytes(b"nothing")
    (interrupted.path / "checkpoint" / ".000000009-ab.safetensors.1.tmp").write_bytes(b"half")
    told = []
    assert same(whole(small()), resume(interrupted, digits, tell=told.append, warn=told.append))
    assert told[-1] == "there is no checkpoint: from the first step" and len(told) == 3
    assert not (interrupted.path / "checkpoint").exists()


def test_a_checkpoint_of_another_model_is_refused(interrupted, digits, small, tmp_path):
    with pytest.raises(Interrupted):
        train(small(hidden=(8,)), digits, tmp_path / "other", stop=Stop(3))
    (theirs,) = (tmp_path / "other" / "checkpoint").iterdir()
    theirs.rename(interrupted.path / "checkpoint" / theirs.name.replace("000000003", "000000008"))
    with pytest.raises(RunError, match=r"the configuration of .* changed"):
        resume(interrupted, digits)


@pytest.mark.parametrize("harm", [{"meter": {}}, {"meter": {"sums": [1]}}, {"generators": {"cpu": torch.zeros(3)}}])
def test_a_checkpoint_that_was_made_up_is_refused(interrupted, digits, harm):
    checkpoints = Checkpoints(interrupted.path / "checkpoint")
    snapshot, _ = checkpoints.load()
    assert snapshot is not None
    checkpoints.save(replace(snapshot, step=9, **harm))
    with pytest.raises(RunError, match="not one of this version"):
        resume(interrupted, digits)


def test_a_finished_run_is_left_as_it_is(digits, small, whole):
    run, told = whole(small()), []
    before = {p.name: p.stat().st_mtime_ns for p in run.path.iterdir() if p.suffix != ".lock"}
    resume(run, digits, tell=told.append)
    assert told == [f"'{run.path}' is finished: all 2 epochs were trained"]
    assert {p.name: p.stat().st_mtime_ns for p in run.path.iterdir() if p.suffix != ".lock"} == before


def test_records_beyond_the_checkpoint_are_made_again(interrupted, digits, small, whole):
    with (interrupted.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 1, "step": 6}) + '\n{"epo')
    assert same(whole(small()), resume(interrupted, digits))


def test_a_second_training_in_one_folder_is_refused_and_names_the_first(interrupted, digits, small):
    with locked(interrupted.path), pytest.raises(RunError, match=r"is being trained by process \d+ on \S+, since 20"):
        resume(interrupted, digits)
    assert not (interrupted.path / OWNER).exists()
    with pytest.raises(UsageError, match=f"continue it with vaelab train --resume {interrupted.path}"):
        train(small(), digits, interrupted.path)


def test_the_lock_of_a_dead_process_is_no_lock(interrupted, digits, small, whole):
    (interrupted.path / OWNER).write_text('{"process": 1, "host": "elsewhere", "since": "2020-01-01"}')
    assert same(whole(small()), resume(interrupted, digits))
    assert not (interrupted.path / OWNER).exists()


# --- steps that are not finite ---


class Poisoned:
    """The ELBO, whose loss is not finite at some steps; of one kind only the gradient is not."""

    def __init__(self, steps, gradient=False):
        self.steps, self.gradient = steps, gradient

    def __call__(self, trace, step):
        estimate = ELBO()(trace, step)
        if step not in self.steps:
            return estimate
        factor = torch.full_like(estimate.loss, math.nan)
        if self.gradient:  # 0 in value, not a number in its derivative
            return replace(
                estimate, loss=estimate.loss + (0 * estimate.loss.detach() + 0 * estimate.loss).sqrt().sqrt()
            )
        return replace(estimate, loss=factor * estimate.loss)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_skipped_step_changes_nothing_and_is_counted(trained, small, gradient):
    with pytest.raises(NonFiniteError, match=r"of step 2 \(epoch 1\).*--on-nonfinite skip"):
        trained({"objective": Poisoned({2}, gradient)})
    training = replace(small().training, on_nonfinite="skip")
    weights = []

    def watched(trace, step):
        weights.append([p.detach().clone() for p in trace_parameters])
        return Poisoned({2, 3, 8}, gradient)(trace, step)

    from vaelab.training import initial_model

    model = initial_model(small())
    trace_parameters = list(model.parameters())
    data = load("digits")
    history = fit(model, watched, data, protocol("dynamic"), training)
    assert [record["skipped_steps"] for record in history] == [2, 3]
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True))
             for pair in itertools.pairwise(weights)]  # fmt: skip
    assert [step for step, different in enumerate(moved) if not different] == [2, 3, 8]
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_training_that_stopped_at_a_step_goes_on_without_it(digits, small, tmp_path, monkeypatch):
    import vaelab.running as running

    monkeypatch.setattr(running, "build", lambda spec, **how: Poisoned({7}) if "objectives" in str(spec["class"])
                        else build(spec, **how))  # fmt: skip
    from vaelab.registry import build

    with pytest.raises(NonFiniteError, match=r"step 7 .*vaelab train --resume .* --on-nonfinite skip"):
        train(small(), digits, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    snapshot, _ = Checkpoints(run.path / "checkpoint").load()
    assert snapshot is not None and snapshot.step == 7
    assert all(t.isfinite().all() for t in snapshot.optimiser.values())
    found = resume(run, digits, on_nonfinite="skip")
    assert found.finished and found.history()[-1]["skipped_steps"] == 1
    assert found.recipe().training.on_nonfinite == "skip"


def test_what_clips_is_counted(trained):
    norms = trained()[1][0]["gradient_norm"]
    limit = (norms["mean"] + norms["max"]) / 2
    clipped = trained(clip=limit)[1][0]["gradient_norm"]["clipped"]
    assert 0 < clipped < 1 and clipped * 6 == pytest.approx(round(clipped * 6))
