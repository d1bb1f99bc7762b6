"""One-line faults in the library's mathematics, each of which a named test must notice.

    python tests/mutants.py            all of them, a line each; exit code 1 if one survives
    python tests/mutants.py KL         those whose name holds "KL"

Each fault is written into a copy of the sources in a temporary folder, and its test is run against that copy. The test
must pass without the fault and fail with it; `pytest` itself never imports this file.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, `old` becomes `new`; `test` notices."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = (
    Mutant("sign of the mean in the Gaussian KL", "distributions.py",
           "return 0.5 * (torch.exp(2 * log_ratio) + scaled.square() - 1) - log_ratio",
           "return 0.5 * (torch.exp(2 * log_ratio) - scaled.square() - 1) - log_ratio", "tests/oracles"),
    Mutant("no log 2 pi in the Gaussian density", "distributions.py",
           "return -0.5 * scaled.square() - self.log_std - 0.5 * LOG_2PI",
           "return -0.5 * scaled.square() - self.log_std", "tests/oracles"),
)  # fmt: skip


def main(wanted: str = "") -> int:
    survivors = 0
    chosen = [m for m in MUTANTS if wanted.lower() in m.name.lower()]
    for mutant in chosen:
        outcome = _try(mutant)
        survivors += outcome != "noticed"
        print(f"{outcome:9}  {mutant.name}  [{mutant.test}]", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults noticed")
    return 1 if survivors or not chosen else 0


def _try(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "src" / "vaelab" / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            return "not found" if mutant.old not in text else "ambiguous"
        if _run(copy, mutant.test) != 0:
            return "broken"  # the test fails without the fault: it shows nothing
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        return "noticed" if _run(copy, mutant.test) == 1 else "SURVIVED"


def _run(copy: Path, test: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
