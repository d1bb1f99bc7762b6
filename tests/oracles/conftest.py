"""One thread: the models of these tests are small."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Several times faster than two threads, where the second core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
