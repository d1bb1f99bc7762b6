"""`vaelab recipes | studies | data`: what there is, each as a table."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vaelab.cli import console
from vaelab.cli.console import Output


def recipes(*, output: Output = Output()) -> None:  # noqa: B008
    """The recipes of `vaelab train`, with their defaults.

    Example: vaelab recipes --json
    """
    from vaelab.recipes import RECIPES

    rows = [
        {"name": name, "summary": (function.__doc__ or "").strip(), "fields": dict(function.__kwdefaults__ or {})}
        for name, function in RECIPES.items()
    ]
    _show(rows, output, ("name", "summary"))


def studies(*, output: Output = Output()) -> None:  # noqa: B008
    """The studies of `vaelab study`.

    Example: vaelab studies
    """
    from vaelab.studies import STUDIES

    rows = [
        {"name": name, "summary": s.summary, "recipe": s.recipe, "arms": [f"{a[0]} ({a[1]})" for a in s.arms.values()]}
        for name, s in STUDIES.items()
    ]
    _show(rows, output, ("name", "arms", "summary"))


def data(
    *,
    data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
    output: Output = Output(),  # noqa: B008
) -> None:
    """The data sets, and where each was found; nothing is fetched.

    A folder of images in class sub-folders, or an .npz file, is given by its path instead of a name.

    Example: vaelab data
    """
    from vaelab.data.datasets import catalogue

    rows = catalogue(data_dir)
    _show(rows, output, tuple(rows[0]))


def _show(rows: list[dict[str, Any]], output: Output, columns: tuple[str, ...]) -> None:
    def show() -> None:
        console.table([list(columns), *[[_cell(row[c]) for c in columns] for row in rows]])

    console.result(rows, output, show)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) if all(isinstance(v, str) for v in value) else "x".join(map(str, value))
    return "" if value is None else str(value)
