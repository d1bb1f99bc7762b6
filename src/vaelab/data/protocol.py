"""Protocols: how grey pixels become what a likelihood is asked about.

Log-likelihoods on MNIST are comparable only on one protocol, so it has a name and is stored with every run:

    dynamic     pixel ~ Bernoulli(grey), redrawn each time an image is used; the test images are drawn once, with a
                fixed seed that no run can change (Salakhutdinov & Murray 2008; Burda et al. 2016, arXiv 1509.00519)
    threshold   pixel = grey >= 1/2: easier, comparable with neither of the others
    grey        the grey levels themselves: only for a cross-entropy, which is not a likelihood

A protocol has a *measure*, and a likelihood accepts some measures (`vaelab.likelihoods`); `check` refuses the rest.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vaelab.errors import UsageError, unknown_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TEST_DRAW_SEED = 1312_6114
"""Seed of the one draw of the test images under `dynamic`: the same for every run, so that runs can be paired."""


@dataclass(frozen=True)
class Protocol:
    """One way from bytes to what the model sees.

    Attributes:
        name: its name in a run.
        measure: `binary` or `grey`.
        redrawn: whether training images are drawn anew at each use.
        summary: a sentence for tables.
    """

    name: str
    measure: str
    redrawn: bool
    summary: str

    def training_batch(self, pixels: "Tensor", generator: "torch.Generator") -> "Tensor":
        """Bytes (B, *X) to what training sees, float32 (B, *X) in [0, 1]."""
        if self.name == "dynamic":
            return _bits(pixels, generator)
        return _fixed(self.name, pixels)

    def test_set(self, pixels: np.ndarray) -> "Tensor":
        """Bytes (N, *X) to the fixed test images, float32; the same for every run and every seed."""
        import torch

        if self.name == "dynamic":
            u = np.random.default_rng(TEST_DRAW_SEED).random(pixels.shape)
            return torch.from_numpy((u * 255 < pixels).astype(np.float32))
        return _fixed(self.name, torch.from_numpy(pixels))


def _bits(pixels: "Tensor", generator: "torch.Generator") -> "Tensor":
    """Bernoulli(pixel / 255), to within 2^-16, from 16 random bits a pixel.

    Four pixels share one 64-bit draw: a float for each took a twentieth of a training step. On the CPU they come from
    NumPy's SFC64, seeded from the generator, which draws five times as fast as torch's Mersenne Twister. The comparison
    is of signed 16-bit integers, where pixel * 257 - 2^15 runs over the whole range.
    """
    import torch

    count = -(-pixels.numel() // 4)
    if pixels.device.type == "cpu":
        seed = int(torch.empty((), dtype=torch.int64).random_(0, None, generator=generator))
        words = torch.from_numpy(np.random.SFC64(seed).random_raw(count).view(np.int64))
    else:
        words = torch.empty(count, dtype=torch.int64, device=pixels.device)
        words.random_(-(2**63), None, generator=generator)
    noise = words.view(torch.int16)[: pixels.numel()].view(pixels.shape)
    return (noise < pixels.to(torch.int16).mul_(257).add_(-(2**15))).float()


def _fixed(name: str, pixels: "Tensor") -> "Tensor":
    return (pixels >= 128).float() if name == "threshold" else pixels.float().div_(255)


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("dynamic", "binary", True, "bits drawn with the grey level as probability; test drawn once"),
        Protocol("threshold", "binary", False, "bits: grey level of one half or more"),
        Protocol("grey", "grey", False, "grey levels in [0, 1], for a cross-entropy only"),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol called `name`. Raises UsageError for an unknown one."""
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def check(chosen: Protocol, likelihood: "nn.Module") -> None:
    """Refuse a likelihood that does not match the data's measure.

    Raises:
        UsageError: with what to do.
    """
    accepted = likelihood.measures
    if chosen.measure not in accepted:  # type: ignore[operator]
        fitting = [p.name for p in PROTOCOLS.values() if p.measure in accepted]  # type: ignore[operator]
        raise UsageError(
            f"protocol '{chosen.name}' gives {chosen.measure} pixels and the likelihood {type(likelihood).__name__} is "
            f"defined on {' or '.join(accepted)}: choose --protocol {' or '.join(fitting) or '(none fits)'}, "  # type: ignore[arg-type]
            "or another likelihood"
        )
