"""Imports what all workers of a study need and takes long to import: torch above all, then what measures codes, and what draws.

For the server that they are forks of, see `vaelab.crew`. It ends with the process that asked for it, also while it imports.
"""

import ctypes
import importlib
import os
import signal

from vaelab.heap import importing

_PDEATHSIG = 1  # prctl(2), PR_SET_PDEATHSIG

if _of := os.environ.pop("VAELAB_SERVER_OF", ""):
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(_of):  # it has ended already
        os._exit(1)

with importing():
    for _name in ("vaelab.cells", "vaelab.running", "vaelab.evaluation", "sklearn.linear_model", "sklearn.neighbors",
                  "sklearn.mixture", "matplotlib.figure"):  # fmt: skip
        importlib.import_module(_name)
