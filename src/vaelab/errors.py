"""Every error a user can cause, each with the exit code the command line ends with.

A message says what was given, what was expected and what to do next; it is shown without a traceback. Anything that is
not a `VaelabError` is a defect of ours and ends with exit code 1.
"""

import difflib
import signal
from collections.abc import Iterable

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals by which a user asks a program to stop: Ctrl-C, kill, a closed terminal."""


class VaelabError(Exception):
    """Base of the errors a user can cause and mend."""

    exit_code = 1


class UsageError(VaelabError):
    """A name, a value or a combination that cannot be used."""

    exit_code = 2


class DataError(VaelabError):
    """Data that is missing, unreadable or fails its checksum."""

    exit_code = 3


class NonFiniteError(VaelabError):
    """Training or evaluation met a value that is not finite."""

    exit_code = 4


class NonFiniteStep(NonFiniteError):
    """A step of training whose loss or gradient is not finite: the weights are those before it."""


class RunError(VaelabError):
    """A run folder that is none, is not ours, or does not fit this version."""

    exit_code = 5


class WorkerDied(VaelabError):
    """A process that worked for this one is gone: killed, or out of memory."""


class NoDensity(VaelabError):
    """A density was asked of a distribution that has none (a Dirac posterior, a cross-entropy on grey levels)."""

    exit_code = 2


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in a table: it offers the nearest one, and lists them all.

    Args:
        kind: what the name stands for, in the singular ("recipe").
        given: what the user wrote.
        known: the names that exist.
    """
    names, given = sorted(known), given if len(given) <= 80 else f"{given[:80]}..."
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(f"unknown {kind} '{given}': {hint}known: {', '.join(names)}")


def one_line(error: Exception, most: int = 300) -> str:
    """What an error says, in one printable line of at most `most` characters: it may quote what a stranger wrote."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(error)[: 4 * most].split()))
    return (line if len(line) <= most else line[:most] + "...") or type(error).__name__


class Interrupted(VaelabError):
    """The user asked to stop (Ctrl-C, SIGTERM); training stops after a whole step.

    Args:
        reason: the signal.
        where: what was reached.
    """

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(f"interrupted by {reason} {where}")
        self.reason, self.where = reason, where
        self.exit_code = {"SIGTERM": 143, "SIGHUP": 129}.get(reason, 130)

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[str, str]]:
        return type(self), (self.reason, self.where)  # between processes an exception is its arguments
