"""Precision: chosen once, with its reason.

Training: matrix products run in bfloat16 where the processor multiplies it in hardware; weights, optimiser state, codes,
KL and the sums over pixels stay in float32.

Evaluation: float32 with float64 accumulation, but for the decoding of importance samples, which is nearly all matrix
products: where the pixels are Bernoulli, bfloat16 too. A logit is then off by up to 1/256 of itself, which moves the log
probability of a pixel by (x - p) times that: little where p is near x, and in no direction. Measured and tested: hundredths
of a nat for an image, thousandths for the mean of images (`docs/results/evaluation.md`). Pixels with a scale of their own
divide the error by it, and stay in float32.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from vaelab.errors import UsageError
from vaelab.native import reason
from vaelab.native.layers import accelerated


@dataclass(frozen=True)
class Precision:
    """The choice and its reason, stored in the run."""

    name: str
    reason: str

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the networks run."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.name == "bfloat16")

    def networks(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context in which a model's layers compute with vaelab's own kernels, where they can (`vaelab.native`)."""
        return accelerated(model) if self.name == "bfloat16" else nullcontext()


def choose(requested: str, device: torch.device) -> Precision:
    """The precision of training on a device: `requested`, or for `auto` the faster one that is safe."""
    if requested != "auto":
        return Precision(requested, "asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bfloat16", "this GPU multiplies bfloat16 in hardware")
        return Precision("float32", "this GPU has no bfloat16")
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        for name in ("amx_bf16", "avx512_bf16"):
            if capabilities.get(name):
                how = f"with {reason()}"
                return Precision("bfloat16", f"this processor multiplies bfloat16 in hardware ({name}), {how}")
        return Precision("float32", "this processor has no bfloat16 instructions")
    return Precision("float32", f"bfloat16 is not tested on {device.type}")


def of_decoding(requested: str, bernoulli: bool, device: torch.device) -> Precision:
    """The precision in which importance samples are decoded: `requested`, or for `auto` the fastest one that is safe.

    Raises:
        UsageError: bfloat16 for pixels that are not Bernoulli, or an unknown name.
    """
    if requested not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"precision is {requested!r}: choose auto, float32 or bfloat16")
    if bernoulli:
        return choose(requested, device)
    if requested == "bfloat16":
        raise UsageError(
            "bfloat16 decoding is for Bernoulli pixels, whose error it does not magnify: choose precision float32"
        )
    return Precision("float32", "the scale of these pixels would magnify what bfloat16 rounds")
