"""Networks: tensors to tensors."""

from vaelab.nn.label import WithLabel
from vaelab.nn.mlp import MLP, ExactLinear, FourierMLP

__all__ = ["MLP", "ExactLinear", "FourierMLP", "WithLabel"]
