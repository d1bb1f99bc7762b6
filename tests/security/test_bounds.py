"""What a configuration may ask for: it is counted before the memory is taken, and every outcome is a sentence."""

import json
import subprocess
import sys
import time

import pytest
import torch

from vaelab import budget, weights
from vaelab.errors import RunError, UsageError, VaelabError
from vaelab.recipes import recipe
from vaelab.registry import NUMBERS, build, limit_for
from vaelab.run import Run

MLP = {"class": "nn.MLP", "in_shape": [4], "hidden": [8], "out_shape": [2]}
HUGE = {
    "a layer of 10^18 numbers": {**MLP, "hidden": [10**9, 10**9]},
    "a layer of 10^80 numbers": {**MLP, "hidden": [10**39, 10**39]},
    "many layers": {**MLP, "hidden": [20_000] * 10},
    "a shape": {**MLP, "in_shape": [10**6] * 6},
    "a normal": {"class": "priors.StandardNormal", "dim": 10**12},
    "draws": {"class": "priors.MixtureOfGaussians", "dim": 10**5, "components": 10**5},
    "an identity": {"class": "priors.MixtureOfGaussians", "dim": 10**6, "components": 1, "covariance": "full"},
    "a repeated identity": {
        "class": "priors.MixtureOfGaussians", "dim": 100, "components": 10**9, "covariance": "full",
    },
    "a table": {"class": "priors.LabelGaussian", "dim": 10**6, "classes": 10**6},
    "pictures": {"class": "priors.VampPrior", "shape": [3, 10**4, 10**4], "dim": 2, "pseudo_inputs": 10**4},
    "a head": {"class": "posteriors.FullGaussian", "features": 4, "dim": 10**7},
    "planar layers": {"class": "posteriors.Planar", "features": 4, "dim": 2, "layers": 10**12},
    "sines": {"class": "nn.FourierMLP", "in_shape": [2], "hidden": [4], "out_shape": [2], "frequencies": 10**11},
    "sines that a machine has room for": {
        "class": "nn.FourierMLP", "in_shape": [2], "hidden": [4], "out_shape": [2], "frequencies": 10**8,
    },
    "a convolution": {"class": "nn.ConvEncoder", "in_shape": [3, 8, 8], "channels": [10**6, 10**6]},
    "a picture of 10^18": {"class": "nn.ConvDecoder", "in_shape": [2], "out_shape": [1, 10**9, 10**9]},
    "a flow": {"class": "priors.Flow", "dim": 10**6},
    "a flow of wide layers": {"class": "priors.Flow", "dim": 2, "hidden": [10**6, 10**6]},
    "a flow of many maps": {"class": "priors.Flow", "dim": 1, "layers": 10**9, "hidden": [1]},
    "a second stage": {"class": "priors.SecondStage", "dim": 2, "latent_dim": 2, "hidden": [10**6, 10**6]},
}  # fmt: skip


@pytest.mark.parametrize("case", HUGE)
def test_what_is_too_large_is_refused_before_its_memory_is_taken(case):
    import resource

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(VaelabError) as caught:
        build(HUGE[case], limit=10**7)
    assert str(caught.value).isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # in KiB: 10^7 numbers are 40 MiB
    assert time.monotonic() - start < 20


def test_the_sentence_says_what_was_asked_for():
    with pytest.raises(
        UsageError, match=r"more than 1,073,741,824 numbers .* shape \(1000000000, 4\): make its layers"
    ):
        build(HUGE["a layer of 10^18 numbers"])
    assert NUMBERS == 1_073_741_824


def test_the_limit_is_exact():
    needed = 4 * 8 + 8 + 8 * 2 + 2
    assert build(MLP, limit=needed)
    with pytest.raises(UsageError, match=f"more than {needed - 1} numbers"):
        build(MLP, limit=needed - 1)


def test_operations_are_counted_too(monkeypatch):
    monkeypatch.setattr(budget, "OPERATIONS", 30)
    with pytest.raises(UsageError, match="more than 30 operations"):
        build({**MLP, "hidden": [1] * 20})
    assert build(MLP)


def test_an_operation_that_cannot_be_foretold_is_counted_afterwards():
    with budget.Budget(3):
        assert len(torch.unique(torch.tensor([1, 1, 2]))) == 2
    with pytest.raises(UsageError, match="numbers were asked for"), budget.Budget(2):
        torch.unique(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("make", [
    lambda: torch.randn(3, 4), lambda: torch.zeros((3, 4)), lambda: torch.full([12], 2.0), lambda: torch.randint(5, (2, 6)),
    lambda: torch.ones(3, 1)[:, 0].new_empty(12), lambda: torch.empty((3, 4), device="cpu"),
])  # fmt: skip
def test_what_an_operation_makes_is_told_by_the_size_it_is_given(make):
    before = torch.ones(3, 1)  # outside: costs nothing
    assert before.numel() == 3
    with budget.Budget(15) as counted:
        made = make()
    assert made.numel() == 12 and counted.made in (12, 15)
    with pytest.raises(UsageError, match="numbers were asked for"), budget.Budget(11):
        make()


@pytest.mark.parametrize("make, numbers", [
    (lambda a, b: a * b, 12), (lambda a, b: 2 * a, 3), (lambda a, b: a.exp(), 3), (lambda a, b: torch.where(a > 0, a, b), 15),
    (lambda a, b: torch.maximum(b, a).add(1), 24),
])  # fmt: skip
def test_what_is_made_number_by_number_has_the_shape_of_what_is_read_together(make, numbers):
    a, b = torch.ones(3, 1), torch.ones(4)
    with budget.Budget(10**6) as counted:
        make(a, b)
    assert counted.made == numbers
    with pytest.raises(UsageError, match="numbers were asked for"), budget.Budget(numbers - 1):
        make(a, b)


def test_shapes_that_do_not_fit_are_torchs_to_refuse():
    with pytest.raises(RuntimeError, match="must match"), budget.Budget(100):
        torch.ones(3) + torch.ones(4)
    with pytest.raises(RuntimeError, match="negative"), budget.Budget(100):
        torch.zeros(-3)


def test_counting_the_labs_model_imports_no_compiler():
    """torch._dynamo and sympy, which the meta device takes for some operations, are 1.5 s of each process of the lab."""
    code = (
        "import sys; from vaelab.recipes import recipe; from vaelab.registry import build\n"
        "for name in ('mnist', 'mnist-2d', 'vae'): build(recipe(name, (1, 28, 28)).model)\n"
        "assert 'torch' in sys.modules; print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("fields", [
    {}, {"posterior": "NeuralSpline", "prior": "Flow"}, {"posterior": "InverseAutoregressive"}, {"network": "residual"},
    {"prior": "VampPrior"}, {"prior": "MixtureOfGaussians(covariance='full')"}, {"posterior": "FullGaussian"},
    {"prior": "SecondStage(latent_dim=2)"}, {"classes": 10}, {"posterior": "NeuralSpline(layers=8)", "latent_dim": 100},
])  # fmt: skip
def test_counting_changes_no_bit_and_saved_models_fit_their_limit(fields, tmp_path, monkeypatch):
    chosen = recipe("vae", (1, 8, 8), **fields).model
    torch.manual_seed(0)
    counted = build(chosen)
    weights.save_model(tmp_path / "m", counted)
    torch.manual_seed(0)
    again = build(chosen, limit=limit_for(weights.numbers(tmp_path / "m")))
    monkeypatch.setattr(budget.Budget, "__torch_dispatch__", lambda self, f, t, a=(), k=None: f(*a, **(k or {})))
    torch.manual_seed(0)
    free = build(chosen)
    for one in (again, free):
        for name, value in counted.state_dict().items():
            assert torch.equal(value, one.state_dict()[name])


# --- arguments of any kind ---

WRONG = [None, True, "text", "", [], [1, "a"], [[1, 2], 10**9], ["abc", 10**9], {}, {"class": "VAE"}, -1, 0, 1.5, 10**39,
         -(10**39), 1e308, [0], [-1], [[[]]], {"a": 1}, MLP, [MLP], "relu", [1.5], [True]]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: str(value)[:30])
def test_any_argument_gives_a_model_or_a_sentence(wrong):
    from resource import RUSAGE_SELF, getrusage

    model = json.loads(json.dumps(recipe("vae", (1, 8, 8), prior="VampPrior", classes=3, hidden=(4, 4)).model))
    conv = json.loads(json.dumps(recipe("vae", (1, 8, 8), network="residual", prior="Flow", hidden=(4,)).model))
    assert build([model, conv], limit=10**6)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    for spec in (model, conv):
        for place in places(spec):
            try:
                build(replaced(spec, place, wrong), limit=10**6)
            except (UsageError, RunError) as error:
                assert str(error).isprintable() and len(str(error)) < 1500, str(error)
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB; ["abc", 10**9] as a shape would be 3 GB


def places(value, path=()):
    """The path of every value inside a spec."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(value, path, new):
    """A copy with another value at a path."""
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def test_a_spec_nested_too_deep():
    value = MLP
    for _ in range(5000):
        value = {"class": "nn.WithLabel", "network": value, "classes": 2}
    with pytest.raises(RunError, match="nested too deep"):
        build(value)


def test_a_run_is_an_error_of_the_run(run, change):
    change(lambda document: document["model"]["encoder"]["network"].update(hidden=[10**9, 10**9]))
    with pytest.raises(RunError, match=r"config\.json' cannot be built: more than .* numbers"):
        Run.open(run.path).model()
