"""Mutated inputs for every parser, and what came of them.

    python tests/fuzz/fuzz.py --inputs 100000

Input number i of a parser depends on the seed, the parser's name and i alone, so any one can be made again
(``--only npz --first 4711 --inputs 1``). For each the outcome must be a clean result or one of the library's errors; what
counts as a finding is

    an exception of another class, or one of ours that hides a MemoryError
    a message of more than 1,500 characters, with control characters, or without the name of the file
    more than 3 seconds of processor time; more than 20 seconds on the clock are cut off
    more memory than the parser's allowance, traced for one input in 20; a process that grows by more than 500 MB

Ends with 1 where there is a finding. A crash of the interpreter leaves the input behind in the scratch folder.
"""

import argparse
import faulthandler
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

import torch
from targets import Target, targets

CPU_SECONDS = 3.0
CLOCK_SECONDS = 20.0
TRACED = 20
LONGEST = 1500
GROWTH = 500 << 10  # KiB
SPACE = 1 << 30  # bytes of address space beyond what is there at the start


class TooSlow(BaseException):
    """The clock ran out; not an Exception, which a parser would catch."""


@dataclass
class Tally:
    """What came of one parser's inputs: clean results, refusals, and the findings as (number of the input, what)."""

    clean: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: list[tuple[int, str]] = field(default_factory=list)


def make(target: Target, seed: int, number: int) -> bytes:
    """Input number `number` of a parser."""
    rng = Random(f"{seed}/{target.name}/{number}")
    return target.mutate(rng.choice(target.corpus), rng, target.corpus)


def fuzz(target: Target, folder: Path, inputs: int, *, seed: int = 0, first: int = 0) -> Tally:
    """Give a parser its inputs first to first + inputs - 1; `folder` is where they are written."""
    tally, path = Tally(), folder / target.file
    start = time.monotonic()
    for data in target.corpus:  # also warms up what is imported late
        path.write_bytes(data)
        target.read(path)
    for number in range(first, first + inputs):
        data = make(target, seed, number)
        path.write_bytes(data)
        traced = number % TRACED == 0
        if traced:
            tracemalloc.start()
        outcome, seconds = attempt(target, path)
        if traced:
            peak, allowed = tracemalloc.get_traced_memory()[1], target.memory + 64 * len(data)
            tracemalloc.stop()
            if peak > allowed:
                tally.findings.append((number, f"{peak:,} bytes of memory for an input of {len(data):,}"))
        if outcome is None:
            tally.clean += 1
        elif said := fault(outcome, target, path):
            tally.findings.append((number, said))
        else:
            tally.refused += 1
        if seconds > CPU_SECONDS and not isinstance(outcome, TooSlow):
            tally.findings.append((number, f"{seconds:.1f} s of processor time"))
    tally.seconds = time.monotonic() - start
    return tally


def attempt(target: Target, path: Path) -> tuple[BaseException | None, float]:
    """What reading a file raised, and the processor time it took."""
    signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
    start = time.process_time()
    try:
        target.read(path)
        outcome = None
    except (Exception, TooSlow) as error:
        outcome = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome, time.process_time() - start


def fault(error: BaseException, target: Target, path: Path) -> str:
    """What is wrong with an error; nothing where it is one of the library's, with a message that can be shown."""
    text = str(error)
    if not isinstance(error, target.expected):
        return f"{type(error).__name__}: {text[:200]!a}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"a MemoryError, shown as {text[:200]!a}"
        cause = cause.__cause__ or cause.__context__
    if len(text) > LONGEST or not text.isprintable():
        return f"a message that cannot be shown, {len(text):,} characters: {text[:200]!a}"
    return f"a message without the file: {text[:200]!a}" if target.named and str(path) not in text else ""


def guarded(run: Callable[[], int]) -> int:
    """Call with the time and space of this process limited, and as a user has it: with warnings shown, not raised."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TooSlow(f"not done after {CLOCK_SECONDS:g} s")

    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, ring)
    with suppress(OSError, ValueError):  # /proc is Linux's
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPACE, resource.RLIM_INFINITY))
    return run()


def main(arguments: list[str]) -> int:
    """The command: prints a line for each parser, and each finding."""
    parser = argparse.ArgumentParser(description="Fuzz every parser of files.")
    parser.add_argument("--inputs", type=int, default=1000, help="for each parser")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of parsers")
    given = parser.parse_args(arguments)
    return guarded(lambda: report(given.inputs, given.first, given.seed, given.only))


def report(inputs: int, first: int, seed: int, only: list[str] | None) -> int:
    found, total, clock = 0, 0, time.monotonic()
    for target in targets():
        if only and target.name not in only:
            continue
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory(prefix="vaelab-fuzz-") as folder:
            tally = fuzz(target, Path(folder), inputs, seed=seed, first=first)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > GROWTH:
            tally.findings.append((first, f"the process grew by {grown >> 10:,} MiB"))
        sys.stdout.write(
            f"{target.name:12} {inputs:9,} inputs  {tally.clean:9,} read  {tally.refused:9,} refused  "
            f"{len(tally.findings):4,} findings  {tally.seconds:7.1f} s  +{grown >> 10} MiB\n"
        )
        for number, said in tally.findings[:20]:
            sys.stdout.write(f"    --only {target.name} --seed {seed} --first {number} --inputs 1: {said}\n")
        sys.stdout.flush()
        found, total = found + len(tally.findings), total + inputs
    sys.stdout.write(f"{total:,} inputs, {found:,} findings, {time.monotonic() - clock:.0f} s\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
