"""How many threads a training's kernels use: as many as torch has, or one where that is faster now.

Threads that share a step wait for each other some forty times in it. On a processor that other programs use too, one of them
is often not running, and a step takes ten times as long as with a single thread. A whole pass (`step.py`) has the same bits with
any number of threads, so the number may be chosen while training runs: a few steps are timed with each, now and then.
"""

import statistics
import time
from collections import deque

import torch

TRIED = 8
"""Steps whose median time speaks for a number of threads."""
WARMING = 8
"""Steps that are not counted at the beginning, and after a change: caches fill, and threads that slept come back."""
AWAKE = 2
"""Steps of them in which threads that slept come back, however long that takes."""
EVERY, SHARE = 1.0, 0.05
"""Seconds after which the other number is tried again, and the part of the time that trials may take: steps may be long."""
GIVEN_UP = 3.0
"""A step that takes so many times what the number in use takes ends a trial."""
AT_ONCE = 0.02
"""Seconds that steps which are one call may take, since nothing can stop them."""
CLEARLY, ENOUGH = 1.3, 3
"""So does the median of that many steps that take so many times as long."""


class Pace:
    """Asked at each step; sets torch's number of threads, and `restore` sets it back.

    Args:
        chooses: whether there is a choice; else nothing is changed.
    """

    def __init__(self, chooses: bool) -> None:
        self.most = self.used = torch.get_num_threads()
        self.chooses = chooses and self.most > 1
        self.times: deque[float] = deque(maxlen=WARMING + TRIED)
        self.typical: float | None = None  # of the number in use
        self.trying = False
        self.pause = EVERY
        self.last = self.decided = time.perf_counter()

    def start(self) -> None:
        """A step begins."""
        self.last = time.perf_counter()

    def ahead(self, most: int) -> int:
        """How many steps may be made at once: as many as take `AT_ONCE` seconds, and one while they are timed."""
        if self.trying or len(self.times) < WARMING:
            return 1
        return max(1, min(most, int(AT_ONCE / max(self.times[-1], 1e-9))))

    def step(self, count: int = 1) -> None:
        """It has ended, or so many have."""
        now = time.perf_counter()
        self.times.extend(count * [(now - self.last) / count])
        if not self.chooses:
            return
        measured = len(self.times) >= WARMING + TRIED
        if self.trying and self.typical is not None:
            if self._slower():
                self._decide(now, better=False)
            elif measured:
                self._decide(now, better=statistics.median(self._latest()) < self.typical)
        elif measured and (self.typical is None or now - self.decided > self.pause):
            self.typical, self.trying = statistics.median(self._latest()), True
            self._switch()

    def _latest(self) -> list[float]:
        return list(self.times)[-TRIED:]

    def _slower(self) -> bool:
        """Whether the number on trial is slower for sure."""
        assert self.typical is not None
        seen = list(self.times)[AWAKE:]
        return bool(seen) and (
            seen[-1] > GIVEN_UP * self.typical
            or (len(seen) >= ENOUGH and statistics.median(seen[-ENOUGH:]) > CLEARLY * self.typical)
        )

    def _decide(self, now: float, better: bool) -> None:
        self.pause = max(EVERY, sum(self.times) / SHARE)  # of the steps: an evaluation may lie between them
        if better:
            self.typical = statistics.median(self._latest())  # the other number stays
            self.times.clear()
        else:
            self._switch()
        self.trying, self.decided = False, now

    def _switch(self) -> None:
        self.used = 1 if self.used == self.most else self.most
        self.times.clear()
        torch.set_num_threads(self.used)

    def begin(self) -> None:
        """Steps follow."""
        if self.used != self.most:
            torch.set_num_threads(self.used)

    def restore(self) -> None:
        """Something else follows."""
        if self.used != self.most:
            torch.set_num_threads(self.most)
