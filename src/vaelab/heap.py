"""What Python and the C library do with memory, where their habits cost time.

Memory that is asked for again at the next step is kept, not given back to the system in between: `keep`.

glibc returns what is free at the end of its heap, and maps large blocks anew each time, so that a step that frees and asks for
the same activations faults in a thousand pages or more, each of which the kernel clears (measured: docs/decisions.md). Up to
`KEPT` bytes of free memory stay with the process instead, from its first training or evaluation on a CPU to its end.

Imports make no garbage, and looking for it is a seventh of the time that torch takes to import: `importing`.
"""

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

KEPT = 256 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 32 * 2**20
"""The largest block that glibc can be told to take from its heap."""


@cache
def keep() -> bool:
    """Ask for it, once for the process; whether it was granted. Nothing is changed where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_THRESHOLD, _MOST) and library.mallopt(_TRIM_THRESHOLD, KEPT))


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python looks for no garbage: where much is made and hardly any of it is."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """The same for imports, whose modules stay: what is there at the end Python will not look at again."""
    with uncollected():
        yield
        gc.freeze()
