"""A small training on the 8x8 digits, in float32, with every field changeable."""

import pytest
import torch

from vaelab.data.protocol import protocol
from vaelab.recipes import recipe
from vaelab.registry import build
from vaelab.training import fit, initial_model

FIELDS = {
    "hidden": (16,), "decoder": (16,), "frequencies": 4, "frequency": 0.7, "start": "random", "epochs": 2, "batch_size": 256,
    "optimiser": "adam", "lr": 4e-3, "schedule": "warm-cosine", "beta2": 0.999, "rates": "equal", "precision": "float32",
}  # fmt: skip


@pytest.fixture
def small(digits):
    """Fields of `mnist-2d` to its recipe for the digits."""
    return lambda **fields: recipe("mnist-2d", digits.shape, **{**FIELDS, "data": "digits", **fields})


@pytest.fixture
def trained(digits, small):
    """Fields of the recipe, and arguments of `fit` under their names, to (model, records)."""

    def run(fit_arguments=None, **fields):
        chosen = small(**fields)
        model = initial_model(chosen)
        arguments = {"objective": build(chosen.objective), **(fit_arguments or {})}
        history = fit(model, arguments.pop("objective"), digits, protocol(chosen.protocol), chosen.training,
                      seed=chosen.seed, **arguments)  # fmt: skip
        return model, history

    return run


@pytest.fixture
def same_weights():
    """Whether two models hold the same weights, bit for bit."""

    def compare(one, other):
        a, b = one.state_dict(), other.state_dict()
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return compare
