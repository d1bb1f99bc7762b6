"""Imports what all workers of a study need and takes long to import: torch above all, then what measures codes, and what draws.

For the server that they are forks of, see `vaelab.crew`. It ends with the process that asked for it, also while it imports.
"""

import ctypes
import os
import signal

from vaelab.heap import importing

_PDEATHSIG = 1  # prctl(2), PR_SET_PDEATHSIG

if _of := os.environ.pop("VAELAB_SERVER_OF", ""):
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(_of):  # it has ended already
        os._exit(1)

with importing():
    import matplotlib.figure  # noqa: F401
    import sklearn.linear_model
    import sklearn.mixture
    import sklearn.neighbors  # noqa: F401

    import vaelab.cells
    import vaelab.evaluation
    import vaelab.running  # noqa: F401
