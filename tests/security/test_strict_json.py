"""JSON somebody else wrote: what is read, and the sentence for each thing that is not."""

import json
import os

import pytest

from vaelab import strict_json
from vaelab.errors import RunError, UsageError

GOOD = {
    "nothing": None,
    "numbers": [0, -1, 2.5, 1e308, 5e-324, 10**39],
    "text": "Grüße, 你好, 😀, tab\tline\nreturn\r",
    "nested": {"a": [{"b": [[]]}]},
    "": True,
}


def test_what_the_standard_allows_is_read(tmp_path):
    path = tmp_path / "x.json"
    for text in (json.dumps(GOOD), json.dumps(GOOD, ensure_ascii=False, indent=3), f" \n{json.dumps(GOOD)}\n"):
        path.write_text(text, encoding="utf-8")
        assert strict_json.read(path) == GOOD
    assert strict_json.parse(b"3", "x") == 3


BAD = {
    "nothing": (b"", "not JSON at line 1, column 1"),
    "half": (b'{"a": [1, 2', "not JSON at line 1, column 12"),
    "two documents": (b"{} {}", "not JSON at line 1, column 4"),
    "single quotes": (b"{'a': 1}", "not JSON"),
    "a comment": (b"{} // x", "not JSON"),
    "a last comma": (b"[1,]", "not JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "not UTF-8 text at byte 7"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 text at byte 0"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "zeros": (bytes(100), "not JSON"),
    "NaN": (b'{"a": NaN}', "NaN, which is not a number of JSON"),
    "infinity": (b"[-Infinity]", "-Infinity, which is not a number of JSON"),
    "a number that becomes infinite": (b"[1e999]", "the number '1e999', which is too large"),
    "a long number that becomes infinite": (b"[" + b"9" * 400 + b".0]", "which is too large"),
    "an integer of 41 digits": (b"[1" + b"0" * 40 + b"]", "an integer of 41 digits, where at most 40"),
    "an integer of a million digits": (b"-" + b"1" * 10**6, "an integer of 1,000,000 digits"),
    "a key twice": (b'{"a": {"k": 1, "k": 1}}', "the key 'k' stands there twice"),
    "a key twice in two spellings": (b'{"k": 1, "\\u006b": 2}', "the key 'k' stands there twice"),
    "65 brackets": (b"[" * 65 + b"]" * 65, None),
    "66 brackets": (b"[" * 66 + b"]" * 66, "brackets nested more than 64 deep"),
    "66 braces": (b'{"a":' * 66 + b"1" + b"}" * 66, "brackets nested more than 64 deep"),
    "a million brackets": (b"[" * 10**6, "brackets nested more than 64 deep"),
    "a million braces": (b'{"a":' * 10**6, "brackets nested more than 64 deep"),
    "half a surrogate pair": (b'["\\ud800"]', "U+D800"),
    "a sequence for a terminal": (b'["\\u001b]0;title\\u0007"]', "U+001B"),
    "the same in a key": (b'{"\\u009b2J": 1}', "U+009B"),
    "a zero in text": (b'["a\\u0000"]', "U+0000"),
    "a raw control character": (b'["\x1b"]', "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_documents(tmp_path, case):
    data, reason = BAD[case]
    path = tmp_path / "x.json"
    path.write_bytes(data)
    if reason is None:
        strict_json.read(path)
        return
    with pytest.raises(RunError) as caught:
        strict_json.read(path)
    text = str(caught.value)
    assert text.startswith(f"'{path}' is damaged: ") and text.endswith("; restore it from a copy, or make it again")
    assert reason in text and text.isprintable() and len(text) < 400
    assert caught.value.exit_code == 5


def test_a_document_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1]")
    assert strict_json.read(path, limit=3) == [1]
    with pytest.raises(RunError, match=r"x\.json' holds more than 2 bytes"):
        strict_json.read(path, limit=2)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file: a terabyte that takes no room
    with pytest.raises(RunError, match=f"holds more than {strict_json.LIMIT:,} bytes"):
        strict_json.read(path)


def test_what_is_no_file_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("gone", ".", "pipe", "loop", "x" * 300):
        with pytest.raises(RunError, match="cannot be read"):
            strict_json.read(tmp_path / name)


# --- records ---


def test_records_and_a_last_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text, expected in {
        "": [], '{"a": 1}\n': [{"a": 1}], '{"a": 1}\n\n{"b": 2}\n': [{"a": 1}, {"b": 2}], '{"a": 1}\n{"b"': [{"a": 1}],
        '{"a": 1}': [], '{"a": "x\u2028y"}\n': [{"a": "x\u2028y"}], '{"a": 1}\r\n': [{"a": 1}],
    }.items():  # fmt: skip
        path.write_text(text, encoding="utf-8", newline="")
        assert strict_json.read_lines(path) == expected
    path.write_bytes(b'{"a": 1}\n{"b": "\xc3')  # cut within a character
    assert strict_json.read_lines(path) == [{"a": 1}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [("[1]", "type list where an object was expected"), ("3", "type int where"), ('{"a"', "not JSON"), ("{} {}", "not JSON"),
     ('{"a": NaN}', "NaN"), ('{"a": 1, "a": 1}', "twice"), ("[" * 10**5, "nested")],
)  # fmt: skip
def test_bad_records_name_the_line(tmp_path, line, reason):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(RunError, match=rf"metrics\.jsonl' is damaged: line 2: .*{reason}"):
        strict_json.read_lines(path)


def test_too_many_records_are_not_read(tmp_path):
    (tmp_path / "m").write_text("{}\n" * 10)
    assert len(strict_json.read_lines(tmp_path / "m", limit=30)) == 10
    with pytest.raises(RunError, match="more than 29 bytes"):
        strict_json.read_lines(tmp_path / "m", limit=29)


# --- writing ---


def test_what_is_written_can_be_read():
    assert strict_json.parse(strict_json.text_of(GOOD).encode(), "x") == GOOD
    assert strict_json.parse(strict_json.text_of(GOOD, indent=2).encode(), "x") == GOOD
    assert "\n" not in strict_json.text_of(GOOD)


def test_what_could_not_be_read_is_not_written():
    deep: list = []
    for _ in range(70):
        deep = [deep]
    for value in ({"data": "a\udcff"}, {"data": "\x1b[2J"}, 10**40, deep, {1: "a", "1": "b"}):
        with pytest.raises(UsageError, match="cannot be written to a run folder"):
            strict_json.text_of(value)
    with pytest.raises(ValueError, match="JSON compliant"):
        strict_json.text_of({"a": float("nan")})
