"""Decoding many codes to score one image of Bernoulli pixels: the decoder's last layers and log p(x|z) in one pass."""

from typing import Self

import torch
from torch import Tensor, nn

from vaelab.errors import UsageError
from vaelab.native.calls import kernels, scratch
from vaelab.native.decoder import COARSE, Decoder


class Scorer:
    """log p(x|z) of one image for many codes, in bfloat16, without the logits: `Scorer.of` a likelihood.

    Importance sampling decodes thousands of codes for each image. Stored and read again, its logits would cost as much as
    their products, and so would a hidden layer's activations; the weights are packed once for all images.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @classmethod
    def of(cls, likelihood: nn.Module) -> Self | None:
        """None where there is no such `Decoder`."""
        decoder = Decoder.of(likelihood, COARSE)
        return None if decoder is None else cls(decoder)

    def __call__(self, z: Tensor, c: Tensor | None, image: Tensor) -> Tensor:
        """Codes z (1, G, D), labels c (G,) of a conditional model, one image (1, *X): (G,)."""
        decoder = self.decoder
        if image.numel() != decoder.pixels:
            raise UsageError(f"the image has {image.numel()} pixels and the decoder describes {decoder.pixels}")
        x, image = decoder.inputs(z, c), image.float().contiguous()
        log_p, threads = x.new_empty(len(x)), torch.get_num_threads()
        kernels().score_codes(
            *decoder.arguments(), image.data_ptr(), x.data_ptr(), log_p.data_ptr(), len(x),
            scratch(64 * decoder.room * threads).data_ptr(), threads,
        )  # fmt: skip
        return log_p
