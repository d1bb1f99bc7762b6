"""Flows: determinants against autograd, densities against integrals, draws against densities, and the identity at first."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from vaelab import flows, posteriors, priors
from vaelab.distributions import DiagGaussian, Transformed
from vaelab.errors import UsageError
from vaelab.rng import stream, stream_seed

F64 = torch.float64
FEATURES = 5
KINDS = {
    "autoregressive": lambda dim: posteriors.InverseAutoregressive(FEATURES, dim, 2, (12,)),
    "linear autoregressive": lambda dim: posteriors.InverseAutoregressive(FEATURES, dim, 1, ()),
    "spline": lambda dim: posteriors.NeuralSpline(FEATURES, dim, 2, (12,), bins=5),
    "planar": lambda dim: posteriors.Planar(FEATURES, dim, 4),
}
INVERTIBLE = [kind for kind in KINDS if kind != "planar"]
FLOW_PRIORS = {
    "spline prior": lambda dim: priors.Flow(dim, "spline", 2, (12,)),
    "autoregressive prior": lambda dim: priors.Flow(dim, "autoregressive", 2, (12,)),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "test"), dtype=F64)


def shaken(module, seed=0, size=0.4):
    """In float64 and away from the identity that flows start with."""
    noise = stream(seed, "shake")
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=noise, dtype=F64))
    return module


def posterior(kind, dim, batch=3, size=0.4):
    return shaken(KINDS[kind](dim), size=size)(normal(batch, FEATURES, seed=1))


def any_flow(kind, dim, size=0.4):
    return shaken(FLOW_PRIORS[kind](dim), size=size)() if kind in FLOW_PRIORS else posterior(kind, dim, 1, size)


def grid(dim, extent, side):
    """Midpoints (N, 1, dim) of cells in [-extent, extent]^dim, and the volume of one."""
    line = (torch.arange(side, dtype=F64) + 0.5) * (2 * extent / side) - extent
    return torch.cartesian_prod(*[line] * dim).reshape(-1, 1, dim), (2 * extent / side) ** dim


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("kind", [*KINDS, *FLOW_PRIORS])
def test_log_determinant_is_that_of_the_autograd_jacobian(kind, dim):
    """For each image its own f (batch 3), at points inside and outside [-5, 5]."""
    batch = 1 if kind in FLOW_PRIORS else 3
    flow = any_flow(kind, dim).flow if batch == 1 else posterior(kind, dim).flow
    eps = 3 * normal(4, batch, dim, seed=7)
    y, log_det = flow.forward(eps)
    assert y.shape == eps.shape and log_det.shape == (4, batch)
    assert (y - eps).abs().max() > 0.1
    for k in range(4):
        whole = torch.autograd.functional.jacobian(lambda e: flow.forward(e.unsqueeze(0))[0].squeeze(0), eps[k])
        for b in range(batch):
            sign, expected = torch.linalg.slogdet(whole[b, :, b])
            assert abs(expected - log_det[k, b]) < 1e-9
            assert sign > 0


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("kind", [*INVERTIBLE, *FLOW_PRIORS])
def test_the_inverse_undoes_the_map_and_has_its_determinant(kind, dim):
    flow = any_flow(kind, dim).flow
    eps = 3 * normal(200, 1, dim, seed=8)
    y, log_det = flow.forward(eps)
    back, again = flow.inverse(y)
    assert torch.allclose(back, eps, rtol=0, atol=1e-7) and torch.allclose(again, log_det, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("kind", [*INVERTIBLE, *FLOW_PRIORS])
def test_drawing_gives_the_log_density_of_what_was_drawn(kind, dim):
    q = any_flow(kind, dim)
    z, log_q = q.draw(100, stream(0, "noise"))
    assert torch.allclose(q.log_prob(z), log_q, rtol=0, atol=1e-7)
    assert torch.equal(q.rsample(100, stream(0, "noise")), z)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("kind", [*INVERTIBLE, *FLOW_PRIORS])
def test_densities_integrate_to_one(kind, dim):
    extent, side = {1: (30, 40_000), 2: (12 if "spline" in kind else 20, 400)}[dim]
    z, volume = grid(dim, extent, side)
    with torch.no_grad():
        q = any_flow(kind, dim, size=0.25)
        total = sum(q.log_prob(part).exp().sum().item() for part in z.split(10_000)) * volume
    # the midpoint rule gains little from smoothness at a spline's knots, where the density has an edge
    assert total == pytest.approx(1, abs=(1e-5 if dim == 1 else 1e-3) if "spline" in kind else 1e-6)


def test_a_planar_flows_density_is_normalised():
    """By its own samples, the only z whose density it knows: E[1/q(z), z in a box] is the box's volume, whatever q."""
    q = posterior("planar", 2, batch=1)
    z, log_q = q.draw(500_000, stream(1, "noise"))
    weights = torch.exp(-log_q) * ((z - q.mean).abs() < q.base.std / 4).all(-1)
    error = weights.std() / math.sqrt(len(weights))
    volume = (q.base.std / 2).prod()
    assert abs(weights.mean() - volume) < 4 * error < 0.05 * volume


@pytest.mark.parametrize("kind", [*KINDS, *FLOW_PRIORS])
def test_samples_follow_the_density(kind):
    """chi^2 over cells of equal width in one dimension, where the cells' masses come from the density's integral."""
    q, n = any_flow(kind, 1), 50_000
    with torch.no_grad():
        z, log_q = q.draw(n, stream(2, "noise"))
        if kind == "planar":  # no density of other z: that of its own samples, as a function of z
            order = z.flatten().argsort()
            at, density = z.flatten()[order], log_q.flatten()[order].exp()
        else:
            at, _ = grid(1, 40, 80_000)
            density, at = q.log_prob(at).exp().flatten(), at.flatten()
    edges = torch.quantile(z.flatten(), torch.linspace(0.02, 0.98, 31, dtype=F64))
    fine = torch.cat([at, edges]).sort().values
    mass = torch.cumulative_trapezoid(_interpolated(fine, at, density), fine)
    cumulative = torch.cat([torch.zeros(1, dtype=F64), mass])[torch.searchsorted(fine, edges)]
    expected = cumulative.diff() * n
    # the edges are sample quantiles, each cell holds 0.032 n: the deviation of the mass between two order statistics
    each = 0.032 * n
    assert ((expected - each).abs() < 5 * math.sqrt(each)).all()
    assert (expected - each).square().sum() / each < 60  # 30 cells: chi^2 above 60 once in a thousand


def _interpolated(fine, at, density):
    return torch.from_numpy(np.interp(fine.numpy(), at.numpy(), density.numpy()))


@pytest.mark.parametrize(
    ("make", "drawing", "density"),
    [
        (KINDS["autoregressive"], 1, 4 + 1),
        (KINDS["spline"], 1, 2 + 1),
        (FLOW_PRIORS["autoregressive prior"], 4 + 1, 1),
        (FLOW_PRIORS["spline prior"], 2 + 1, 1),
    ],
)
def test_a_posterior_draws_in_one_pass_and_a_prior_scores_in_one(make, drawing, density):
    """Passes of a layer's network: an inverse takes `dim` or two, and one more for its determinant."""
    module = shaken(make(4))
    q = module() if isinstance(module, priors.Flow) else module(normal(3, FEATURES))
    passes = []
    module.network.transforms[0].hyper.register_forward_hook(lambda *_: passes.append(1))
    z, _ = q.draw(2, stream(0, "noise"))
    assert len(passes) == drawing
    q.log_prob(z)
    assert len(passes) == drawing + density


@pytest.mark.parametrize("kind", KINDS)
def test_flows_start_as_the_gaussian(kind):
    q = KINDS[kind](3).double()(normal(4, FEATURES))
    assert isinstance(q, Transformed)
    z, log_q = q.draw(6, stream(0, "noise"))
    assert torch.allclose(z, q.base.rsample(6, stream(0, "noise")), rtol=0, atol=1e-12)
    assert torch.allclose(log_q, q.base.log_prob(z), rtol=0, atol=1e-12)
    assert torch.allclose(q.mean, q.base.mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [posteriors.InverseAutoregressive, posteriors.NeuralSpline, posteriors.Planar])
def test_a_flow_of_no_layers_is_the_gaussian_bit_for_bit(cls):
    none, gaussian = cls(FEATURES, 3, layers=0), posteriors.Gaussian(FEATURES, 3)
    none.load_state_dict(gaussian.state_dict())
    h = normal(4, FEATURES).float()
    q, expected = none(h), gaussian(h)
    assert type(q) is DiagGaussian
    assert torch.equal(q.mean, expected.mean) and torch.equal(q.log_std, expected.log_std)


def test_a_flow_prior_of_no_layers_is_a_gaussian_and_of_some_starts_as_the_standard_normal():
    assert type(priors.Flow(3, layers=0)()) is DiagGaussian
    z = normal(7, 2, 3)
    for kind in priors.Flow.KINDS:
        p = priors.Flow(3, kind).double()()
        assert torch.allclose(p.log_prob(z), DiagGaussian(0 * z[0], 0 * z[0]).log_prob(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_a_flow_learns(kind):
    module = shaken(KINDS[kind](3))
    z, log_q = module(normal(4, FEATURES)).draw(6, stream(0, "noise"))
    (z.square().sum(-1) + log_q).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("kind", INVERTIBLE)
def test_one_image_has_its_own_flow_whichever_others_are_there(kind, dim):
    """`select`, `log_prob_all` and plain broadcasting of values over images are log_prob, image by image."""
    q, value = posterior(kind, dim), normal(4, 2, dim, seed=3)
    each = q.log_prob_all(value)
    assert each.shape == (4, 2, 3)
    for b in range(3):
        alone = q.select(slice(b, b + 1))
        assert torch.allclose(each[..., b], alone.log_prob(value), rtol=0, atol=1e-9)
    assert torch.allclose(q.log_prob(value[:, :1]), each[:, 0], rtol=0, atol=1e-9)


def test_a_selected_planar_flow_is_that_images_own():
    q = posterior("planar", 2)
    y, log_det = q.flow.forward(normal(4, 3, 2))
    one, det = q.select(slice(1, 2)).flow.forward(normal(4, 3, 2)[:, 1:2])
    assert torch.allclose(one, y[:, 1:2]) and torch.allclose(det, log_det[:, 1:2])


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 1000.0])
def test_planar_layers_are_invertible_whatever_their_parameters(size):
    """w.u_moved > -1 (Rezende & Mohamed 2015, appendix A.1): the slope 1 + w.u (1 - tanh^2) is above 0 everywhere."""
    u, w = size * normal(5000, 1, 3), size * normal(5000, 1, 3, seed=1)
    layer = flows.PlanarLayers(u, w, torch.zeros(5000, 1, dtype=F64))
    at_centre = torch.zeros(1, 5000, 3, dtype=F64)  # tanh'(0) = 1: the steepest point
    _, log_det = layer.forward(at_centre)
    assert log_det.isfinite().all() and (log_det >= math.log(flows.FLOOR) - 1e-6).all()
    moved = layer.forward(at_centre + 1e-4 * w[:, 0] / w[:, 0].norm(dim=-1, keepdim=True))[0]
    assert ((moved * w[:, 0]).sum(-1) > 0).all()  # so the map along w is increasing


def test_a_planar_layer_leaves_everything_where_u_is_zero_or_w_is_small():
    eps, b = normal(4, 6, 3), normal(6, 1)
    for u, w, change in ((0, 1, 0.0), (1, 0, 4.0), (1, 1e-9, 4.0), (1, 1e-300, 4.0)):
        y, log_det = flows.PlanarLayers(
            u * normal(6, 1, 3, seed=1), w * normal(6, 1, 3, seed=2), b
        ).forward(eps)  # fmt: skip
        assert log_det.isfinite().all() and (y - eps).abs().max() <= change


def test_a_planar_flow_says_that_it_has_no_inverse():
    with pytest.raises(UsageError, match="own samples only"):
        posterior("planar", 2).log_prob(normal(1, 3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_no_density_with_stopped_parameters_comes_from_a_flow(kind):
    with pytest.raises(UsageError, match="STL and DReG"):
        posterior(kind, 2).detach()


def test_the_code_of_a_flow_is_the_image_of_the_bases_mean():
    q = posterior("spline", 3)
    centre, _ = q.flow.forward(torch.zeros(1, 3, 3, dtype=F64))
    assert torch.allclose(q.mean, q.base.mean + q.base.std * centre[0])
    assert (q.mean - q.base.mean).abs().max() > 1e-2


@pytest.mark.parametrize("dim", [1, 2])
def test_a_spline_priors_tail_bound_holds(dim):
    """Beyond the bound's onset at sqrt(D) * 5 deviations; nothing is claimed before it."""
    with torch.no_grad():
        p = any_flow("spline prior", dim)
        z, volume = grid(dim, 30, 20_000 if dim == 1 else 500)
        log_p, distance = p.log_prob(z).flatten(), z.flatten(1).norm(dim=1)
    assert (p.log_tail(0.1), p.log_tail(3.0)) == (0.0, 0.0)
    for radius in (6.0, 10.0, 14.0, 18.0):
        mass = (log_p[distance > radius].exp().sum() * volume).log().item()
        assert p.log_tail(radius) >= mass - 1e-3
    assert p.log_tail(30.0) < -20


def test_a_spline_moves_no_coordinate_out_of_its_box_and_none_outside_it():
    """What the tail bound rests on."""
    flow = any_flow("spline prior", 4).flow
    eps = 4 * normal(20_000, 1, 4)
    y, _ = flow.forward(eps)
    outside = eps.abs() > flows.BOUND
    assert outside.any() and torch.equal(y[outside], eps[outside])
    assert (y[~outside].abs() <= flows.BOUND + 1e-9).all()


def test_an_autoregressive_prior_claims_no_tail_bound():
    with pytest.raises(UsageError, match="no bound on the tail"):
        any_flow("autoregressive prior", 2).log_tail(9.0)


@pytest.mark.parametrize("kind", [*KINDS, *FLOW_PRIORS])
def test_flows_run_in_float32_under_autocast(kind):
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(0, "init"))
        module = (FLOW_PRIORS | KINDS)[kind](3)
    module = shaken(module).float()
    h = () if kind in FLOW_PRIORS else (normal(4, FEATURES).float(),)

    def passes():
        q = module(*h)
        z, log_q = q.draw(5, stream(0, "noise"))
        return z, log_q, q.mean, z if kind == "planar" else q.log_prob(z)

    plain = passes()
    with torch.autocast("cpu", torch.bfloat16):
        cast = passes()
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("kind", ["spline", "spline prior"])
def test_splines_of_large_weights_are_inverted_in_float32(kind):
    """With zuko's default slopes some inverses are not a number here."""
    module = shaken((FLOW_PRIORS | KINDS)[kind](6), size=10.0).float()
    q = module() if kind in FLOW_PRIORS else module(normal(3, FEATURES).float())
    y, _ = q.flow.forward(2 * normal(2000, 1 if kind in FLOW_PRIORS else 3, 6).float())
    back, log_det = q.flow.inverse(y)
    assert back.isfinite().all() and log_det.isfinite().all()


PROGRAM = """
import torch, sys
before = torch.distributions.Distribution._validate_args
if {switched_off}:
    torch.distributions.Distribution.set_default_validate_args(False)
    before = False
import vaelab.flows, vaelab.posteriors, vaelab.priors
assert "zuko" not in sys.modules
vaelab.priors.Flow(2)
assert "zuko" in sys.modules
assert torch.distributions.Distribution._validate_args is before
if before:
    try:
        torch.distributions.Normal(0.0, -1.0)
    except ValueError:
        print("validated")
else:
    print("as it was")
"""


@pytest.mark.parametrize(("switched_off", "printed"), [(False, "validated"), (True, "as it was")])
def test_importing_zuko_leaves_torchs_validation_as_it_was(switched_off, printed):
    program = PROGRAM.format(switched_off=switched_off)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == printed, done.stderr


def test_without_zuko_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    for build in (
        lambda: posteriors.NeuralSpline(4, 2),
        lambda: posteriors.InverseAutoregressive(4, 2),
        lambda: priors.Flow(2),
    ):
        with pytest.raises(UsageError, match=r"pip install 'vaelab\[flows\]'"):
            build()
    posteriors.Planar(4, 2), posteriors.NeuralSpline(4, 2, layers=0), priors.Flow(2, layers=0)
