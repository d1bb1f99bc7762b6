"""The only module that prints: results on stdout, progress and errors on stderr."""

import json as json_module
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter, Token
from rich import box
from rich.console import Console
from rich.table import Table

from vaelab.errors import ENDING

if TYPE_CHECKING:
    from rich.progress import Progress

_OUTPUT = Group("Output", sort_key=90)
EVERY = 5.0
"""Seconds between the lines of progress where there is no terminal."""


@Parameter(name="*", group=_OUTPUT)
@dataclass(frozen=True, kw_only=True)
class Output:
    """What is printed."""

    json: Annotated[bool, Parameter(negative="", help="Print one JSON document instead of tables.")] = False
    quiet: Annotated[bool, Parameter(negative="", help="No progress.")] = False
    debug: Annotated[bool, Parameter(negative="", help="Show the traceback of an error.")] = False


def error(message: str, debug: bool = False) -> None:
    """An error, on stderr."""
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {_escape(message)}")


def note(message: str, output: Output) -> None:
    """A line that is not a result, on stderr; not with --quiet."""
    if not output.quiet:
        Console(stderr=True, soft_wrap=True, highlight=False).print(_escape(message))


def result(document: Any, output: Output, show: Callable[[], None]) -> None:
    """A result: the document with --json, else what `show` prints."""
    if output.json:
        print(json_module.dumps(document, indent=2, allow_nan=False, default=str))
    else:
        show()


def text(message: str) -> None:
    """A line of a result, on stdout."""
    Console(soft_wrap=True, highlight=False).print(_escape(message))


def table(rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout; the first row is its header. In a pipe it is never wrapped."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=10_000)
    shown = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for name in rows[0]:
        shown.add_column(_escape(name), overflow="fold")
    for row in rows[1:]:
        shown.add_row(*map(_escape, row))
    if out.is_terminal:
        out.print(shown)
    else:
        with out.capture() as captured:
            out.print(shown)
        print("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()))


class Stages:
    """Progress on stderr: a live bar on a terminal, one plain line every few seconds elsewhere, nothing if quiet.

    Several may be open at once, each with its bar.
    """

    def __init__(self, output: Output) -> None:
        self.quiet = output.quiet
        self.console = Console(stderr=True, highlight=False)
        self._bars: Progress | None = None

    @contextmanager
    def __call__(self, label: str) -> Iterator[Callable[[float, str], None]]:
        if self.quiet:
            yield lambda done, text: None
        elif self.console.is_terminal:
            yield from self._live(label)
        else:
            yield from self._plain(label)

    def _live(self, label: str) -> Iterator[Callable[[float, str], None]]:
        bars = self._bars = self._bars or _new_bars(self.console)
        start = time.perf_counter()
        bars.start()
        task = bars.add_task(_escape(label), total=1.0, text="", left="")

        def update(done: float, text: str) -> None:
            left = "" if done >= 1 else f"{_left(start, done)}  "
            bars.update(task, completed=done, text=_escape(text), left=left)

        try:
            yield update
            bars.update(task, completed=1.0, left="")
        finally:  # its line stays above those that go on
            self.console.print(bars.make_tasks_table([one for one in bars.tasks if one.id == task]))
            bars.remove_task(task)
            if not bars.tasks:
                bars.stop()

    def _plain(self, label: str) -> Iterator[Callable[[float, str], None]]:
        start = last = time.perf_counter()
        latest = ""

        def update(done: float, text: str) -> None:
            nonlocal last, latest
            latest = text
            if done < 1 and time.perf_counter() - last >= EVERY:
                last = time.perf_counter()
                line = f"{label}: {100 * done:.0f} %  {_left(start, done)}  {text}"
                self.console.print(_escape(line.rstrip()), soft_wrap=True)

        yield update
        line = f"{label}: done in {time.perf_counter() - start:.1f} s  {latest}"
        self.console.print(_escape(line.rstrip()), soft_wrap=True)

    def fetch(self) -> Callable[[str, int, int | None], None]:
        """Progress of a download, for `vaelab.data.load`."""
        last = 0.0

        def update(label: str, done: int, total: int | None) -> None:
            nonlocal last
            if not self.quiet and time.perf_counter() - last > (0.2 if self.console.is_terminal else EVERY):
                last = time.perf_counter()
                size = f"{done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f} MB" if total else "")
                self.console.print(_escape(f"{label}: {size}"), end="\r" if self.console.is_terminal else "\n")

        return update


@contextmanager
def interruptible() -> Iterator[Callable[[], str | None]]:
    """Ctrl-C, SIGTERM and a closed terminal are noted, for training to finish its step and save; a second one leaves at once.

    A closed terminal that nohup has told the process not to mind is not.
    """
    received: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise SystemExit(128 + number)
        received.append(signal.Signals(number).name)

    hangup = getattr(signal, "SIGHUP", None)
    minded = [number for number in ENDING if number != hangup or signal.getsignal(number) != signal.SIG_IGN]
    held = {number: signal.signal(number, handle) for number in minded}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def whole(kind: type, tokens: Sequence[Token]) -> int:
    """A whole number; "1.5" is refused instead of being rounded."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'unable to convert "{tokens[0].value}" into int') from None


def plain(problem: Exception) -> str:
    """The message of an error of the command-line parser, in one line."""
    lines = [line.strip(" │╭╮╰╯─") for line in str(problem).splitlines()]
    return re.sub(r"\s+", " ", " ".join(line for line in lines if line)).replace(", ...", " and others").rstrip(".")


def usage(arguments: Sequence[str], commands: Container[str]) -> str:
    """The command that was asked for, without its options."""
    return " ".join(["vaelab", *(word for word in arguments[:1] if word in commands)])


def _new_bars(console: Console) -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.percentage:>3.0f} %"),
               TimeElapsedColumn(), TextColumn("{task.fields[left]}{task.fields[text]}"))  # fmt: skip
    return Progress(*columns, console=console, transient=True)


def _left(start: float, done: float) -> str:
    if done <= 0:
        return ""
    left = (time.perf_counter() - start) * (1 - done) / done
    return f"{int(left // 60)}:{int(left % 60):02d} left"


def _escape(message: str) -> str:
    from rich.markup import escape

    return escape(message)
