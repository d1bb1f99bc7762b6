"""Decoding many codes to score one image of Bernoulli pixels: the decoder's last layer and log p(x|z) in one pass."""

import copy
from typing import Self

import torch
from torch import Tensor, nn

from vaelab.likelihoods import Bernoulli
from vaelab.native.build import library
from vaelab.native.layers import _fits, _kernels, _scratch, _up
from vaelab.nn import MLP, AroundMean, FourierMLP, WithLabel


class Scorer:
    """log p(x|z) of one image for many codes, in bfloat16, without the logits: `Scorer.of` a likelihood.

    Importance sampling decodes thousands of codes for each image. Its logits, stored and read again, would cost as much
    as their products; the last layer's weights are packed once for all images.
    """

    def __init__(self, likelihood: Bernoulli, last: nn.Linear, constant: Tensor) -> None:
        self.likelihood, self.n, self.k = likelihood, *last.weight.shape
        self.rows = torch.empty(_up(self.n) * _up(self.k), dtype=torch.bfloat16)
        _kernels().pack_rows(last.weight.detach().contiguous().data_ptr(), self.rows.data_ptr(), self.n, self.k)
        self.bias = (constant if last.bias is None else last.bias.detach() + constant).contiguous()

    @classmethod
    def of(cls, likelihood: nn.Module) -> Self | None:
        """None where there are no kernels, or the decoder is none of the lab's dense ones in float32 on the CPU."""
        if library() is None or type(likelihood) is not Bernoulli:
            return None
        found = _before_last(likelihood.decoder)
        if found is None or not _fits(found[1]):
            return None
        without, last, constant = found
        beheaded = copy.copy(likelihood)
        beheaded._modules = {"decoder": without}
        return cls(beheaded, last, constant)

    def __call__(self, z: Tensor, c: Tensor | None, image: Tensor) -> Tensor:
        """Codes z (1, G, D), labels c (G,) of a conditional model, one image (1, *X): (G,)."""
        hidden = self.likelihood.parameters_at(z, c)[0].float().contiguous()
        image, m, threads = image.float().contiguous(), len(hidden), torch.get_num_threads()
        log_p = hidden.new_empty(m)
        _kernels().score_codes(
            self.rows.data_ptr(), self.bias.data_ptr(), image.data_ptr(), hidden.data_ptr(), log_p.data_ptr(),
            m, self.n, self.k, _scratch(32 * _up(self.k) * threads).data_ptr(), threads,
        )  # fmt: skip
        return log_p


def _before_last(network: nn.Module) -> tuple[nn.Module, nn.Linear, Tensor] | None:
    """A dense decoder without its last layer, which shares the other ones; that layer; what is added after it, (P,)."""
    if type(network) is MLP:
        *before, last = network.layers
        if network.out_activation or type(last) is not nn.Linear:
            return None
        short = copy.copy(network)
        short._modules, short.out_shape = {"layers": nn.Sequential(*before)}, (last.in_features,)
        return short, last, last.weight.new_zeros(last.out_features)
    if type(network) not in (WithLabel, FourierMLP, AroundMean) or (found := _before_last(network.network)) is None:
        return None
    without, last, constant = found
    if type(network) is AroundMean:
        return without, last, constant + network.constant.flatten()
    short = copy.copy(network)
    short._modules = {"network": without}
    return short, last, constant
