"""The report: one self-contained page and strict JSON, from one dict."""

import base64
import copy
import html.parser
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from vaelab.errors import RunError
from vaelab.report import figures, page

VOID = {"meta", "link", "img", "br", "hr"}


class Reader(html.parser.HTMLParser):
    """Reads a page, checks that tags nest, and keeps tags, texts and the table's rows."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def value(mean, se=None, n=3, reason="") -> dict:
    return {"mean": mean, "se": se, "n": n, "values": [] if mean is None else [mean] * n, "reason": reason}


@pytest.fixture
def folder(tmp_path):
    for name in ("generation", "training"):
        figures.save(figures.generation(np.zeros((2, 1, 8, 8)), name), tmp_path / "images" / f"{name}.png", dpi=30)
    return tmp_path


@pytest.fixture
def report() -> dict:
    return {
        "format": 1,
        "title": "Removing the KL term",
        "lead": "Two models.",
        "n_seeds": 3,
        "command": "vaelab study removing-kl --seeds 3",
        "arms": [
            {"key": "kl", "label": "with KL", "description": "beta = 1", "runs": ["runs/kl-seed0"]},
            {"key": "no", "label": "without KL", "description": "beta = 0", "runs": ["runs/no-seed0"]},
        ],
        "metrics": [
            {"key": "nll", "label": "NLL", "unit": "nats", "help": "By quadrature.", "decimals": 2, "section": "Bound"},
            {"key": "std", "label": "code spread", "unit": "σ", "help": "Of codes.", "decimals": 1, "section": "Codes"},
            {"key": "elbo", "label": "ELBO", "unit": "nats", "help": "The bound.", "decimals": 2, "section": "Bound"},
        ],
        "values": {
            "nll": {"kl": value(132.954, 0.041), "no": value(None, n=0, reason="quadrature did not converge")},
            "std": {"kl": value(0.98, 0.01), "no": value(12345.67, n=1)},
            "elbo": {"kl": value(-137.4, 0.2)},
        },
        "observations": [
            {"text": "The rate explodes.", "figure": None},
            {"text": "The samples are noise.", "figure": "images/generation.png"},
        ],
        "figures": [
            {"file": "images/generation.png", "title": "Samples", "caption": "From the prior.", "alt": "a grid"},
            {"file": "images/training.png", "title": "Training", "caption": "Against time.", "alt": "two plots"},
        ],
        "protocol": {"data": "mnist", "quadrature": {"error": 2e-4}, "seeds": [0, 1, 2]},
        "environment": {"torch": "2.13.0", "deterministic": True},
    }


def test_json_returns_what_was_given(folder, report) -> None:
    assert page.write_report(folder, report) == folder / "report.html"
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    assert sorted(p.name for p in folder.iterdir()) == ["images", "report.html", "report.json"]


def test_a_report_read_back_gives_the_same_page(folder, report) -> None:
    report["values"]["std"]["no"] = value(math.inf)
    first = page.write_report(folder, report).read_bytes()
    again = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert page.text_table(again) == page.text_table(report)
    assert page.notes(again) == page.notes(report)
    assert page.write_report(folder, again).read_bytes() == first


def test_a_write_that_fails_leaves_the_old_page_whole(folder, report, monkeypatch) -> None:
    before = page.write_report(folder, report).read_bytes()

    def full_disk(self, text, **_) -> None:
        self.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        page.write_report(folder, report | {"title": "Another"})
    assert (folder / "report.html").read_bytes() == before
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    assert sorted(p.name for p in folder.iterdir()) == ["images", "report.html", "report.json"]


def test_only_temporary_names_are_written_to(folder, report, monkeypatch) -> None:
    written, write = [], Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: (written.append(self.name), write(self, *a, **k)))
    page.write_report(folder, report)
    assert len(written) == 2
    assert not {"report.json", "report.html"} & set(written)


def test_json_is_strict_and_keeps_what_is_not_finite(folder, report) -> None:
    report["values"]["nll"]["kl"] = value(math.nan) | {"values": [np.float32(1.5), -math.inf, math.inf]}
    report["protocol"]["sizes"] = np.array([3, 4])
    page.write_report(folder, report)

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    read = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    kept = read["values"]["nll"]["kl"]
    assert math.isnan(float(kept["mean"]))
    assert [float(item) for item in kept["values"]] == [1.5, -math.inf, math.inf]
    assert read["protocol"]["sizes"] == [3, 4]


def test_json_refuses_what_it_would_have_to_guess(folder, report) -> None:
    report["protocol"]["when"] = object()
    with pytest.raises(TypeError, match=r"report\['protocol'\]\['when'\]: a object"):
        page.write_report(folder, report)


def test_text_table_groups_sections_and_puts_n_beside_every_number(report) -> None:
    assert page.text_table(report) == [
        ["section", "metric", "unit", "with KL", "without KL"],
        ["Bound", "NLL", "nats", "132.95 ± 0.04 (n = 3)", "n/a [1]"],
        ["Bound", "ELBO", "nats", "-137.40 ± 0.20 (n = 3)", "n/a [2]"],
        ["Codes", "code spread", "σ", "1.0 ± 0.01 (n = 3)", "12,345.7 (n = 1)"],
    ]
    assert page.notes(report) == ["quadrature did not converge", "not measured"]


def test_no_standard_error_is_claimed_for_one_seed(report) -> None:
    report["values"]["nll"]["kl"] = value(132.954, 0.0, n=1)
    assert page.text_table(report)[1][3] == "132.95 (n = 1)"


@pytest.mark.parametrize(
    ("mean", "shown"),
    [(0.0, "0.00"), (0.00012, "0.00012"), (-0.0049, "-0.0049"), (-1234567.891, "-1,234,567.89"), (3e9, "3e+09")],
)
def test_numbers_neither_vanish_nor_overflow(report, mean: float, shown: str) -> None:
    report["values"]["nll"]["kl"] = value(mean, n=2)
    assert page.text_table(report)[1][3] == f"{shown} (n = 2)"


@pytest.mark.parametrize(("mean", "word"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_what_is_not_finite_is_not_available_and_says_why(report, mean: float, word: str) -> None:
    report["values"]["nll"]["kl"] = value(mean)
    assert page.text_table(report)[1][3] == "n/a [1]"
    assert page.notes(report)[0] == f"not finite: {word}"


def test_the_page_is_well_formed_and_carries_the_same_table(folder, report) -> None:
    read = Reader(page.write_report(folder, report).read_text(encoding="utf-8"))
    assert read.all("html") == [{"lang": "en"}]
    rows = [" | ".join(row) for row in read.rows]
    for row in page.text_table(report)[1:]:
        label, unit, *cells = row[1:]
        (found,) = [line for line in rows if line.startswith(label)]
        assert found.endswith(" | ".join([unit, *cells]).replace("-", "−"))
    for metric in report["metrics"]:
        assert metric["help"] in read.text
    for sentence in ("quadrature did not converge", "The rate explodes.", "Two models.", report["command"], "yes"):
        assert sentence in read.text


def test_every_number_of_the_table_has_its_n(folder, report) -> None:
    document = page.write_report(folder, report).read_text(encoding="utf-8")
    cells = re.findall(r'<td class="number">(.*?)</td>', document)
    assert len(cells) == 6
    for cell in cells:
        assert re.search(r"<small>\(n = \d+\)</small>$", cell) or cell.startswith("n/a <a ")


def test_notes_that_are_referred_to_exist(folder, report) -> None:
    read = Reader(page.write_report(folder, report).read_text(encoding="utf-8"))
    targets = {link["href"].removeprefix("#") for link in read.all("a")}
    assert {"note-1", "note-2", "figures", "numbers"} <= targets
    assert targets <= {attributes.get("id") for _, attributes in read.tags}


def test_headings_are_nested(folder, report) -> None:
    read = Reader(page.write_report(folder, report).read_text(encoding="utf-8"))
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_page_needs_nothing_but_itself(folder, report) -> None:
    document = page.write_report(folder, report).read_text(encoding="utf-8")
    read = Reader(document)
    for _, attributes in read.tags:
        for key in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
    assert not re.search(r"url\(|@import|https?://", document)
    assert read.all("script") == []
    policy = [m["content"] for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_figure_is_embedded_byte_for_byte(folder, report) -> None:
    read = Reader(page.write_report(folder, report).read_text(encoding="utf-8"))
    drawn = read.all("img")
    assert [image["alt"] for image in drawn] == ["a grid", "two plots"]
    for image, figure in zip(drawn, report["figures"], strict=True):
        content = (folder / figure["file"]).read_bytes()
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == content
        size = [int.from_bytes(content[16:20]), int.from_bytes(content[20:24])]
        assert [int(image["width"]), int(image["height"])] == size


def test_observations_stand_with_the_figure_they_speak_of(folder, report) -> None:
    document = page.write_report(folder, report).read_text(encoding="utf-8")
    places = [document.index(text) for text in (
        "The rate explodes.", 'alt="a grid"', "The samples are noise.", 'alt="two plots"')]  # fmt: skip
    assert places == sorted(places)


def test_hostile_strings_are_text(folder, report) -> None:
    attack = "<script>alert('1')</script>\"><img src=http://example.org onerror=x> $title & ${css}"
    hostile = copy.deepcopy(report)
    hostile |= {"title": attack, "lead": attack, "command": attack}
    hostile["protocol"] = {attack: attack}
    hostile["environment"] = {"nested": {attack: [attack]}}
    hostile["observations"] = [{"text": attack, "figure": None}, {"text": attack, "figure": "images/training.png"}]
    for part in ("arms", "metrics", "figures"):
        for item in hostile[part]:
            item |= {key: attack for key in item if key not in ("key", "file", "runs", "decimals")}
    hostile["arms"][0]["runs"] = [attack]
    hostile["values"]["nll"]["no"]["reason"] = attack
    read = Reader(page.write_report(folder, hostile).read_text(encoding="utf-8"))
    assert read.all("script") == []
    assert len(read.all("img")) == 2
    assert {image["alt"] for image in read.all("img")} == {attack}
    assert read.text.count(attack) > 15
    clean = Reader(page.write_report(folder, report).read_text(encoding="utf-8"))
    assert {tag for tag, _ in read.tags} == {tag for tag, _ in clean.tags}


def test_a_single_run_is_one_arm(folder, report) -> None:
    report["arms"] = report["arms"][:1]
    report["values"] = {key: {"kl": row["kl"]} for key, row in report["values"].items()}
    read = Reader(page.write_report(folder, report | {"n_seeds": 1}).read_text(encoding="utf-8"))
    assert ["metric", "unit", "with KLbeta = 1"] in read.rows


def test_parts_that_are_empty_leave_no_heading(folder, report) -> None:
    report |= {"observations": [], "figures": [], "metrics": [], "values": {}, "lead": ""}
    read = Reader(page.write_report(folder, report).read_text(encoding="utf-8"))
    assert {section["id"] for section in read.all("section")} == {"method"}
    assert [link["href"] for link in read.all("a")] == ["#method"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["figures"][0].update(file="images/none.png"), "observation 2 speaks of 'images/generation.png'"),
        (
            lambda r: r["figures"].append({"file": "images/none.png", "title": "x"}),
            r"none\.png does not exist; draw it",
        ),
        (lambda r: r["figures"].append({"file": "../secret.png", "title": "x"}), "outside the report's folder"),
        (lambda r: r["figures"].append({"file": "images/text.png", "title": "x"}), r"text\.png is not a PNG"),
        (lambda r: r["figures"].append(r["figures"][0]), r"figure images/generation\.png given twice"),
        (lambda r: r.update(format=2), "format 2 given"),
        (lambda r: r.pop("protocol"), "without protocol"),
        (lambda r: r.update(arms=[]), "no arms"),
        (lambda r: r["arms"].append(r["arms"][0]), "arm kl given twice"),
        (lambda r: r["values"].update(nil={}), "values of 'nil', which is not among the metrics: nll"),
        (lambda r: r["values"]["nll"].update(lk=value(1.0)), "'lk', which is not an arm: kl, no"),
        (lambda r: r["values"]["nll"]["kl"].pop("n"), "'nll' for 'kl' has a mean but no n"),
    ],
)
def test_a_report_with_a_hole_is_refused_and_nothing_is_written(folder, report, change, message: str) -> None:
    (folder / "images" / "text.png").write_text("no image")
    (folder.parent / "secret.png").write_bytes((folder / "images" / "training.png").read_bytes())
    change(report)
    with pytest.raises(RunError, match=message):
        page.write_report(folder, report)
    assert [p.name for p in folder.iterdir()] == ["images"]
