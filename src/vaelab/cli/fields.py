"""A recipe's keyword arguments as options of a command: the function is the command line."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from cyclopts import Group, Parameter

from vaelab.cli import console
from vaelab.recipes import FIELDS, Recipe

_FIELDS = Group("Fields of the recipe", sort_key=10)


def command_from(
    function: Callable[..., Recipe],
    body: Callable[..., Any],
    *,
    without: tuple[str, ...] = (),
    unset: tuple[str, ...] = (),
    doc: str = "",
) -> Callable[..., Any]:
    """A command whose options are those of `body` and the fields of a recipe function.

    Args:
        function: the recipe; its keyword-only arguments become options, with their types and defaults.
        body: called with its own options by name, and `fields`, the recipe's options that were given or have defaults.
        without: fields that are left out.
        unset: fields whose default is "not given" (None), to be chosen later.
        doc: help of the command.
    """
    own = {n: p for n, p in inspect.signature(body).parameters.items() if n != "fields"}
    offered = {
        name: _option(parameter, name in unset)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in (*own, *without)
    }

    def command(**values: Any) -> Any:
        fields = {name: values.pop(name, parameter.default) for name, parameter in offered.items()}
        return body(**values, fields=fields)

    parameters = [*own.values(), *offered.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = doc
    return command


def _option(parameter: inspect.Parameter, unset: bool) -> inspect.Parameter:
    kind: Any = parameter.annotation
    help = FIELDS[parameter.name]
    more: Mapping[str, Any] = {"consume_multiple": True, "negative_iterable": ""} if kind == tuple[int, ...] else {}
    if kind is int:
        more = {"converter": console.whole}
    if unset:
        kind, parameter = kind | None, parameter.replace(default=None)
    return parameter.replace(annotation=Annotated[kind, Parameter(help=help, group=_FIELDS, **more)])
