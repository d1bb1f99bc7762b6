"""Decoding many codes to score one image of Bernoulli pixels: the decoder's last layers and log p(x|z) in one pass."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.errors import UsageError
from vaelab.likelihoods import Bernoulli
from vaelab.native.build import library
from vaelab.native.calls import kernels, scratch, up
from vaelab.native.layers import fits
from vaelab.nn import MLP, AroundMean, FourierMLP, WithLabel

ACTIVATIONS = (nn.ReLU, nn.SiLU)
"""Those between layers that the kernel computes, in the order of its numbers."""


class Scorer:
    """log p(x|z) of one image for many codes, in bfloat16, without the logits: `Scorer.of` a likelihood.

    Importance sampling decodes thousands of codes for each image. Stored and read again, its logits would cost as much as
    their products, and so would a hidden layer's activations; the weights are packed once for all images.
    """

    def __init__(self, before: Bernoulli, layers: Sequence[nn.Module], constant: Tensor) -> None:
        """`before` says what the first of `layers` reads, and `constant` (P,) is added to what the last one says."""
        self.before, linear = before, [layer for layer in layers if isinstance(layer, nn.Linear)]
        self.widths = torch.tensor([linear[0].in_features, *(layer.out_features for layer in linear)])
        kinds = [ACTIVATIONS.index(type(layer)) for layer in layers if not isinstance(layer, nn.Linear)]
        self.kinds = torch.tensor(kinds, dtype=torch.int32)
        packed, biases = [], []
        for layer in linear:
            n, k = layer.weight.shape
            packed.append(torch.empty(up(n) * up(k), dtype=torch.bfloat16))
            kernels().pack_rows(layer.weight.data_ptr(), packed[-1].data_ptr(), n, k)
            bias = layer.weight.new_zeros(n) if layer.bias is None else layer.bias.detach()
            biases.append(F.pad(bias + constant if layer is linear[-1] else bias, (0, up(n) - n)))
        self.weights, self.biases = torch.cat(packed), torch.cat(biases)
        self.room = 64 * max(up(layer.in_features) for layer in linear)

    @classmethod
    def of(cls, likelihood: nn.Module) -> Self | None:
        """None where there are no kernels, or the decoder is none of the lab's dense ones in float32 on the CPU."""
        if library() is None or type(likelihood) is not Bernoulli or (found := _parted(likelihood.decoder)) is None:
            return None
        decoder, layers, constant = found
        before = copy.copy(likelihood)
        before._modules = {"decoder": decoder}
        return cls(before, layers, constant) if all(map(fits, layers)) else None

    def __call__(self, z: Tensor, c: Tensor | None, image: Tensor) -> Tensor:
        """Codes z (1, G, D), labels c (G,) of a conditional model, one image (1, *X): (G,)."""
        if image.numel() != int(self.widths[-1]):
            raise UsageError(f"the image has {image.numel()} pixels and the decoder describes {int(self.widths[-1])}")
        x, image = self.before.parameters_at(z, c)[0].float().contiguous(), image.float().contiguous()
        log_p, threads = x.new_empty(len(x)), torch.get_num_threads()
        kernels().score_codes(
            self.weights.data_ptr(), self.biases.data_ptr(), self.widths.data_ptr(), self.kinds.data_ptr(),
            len(self.widths) - 1, image.data_ptr(), x.data_ptr(), log_p.data_ptr(), len(x),
            scratch(self.room * threads).data_ptr(), threads,
        )  # fmt: skip
        return log_p


def _parted(network: Any) -> tuple[nn.Module, Sequence[nn.Module], Tensor] | None:
    """A dense decoder without the last layers that the kernel computes; those; what is added after them, (P,)."""
    if type(network) is MLP:
        layers = list(network.layers)
        if network.out_activation or type(layers[-1]) is not nn.Linear:
            return None
        start = len(layers) - 1
        while start >= 2 and type(layers[start - 1]) in ACTIVATIONS and type(layers[start - 2]) is nn.Linear:
            start -= 2
        short: Any = copy.copy(network)
        short._modules = {"layers": nn.Sequential(*layers[:start])}
        short.out_shape = (layers[start].in_features,)
        return short, layers[start:], layers[-1].weight.new_zeros(layers[-1].out_features)
    if type(network) not in (WithLabel, FourierMLP, AroundMean) or (found := _parted(network.network)) is None:
        return None
    decoder, layers, constant = found
    if type(network) is AroundMean:
        return decoder, layers, constant + network.constant.flatten()
    short = copy.copy(network)
    short._modules = {"network": decoder}
    return short, layers, constant
