"""The training loop, in plain sight.

One step: take a batch of bytes, let the protocol make it what the model sees, trace, estimate, differentiate, update.
The data set lives in memory as bytes; there are no loader processes. All noise of step s comes from the stream
("noise", s), and the order of epoch e from ("order", e): see `vaelab.rng`.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.data.datasets import Dataset, Images
from vaelab.data.protocol import Protocol, check
from vaelab.data.protocol import protocol as protocol_named
from vaelab.errors import Interrupted, NoDensity, NonFiniteError, RunError, UsageError
from vaelab.models.vae import VAE
from vaelab.objectives import Objective
from vaelab.optim import Optimiser
from vaelab.precision import choose
from vaelab.recipes import Recipe, Training
from vaelab.registry import build
from vaelab.rng import stream, stream_seed
from vaelab.run import Run
from vaelab.schedules import LEARNING_RATE
from vaelab.trace import Trace


def text_of(metrics: dict[str, float | None]) -> str:
    """Rate and distortion in one line, for people."""
    rate, distortion = metrics["rate"], metrics["distortion"]
    return f"rate {'n/a' if rate is None else f'{rate:.2f}'}  distortion {distortion:.2f} nats"


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows; rate and distortion in nats per image, means over the epoch so far."""

    epoch: int
    epochs: int
    step: int
    steps: int
    rate: float | None
    distortion: float
    images_per_second: float
    seconds_left: float

    def text(self) -> str:
        """One line for a progress bar."""
        metrics = text_of({"rate": self.rate, "distortion": self.distortion})
        return f"epoch {self.epoch}/{self.epochs}  {metrics}  {self.images_per_second:,.0f} images/s"


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
) -> list[Record]:
    """Fit a model to a data set. The model is changed in place, and holds the averaged weights afterwards.

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
        stop: asked after each step; a reason ends training with `Interrupted`, the model kept as it is.

    Returns:
        One record for each epoch.

    Raises:
        UsageError: the likelihood does not match the protocol, or the batch is larger than the data.
        NonFiniteError: the loss is not finite; names the step.
        Interrupted: `stop` gave a reason.
    """
    _check_fit(model, data, protocol, training)
    device = torch.device(device)
    model.to(device).train()
    pixels = torch.from_numpy(data.train.pixels).to(device)
    test = protocol.test_set(data.test.pixels).to(device)
    labels, test_labels = labels_for(model, data.train, device), labels_for(model, data.test, device)
    precision = choose(training.precision, device)
    steps_per_epoch = math.ceil(len(pixels) / training.batch_size)
    steps = steps_per_epoch * training.epochs
    optimiser = Optimiser(
        model, training.optimiser, training.lr, LEARNING_RATE[training.schedule], steps, training.clip, training.average,
        bfloat16=precision.name == "bfloat16",
    )  # fmt: skip

    history: list[Record] = []
    seconds, step = 0.0, 0
    try:
        for epoch in range(1, training.epochs + 1):
            start, meter = time.perf_counter(), Meter(device)
            order = torch.randperm(len(pixels), generator=stream(seed, "order", epoch)).to(device)
            for batch in order.split(training.batch_size):
                noise = stream(seed, "noise", step, device=device)
                x = protocol.training_batch(pixels.index_select(0, batch), noise)
                c = None if labels is None else labels[batch]
                with precision.autocast(device):
                    trace = model.trace(x, c, k=training.k, generator=noise)
                loss = objective(trace, step).loss
                loss.backward()
                if not math.isfinite(loss.item()):
                    raise NonFiniteError(
                        f"the loss of step {step} (epoch {epoch}) is {loss.item()}: lower --lr, or try --precision float32"
                    )
                norm = optimiser.step(step)
                if not math.isfinite(norm):
                    raise NonFiniteError(
                        f"the gradient of step {step} (epoch {epoch}) is not finite: lower --lr, or try --precision float32"
                    )
                meter.add(trace, norm)
                step += 1
                if meter.due():
                    now = seconds + time.perf_counter() - start
                    on_progress(meter.progress(epoch, training.epochs, step, steps, training.batch_size, now))
                reason = stop()
                if reason:
                    raise Interrupted(reason, f"after step {step} of {steps}")
            seconds += time.perf_counter() - start

            rate, distortion = meter.means()
            # the curve is followed in the training's precision, which is faster; its last point is in float32
            followed = nullcontext() if epoch == training.epochs else precision.autocast(device)
            with optimiser.evaluated(), followed:
                tested = test_metrics(model, test, test_labels, seed)
            if not all(value is None or math.isfinite(value) for value in (rate, distortion, *tested.values())):
                raise NonFiniteError(
                    f"rate or distortion is not finite after step {step - 1} (epoch {epoch}): lower --lr, "
                    "or try --precision float32"
                )
            record = {
                "epoch": epoch,
                "step": step,
                "seconds": round(seconds, 3),
                "images_per_second": round(len(pixels) * epoch / seconds, 1),
                "gradient_norm": {"mean": meter.norm_sum / meter.steps, "max": meter.norm_max},
                "train": {"rate": rate, "distortion": distortion},
                "test": tested,
            }
            history.append(record)
            on_epoch(record)
    finally:  # whatever happened, the model is left with float32 weights of its own
        optimiser.finish()
        model.eval()
    return history


def train(
    recipe: Recipe,
    data: Dataset,
    path: Path,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], str | None] = lambda: None,
) -> Run:
    """Train a recipe into a new run folder; same seed, same machine, same threads: same bits.

    An interrupted training saves the weights it has and raises. Arguments and errors as in `fit`, and UsageError where
    the folder cannot be made.
    """
    check_recipe(recipe, data)
    model, objective = initial_model(recipe), build(recipe.objective)
    protocol = protocol_named(recipe.protocol)
    precision = choose(recipe.training.precision, torch.device(device))
    run = Run.create(
        path, recipe, device=str(device), data_fingerprint=data.fingerprint, data_source=data.source,
        precision=precision.name, precision_reason=precision.reason,
    )  # fmt: skip
    try:
        fit(
            model, objective, data, protocol, recipe.training, seed=recipe.seed, device=device,
            on_progress=on_progress, on_epoch=run.append, stop=stop,
        )  # fmt: skip
    except Interrupted:
        run.save_model(model)
        raise
    run.save_model(model)
    return run


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


def initial_model(recipe: Recipe) -> VAE:
    """The recipe's model with its first weights, from the stream "init"; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(recipe.seed, "init"))
        return build(recipe.model)


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
    meter = Meter(images.device)
    with evaluating(model):
        for i, x in enumerate(images.split(batch_size)):
            c = None if labels is None else labels[i * batch_size : (i + 1) * batch_size]
            meter.add(model.trace(x, c, generator=stream(seed, "eval", i, device=images.device)))
    rate, distortion = meter.means()
    return {"rate": rate, "distortion": distortion}


class Meter:
    """Sums of rate and distortion with their counts, so that unequal batches average rightly; in float64."""

    def __init__(self, device: torch.device, interval: float = 0.2) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.has_rate = True
        self.count, self.interval, self.last = 0, interval, time.perf_counter()
        self.steps, self.norm_sum, self.norm_max = 0, 0.0, 0.0

    def add(self, trace: Trace, gradient_norm: float = 0.0) -> None:
        distortion = trace.distortion.detach()
        try:
            rate = trace.rate.detach().sum()
        except NoDensity:
            rate, self.has_rate = torch.zeros((), device=distortion.device), False
        self.sums += torch.stack([rate, distortion.sum()]).double()
        self.count += len(distortion)
        self.steps += 1
        self.norm_sum, self.norm_max = self.norm_sum + gradient_norm, max(self.norm_max, gradient_norm)

    def means(self) -> tuple[float | None, float]:
        rate, distortion = (self.sums / self.count).tolist()
        return (rate if self.has_rate else None), distortion

    def due(self) -> bool:
        now = time.perf_counter()
        if now - self.last < self.interval:
            return False
        self.last = now
        return True

    def progress(self, epoch: int, epochs: int, step: int, steps: int, batch: int, seconds: float) -> Progress:
        rate, distortion = self.means()
        speed, left = batch * step / seconds, seconds / step * (steps - step)
        return Progress(epoch, epochs, step, steps, rate, distortion, speed, left)
