"""Precision: chosen once, with its reason.

Matrix products run in bfloat16 where the processor multiplies it in hardware; weights, optimiser state, codes, KL and the
sums over pixels stay in float32. Evaluation always runs in float32 with float64 accumulation.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The choice and its reason, stored in the run."""

    name: str
    reason: str

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the networks run."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.name == "bfloat16")


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
                return Precision("bfloat16", f"this processor multiplies bfloat16 in hardware ({name})")
        return Precision("float32", "this processor has no bfloat16 instructions")
    return Precision("float32", f"bfloat16 is not tested on {device.type}")
