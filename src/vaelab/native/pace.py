"""How many threads a training's kernels use: as many as torch has, or one where that is faster now.

Threads that share a step wait for each other some forty times in it. On a processor that other programs use too, one of them
is often not running, and a step takes ten times as long as with a single thread. A whole pass (`step.py`) has the same bits with
any number of threads, so the number may be chosen while training runs: a few steps are timed with each, now and then.
"""

import statistics
import time

import torch

TRIED = 8
"""Steps whose median time speaks for a number of threads."""
WARMING = 8
"""Steps that are not counted at the beginning, and after a change: caches fill, and threads that slept come back."""
AWAKE = 2
"""Steps of them in which threads that slept come back, however long that takes."""
EVERY = 1.0
"""Seconds after which the other number is tried again."""
GIVEN_UP = 3.0
"""A step that takes so many times what the number in use takes ends a trial."""


class Pace:
    """Asked at each step; sets torch's number of threads, and `restore` sets it back.

    Args:
        chooses: whether there is a choice; else nothing is changed.
    """

    def __init__(self, chooses: bool) -> None:
        self.most = self.used = torch.get_num_threads()
        self.chooses = chooses and self.most > 1
        self.times: list[float] = []
        self.typical: float | None = None  # of the number in use
        self.trying = False
        self.last = self.decided = time.perf_counter()

    def start(self) -> None:
        """A step begins."""
        self.last = time.perf_counter()

    def step(self) -> None:
        """It has ended."""
        now = time.perf_counter()
        self.times.append(now - self.last)
        if not self.chooses:
            return
        awake = len(self.times) > AWAKE
        slow = self.trying and awake and self.typical is not None and self.times[-1] > GIVEN_UP * self.typical
        if slow or (
            len(self.times) >= WARMING + TRIED and (self.trying or self.typical is None or now - self.decided > EVERY)
        ):
            self._decide(now)

    def _decide(self, now: float) -> None:
        measured = statistics.median(self.times[-TRIED:])
        if self.trying:
            if self.typical is not None and measured < self.typical:
                self.typical = measured  # the other number stays
            else:
                self._switch()
            self.trying, self.decided = False, now
        else:
            self.typical, self.trying = measured, True
            self._switch()
        self.times.clear()

    def _switch(self) -> None:
        self.used = 1 if self.used == self.most else self.most
        torch.set_num_threads(self.used)

    def begin(self) -> None:
        """Steps follow."""
        if self.used != self.most:
            torch.set_num_threads(self.used)

    def restore(self) -> None:
        """Something else follows."""
        if self.used != self.most:
            torch.set_num_threads(self.most)
