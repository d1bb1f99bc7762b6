"""Legibility: how readable a model's samples are, judged by a small classifier of the real images.

A classifier is trained on the training images and its own test accuracy is stated. Of the prior samples (decoder means)
it gives the share that it reads with probability above 0.9, and the entropy of the classes it reads: a model that draws
one perfect digit is legible and has entropy 0; ten classes in equal parts have log 10 = 2.303 nats.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from vaelab.data.datasets import Dataset
from vaelab.data.store import cache_dir
from vaelab.native import version
from vaelab.native.layers import accelerated_layers
from vaelab.precision import choose
from vaelab.rng import stream, stream_seed
from vaelab.run import replacing

CONFIDENT = 0.9
"""A sample counts as legible where the classifier's largest probability is above this."""


class Classifier(nn.Module):
    """Two strided convolutions and two linear layers, for images (C, H, W) of any size from 8x8."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.shape, self.classes = shape, classes
        side = math.ceil(math.ceil(height / 2) / 2) * math.ceil(math.ceil(width / 2) / 2)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * side, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) in [0, 1] to logits (N, classes)."""
        return self.head(self.features(x))

    @torch.no_grad()
    def probabilities(self, x: Tensor, batch_size: int = 500) -> Tensor:
        """Class probabilities (N, classes)."""
        return torch.cat([self(part).softmax(-1) for part in x.split(batch_size)])


@dataclass(frozen=True)
class Legibility:
    """Of n samples: the `share` read with probability above 0.9, and the entropy in nats of the classes read."""

    share: float
    class_entropy: float
    n: int


def classifier_for(
    data: Dataset, on_progress: Callable[[float], None] = lambda done: None
) -> tuple[Classifier | None, float | None]:
    """The classifier of a data set and its test accuracy; trained once, then kept in the user's cache.

    The same data, the same version of this file and the same kernels give the same classifier, so keeping it changes no number.
    Without labels there is none: (None, None).
    """
    if data.train.labels is None or data.test.labels is None:
        return None, None
    source = hashlib.sha256(Path(__file__).read_bytes() + version().encode()).hexdigest()[:12]
    path = cache_dir() / "classifiers" / f"{data.fingerprint}-{source}.safetensors"
    if path.is_file():
        with torch.random.fork_rng(devices=[]):
            model = Classifier(data.shape, _classes(data))
        try:
            load_model(model, str(path))
            return model.eval(), accuracy(model, data)
        except (SafetensorError, RuntimeError):
            path.unlink(missing_ok=True)  # damaged: made anew below
    model, test_accuracy = train_classifier(data, on_progress=on_progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_model(model, str(temporary))
    except OSError:
        pass  # a cache that cannot be written costs time, no more
    return model, test_accuracy


def train_classifier(
    data: Dataset, *, epochs: int = 2, seed: int = 0, on_progress: Callable[[float], None] = lambda done: None
) -> tuple[Classifier, float]:
    """Train the classifier on the training images, each moved by up to one pixel; returns it with its test accuracy.

    Args:
        data: must have labels.
        epochs: passes over images; more are made where there are few images, so that at least 450 steps are taken.
        seed: the root of all randomness.
        on_progress: called with the fraction done.
    """
    with _one_thread():
        model = _trained(data, epochs, seed, on_progress)
        return model, accuracy(model, data)


def _trained(data: Dataset, epochs: int, seed: int, on_progress: Callable[[float], None]) -> Classifier:
    assert data.train.labels is not None
    labels = torch.from_numpy(data.train.labels)
    pixels = torch.from_numpy(data.train.pixels)
    batch = 256
    epochs = max(epochs, math.ceil(450 / math.ceil(len(pixels) / batch)))
    steps = epochs * math.ceil(len(pixels) / batch)
    precision = choose("auto", torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "classifier"))
        model = Classifier(data.shape, _classes(data))
    peak = 6e-3
    optimiser = torch.optim.Adam(model.parameters(), peak, fused=True)
    step = 0
    with precision.networks(model):
        layout = (
            torch.contiguous_format if accelerated_layers(model) else torch.channels_last
        )  # as who computes reads images
        for epoch in range(epochs):
            noise = stream(seed, "classifier", epoch)
            for index in torch.randperm(len(pixels), generator=noise).split(batch):
                x = _shift(pixels[index], noise).float().div_(255)
                with precision.autocast(torch.device("cpu")):
                    logits = model(x.to(memory_format=layout))
                F.cross_entropy(logits.float(), labels[index]).backward()
                done = step / steps
                optimiser.param_groups[0]["lr"] = peak * min(1.0, 10 * done + 0.02) * (1 - done)
                optimiser.step()
                optimiser.zero_grad()
                step += 1
                if step % 20 == 0:
                    on_progress(step / steps)
    model.eval()
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """Other numbers of threads train another classifier, by rounding, and with one it can be made beside something else.

    474 steps beside other programs: 10.6 and 12.1 s with one thread, 63 and 77 s with two (n = 2).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accuracy(model: Classifier, data: Dataset) -> float:
    """Share of the test images that the classifier reads rightly."""
    read = model.probabilities(torch.from_numpy(data.test.pixels).float().div_(255)).argmax(-1)
    return (read == torch.from_numpy(data.test.labels)).double().mean().item()


def loaded(data: Dataset, weights: Mapping[str, np.ndarray]) -> Classifier:
    """The classifier of a data set that has these weights."""
    with torch.random.fork_rng(devices=[]):
        model = Classifier(data.shape, _classes(data))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return model.eval()


def legibility(model: Classifier, images: Tensor) -> Legibility:
    """Legibility of images (N, C, H, W) in [0, 1]."""
    p = model.probabilities(images)
    frequency = p.argmax(-1).bincount(minlength=p.shape[1]).double() / len(p)
    entropy = abs((frequency * frequency.clamp_min(1e-300).log()).sum().item())
    return Legibility((p.amax(-1) > CONFIDENT).double().mean().item(), entropy, len(p))


def _classes(data: Dataset) -> int:
    assert data.train.labels is not None and data.test.labels is not None
    return int(max(data.train.labels.max(), data.test.labels.max())) + 1


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by one of the nine offsets of up to a pixel; the border is black."""
    dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
