"""Shared by all tests: where the data is, one thread, and a small data set."""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
if "VAELAB_DATA" not in os.environ and SHARED.is_dir():
    os.environ["VAELAB_DATA"] = str(SHARED)
os.environ.setdefault("MPLBACKEND", "Agg")

import torch  # noqa: E402

TESTS = Path(__file__).parent
TOGETHER = ("cli", "explore")
"""Folders whose session fixtures train models: each is run by one process."""


def pytest_collection_modifyitems(items):
    for item in items:
        part = item.path.relative_to(TESTS).parts[0]
        if part in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(part))


torch.set_num_threads(1)  # for session fixtures, which come before `_one_thread`


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small are several times slower on two threads, where the second core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits():
    from vaelab.data.datasets import load

    return load("digits")


@pytest.fixture(autouse=True)
def _global_state_is_left_alone():
    """No part of the library may move torch's global generator or its default dtype."""
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype
    torch.set_rng_state(before)


@pytest.fixture(params=[True, False], ids=["tiles", "avx512"])
def kernels(request, monkeypatch):
    """vaelab's own kernels, both forms in turn, everywhere in the library."""
    from vaelab.native import build

    if build.library() is None:
        pytest.skip(f"no kernels here: {build.reason()}")
    if request.param and "amx_bf16" not in build.abilities():
        pytest.skip("this processor has no tile registers")
    chosen = build.load(request.param)
    monkeypatch.setattr(build, "_found", lambda: (chosen, "chosen by a test"))
    return chosen


@pytest.fixture
def no_kernels(monkeypatch):
    """Call it: from then on everything runs in torch's kernels, as where there is no compiler."""
    from vaelab.native import build

    return lambda: monkeypatch.setattr(build, "_found", lambda: (None, "taken away by a test"))
