"""The fuzzer in short: some hundred inputs for each parser; and that it does find what it is there to find."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import fuzz
import mutations
import pytest
from targets import Target, targets

from vaelab.errors import DataError

INPUTS = 300
TARGETS = {target.name: target for target in targets()}


def test_no_parser_is_surprised():
    """In a process of its own, with its time and its space limited: as `python tests/fuzz/fuzz.py --inputs 300`."""
    done = subprocess.run(
        [sys.executable, str(Path(fuzz.__file__)), "--inputs", str(INPUTS)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{INPUTS * len(TARGETS):,} inputs, 0 findings" in done.stdout
    lines = re.findall(r"^(\S+) +(\S+) inputs +(\S+) read +(\S+) refused +0 findings", done.stdout, re.M)
    assert [name for name, *_ in lines] == list(TARGETS)
    for name, inputs, read, refused in lines:  # both happen, or the mutations are too weak or too strong
        assert int(inputs) == INPUTS == int(read) + int(refused) and int(read) > 0 and int(refused) > INPUTS / 8, name


@pytest.mark.parametrize("name", TARGETS)
def test_an_input_depends_on_seed_parser_and_number_alone(name):
    target = TARGETS[name]
    made = [fuzz.make(target, 0, number) for number in range(40)]
    assert made == [fuzz.make(target, 0, number) for number in range(40)]
    assert made != [fuzz.make(target, 1, number) for number in range(40)]
    assert len(set(made)) > 25 and sum(data not in target.corpus for data in made) > 25


# --- what it must find ---


def reader(harm):
    """A parser that fails for one input in eight or so: those in which the first byte is no longer x."""

    def read(path: Path) -> None:
        if path.read_bytes()[:1] != b"x":
            harm(path)

    return read


def burn(path: Path) -> None:
    start = time.process_time()
    while time.process_time() - start < 0.3:
        pass


def hang(path: Path) -> None:
    try:
        time.sleep(30)
    except Exception:
        raise DataError(f"{path}: broken") from None


def hidden_memory(path: Path) -> None:
    try:
        raise MemoryError
    except Exception as error:
        raise DataError(f"{path}: broken") from error


def raises(error: Exception):
    def harm(path: Path) -> None:
        raise type(error)(str(error).replace("PATH", str(path)))

    return harm


HARMS = {
    "another error": (raises(KeyError("PATH")), "KeyError"),
    "an assertion": (raises(AssertionError("PATH")), "AssertionError"),
    "no memory": (raises(MemoryError("PATH")), "MemoryError"),
    "no memory, hidden": (hidden_memory, "a MemoryError, shown as"),
    "a message for a terminal": (raises(DataError("PATH \x1b[2J")), "cannot be shown"),
    "a message of two lines": (raises(DataError("PATH\nerror: x")), "cannot be shown"),
    "a message without end": (raises(DataError("PATH" + "x" * 2000)), "cannot be shown"),
    "a message without the file": (raises(DataError("broken")), "without the file"),
    "slowness": (burn, "s of processor time"),
    "a hang": (hang, "TooSlow"),
    "much memory": (lambda path: bytearray(50 << 20), "bytes of memory for an input"),
}


@pytest.mark.parametrize("case", HARMS)
def test_each_kind_of_harm_is_found(tmp_path, monkeypatch, case):
    harm, said = HARMS[case]
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.1)
    monkeypatch.setattr(fuzz, "CLOCK_SECONDS", 0.2 if case == "a hang" else 5.0)
    monkeypatch.setattr(fuzz, "TRACED", 1)

    def ring(signum: int, frame: object) -> None:
        raise fuzz.TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    try:
        tally = fuzz.fuzz(Target("planted", "file", (b"xy",), mutations.of_bytes, reader(harm)), tmp_path, 12)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tally.findings and all(said in text for _, text in tally.findings), tally.findings
    assert tally.clean
    number, _ = tally.findings[0]
    assert fuzz.make(TARGETS["idx"], 0, number)
    again = fuzz.make(Target("planted", "file", (b"xy",), mutations.of_bytes, reader(harm)), 0, number)
    assert again[:1] != b"x"  # the number is that of an input that does harm


def test_a_corpus_that_is_refused_is_no_corpus(tmp_path):
    target = Target("planted", "file", (b"y",), mutations.of_bytes, reader(raises(DataError("PATH"))))
    with pytest.raises(DataError):
        fuzz.fuzz(target, tmp_path, 1)


def test_trees_are_changed_into_each_kind_of_value():
    made = b" ".join(mutations.of_json(b'{"a": {"b": [1, 2]}, "c": 0.5}', Random(i)) for i in range(2000))
    for text in (
        b"NaN",
        b"1e999",
        b"[" * 70,
        b"\\ud800",
        b"\\u001b",
        b"os:system",
        b"null",
        b"9" * 60,
        b"9223372036854775808",
    ):
        assert text in made, text
