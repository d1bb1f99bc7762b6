"""Imports what all workers of a study need and takes long to import: torch above all, then what measures codes, and what draws.

For the server that they are forks of, see `vaelab.crew`.
"""

import importlib

from vaelab.heap import importing

with importing():
    for _name in ("vaelab.cells", "vaelab.running", "vaelab.evaluation", "sklearn.linear_model", "sklearn.neighbors",
                  "sklearn.mixture", "matplotlib.figure"):  # fmt: skip
        importlib.import_module(_name)
