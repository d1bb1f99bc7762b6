"""Dense decoders of Bernoulli pixels as `decode.h` reads them: their last layers packed, and what comes before left to torch."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.likelihoods import Bernoulli
from vaelab.native.build import library
from vaelab.native.calls import kernels, up
from vaelab.native.layers import as_written, fits
from vaelab.nn import MLP, AroundMean, FourierMLP, WithLabel

ACTIVATIONS = (nn.ReLU, nn.SiLU)
"""Those between layers that the kernels compute, in the order of their numbers."""
COARSE, FINE, FULL = 1, 2, 3
"""Parts of a number: what bfloat16 holds of it, 16 bits, and what float32 holds."""


class Decoder:
    """`Decoder.of` a likelihood: `inputs` of its last layers at some codes, and those packed, in `arguments` of a kernel.

    Attributes:
        parts: of each number.
        widths: of all layers' inputs and the last one's output.
        pixels: of an image.
        room: the largest up(width) of inputs.
    """

    def __init__(self, before: Bernoulli, layers: Sequence[nn.Module], constant: Tensor, parts: int) -> None:
        """`before` says what the first of `layers` reads, and `constant` (P,) is added to what the last one says."""
        self.before, self.parts = before, parts
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        self.widths = torch.tensor([linear[0].in_features, *(layer.out_features for layer in linear)])
        self.pixels = linear[-1].out_features
        self.room = max(up(layer.in_features) for layer in linear)
        kinds = [ACTIVATIONS.index(type(layer)) for layer in layers if not isinstance(layer, nn.Linear)]
        self.kinds = torch.tensor(kinds, dtype=torch.int32)
        packed, biases = [], []
        for layer in linear:
            n, k = layer.weight.shape
            packed.append(torch.empty(parts * up(n) * up(k), dtype=torch.bfloat16))
            kernels().pack_rows(layer.weight.data_ptr(), packed[-1].data_ptr(), n, k, parts)
            bias = layer.weight.new_zeros(n) if layer.bias is None else layer.bias.detach()
            biases.append(F.pad(bias + constant if layer is linear[-1] else bias, (0, up(n) - n)))
        self.weights, self.biases = torch.cat(packed), torch.cat(biases)

    @classmethod
    def of(cls, likelihood: nn.Module, parts: int) -> Self | None:
        """None where there are no kernels, or the decoder is none of the lab's dense ones in float32 on the CPU."""
        if library() is None or type(likelihood) is not Bernoulli or not as_written(likelihood):
            return None
        if (found := _parted(likelihood.decoder)) is None:
            return None
        decoder, layers, constant = found
        before = copy.copy(likelihood)
        before._modules = {"decoder": decoder}
        return cls(before, layers, constant, parts) if all(map(fits, layers)) else None

    def inputs(self, z: Tensor, c: Tensor | None) -> Tensor:
        """What the first of the packed layers reads at codes z (1, G, D), for labels c (G,): (G, K)."""
        return self.before.parameters_at(z, c)[0].float().contiguous()

    def arguments(self) -> tuple[int, int, int, int, int]:
        """Weights, biases, widths, activations, and how many layers."""
        pointers = (self.weights.data_ptr(), self.biases.data_ptr(), self.widths.data_ptr(), self.kinds.data_ptr())
        return *pointers, len(self.widths) - 1


def _parted(network: Any) -> tuple[nn.Module, Sequence[nn.Module], Tensor] | None:
    """A dense decoder without the last layers that the kernels compute; those; what is added after them, (P,)."""
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
