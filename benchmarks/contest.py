"""Contenders side by side: started once each, called in turn, round after round, while the others wait.

Timings of a shared machine drift by tens of percent within minutes. A ratio is therefore taken within each round, and its
median over rounds is reported with its range.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any


class Contender:
    """A process that holds one contender."""

    def __init__(self, where: str, **arguments: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", where, json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def call(self, method: str, *values: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps([method, values]), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended with exit code {self.process.wait()}")
        return json.loads(line)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns, as Markdown."""
    head, *body = rows
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    return "\n".join(lines)


def middle(values: Sequence[float], form: str = ".2f") -> str:
    """Median, and the range in brackets."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]
