"""Networks: tensors to tensors."""

from vaelab.nn.conv import ConvDecoder, ConvEncoder
from vaelab.nn.label import WithLabel
from vaelab.nn.mean import AroundMean, Centred
from vaelab.nn.mlp import MLP, ExactLinear, FourierMLP

__all__ = ["MLP", "AroundMean", "Centred", "ConvDecoder", "ConvEncoder", "ExactLinear", "FourierMLP", "WithLabel"]
