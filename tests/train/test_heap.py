"""Memory that the next step asks for again stays with the process."""

import platform
import subprocess
import sys

import pytest

from vaelab import heap

STEPS = """
import ctypes, resource, sys
from vaelab import heap
if sys.argv[1] == "kept":
    assert heap.keep()
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
c.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
size = 30 * 2**20
def step():
    held = [c.malloc(size) for _ in range(3)]
    for block in held:
        c.memset(block, 1, size)
    for block in held:
        c.free(block)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to keep memory, and this is another"
)
def test_a_step_does_not_fault_in_what_the_last_one_freed():
    """Three blocks of 30 MB are 23,000 pages."""
    kept, given_back = (
        float(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < 1000 < given_back


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert heap.keep.__wrapped__() is False
