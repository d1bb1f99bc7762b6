"""vaelab's own kernels against float64: products, pixels, Adam, images; and how they are compiled and found."""

import copy
import ctypes
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from vaelab import pixels
from vaelab.data.protocol import KERNELS, _words, protocol
from vaelab.errors import UsageError
from vaelab.native import build, layers, library, reason
from vaelab.native.calls import adding_gradients, linear_room
from vaelab.native.layers import accelerated
from vaelab.optim import Adam
from vaelab.registry import build as built
from vaelab.rng import stream
from vaelab.training import fit, initial_model
from vaelab.training import test_metrics as measured

pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {reason()}")
SIZES = [(1, 1, 1), (128, 784, 400), (33, 37, 129), (96, 2, 31), (5, 64, 32), (31, 33, 1)]
"""Rows, inputs, outputs."""


def rounded(t):
    return t.bfloat16().double()


def products(kernels, m, k, n, threads=1):
    """x, w, b, dy, and what the kernels make of them: y, dw (from ones), db (from ones), dx."""
    noise = stream(m, "products", n)
    x, w, b, dy = (torch.randn(*shape, generator=noise) for shape in ((m, k), (n, k), (n,), (m, n)))
    y, dw, db, dx = torch.empty(m, n), torch.ones(n, k), torch.ones(n), torch.empty(m, k)
    scratch = torch.full((linear_room(m, n, k, threads),), math.nan, dtype=torch.bfloat16)
    at = [t.data_ptr() for t in (x, w, b, dy, y, dw, db, dx, scratch)]
    kernels.linear_forward(at[0], at[1], at[2], at[4], m, n, k, at[8], threads)
    scratch.fill_(math.nan)
    kernels.linear_backward(at[0], at[1], at[3], *at[5:8], m, n, k, at[8], threads)
    return (x, w, b, dy), (y, dw, db, dx)


@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_rounded_numbers(kernels, size):
    (x, w, b, dy), (y, dw, db, dx) = products(kernels, *size)
    scale = 1e-6 * max(size)
    assert (y - (rounded(x) @ rounded(w).T + b)).abs().max() < scale
    assert (dw - 1 - rounded(dy).T @ rounded(x)).abs().max() < scale
    assert (db - 1 - dy.double().sum(0)).abs().max() < scale
    assert (dx - rounded(dy) @ rounded(w)).abs().max() < scale


def test_products_do_not_depend_on_the_number_of_threads(kernels):
    _, one = products(kernels, 130, 100, 77)
    for threads in (2, 3):
        _, other = products(kernels, 130, 100, 77, threads)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 7, bias=False))


@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (40,)])
def test_a_layer_is_torchs_with_rounded_operands(kernels, shape):
    model, x = network(), torch.randn(*shape, generator=stream(0, "x")).requires_grad_()
    reference = copy.deepcopy(model).double()
    with accelerated(model):
        y = model(x)
        y.square().sum().backward()
    assert all("forward" not in vars(m) for m in model.modules())
    exact = x.detach().double().requires_grad_()
    reference(exact).square().sum().backward()
    assert y.dtype == torch.float32 and y.shape == (*shape[:-1], 7)
    for ours, theirs in (
        (x.grad, exact.grad),
        *((p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)),
    ):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()
        assert (ours - theirs).norm() > 0


def test_gradients_are_added_where_there_are_some(kernels):
    model, x = network(), torch.randn(5, 40, generator=stream(0, "x"))
    with accelerated(model), adding_gradients():
        model(x).sum().backward()
        once = [p.grad.clone() for p in model.parameters()]
        held = [p.grad for p in model.parameters()]
        model(x).sum().backward()
    assert all(p.grad is grad and torch.allclose(grad, 2 * first) for p, grad, first in
               zip(model.parameters(), held, once, strict=True))  # fmt: skip


def test_a_gradient_of_a_gradient(kernels):
    model, x = network(), torch.randn(5, 40, generator=stream(0, "x"), requires_grad=True)
    with accelerated(model):
        (slope,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        slope.square().sum().backward()
    reference, exact = copy.deepcopy(network()).double(), x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(exact).tanh().sum(), exact, create_graph=True)
    expected.square().sum().backward()
    assert (x.grad - exact.grad).norm() < 5e-2 * exact.grad.norm()


def test_asking_for_gradients_adds_to_none(kernels):
    """torch.autograd.grad gives what is asked for, and .grad stays as it is."""
    layer, x = nn.Linear(40, 33), torch.randn(5, 40, generator=stream(0, "x"), requires_grad=True)
    layer.weight.grad = torch.zeros_like(layer.weight)
    with accelerated(layer):
        for asked in (x, layer.weight):
            (found,) = torch.autograd.grad(layer(x).square().sum(), asked)
            assert found.any() and found.shape == asked.shape
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("kind", ["transposed", "bfloat16"])
def test_a_gradient_of_a_gradient_of_what_was_converted(kernels, kind):
    layer = nn.Linear(4, 3)
    found = []
    for own in (True, False):
        x = torch.randn(4, 4, generator=stream(0, "x"), requires_grad=True)
        given = x.T if kind == "transposed" else x.bfloat16()
        with accelerated(layer) if own else torch.autocast("cpu", enabled=False):
            y = layer(given if own else given.float())
        (slope,) = torch.autograd.grad(y.tanh().sum(), layer.weight, create_graph=True)
        slope.square().sum().backward()
        found.append(x.grad)
    assert (found[0] - found[1]).norm() < 5e-2 * found[1].norm()


def test_what_does_not_fit_a_layer_is_refused_by_torch(kernels):
    layer = nn.Linear(10, 3)
    with accelerated(layer):
        with pytest.raises(RuntimeError, match="shapes"):
            layer(torch.zeros(4, 5))
        with pytest.raises(RuntimeError):
            layer(torch.zeros(4, 10, dtype=torch.int64))


def test_contexts_inside_one_another_and_a_forward_of_ones_own(kernels):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = lambda x: x
    with accelerated(model):
        with accelerated(model):
            pass
        assert layers.accelerated_layers(model) == [model[0]]
        with layers.suspended(model):
            assert layers.accelerated_layers(model) == []
        assert layers.accelerated_layers(model) == [model[0]]
    assert "forward" not in vars(model[0]) and "forward" in vars(model[1])


def test_the_last_point_of_a_curve_is_in_float32(kernels, digits, small):
    chosen = small(precision="bfloat16", epochs=1)
    model = initial_model(chosen)
    (record,) = fit(model, built(chosen.objective), digits, protocol(chosen.protocol), chosen.training)
    exact = measured(model, protocol(chosen.protocol).test_set(digits.test.pixels), None, 0)
    assert record["test"] == exact


def test_pixels_of_another_size_are_refused(kernels):
    px = pixels.Bernoulli(torch.zeros(1, 3, 2, 4, 4))
    with pytest.raises(UsageError, match="the images have shape"):
        px.cross_log_prob(torch.zeros(1, 1, 4, 4))


def test_a_gradient_of_a_gradient_of_pixels(kernels):
    logits, x = torch.randn(1, 2, 1, 3, 3, generator=stream(0, "l")).requires_grad_(), torch.ones(2, 1, 3, 3)
    (slope,) = torch.autograd.grad(pixels.Bernoulli(logits).log_prob(x).sum(), logits, create_graph=True)
    slope.sum().backward()
    p = torch.sigmoid(logits.detach())
    assert torch.allclose(logits.grad, -p * (1 - p), atol=1e-6)


def test_images_are_float32_whatever_the_default(kernels):
    data, index = torch.full((3, 2, 2), 255, dtype=torch.uint8), torch.tensor([2, 0])
    torch.set_default_dtype(torch.float64)
    try:
        batch = protocol("grey").training_batch(data, stream(0, "x"), index)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch.dtype == torch.float32 and (batch == 1).all()
    short = protocol("grey").training_batch(data, stream(0, "x"), index.int())
    assert torch.equal(short, batch)


def test_only_plain_float32_layers_on_a_cpu_are_replaced(kernels):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4).double(), Own(4, 4), nn.Linear(4, 4))
    with accelerated(model):
        assert [m for m in model.modules() if "forward" in vars(m)] == [model[2]] == layers.accelerated_layers(model)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4, 1e30])
def test_pixels_are_exact_for_logits_of_any_size(kernels, scale):
    logits = (scale * torch.randn(3, 4, 1, 5, 27, generator=stream(0, "l"))).requires_grad_()
    x = torch.rand(4, 1, 5, 27, generator=stream(0, "x"))
    log_px = pixels.Bernoulli(logits).log_prob(x)
    log_px.square().sum().backward() if scale < 1e10 else log_px.sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = (x * exact - nn.functional.softplus(exact, threshold=50)).flatten(2).sum(-1)
    expected.square().sum().backward() if scale < 1e10 else expected.sum().backward()
    assert torch.allclose(log_px.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6 * float(exact.grad.abs().max()))


def test_images_of_many_pixels(kernels):
    """Products of up to 64 factors of at most 2 are taken together, 16 side by side: 5,000 pixels are more than one such set."""
    log_px = pixels.Bernoulli(torch.zeros(1, 1, 1, 50, 100)).log_prob(torch.ones(1, 1, 50, 100))
    assert log_px.item() == pytest.approx(-5000 * math.log(2), rel=1e-6)


def test_pixels_that_are_not_finite_say_so(kernels):
    for bad in (math.nan, math.inf):
        logits = torch.zeros(1, 2, 1, 4, 4)
        logits[0, 1, 0, 2, 2] = bad
        log_px = pixels.Bernoulli(logits).log_prob(torch.zeros(2, 1, 4, 4))
        assert log_px[0, 0].isfinite() and not log_px[0, 1].isfinite()


@pytest.mark.parametrize("nesterov", [False, True])
def test_adam_is_its_formula(kernels, nesterov):
    noise = stream(0, "adam")
    weights, gradient = torch.randn(1000, generator=noise), torch.empty(1000)
    w, m, v = weights.double(), torch.zeros(1000).double(), torch.zeros(1000).double()
    rate = torch.cat([torch.full((300,), 1e-2), torch.full((700,), 3e-2)]).double()
    adam = Adam(weights, gradient, 0.95, [(300, 1.0), (700, 3.0)], nesterov)
    for t in range(1, 9):
        gradient.copy_(torch.randn(1000, generator=noise))
        g = 0.5 * gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        ahead = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t) if nesterov else m / (1 - 0.9**t)
        w = w - rate * ahead / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        adam.step(1e-2, 0.5)
        assert not gradient.any()
        assert (weights - w).abs().max() < 1e-6
    assert adam.counts().tolist() == [8, 8]


def test_moments_that_have_decayed_are_zero(kernels):
    weights, gradient = torch.zeros(100), torch.zeros(100)
    adam = Adam(weights, gradient, 0.999, [(100, 1.0)], False)
    adam.mean.fill_(1e-39)
    adam.step(1e-3)
    assert not adam.mean.any() and not weights.any()


def test_the_norm_is_that_of_all_numbers_whatever_the_threads(kernels):
    x = torch.randn(100_001, generator=stream(0, "x"))
    sums = torch.empty(25, dtype=torch.float64)
    one, two = (kernels.squares(x.data_ptr(), sums.data_ptr(), len(x), 4096, threads) for threads in (1, 2))
    assert one == two == pytest.approx(x.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["grey", "dynamic", "threshold"])
def test_a_batch_of_images_is_what_the_protocol_makes_of_it(name, kernels):
    """Of 105 pixels, so that rows begin anywhere in a word of draws."""
    data = torch.randint(0, 256, (300, 3, 5, 7), dtype=torch.uint8, generator=stream(0, "data"))
    data[:256] = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    index = torch.randperm(300, generator=stream(0, "index"))[:257]
    one, other = (protocol(name).training_batch(*given) for given in
                  ((data, stream(0, "bits"), index), (data[index], stream(0, "bits"))))  # fmt: skip
    assert torch.equal(one, other)


def test_a_black_pixel_is_never_lit(kernels):
    """Also where the draw is the lowest, as it is for one pixel in 65,536."""
    data, index = torch.zeros(1, 2**22, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    out = torch.full((2**22,), math.nan)
    kernels.batch(data.data_ptr(), index.data_ptr(), KERNELS["dynamic"], 1, out.data_ptr(), 1, 2**22, 1)
    assert not out.any()
    assert -(2**15) in _words(1, 2**20).view(np.int16)


def test_no_compiler_no_kernels_but_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for found in (build._found, build.load):
        monkeypatch.setattr(build, found.__name__, found.__wrapped__)
    assert build.library() is None
    assert build.reason() == "torch's kernels (there is no C compiler (cc, gcc, clang))"


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc"])
def test_a_compiler_that_fails_is_no_kernels(monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    for found in (build._found, build.load):
        monkeypatch.setattr(build, found.__name__, found.__wrapped__)
    assert build.library() is None
    assert "C compiler" in build.reason()


def test_the_cache_is_used_and_a_damaged_file_in_it_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    load = build.load.__wrapped__
    assert isinstance(load(False), ctypes.CDLL)
    (kept,) = (tmp_path / "native").iterdir()
    written = kept.stat().st_mtime_ns
    load(False)
    assert kept.stat().st_mtime_ns == written
    kept.unlink()  # written over, it would change under who has it loaded
    kept.write_bytes(b"no library")
    assert isinstance(load(False), ctypes.CDLL)


def test_processes_that_begin_together_compile_once(tmp_path):
    """The second waits for the first. Each says when it found the library's file, and which."""
    code = (
        "from vaelab.native import build; from vaelab.data.store import cache_dir; build.load(False);"
        "(kept,) = (cache_dir() / 'native').iterdir(); print(kept.stat().st_ino)"
    )
    environment = {**os.environ, "VAELAB_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    one, other = (process.communicate()[0] for process in both)
    assert one and one == other


def test_what_was_compiled_ahead_is_found(monkeypatch, tmp_path):
    """By a process that looks for no modules in the current folder, and removes what another has left there."""
    (tmp_path / "random.py").write_text("raise SystemExit('a file of the current folder')")
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    for name, age in (("making-old", 1000), ("making-new", 0)):
        (cache / "native" / name / "within").mkdir(parents=True)
        os.utime(cache / "native" / name, (time.time() - age, time.time() - age))
    monkeypatch.setenv("VAELAB_CACHE", str(cache))
    monkeypatch.setattr(build, "_beside", [])
    build.ahead()
    (beside,) = build._beside
    assert beside.wait(100) == 0
    kept, new = sorted((cache / "native").iterdir())
    assert new.name == "making-new"
    monkeypatch.setenv("CC", "false")
    assert isinstance(build.load.__wrapped__("amx_bf16" in build.abilities()), ctypes.CDLL)
    build.ahead()
    assert build._beside == [beside]  # there is nothing to do
    kept.unlink()
    build.keep()
    assert not kept.exists()  # that compiler does nothing, and nobody is told: `library` will


@pytest.mark.parametrize("name, value", [("VAELAB_KERNELS", "torch"), ("VAELAB_CACHE", "/dev/null/x")])
def test_nothing_is_compiled_ahead_that_nobody_would_find(monkeypatch, tmp_path, name, value):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "_beside", [])
    build.ahead()
    build.keep()
    assert not build._beside and not list(tmp_path.iterdir())


def test_what_is_compiled_is_used_again_whatever_the_umask(monkeypatch, tmp_path):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    before = os.umask(0o002)
    try:
        build.load.__wrapped__(False)
        monkeypatch.setenv("CC", "false")
        assert isinstance(build.load.__wrapped__(False), ctypes.CDLL)
    finally:
        os.umask(before)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_code_that_others_may_have_written_is_not_run(monkeypatch, tmp_path, what):
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path))
    load, opened = build.load.__wrapped__, build._open
    load(False)
    (kept,) = (tmp_path / "native").iterdir()
    (kept if what == "file" else kept.parent).chmod(0o777)
    theirs, seen = kept.stat().st_ino, []
    monkeypatch.setattr(build, "_open", lambda path: seen.append(path.stat().st_ino) or opened(path))
    assert isinstance(load(False), ctypes.CDLL)
    assert len(seen) == 1 and theirs not in seen


def test_asking_for_torchs(monkeypatch):
    monkeypatch.setenv("VAELAB_KERNELS", "torch")
    monkeypatch.setattr(build, "_found", build._found.__wrapped__)
    assert build.library() is None and "VAELAB_KERNELS" in build.reason()


@pytest.mark.parametrize("asked", ["", "auto"])
def test_asking_for_nothing_in_particular(monkeypatch, asked):
    monkeypatch.setenv("VAELAB_KERNELS", asked)
    monkeypatch.setattr(build, "_found", build._found.__wrapped__)
    assert build.library() is not None
