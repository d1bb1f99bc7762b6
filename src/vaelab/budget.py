"""How much a model may take while it is built: counted before the memory is.

Twenty bytes of a configuration, ``"hidden": [1000000000]``, ask for three terabytes. `Budget` stands between a
constructor and torch: each operation that would make a tensor is first run on the meta device, where tensors have shapes
and no memory, and refused where the sum would pass the limit. What is not refused runs as it would have run, with the
same bits.

Temporaries count as well as what is kept, and an operation that the meta device cannot foretell (its result's size
depends on numbers, as that of `unique` does) is counted after it has run: it makes no more than it was given.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from vaelab.errors import UsageError

OPERATIONS = 10_000
"""Operations while one model is built. A dense network takes eight a layer, a flow forty a map."""


class Budget(TorchDispatchMode):
    """A context in which at most `limit` numbers are made, by at most `OPERATIONS` operations.

    It may be entered again and again; the sum goes on.

    Args:
        limit: of numbers, in tensors of any dtype.

    Raises:
        UsageError: inside, at the operation that would pass a limit.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.made, self.operations = limit, 0, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch's hook: its default imports torch._dynamo and sympy, 1.5 s
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        if self.operations > OPERATIONS:
            raise UsageError(f"more than {OPERATIONS:,} operations were taken to build it: make it of fewer layers")
        if func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        if (shape := _told(func, args, kwargs)) is not None:
            self._make(math.prod(shape), shape)
            return func(*args, **kwargs)
        try:
            foretold = func(*tree_map(_shadow, args), **tree_map(_shadow, kwargs | _elsewhere(func)))
        except UsageError:
            raise
        except Exception:  # no meta kernel, or a call that is wrong: what it is, the call itself will say
            result = func(*args, **kwargs)
            self._count(result)
            return result
        self._count(foretold)
        return func(*args, **kwargs)

    def _count(self, result: Any) -> None:
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._make(tensor.numel(), tensor.shape)

    def _make(self, numbers: int, shape: Sequence[int]) -> None:
        self.made += numbers
        if self.made > self.limit:
            raise UsageError(
                f"more than {self.limit:,} numbers were asked for, the last of them in a tensor of shape {tuple(shape)}: "
                "make its layers smaller"
            )


def _told(func: Any, args: Any, kwargs: Any) -> Sequence[int] | None:
    """The shape of what an operation makes, where that is told by a size it is given or by the shapes of what it reads, number
    by number; None of any other.

    The meta device knows those, too, but for some it imports torch._dynamo and sympy first: 1.5 s.
    """
    given = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
    if isinstance(size := given.get("size"), list | tuple) and "device" in given:
        return size if all(isinstance(side, int) and side >= 0 for side in size) else None
    if torch.Tag.pointwise in func.tags and [str(one.type) for one in func._schema.returns] == ["Tensor"]:
        with suppress(ValueError):  # shapes that do not fit: the call itself will say so
            return np.broadcast_shapes(*(item.shape for item in given.values() if isinstance(item, torch.Tensor)))
    return None


def _shadow(value: Any) -> Any:
    """A tensor without its memory, or the meta device in place of another."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.Generator):  # the meta device draws nothing
        return None
    return torch.device("meta") if isinstance(value, torch.device) else value


def _elsewhere(func: Any) -> dict[str, torch.device]:
    """The device argument of an operation that takes one."""
    names = (argument.name for argument in func._schema.arguments)
    return {"device": torch.device("meta")} if "device" in names else {}
