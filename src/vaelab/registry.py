"""The closed registry: which classes a run folder may name, and nested data for what they build.

A run folder must rebuild any model without executing what it contains. So ``config.json`` holds *specs*: a dictionary
with a ``class`` and that class's constructor arguments, nested. A class is named in `COMPONENTS`, or, for a user's own
network, by its import path ``package.module:Class`` (the run then says that it depends on that code).

The convention that makes this work without metaclasses or decorators: **a component keeps each constructor argument
under its own name** (`torch.nn.Linear` does, scikit-learn's estimators do). `to_spec` reads them back.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from vaelab.errors import RunError, UsageError, unknown_name

Spec = dict[str, Any]

COMPONENTS: dict[str, str] = {
    "VAE": "vaelab.models.vae:VAE",
    "nn.MLP": "vaelab.nn.mlp:MLP",
    "nn.FourierMLP": "vaelab.nn.mlp:FourierMLP",
    "nn.ConvEncoder": "vaelab.nn.conv:ConvEncoder",
    "nn.ConvDecoder": "vaelab.nn.conv:ConvDecoder",
    "nn.WithLabel": "vaelab.nn.label:WithLabel",
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


def build(value: Any) -> Any:
    """Build what a spec describes; plain data is returned as it is, lists as tuples.

    Raises:
        RunError: the spec names an unknown class, or arguments that class does not take.
    """
    if isinstance(value, Mapping):
        if "class" not in value:
            return {key: build(item) for key, item in value.items()}
        cls = _resolve(value["class"])
        arguments = {key: build(item) for key, item in value.items() if key != "class"}
        try:
            inspect.signature(cls).bind(**arguments)
            return cls(**arguments)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise RunError(f"'{value['class']}' cannot be built: {error}; {_takes(cls)}") from None
    if isinstance(value, list | tuple):
        return tuple(build(item) for item in value)
    return value


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
    """A class's name in the registry, or its import path where it is not ours."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    names = [name for name, target in COMPONENTS.items() if target == path]
    if names:
        return names[0]
    if "<locals>" not in path:
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


def _resolve(name: Any) -> type:
    if not isinstance(name, str):
        raise RunError(f"a configuration names the class {name!r}; expected a string")
    path = COMPONENTS.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute:
        raise RunError(f"unknown component '{name}': this version knows {', '.join(COMPONENTS)}")
    try:
        cls: Any = importlib.import_module(module)
        for part in attribute.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise RunError(f"cannot import '{path}', which this run was made with: {error}; install or add it") from None
    from torch import nn

    if not isinstance(cls, type):
        raise RunError(f"'{path}' is not a class")
    if not (issubclass(cls, nn.Module) or dataclasses.is_dataclass(cls)):
        raise RunError(f"'{path}' is neither a torch module nor a dataclass: it is not built")
    return cls
