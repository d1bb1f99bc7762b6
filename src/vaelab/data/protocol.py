"""Protocols: how grey pixels become what a likelihood is asked about.

Log-likelihoods on MNIST are comparable only on one protocol, so it has a name and is stored with every run:

    dynamic      pixel ~ Bernoulli(grey), redrawn each time an image is used; the test images are drawn once, with a
                 fixed seed that no run can change (Salakhutdinov & Murray 2008; Burda et al. 2016, arXiv 1509.00519)
    static       the pixels themselves, where they are bits: the published fixed draw of MNIST, `mnist-static`
                 (Larochelle & Murray 2011). About 2 nats harder than dynamic, since networks learn the draw by heart
    threshold    pixel = grey >= 1/2: easier, comparable with neither of the others
    levels       pixel = byte / 255, one of 256 levels, each with a probability
    dequantised  pixel = (byte + u) / 256 with u ~ U[0, 1), redrawn each time; the test images are drawn once
    grey         the grey levels themselves: only for a cross-entropy, which is not a likelihood

A protocol has a *measure*, and a likelihood accepts some measures (`vaelab.likelihoods`); `check` refuses the rest.

Why dequantise: a density on the 256 levels themselves has no upper bound, since it may put a spike on each. With noise
that fills the bins, a density p on [0, 1)^P bounds the probability of the levels (Theis et al. 2016, arXiv 1511.01844,
section 3.1), by Jensen's inequality,

    log P(bytes) = log of the integral of p over the bin = log E_u p(x) - P log 256 >= E_u log p(x) - P log 256

so that bits per dimension = -log2 p(x) / P + 8, and never flatters the model beside one on `levels`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vaelab.errors import UsageError, unknown_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

KERNELS = {"grey": 0, "dynamic": 1, "threshold": 2, "static": 2}
"""What vaelab's kernels make of a byte, as in `native/images.h`; what a network sees is a 255th of it."""
TEST_DRAW_SEED = 1312_6114
"""Seed of the one draw of the test images: the same for every run, so that runs can be paired."""


@dataclass(frozen=True)
class Protocol:
    """One way from bytes to what the model sees.

    Attributes:
        name: its name in a run.
        measure: `binary`, `levels256`, `continuous` or `grey`.
        redrawn: whether training images are drawn anew at each use.
        summary: a sentence for tables.
    """

    name: str
    measure: str
    redrawn: bool
    summary: str

    @property
    def bits_offset(self) -> float | None:
        """What is added to -log2 p(x) / P to give bits per dimension; None where there are none (grey levels)."""
        return {"binary": 0.0, "levels256": 0.0, "continuous": 8.0}.get(self.measure)

    def check_pixels(self, pixels: np.ndarray) -> None:
        """Refuse bytes (N, *X) that the protocol is not meant for. Raises UsageError."""
        if self.name == "static" and not np.isin(pixels, (0, 255)).all():
            raise UsageError(
                "protocol 'static' takes pixels as they are, which must be bits (bytes 0 and 255), and these are grey: "
                "choose the data set mnist-static, or --protocol dynamic"
            )

    def training_batch(self, pixels: "Tensor", generator: "torch.Generator", index: "Tensor | None" = None) -> "Tensor":
        """Bytes (N, *X) to what training sees, float32 (B, *X) in [0, 1].

        Args:
            pixels: of the data set, or of a batch.
            generator: of what is drawn.
            index: which images (B,), numbers from 0 to N - 1; all if None.
        """
        own = _natively(self.name, pixels, index, generator) if index is not None else None
        if own is not None:
            return own
        batch = pixels if index is None else pixels.index_select(0, index)
        if self.name == "dynamic":
            return _bits(batch, generator)
        if self.name == "dequantised":
            return _spread(batch, _noise(batch.shape, batch.device, generator))
        return _fixed(self.name, batch)

    def test_set(self, pixels: np.ndarray) -> "Tensor":
        """Bytes (N, *X) to the fixed test images, float32; the same for every run and every seed.

        Raises:
            UsageError: as `check_pixels`.
        """
        import torch

        self.check_pixels(pixels)
        if self.name == "dynamic":
            u = np.random.default_rng(TEST_DRAW_SEED).random(pixels.shape)
            return torch.from_numpy((u * 255 < pixels).astype(np.float32))
        if self.name == "dequantised":
            noise = np.random.default_rng(TEST_DRAW_SEED).integers(-(2**15), 2**15, pixels.shape, np.int16)
            return _spread(torch.from_numpy(pixels), torch.from_numpy(noise))
        return _fixed(self.name, torch.from_numpy(pixels))


def _natively(name: str, pixels: "Tensor", index: "Tensor", generator: "torch.Generator") -> "Tensor | None":
    """The same, images `index` of the data set, in one pass of vaelab's own kernel: where there is one."""
    import torch

    from vaelab.native import library

    plain = pixels.device.type == index.device.type == "cpu" and pixels.is_contiguous() and index.is_contiguous()
    plain = plain and pixels.dtype == torch.uint8 and index.dtype == torch.int64 and index.dim() == 1
    kernels = library() if plain and name in KERNELS else None
    if kernels is None:
        return None
    rows, event = len(index), pixels.shape[1:]
    out = torch.empty((rows, *event), dtype=torch.float32, device="cpu")
    kernels.batch(
        pixels.data_ptr(), index.data_ptr(), KERNELS[name], seed_of_bits(name, generator), out.data_ptr(), rows, event.numel(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def seed_of_bits(name: str, generator: "torch.Generator") -> int:
    """Of what vaelab's kernels draw for a batch; 0 where they draw nothing."""
    return _seed(generator) if name == "dynamic" else 0


def _bits(pixels: "Tensor", generator: "torch.Generator") -> "Tensor":
    """Bernoulli(pixel / 255), to within 2^-16: signed 16-bit noise below pixel * 257 - 2^15, which has the same range."""
    import torch

    return (_noise(pixels.shape, pixels.device, generator) < pixels.to(torch.int16).mul_(257).add_(-(2**15))).float()


def _spread(pixels: "Tensor", noise: "Tensor") -> "Tensor":
    """(pixel + u) / 256 for u = (noise + 2^15) / 2^16: 24 bits, which float32 holds exactly, so that 1 is not reached."""
    import torch

    return pixels.to(torch.int32).mul_(2**16).add_(noise).add_(2**15).float().mul_(2.0**-24)


def _noise(shape: tuple[int, ...], device: "torch.device", generator: "torch.Generator") -> "Tensor":
    """A signed 16-bit integer for each pixel, uniform.

    Four pixels share one 64-bit draw: a float for each took a twentieth of a training step. On the CPU word i is what
    SplitMix64 (Steele, Lea & Flood 2014) draws i steps after a seed from the generator: it depends on both alone, so that
    vaelab's kernel draws eight at once, in several threads, the same ones.
    """
    import torch

    size = math.prod(shape)
    count = -(-size // 4)
    if device.type == "cpu":
        words = torch.from_numpy(_words(_seed(generator), count).view(np.int64))
    else:
        words = torch.empty(count, dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:size].view(shape)


def _seed(generator: "torch.Generator") -> int:
    import torch

    return int(torch.empty((), dtype=torch.int64).random_(0, None, generator=generator))


def _words(seed: int, count: int) -> np.ndarray:
    """The first words of SplitMix64 after a seed, uint64 (count,)."""
    z = np.arange(1, count + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    return z ^ (z >> np.uint64(31))


def _fixed(name: str, pixels: "Tensor") -> "Tensor":
    return (pixels >= 128).float() if name in ("threshold", "static") else pixels / 255


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("dynamic", "binary", True, "bits drawn with the grey level as probability; test drawn once"),
        Protocol("threshold", "binary", False, "bits: grey level of one half or more"),
        Protocol("static", "binary", False, "bits as they are: the published draw, data set mnist-static"),
        Protocol("levels", "levels256", False, "256 grey levels, each with a probability"),
        Protocol("dequantised", "continuous", True, "grey levels with uniform noise in their bins; test drawn once"),
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
    from vaelab.likelihoods import MEMBERS

    accepted: tuple[str, ...] = likelihood.measures  # type: ignore[assignment]
    if chosen.measure not in accepted:
        fitting = [p.name for p in PROTOCOLS.values() if p.measure in accepted]
        others = [member.__name__ for member in MEMBERS if chosen.measure in member.measures]
        raise UsageError(
            f"protocol '{chosen.name}' gives {chosen.measure} pixels and the likelihood {type(likelihood).__name__} is "
            f"defined on {' or '.join(accepted)}: choose --protocol {' or '.join(fitting) or '(none fits)'}, "
            f"or the likelihood {' or '.join(others)}"
        )
