"""The training loop, in plain sight.

One step: take a batch of bytes, let the protocol make it what the model sees, trace, estimate, differentiate, update.
The data set lives in memory as bytes; there are no loader processes. All noise of step s comes from the stream
("noise", s), and the order of epoch e from ("order", e): see `vaelab.rng`. What else a step depends on is in a
`vaelab.checkpoint.Snapshot`, so that a training that was interrupted goes on with the same bits.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vaelab import heap
from vaelab.checkpoint import Snapshot, untrained
from vaelab.data.datasets import Dataset, Images
from vaelab.data.protocol import Protocol, check
from vaelab.data.protocol import protocol as protocol_named
from vaelab.errors import Interrupted, NonFiniteError, NonFiniteStep, RunError, UsageError
from vaelab.meter import Meter, Pass, Progress
from vaelab.models.vae import VAE
from vaelab.native.calls import adding_gradients
from vaelab.native.layers import suspended
from vaelab.native.pace import Pace
from vaelab.native.step import fused
from vaelab.nn.mean import AroundMean, Centred
from vaelab.objectives import Objective
from vaelab.optim import Optimiser
from vaelab.precision import choose
from vaelab.recipes import Recipe, Training
from vaelab.registry import build
from vaelab.rng import stream, stream_seed
from vaelab.schedules import LEARNING_RATE

MEAN_OF = 10_000
"""Training images whose mean a model may start from, evenly spaced."""
Record = dict[str, Any]
"""One line of metrics.jsonl: epoch, step, seconds of training, lr, and rate and distortion on train and test."""


def fit(
    model: VAE,
    objective: Objective,
    data: Dataset,
    protocol: Protocol,
    training: Training,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_epoch: Callable[[Record], None] = lambda record: None,
    stop: Callable[[], str | None] = lambda: None,
    keep: Callable[[Snapshot], None] = lambda snapshot: None,
    keep_every: float = math.inf,
    start: Snapshot | None = None,
) -> list[Record]:
    """Fit a model to a data set. The model is changed in place, and holds the averaged weights afterwards.

    On a CPU the process keeps up to 256 MiB of free memory from then on, see `vaelab.heap`.

    Args:
        model: a `VAE`; a conditional one is given the labels.
        objective: what is differentiated, see `vaelab.objectives`.
        data: images as bytes.
        protocol: how bytes become what the model sees.
        training: epochs, batch size, optimiser …
        seed: the root of all randomness.
        device: where to train.
        on_progress: called a few times a second.
        on_epoch: called with each epoch's record.
        stop: asked after each step, or after a few that begin within 20 ms; a reason ends training with `Interrupted`, the
            model kept as it is.
        keep: given a snapshot every `keep_every` seconds, and where `stop` ends training.
        keep_every: seconds; with 0 after each step.
        start: the snapshot to go on from, of a training with the same arguments.

    Returns:
        One record for each epoch.

    Raises:
        UsageError: the likelihood does not match the protocol, or the batch is larger than the data.
        NonFiniteError: the loss or its gradient is not finite, and `training.on_nonfinite` is "stop"; names the step.
        Interrupted: `stop` gave a reason.
        RunError: the snapshot is of another training.
    """
    _check_fit(model, data, protocol, training)
    device = torch.device(device)
    if device.type == "cpu":
        heap.keep()
    model.to(device).train()
    pixels = torch.from_numpy(data.train.pixels).to(device)
    test = protocol.test_set(data.test.pixels).to(device)
    labels, test_labels = labels_for(model, data.train, device), labels_for(model, data.test, device)
    precision = choose(training.precision, device)
    steps_per_epoch = math.ceil(len(pixels) / training.batch_size)
    steps = steps_per_epoch * training.epochs
    threads = torch.get_num_threads()
    history: list[Record] = []
    seconds, step, skipped, meter = 0.0, 0, 0, Meter()

    def now() -> float:
        return seconds + time.perf_counter() - began

    def snapshot() -> Snapshot:
        return Snapshot(step, now(), list(history), meter.state(), skipped, optimiser.state(), untrained(model),
                        _generators(device))  # fmt: skip

    def noise(step: int) -> torch.Generator:
        return generator.manual_seed(stream_seed(seed, "noise", step))

    def differentiate(batches: Tensor, step: int) -> list[Pass]:
        """The pass of one batch: the parameters hold the gradient of the objective afterwards. Or those of several, with the
        updates between them."""
        if whole is not None:
            return whole(batches, noise, step)
        drawn = noise(step)
        x = protocol.training_batch(pixels, drawn, batches)
        with precision.autocast(device):
            trace = model.trace(x, None if labels is None else labels[batches], k=training.k, generator=drawn)
        loss = objective(trace, step).loss
        with adding_gradients():
            loss.backward()
        return [Pass.of(trace, loss)]

    with _own_generator(seed, device), precision.networks(model):
        optimiser = Optimiser(
            model, training.optimiser, training.lr, LEARNING_RATE[training.schedule], steps, training.clip, training.average,
            bfloat16=precision.name == "bfloat16", beta2=training.beta2, rates=training.rates,
        )  # fmt: skip
        try:
            if start is not None:
                history, seconds, step, skipped = list(start.history), start.seconds, start.step, start.skipped
                _restore(start, model, optimiser, meter, device)
            own = precision.name == "bfloat16" and device.type == "cpu"
            whole = (
                fused(model, objective, pixels, protocol, training.batch_size, training.k, optimiser) if own else None
            )
            buffers = [] if whole else list(model.buffers())  # which a network may change in its forward pass
            generator = torch.Generator(device)
            pace = Pace(chooses=whole is not None and optimiser.muon is None)
            most = 1 if whole is None or training.average or not keep_every else whole.most  # steps at once
            kept = began = time.perf_counter()
            while len(history) < training.epochs:
                epoch = len(history) + 1
                order = torch.randperm(len(pixels), generator=stream(seed, "order", epoch)).to(device)
                pace.begin()
                while step < epoch * steps_per_epoch:
                    at = (step - (epoch - 1) * steps_per_epoch) * training.batch_size
                    before = [buffer.clone() for buffer in buffers]
                    pace.start()
                    ahead = min(pace.ahead(most), epoch * steps_per_epoch - step)
                    passes = differentiate(order[at : at + ahead * training.batch_size], step)
                    for passed in passes:
                        norm = optimiser.step(
                            step, not math.isfinite(passed.loss), passed.gradient_norm, passed.updated
                        )
                        if math.isfinite(passed.loss) and math.isfinite(norm):
                            meter.add(passed, norm, training.clip)
                        else:
                            for buffer, old in zip(buffers, before, strict=True):
                                buffer.copy_(old)  # the model is as it was before the step
                            if training.on_nonfinite == "stop":
                                keep(snapshot())
                                raise _not_finite(step, epoch, passed.loss)
                            skipped += 1
                        step += 1
                    pace.step(len(passes), ahead)
                    if meter.due() and meter.steps:  # none if all were left out
                        on_progress(meter.progress(epoch, training, step, steps, now(), skipped))
                    if reason := stop():
                        keep(snapshot())
                        raise Interrupted(reason, f"after step {step} of {steps}")
                    if time.perf_counter() - kept >= keep_every and step < epoch * steps_per_epoch:
                        keep(snapshot())
                        kept = time.perf_counter()
                seconds, began = now(), time.perf_counter()
                pace.restore()

                # the curve is followed in the training's precision, which is faster; its last point is in float32
                followed = suspended(model) if epoch == training.epochs else precision.autocast(device)
                with optimiser.evaluated(), followed:
                    tested = test_metrics(model, test, test_labels, seed)
                record = _record(epoch, step, seconds, len(pixels), meter, tested, skipped)
                history.append(record)
                meter = Meter()
                on_epoch(record)
                began = time.perf_counter()  # evaluation does not count
                if epoch < training.epochs and began - kept >= keep_every:
                    keep(snapshot())
                    kept = time.perf_counter()
        finally:  # whatever happened, the model is left with float32 weights of its own
            torch.set_num_threads(threads)
            optimiser.finish()
            model.eval()
    return history


def _record(
    epoch: int, step: int, seconds: float, images: int, meter: Meter, tested: dict[str, float | None], skipped: int
) -> Record:
    """Of an epoch. Raises NonFiniteError where a number in it is not finite."""
    if not meter.steps:
        raise NonFiniteError(f"all steps of epoch {epoch} were skipped, since they were not finite: lower --lr")
    rate, distortion = meter.means()
    if not all(value is None or math.isfinite(value) for value in (rate, distortion, *tested.values())):
        raise NonFiniteError(
            f"rate or distortion is not finite after step {step - 1} (epoch {epoch}): lower --lr, "
            "or try --precision float32"
        )
    return {
        "epoch": epoch,
        "step": step,
        "seconds": round(seconds, 3),
        "images_per_second": round(images * epoch / seconds, 1),
        "gradient_norm": meter.gradient(),
        "skipped_steps": skipped,
        "train": {"rate": rate, "distortion": distortion},
        "test": tested,
    }


def _not_finite(step: int, epoch: int, loss: float) -> NonFiniteStep:
    what = "the gradient" if math.isfinite(loss) else "the loss"
    given = "not finite" if math.isfinite(loss) else str(loss)
    return NonFiniteStep(
        f"{what} of step {step} (epoch {epoch}) is {given}: lower --lr, try --precision float32, "
        "or leave such steps out with --on-nonfinite skip"
    )


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The states of the global generators that a network may draw from."""
    found = {"cpu": torch.get_rng_state()}
    return found if device.type == "cpu" else found | {"cuda": torch.cuda.get_rng_state(device)}


def _restore(start: Snapshot, model: nn.Module, optimiser: Optimiser, meter: Meter, device: torch.device) -> None:
    """Raises RunError where the snapshot is of another training."""
    optimiser.load(start.optimiser)
    own = untrained(model)
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in start.model.items()}:
        raise RunError("this checkpoint is of another model: train again, without --resume")
    for name, tensor in own.items():
        tensor.copy_(start.model[name])
    try:
        meter.load(start.meter)
        torch.set_rng_state(start.generators["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(start.generators["cuda"], device)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise RunError("this checkpoint is not one of this version: train again, without --resume") from None


@contextmanager
def _own_generator(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generator for whoever draws from it (dropout in a user's network), and as it was afterwards."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(stream_seed(seed, "global"))
        yield


def check_recipe(recipe: Recipe, data: Dataset) -> None:
    """Refuse a recipe that cannot be trained on a data set, before anything is written.

    The parts are built, and the objective reads one trace of a few images: what does not combine says so here.

    Raises:
        UsageError: a part that cannot be built, or a combination that does not exist.
        NoDensity: an objective that needs a density which a part does not have.
    """
    try:
        model, objective = initial_model(recipe), build(recipe.objective)
    except RunError as error:
        raise UsageError(str(error)) from None
    protocol = protocol_named(recipe.protocol)
    _check_fit(model, data, protocol, recipe.training)
    noise = stream(recipe.seed, "check")
    last = len(data.train) % recipe.training.batch_size or recipe.training.batch_size
    few = min(4, last)  # no more than the smallest batch: some objectives compare images
    x = protocol.training_batch(torch.from_numpy(data.train.pixels[:few]), noise)
    labels = labels_for(model, data.train)
    with _says_what_does_not_fit():
        trace = model.trace(x, None if labels is None else labels[:few], k=recipe.training.k, generator=noise)
        objective(trace, 0)


@contextmanager
def _says_what_does_not_fit() -> Iterator[None]:
    """A network whose shapes do not fit is the user's to mend, and torch's message says where."""
    try:
        yield
    except RuntimeError as error:
        raise UsageError(f"the parts of this model do not fit together: {error}") from None


def labels_for(model: VAE, images: Images, device: torch.device | str = "cpu") -> Tensor | None:
    """The labels (N,) that a conditional model needs, None for any other.

    Raises:
        UsageError: the images have no labels, or more kinds than the model knows.
    """
    if model.classes is None:
        return None
    if images.labels is None:
        raise UsageError("this model is conditional and the data has no labels: choose labelled data, or another model")
    if int(images.labels.max(initial=0)) >= model.classes:
        raise UsageError(
            f"the data has the label {int(images.labels.max())} and this model knows 0 to {model.classes - 1}: "
            "build it with more classes"
        )
    return torch.from_numpy(images.labels.astype("int64")).to(device)


def _check_fit(model: VAE, data: Dataset, protocol: Protocol, training: Training) -> None:
    check(protocol, model.likelihood)
    protocol.check_pixels(data.train.pixels)
    labels_for(model, data.train)
    labels_for(model, data.test)
    if training.batch_size > len(data.train):
        raise UsageError(
            f"batch_size is {training.batch_size} and there are {len(data.train)} training images: "
            f"choose --batch-size {max(1, min(32, len(data.train)))}, say"
        )


def initial_model(recipe: Recipe, data: Dataset | None = None) -> VAE:
    """The recipe's model with its first weights, from the stream "init"; torch's global generator is left as it was.

    Args:
        recipe: of the run.
        data: what it will be trained on: the parts that start from the mean image (`vaelab.nn.mean`) are given it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(recipe.seed, "init"))
        model: VAE = build(recipe.model)
    starting = [part for part in model.modules() if isinstance(part, Centred | AroundMean)]
    if data is not None and starting:
        some = torch.from_numpy(data.train.pixels[:: math.ceil(len(data.train) / MEAN_OF)])
        x = protocol_named(recipe.protocol).training_batch(some, stream(recipe.seed, "init", 0))
        for part in starting:
            part.start_at(x.mean(0))
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients, and the mode restored afterwards."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)


def test_metrics(
    model: VAE, images: Tensor, labels: Tensor | None, seed: int, batch_size: int = 1000
) -> dict[str, float | None]:
    """Rate and distortion of the test images, with the same noise at every call, in nats per image."""
    meter = Meter()
    with evaluating(model):
        for i, x in enumerate(images.split(batch_size)):
            c = None if labels is None else labels[i * batch_size : (i + 1) * batch_size]
            meter.add(Pass.of(model.trace(x, c, generator=stream(seed, "eval", i, device=images.device))))
    rate, distortion = meter.means()
    return {"rate": rate, "distortion": distortion}
