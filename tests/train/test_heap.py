"""Memory that the next step asks for again stays with the process."""

import gc
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


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_looked_for_inside_and_all_is_as_before_afterwards(enabled):
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError), heap.uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_what_was_imported_is_not_looked_at_again():
    before = gc.get_freeze_count()
    try:
        with heap.importing():
            made = [[] for _ in range(1000)]
        assert gc.isenabled() and gc.get_freeze_count() >= before + len(made)
    finally:
        gc.unfreeze()


def test_a_command_runs_with_garbage_collection():
    """It is off from the very start until the command is known."""
    code = (
        "import gc, sys; from vaelab import __main__ as start; from vaelab.data import datasets; seen = []\n"
        "real = datasets.catalogue; datasets.catalogue = lambda *a: seen.append(gc.isenabled()) or real(*a)\n"
        "freeze = gc.freeze; gc.freeze = lambda: (seen.append('leaving'), freeze())\n"
        "sys.argv = ['vaelab', 'data', '--json']\n"
        "try: start.main()\n"
        "except SystemExit as end: print(seen, end.code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[True, 'leaving'] 0")
