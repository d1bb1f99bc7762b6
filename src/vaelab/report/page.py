"""The report of a study or of a single run: `report.html` to read, project and mail, `report.json` for every number.

The page is one file: its figures are embedded, it has no script, and its Content-Security-Policy forbids every request,
so that it reads the same from a mail attachment in ten years. Both files are made from one dict:

    {"format": 1, "title": str, "lead": str, "n_seeds": int, "command": str,
     "arms": [{"key": "kl", "label": "with KL", "description": "beta = 1", "runs": ["runs/kl-seed0"]}, ...],
     "metrics": [{"key": "nll", "label": "negative log-likelihood", "unit": "nats", "help": "one sentence",
                  "decimals": 2, "section": "Likelihood"}, ...],
     "values": {metric key: {arm key: {"mean": float or None, "se": float or None, "n": int, "values": [float, ...],
                                       "reason": why there is no number}}},
     "observations": [{"text": str, "figure": file of the figure it speaks of, or None}, ...],
     "figures": [{"file": "images/x.png", "title": str, "caption": str, "alt": str}, ...],
     "protocol": {...}, "environment": {...}}

A value that is absent is n/a, and the reason stands under the table. JSON has no word for a number that is not finite:
`report.json` holds the strings "NaN", "Infinity" and "-Infinity", which Python's float() and JavaScript's Number() read
back, and the table prints n/a.

The page is built with html.escape and string.Template, not Jinja2: that is not among our dependencies (torch brings it,
and may stop), and here every string passes through `_tag`, which escapes whatever is not markup of its own making.
"""

import base64
import html
import json
import math
import os
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaelab.errors import RunError

REQUIRED = ("title", "n_seeds", "arms", "metrics", "values", "observations", "figures", "protocol", "environment")
PNG = b"\x89PNG\r\n\x1a\n"
Report = Mapping[str, Any]


def write_report(folder: Path, report: Report) -> Path:
    """Writes `folder`/report.json and `folder`/report.html, and returns the path of the page.

    Both are composed before either is written, and each is written to a temporary name and renamed.

    Args:
        folder: holds the figures, at the paths that the report names.
        report: see the module's docstring; numpy scalars and arrays are taken as numbers and lists.

    Raises:
        RunError: a part is missing, a key refers to nothing, or a figure is not there or not a PNG.
    """
    plain = _plain(report, "report")
    _check(plain)
    page = _page(folder, plain)
    document = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _write(folder / "report.json", document)
    return _write(folder / "report.html", page)


def text_table(report: Report) -> list[list[str]]:
    """The page's table as rows of equal length: a header, then section, metric, unit and one cell per arm.

    A cell reads 'mean ± s.e. (n = 3)', 'mean (n = 1)' or 'n/a [1]', where [1] counts the sentences of `notes`.
    """
    rows = [["section", "metric", "unit", *(arm["label"] for arm in report["arms"])]]
    rows += [[row.section, row.label, row.unit, *(cell.text for cell in row.cells)] for row in _rows(report)]
    return rows


def notes(report: Report) -> list[str]:
    """Why values are n/a: the sentences that [1], [2] ... of `text_table` refer to."""
    return list(dict.fromkeys(_reason(value) for _, _, value in _values(report) if _finite(value.get("mean")) is None))


class _Cell(NamedTuple):
    number: str  # "-132.95 ± 0.04", or "" when there is none
    n: str  # "(n = 3)"
    note: int  # counts from 1; 0 when there is a number

    @property
    def text(self) -> str:
        return f"{self.number} {self.n}" if self.number else f"n/a [{self.note}]"


class _Row(NamedTuple):
    section: str
    label: str
    unit: str
    help: str
    cells: list[_Cell]


def _values(report: Report) -> list[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """Every (metric, arm key, value) of the table, metrics grouped by section in order of first appearance."""
    sections = list(dict.fromkeys(metric.get("section", "") for metric in report["metrics"]))
    metrics = sorted(report["metrics"], key=lambda metric: sections.index(metric.get("section", "")))
    table = report["values"]
    return [(m, arm["key"], table.get(m["key"], {}).get(arm["key"], {})) for m in metrics for arm in report["arms"]]


def _rows(report: Report) -> list[_Row]:
    reasons, rows = notes(report), []
    values = _values(report)
    for start in range(0, len(values), len(report["arms"])):
        cells, metric = [], values[start][0]
        for _, _, value in values[start : start + len(report["arms"])]:
            mean, error = _finite(value.get("mean")), _finite(value.get("se"))
            if mean is None:
                cells.append(_Cell("", "", reasons.index(_reason(value)) + 1))
                continue
            decimals = metric.get("decimals", 2)
            spread = "" if error is None or value["n"] < 2 else f" ± {_number(error, decimals)}"
            cells.append(_Cell(_number(mean, decimals) + spread, f"(n = {value['n']})", 0))
        rows.append(
            _Row(metric.get("section", ""), metric["label"], metric.get("unit", ""), metric.get("help", ""), cells)
        )
    return rows


def _finite(value: Any) -> float | None:
    """A number of the report, as it was given or as report.json spells it; None where there is none to print."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def _reason(value: Mapping[str, Any]) -> str:
    if value.get("reason"):
        return value["reason"]
    return "not measured" if value.get("mean") is None else f"not finite: {_plain(value['mean'], 'mean')}"


def _number(value: float, decimals: int) -> str:
    """Fixed decimals, but never a zero for what is not zero, nor more than seven digits before the point."""
    text = f"{value:,.{decimals}f}"
    if value and (abs(value) >= 1e7 or not float(text.replace(",", ""))):
        return f"{value:.2g}"
    return text


def _plain(value: Any, where: str) -> Any:
    """`value` in what strict JSON can hold."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{where}: a {type(value).__name__} cannot be written to JSON")


def _check(report: Report) -> None:
    """Finds what would otherwise be a silent hole in the page: a missing part, or a key that refers to nothing."""
    if report.get("format") != 1:
        raise RunError(f"report: format {report.get('format')!r} given; this version writes format 1")
    if missing := [key for key in REQUIRED if key not in report]:
        raise RunError(f"report: without {', '.join(missing)}; expected {', '.join(REQUIRED)}")
    if not report["arms"]:
        raise RunError("report: no arms; a single run is one arm")
    arms = [arm["key"] for arm in report["arms"]]
    metrics = [metric["key"] for metric in report["metrics"]]
    files = [figure["file"] for figure in report["figures"]]
    for kind, keys in (("arm", arms), ("metric", metrics), ("figure", files)):
        if double := {key for key in keys if keys.count(key) > 1}:
            raise RunError(f"report: {kind} {', '.join(sorted(double))} given twice")
    for metric, row in report["values"].items():
        if metric not in metrics:
            raise RunError(f"report: values of '{metric}', which is not among the metrics: {', '.join(metrics)}")
        for arm, value in row.items():
            if arm not in arms:
                raise RunError(f"report: a value of '{metric}' for '{arm}', which is not an arm: {', '.join(arms)}")
            if value.get("mean") is not None and not isinstance(value.get("n"), int):
                raise RunError(f"report: the value of '{metric}' for '{arm}' has a mean but no n")
    for index, observation in enumerate(report["observations"]):
        if (figure := observation.get("figure")) is not None and figure not in files:
            raise RunError(f"report: observation {index + 1} speaks of '{figure}', which is not among the figures")


class _Html(str):
    """Markup of our own making; any other string is text and is escaped."""


def _tag(name: str, attributes: Mapping[str, str | int], *children: str) -> _Html:
    opening = "".join(f' {key}="{html.escape(str(value))}"' for key, value in attributes.items())
    if name == "img":
        return _Html(f"<{name}{opening}>")
    return _Html(f"<{name}{opening}>{_join(*children)}</{name}>")


def _join(*children: str) -> _Html:
    return _Html("".join(child if isinstance(child, _Html) else html.escape(child) for child in children))


def _page(folder: Path, report: Report) -> str:
    whole = [o["text"] for o in report["observations"] if o.get("figure") is None]
    arms = [
        _join(_tag("dt", {}, arm["label"]), _tag("dd", {}, arm["description"]))
        for arm in report["arms"]
        if arm.get("description")
    ]
    parts = {
        "findings": _part("findings", "In short", [_findings(whole)] if whole else []),
        "figures": _part("figures", "What the pictures show", [_exhibit(folder, report, f) for f in report["figures"]]),
        "numbers": _part("numbers", "The numbers", _table(report) if report["metrics"] else []),
        "method": _part("method", "How it was made", _method(report)),
    }
    titles = {"findings": "In short", "figures": "Pictures", "numbers": "Numbers", "method": "Method"}
    links = [_tag("li", {}, _tag("a", {"href": f"#{key}"}, titles[key])) for key, part in parts.items() if part]
    files = resources.files("vaelab.report")
    return string.Template(files.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        parts,
        title=_join(report["title"]),
        css=files.joinpath("page.css").read_text(encoding="utf-8"),
        lead=_tag("p", {"class": "lead"}, report["lead"]) if report.get("lead") else "",
        arms=_tag("dl", {"class": "arms"}, *arms) if arms else "",
        contents=_tag("nav", {"aria-label": "contents"}, _tag("ul", {}, *links)),
    )


def _part(key: str, title: str, children: Sequence[str]) -> str:
    if not children:
        return ""
    return _tag("section", {"id": key, "aria-labelledby": f"{key}-title"},
                _tag("h2", {"id": f"{key}-title"}, title), *children)  # fmt: skip


def _findings(texts: Sequence[str]) -> str:
    return _tag("ul", {"class": "findings"}, *(_tag("li", {}, text) for text in texts)) if texts else _Html("")


def _exhibit(folder: Path, report: Report, figure: Mapping[str, Any]) -> str:
    """One figure with its caption, and under it the observations that speak of it."""
    path = folder / figure["file"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"report: the figure '{figure['file']}' lies outside the report's folder {folder}")
    if not path.is_file():
        raise RunError(f"report: the figure {path} does not exist; draw it first, or leave it out of the report")
    content = path.read_bytes()
    if not content.startswith(PNG) or len(content) < 24:
        raise RunError(f"report: the figure {path} is not a PNG image")
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))  # the IHDR chunk comes first
    picture = {
        "src": "data:image/png;base64," + base64.b64encode(content).decode("ascii"),
        "alt": figure.get("alt") or figure["title"],
        "width": width,
        "height": height,
    }
    caption = _tag("figcaption", {}, figure["caption"]) if figure.get("caption") else ""
    shape = "picture wide" if width > 1.4 * height else "picture"
    return _tag(
        "article",
        {"class": "exhibit"},
        _tag("h3", {}, figure["title"]),
        _tag("figure", {}, _tag("div", {"class": shape}, _tag("img", picture)), caption),
        _findings([o["text"] for o in report["observations"] if o.get("figure") == figure["file"]]),
    )


def _table(report: Report) -> list[str]:
    n = report["n_seeds"]
    meaning = (
        "One seed (n = 1): no standard error can be given, and a difference may be chance."
        if n == 1
        else f"Mean ± standard error over {n} seeds; n is the number of seeds behind each number."
    )
    heads = [_tag("th", {"scope": "col"}, "metric"), _tag("th", {"scope": "col"}, "unit")]
    for arm in report["arms"]:
        more = _tag("small", {}, arm["description"]) if arm.get("description") else ""
        heads.append(_tag("th", {"scope": "col"}, arm["label"], more))
    groups: dict[str, list[str]] = {}
    for row in _rows(report):
        more = _tag("small", {}, row.help) if row.help else ""
        cells = [_tag("th", {"scope": "row", "class": "metric"}, row.label, more), _tag("td", {}, row.unit)]
        cells += [_tag("td", {"class": "number"}, _cell(cell)) for cell in row.cells]
        groups.setdefault(row.section, []).append(_tag("tr", {}, *cells))
    bodies = []
    for section, rows in groups.items():
        span = {"scope": "rowgroup", "class": "section", "colspan": len(heads)}
        head = _tag("tr", {}, _tag("th", span, section)) if section else ""
        bodies.append(_tag("tbody", {}, head, *rows))
    table = _tag("table", {}, _tag("thead", {}, _tag("tr", {}, *heads)), *bodies)
    reasons = [_tag("li", {"id": f"note-{at + 1}"}, reason) for at, reason in enumerate(notes(report))]
    return [
        _tag("p", {}, meaning),
        _tag("div", {"class": "scroll", "role": "region", "aria-label": "the numbers", "tabindex": 0}, table),
        _tag("ol", {"class": "notes"}, *reasons) if reasons else "",
    ]


def _cell(cell: _Cell) -> str:
    if not cell.number:
        return _join("n/a ", _tag("a", {"href": f"#note-{cell.note}"}, f"[{cell.note}]"))
    return _join(cell.number.replace("-", "−"), " ", _tag("small", {}, cell.n))


def _method(report: Report) -> list[str]:
    parts: list[str] = []
    if report.get("command"):
        parts += [_tag("h3", {}, "Command"), _tag("pre", {}, _tag("code", {}, report["command"]))]
    runs = {arm["label"]: arm.get("runs", []) for arm in report["arms"] if arm.get("runs")}
    for title, facts in (
        ("Protocol", report["protocol"]),
        ("Run folders", runs),
        ("Environment", report["environment"]),
    ):
        if facts:
            lines = [
                _tag("tr", {}, _tag("th", {"scope": "row"}, key.replace("_", " ")), _tag("td", {}, _fact(value)))
                for key, value in facts.items()
            ]
            parts += [_tag("h3", {}, title), _tag("table", {"class": "facts"}, _tag("tbody", {}, *lines))]
    return parts


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key.replace('_', ' ')}: {_fact(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_fact(item) for item in value)
    return {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # a file name may hold what UTF-8 cannot
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
