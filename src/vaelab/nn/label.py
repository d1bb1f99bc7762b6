"""Labels as inputs: a wrapper that lets any network read a label beside its input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.errors import UsageError


class WithLabel(nn.Module):
    """A network that also reads a label, as a one-hot vector beside its input (Sohn et al. 2015).

    Vectors (..., D) become (..., D + classes); images (..., C, H, W) become (..., C + classes, H, W), one constant plane a
    class, or, where the network reads vectors, flat pixels and the one-hot vector. So the wrapped network must be built for
    the wider input.

    Args:
        network: built for the wider input; has `in_shape`.
        classes: number of labels, 0 to classes - 1.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise UsageError(f"classes is {classes}: expected an integer of 1 or more")
        self.network, self.classes = network, classes

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (..., B, *X) and labels c (B,) to what the network makes of both.

        On a GPU, looking at labels waits for everything queued before, so training does not look there: its loop has
        checked the labels of the whole data set (`vaelab.training.labels_for`).

        Raises:
            UsageError: a label outside 0 to classes - 1, or another number of labels than B.
        """
        exported = torch.compiler.is_exporting()  # a graph has no values to look at
        if c.numel() and not exported and (c.device.type == "cpu" or not self.training):
            least, most = torch.stack(c.aminmax()).tolist()
            if least < 0 or most >= self.classes:
                raise UsageError(
                    f"a label lies outside 0 to {self.classes - 1}, which this network was built for: "
                    f"labels from {least} to {most} were given; number them from 0, or build it with more classes"
                )
        vector = len(self.network.in_shape) == 1  # type: ignore[arg-type]
        if vector and x.dim() == 4:  # images into a dense network
            x = x.flatten(1)
        batch = x.shape[-2 if vector else -4]
        if c.shape != (batch,):
            raise UsageError(f"labels of shape {tuple(c.shape)} were given for {batch} inputs: give one for each")
        label = F.one_hot(c.long(), self.classes).to(x.dtype)
        if vector:
            return self.network(torch.cat([x, label.expand(*x.shape[:-1], -1)], -1))
        planes = label[..., None, None].expand(*x.shape[:-3], -1, *x.shape[-2:])
        return self.network(torch.cat([x, planes], -3))
