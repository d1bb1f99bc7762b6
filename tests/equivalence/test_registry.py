"""Models to specs and back, and what a spec may not name."""

import sys

import pytest
import torch
from torch import nn

from vaelab.errors import RunError, UsageError
from vaelab.objectives import ELBO
from vaelab.recipes import RECIPES, Recipe, recipe
from vaelab.registry import COMPONENTS, build, foreign_classes, spec, to_spec
from vaelab.run import Run
from vaelab.schedules import Cosine, Cyclic, Linear

FIELDS = [
    {},
    {"latent_dim": 1, "hidden": (7, 5)},
    {"protocol": "threshold", "activation": "gelu", "hidden": (4,)},
    {"protocol": "grey"},
]


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_rebuilt_from_its_spec(name, fields):
    chosen = recipe(name, (1, 8, 8), **fields)
    model = build(chosen.model)
    again = to_spec(model)
    rebuilt = build(again)
    assert shapes(rebuilt) == shapes(model)
    assert to_spec(rebuilt) == again
    assert {**again["posterior"]} == chosen.model["posterior"]
    assert build(chosen.objective) == build(to_spec(build(chosen.objective)))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_its_configuration(name):
    import json

    chosen = recipe(name, (1, 8, 8), latent_dim=3, lr=0.25, seed=7)
    assert Recipe.from_dict(json.loads(json.dumps(chosen.to_dict()))).to_dict() == json.loads(
        json.dumps(chosen.to_dict())
    )


@pytest.mark.parametrize("beta", [0.0, 4.0, Linear(0, 1, 5), Cosine(1, 0, 5), Cyclic(0, 1, 5, 0.25)])
def test_every_schedule_survives_its_spec(beta):
    assert build(to_spec(ELBO(beta))) == ELBO(beta)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_registered_name_is_there_and_is_found_again(name):
    import importlib

    from vaelab.registry import name_of

    module, _, attribute = COMPONENTS[name].partition(":")
    assert name_of(getattr(importlib.import_module(module), attribute)) == name


SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width, inner=None):
        super().__init__()
        self.width, self.inner = width, inner
        self.layer = nn.Linear(64, width)
    def forward(self, x):
        return self.layer(x.flatten(1))

class Forgetful(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(64, width)

class Effect:
    def __init__(self, path):
        open(path, "w").close()

number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's on the path, under a name that nothing has imported."""
    (tmp_path / "users_own_networks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "users_own_networks"
    sys.modules.pop("users_own_networks", None)


def test_a_users_own_network_is_named_by_its_import_path(user_module, tmp_path):
    import importlib

    from vaelab import likelihoods, posteriors, priors
    from vaelab.models.vae import VAE
    from vaelab.nn.mlp import MLP

    net = importlib.import_module(user_module).Net(12, inner=MLP((2,), (), (3,)))
    model = VAE(net, posteriors.Gaussian(12, 2), priors.StandardNormal(2),
                likelihoods.Bernoulli(MLP((2,), (6,), (1, 8, 8))))  # fmt: skip
    written = to_spec(model)
    assert written["encoder"]["class"] == f"{user_module}:Net"
    assert foreign_classes(written) == [f"{user_module}:Net"]
    run = Run.create(tmp_path / "run", Recipe("mine", "digits", "dynamic", written, to_spec(ELBO())))
    run.save_model(model)
    loaded = Run.open(tmp_path / "run").model()
    assert type(loaded.encoder) is type(net) and shapes(loaded) == shapes(model)
    assert torch.equal(loaded.encoder.layer.weight, net.layer.weight)


def test_a_component_that_forgets_its_arguments_is_refused(user_module):
    import importlib

    with pytest.raises(UsageError, match=r"Forgetful .*'width'.*set self\.width = width"):
        to_spec(importlib.import_module(user_module).Forgetful(3))


def test_a_class_inside_a_function_is_refused():
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()

    with pytest.raises(UsageError, match="inside a function: move it to a module"):
        to_spec(Local())


def test_a_dataclass_inside_a_function_is_refused_too():
    """Its import path could never be imported again."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Local:
        beta: float = 1.0

    with pytest.raises(UsageError, match="inside a function: move it to a module"):
        to_spec(Local())


def test_a_name_outside_the_registry_is_never_imported(user_module):
    for name in (f"{user_module}.Net", user_module, f"nn.{user_module}", "", "MLP"):
        with pytest.raises(RunError, match="unknown component"):
            build({"class": name})
        with pytest.raises(UsageError, match="unknown component"):
            spec(name)
    assert user_module not in sys.modules


def test_the_nearest_component_is_offered():
    with pytest.raises(UsageError, match=r"did you mean 'nn\.MLP'"):
        spec("nn.MPL")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Net", "cannot import 'no_such_module:Net'"),
        ("users_own_networks:Missing", "cannot import 'users_own_networks:Missing'"),
        ("users_own_networks:Net.Missing", "cannot import"),
        ("users_own_networks:number", "'users_own_networks:number' is not a class"),
        ("json:dumps", "'json:dumps' is not a class"),
        (3, "names the class 3"),
        (None, "names the class None"),
        (":Net", "unknown component ':Net'"),
        (".relative:Net", "unknown component '.relative:Net'"),
        ("numpy:ndarray", "'numpy:ndarray' is not a part of vaelab"),
    ],
)
def test_a_spec_that_names_no_class_is_refused(user_module, monkeypatch, name, message):
    monkeypatch.setenv("VAELAB_TRUST", "no_such_module,users_own_networks,json")
    with pytest.raises(RunError, match=message):
        build({"class": name})


@pytest.mark.parametrize("arguments", [{"widths": 3}, {"dim": 2, "more": 1}])
def test_arguments_that_a_class_does_not_take_are_refused(arguments):
    with pytest.raises(RunError, match=r"'priors\.StandardNormal' cannot be built: "):
        build({"class": "priors.StandardNormal", **arguments})


def test_a_class_that_is_no_component_is_not_built(user_module, tmp_path):
    """A run folder executes nothing: of classes outside the registry, modules of torch and dataclasses are built."""
    for name, arguments in (
        (f"{user_module}:Effect", {"path": str(tmp_path / "made")}),
        ("pathlib:Path", {}),
        ("builtins:dict", {"a": 1}),
    ):
        with pytest.raises(RunError, match="neither a torch module nor a dataclass"):
            build({"class": name, **arguments}, trust=[user_module, "pathlib", "builtins"])
    assert not (tmp_path / "made").exists()


def test_plain_data_is_returned_as_it_is():
    assert build({"a": [1, [2, "x"]], "b": None}) == {"a": (1, (2, "x")), "b": None}
    assert to_spec((1, [2.5, None], {"a": True})) == [1, [2.5, None], {"a": True}]
