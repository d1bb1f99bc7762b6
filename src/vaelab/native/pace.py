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
"""Steps, one by one, whose median time speaks for a number of threads."""
WARMING = 8
"""Steps that are not counted at the beginning, and after a change: caches fill, and threads that slept come back."""
AWAKE = 2
"""Steps of them in which threads that slept come back, however long that takes."""
EVERY, SHARE = 1.0, 0.05
"""Seconds after which the other number is tried again, and the part of the time that trials may take: steps may be long."""
GIVEN_UP = 3.0
"""A step that takes so many times what the number in use takes ends a trial."""
CLEARLY, ENOUGH = 1.3, 3
"""So does the median of that many steps that take so many times as long."""
AT_ONCE = 0.02
"""Seconds after which no further step is begun in a call, since nothing can stop it."""


class Pace:
    """Asked at each step; sets torch's number of threads, and `restore` sets it back.

    Args:
        chooses: whether there is a choice; else nothing is changed.
    """

    def __init__(self, chooses: bool) -> None:
        self.most = self.used = torch.get_num_threads()
        self.chooses = chooses and self.most > 1
        self.times: deque[float] = deque(maxlen=WARMING + TRIED)  # of steps that are compared
        self.calls: deque[float] = deque(maxlen=WARMING)  # of a step, in each of the latest calls
        self.trusted = 1  # steps that may be one call, as far as those before have been
        self.typical: float | None = None  # of the number in use
        self.trying = False
        self.pause = EVERY
        self.last = self.decided = time.perf_counter()

    def start(self) -> None:
        """A step begins."""
        self.last = time.perf_counter()

    def ahead(self, most: int) -> int:
        """How many steps may be one call: as many as take `AT_ONCE` seconds; and one while threads are compared."""
        if self._compares(time.perf_counter()) or len(self.calls) < WARMING:
            return 1
        return max(1, min(most, self.trusted, int(AT_ONCE / max(statistics.median(self.calls), 1e-9))))

    def step(self, made: int = 1, asked: int = 1) -> None:
        """It has ended, or so many of those that were asked for have."""
        now = time.perf_counter()
        self.calls.append((now - self.last) / made)
        self.trusted = 1 if made < asked else 2 * asked
        if not self._compares(now) or asked > 1:
            return
        self.times.append(now - self.last)
        measured = len(self.times) >= WARMING + TRIED
        if not self.trying:
            if measured:
                self.typical, self.trying = statistics.median(self._latest()), True
                self._switch()
        elif self._slower():
            self._decide(now, better=False)
        elif measured and self.typical is not None:
            self._decide(now, better=statistics.median(self._latest()) < self.typical)

    def _compares(self, now: float) -> bool:
        """Whether steps are timed now, one by one."""
        return self.chooses and (self.trying or self.typical is None or now - self.decided > self.pause)

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
