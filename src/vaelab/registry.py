"""The closed registry: which classes a run folder may name, and nested data for what they build.

A run folder must rebuild any model without executing what it contains. So ``config.json`` holds *specs*: a dictionary
with a ``class`` and that class's constructor arguments, nested. A class is named in `COMPONENTS`, or, for a user's own
network, by its import path ``package.module:Class`` (the run then says that it depends on that code).

An import path is a name that a stranger may have chosen, and importing a module runs it. So a path is followed only where
this process has written it itself (`to_spec`, as training does), or where the user trusts it by name: in the environment
variable VAELAB_TRUST, separated by commas, or in `build`'s argument `trust`. An entry is a package or module, with all
that is below it, or one path. What is then built is a module of torch or a dataclass, defined in what is trusted.

What a spec asks for is bounded too: `build` refuses more than `NUMBERS` numbers before their memory is taken
(`vaelab.budget`), and what a constructor makes of wrong arguments is an error of the run.

The convention that makes this work without metaclasses or decorators: **a component keeps each constructor argument
under its own name** (`torch.nn.Linear` does, scikit-learn's estimators do). `to_spec` reads them back.
"""

import dataclasses
import importlib
import inspect
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vaelab.errors import RunError, UsageError, VaelabError, one_line, unknown_name

if TYPE_CHECKING:
    from vaelab.budget import Budget

Spec = dict[str, Any]

NUMBERS = 1 << 30
"""The most numbers that building a model may make: 4 GiB in float32."""

_written: dict[str, type] = {}
"""Import paths that this process has written, with their classes: these are loaded already, and the user's own."""

COMPONENTS: dict[str, str] = {
    "VAE": "vaelab.models.vae:VAE",
    "nn.MLP": "vaelab.nn.mlp:MLP",
    "nn.FourierMLP": "vaelab.nn.mlp:FourierMLP",
    "nn.ConvEncoder": "vaelab.nn.conv:ConvEncoder",
    "nn.ConvDecoder": "vaelab.nn.conv:ConvDecoder",
    "nn.WithLabel": "vaelab.nn.label:WithLabel",
    "nn.Centred": "vaelab.nn.mean:Centred",
    "nn.AroundMean": "vaelab.nn.mean:AroundMean",
    "posteriors.Gaussian": "vaelab.posteriors:Gaussian",
    "posteriors.FullGaussian": "vaelab.posteriors:FullGaussian",
    "posteriors.Laplace": "vaelab.posteriors:Laplace",
    "posteriors.Delta": "vaelab.posteriors:Delta",
    "posteriors.InverseAutoregressive": "vaelab.posteriors:InverseAutoregressive",
    "posteriors.Planar": "vaelab.posteriors:Planar",
    "posteriors.NeuralSpline": "vaelab.posteriors:NeuralSpline",
    "priors.StandardNormal": "vaelab.priors:StandardNormal",
    "priors.Laplace": "vaelab.priors:Laplace",
    "priors.MixtureOfGaussians": "vaelab.priors:MixtureOfGaussians",
    "priors.VampPrior": "vaelab.priors:VampPrior",
    "priors.Flow": "vaelab.priors:Flow",
    "priors.LabelGaussian": "vaelab.priors:LabelGaussian",
    "priors.SecondStage": "vaelab.priors:SecondStage",
    "likelihoods.Bernoulli": "vaelab.likelihoods:Bernoulli",
    "likelihoods.GreyCrossEntropy": "vaelab.likelihoods:GreyCrossEntropy",
    "likelihoods.ContinuousBernoulli": "vaelab.likelihoods:ContinuousBernoulli",
    "likelihoods.Gaussian": "vaelab.likelihoods:Gaussian",
    "likelihoods.Laplace": "vaelab.likelihoods:Laplace",
    "likelihoods.DiscretisedLogistic": "vaelab.likelihoods:DiscretisedLogistic",
    "likelihoods.DiscretisedLogisticMixture": "vaelab.likelihoods:DiscretisedLogisticMixture",
    "likelihoods.Categorical": "vaelab.likelihoods:Categorical",
    "objectives.ELBO": "vaelab.objectives:ELBO",
    "objectives.FreeBits": "vaelab.objectives:FreeBits",
    "objectives.Capacity": "vaelab.objectives:Capacity",
    "objectives.IWAE": "vaelab.objectives:IWAE",
    "objectives.MIWAE": "vaelab.objectives:MIWAE",
    "objectives.PIWAE": "vaelab.objectives:PIWAE",
    "objectives.CIWAE": "vaelab.objectives:CIWAE",
    "objectives.STL": "vaelab.objectives:STL",
    "objectives.DReG": "vaelab.objectives:DReG",
    "objectives.BetaTC": "vaelab.objectives:BetaTC",
    "objectives.DIP": "vaelab.objectives:DIP",
    "objectives.InfoVAE": "vaelab.objectives:InfoVAE",
    "objectives.WAE": "vaelab.objectives:WAE",
    "objectives.RAE": "vaelab.objectives:RAE",
    "schedules.Linear": "vaelab.schedules:Linear",
    "schedules.Cosine": "vaelab.schedules:Cosine",
    "schedules.Cyclic": "vaelab.schedules:Cyclic",
}


def spec(name: str, **arguments: Any) -> Spec:
    """A spec: the class called `name`, to be built with `arguments` (plain data or specs)."""
    if name not in COMPONENTS and ":" not in name:
        raise unknown_name("component", name, COMPONENTS)
    return {"class": name, **arguments}


def build(value: Any, *, trust: Iterable[str] = (), limit: int = NUMBERS) -> Any:
    """Build what a spec describes; plain data is returned as it is, lists as tuples.

    Args:
        value: a spec, or plain data.
        trust: packages, modules or import paths that classes may be imported from, beside those in VAELAB_TRUST.
        limit: of the numbers that are made, temporaries included. For a model that is loaded, `limit_for` its weights.

    Raises:
        RunError: the spec names an unknown class, one that is not trusted, or arguments that class does not take.
        UsageError: an argument out of range, or more than `limit` numbers.
    """
    try:
        if not _names_a_class(value):
            return _build(value, (), None)
        from vaelab.budget import Budget  # torch: only where a class is built

        return _build(value, (*trust, *os.environ.get("VAELAB_TRUST", "").split(",")), Budget(limit))
    except RecursionError:
        raise RunError(
            "a configuration is nested too deep to be built: expected parts within parts, nine deep"
        ) from None


def limit_for(numbers: int) -> int:
    """The limit for a model whose weights are so many numbers: what it keeps and what it makes on the way.

    The catalogue's models make at most 2.3 times what they keep, splines the most.
    """
    return min(NUMBERS, 8 * numbers + (1 << 20))


def _names_a_class(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "class" in value or any(map(_names_a_class, value.values()))
    return isinstance(value, list | tuple) and any(map(_names_a_class, value))


def _build(value: Any, trust: tuple[str, ...], budget: "Budget | None") -> Any:
    if isinstance(value, Mapping):
        if "class" not in value or budget is None:
            return {key: _build(item, trust, budget) for key, item in value.items()}
        cls = _resolve(value["class"], trust)
        arguments = {key: _build(item, trust, budget) for key, item in value.items() if key != "class"}
        if value["class"] in COMPONENTS:
            _check_lists(value["class"], arguments)
        try:
            inspect.signature(cls).bind(**arguments)
            with budget:
                return cls(**arguments)
        except VaelabError as error:
            said = str(error)
            if said.isprintable() and len(said) <= 1000:
                raise
            raise UsageError(one_line(error)) from error  # it quotes an argument, and that may be anything
        except Exception as error:  # a constructor may fail in any way on arguments that somebody else wrote
            raise RunError(f"'{value['class']}' cannot be built: {one_line(error)}; {_takes(cls)}") from error
    if isinstance(value, list | tuple):
        return tuple(_build(item, trust, budget) for item in value)
    return value


def _check_lists(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse lists that mix numbers with text or lists: their product, as of a shape, repeats the text so many times."""
    for key, values in arguments.items():
        if isinstance(values, tuple) and len({isinstance(item, int | float) for item in values}) > 1:
            raise RunError(f"'{name}' cannot be built: its {key} mixes numbers with other things; expected numbers")


def _takes(cls: type) -> str:
    """A class's constructor arguments, for a message."""
    shown = [
        name if parameter.default is parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in inspect.signature(cls).parameters.items()
    ]
    return f"it takes {', '.join(shown)}" if shown else "it takes no arguments"


def to_spec(value: Any) -> Any:
    """The spec of a component, the inverse of `build`.

    Raises:
        UsageError: a component that does not keep a constructor argument under its own name.
    """
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [to_spec(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_spec(item) for key, item in value.items()}
    cls = type(value)
    arguments = {}
    for name in inspect.signature(cls).parameters:
        try:
            arguments[name] = to_spec(getattr(value, name))
        except AttributeError:
            raise UsageError(
                f"{cls.__qualname__} cannot be written to a run folder: it does not keep its constructor argument "
                f"'{name}' as an attribute; set self.{name} = {name} in __init__"
            ) from None
    return {"class": name_of(cls), **arguments}


def name_of(cls: type) -> str:
    """A class's name in the registry, or its import path where it is not ours; `build` then knows the path."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    names = [name for name, target in COMPONENTS.items() if target == path]
    if names:
        return names[0]
    if "<locals>" not in path:
        _written[path] = cls
        return path
    raise UsageError(f"{cls.__qualname__} is defined inside a function: move it to a module so that a run can name it")


def foreign_classes(value: Any) -> list[str]:
    """The import paths in a spec that are not the library's own."""
    if isinstance(value, Mapping):
        own = [value["class"]] if ":" in str(value.get("class", "")) else []
        return own + [path for item in value.values() for path in foreign_classes(item)]
    if isinstance(value, list | tuple):
        return [path for item in value for path in foreign_classes(item)]
    return []


def _resolve(name: Any, trust: tuple[str, ...]) -> type:
    if not isinstance(name, str):
        raise RunError(f"a configuration names the class {ascii(name)[:60]}; expected a string")
    path = COMPONENTS.get(name, name)
    module, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise RunError(f"unknown component {_shown(name)}: this version knows {', '.join(COMPONENTS)}")
    if name not in COMPONENTS and not _trusted(name, trust):
        if name in _written:
            return _component(name, _written[name])
        raise RunError(
            f"{_shown(name)} is not a part of vaelab, and importing it would run somebody's code: if you know and trust "
            f"it, name its package in the environment, VAELAB_TRUST={_shown(module.partition('.')[0])}"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            if part not in vars(found):  # not getattr, which may run code
                raise ImportError(f"it has no {part}")
            found = vars(found)[part]
            if not isinstance(found, type):
                raise RunError(f"{_shown(path)} is not a class")
    except RunError:
        raise
    except Exception as error:  # the module's own code may fail in any way
        raise RunError(
            f"cannot import {_shown(path)}, which this run was made with: {one_line(error)}; install or add it"
        ) from error
    if name not in COMPONENTS and not _trusted(f"{found.__module__}:{found.__qualname__}", trust):
        raise RunError(f"{_shown(path)} is defined in '{found.__module__}', which is not trusted: name that one")
    return _component(path, found)


def _trusted(path: str, trust: tuple[str, ...]) -> bool:
    module = path.partition(":")[0]
    return any(path == entry or f"{module}.".startswith(f"{entry}.") for one in trust if (entry := one.strip()))


def _component(path: str, cls: type) -> type:
    from torch import nn

    if not (issubclass(cls, nn.Module) or dataclasses.is_dataclass(cls)):
        raise RunError(f"{_shown(path)} is neither a torch module nor a dataclass: it is not built")
    return cls


def _shown(name: str) -> str:
    """A name out of a configuration, in quotes; too long a one is cut."""
    return f"'{name}'" if name.isprintable() and len(name) <= 120 else ascii(name[:120])
