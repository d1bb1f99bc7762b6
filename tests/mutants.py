"""One-line faults in the library's mathematics, each of which a named test must notice.

    python tests/mutants.py            all of them, a line each; exit code 1 if one survives
    python tests/mutants.py KL         those whose name holds "KL"

Each fault is written into a copy of the sources in a temporary folder, and its test is run against that copy. The test
must pass without the fault and fail with it; `pytest` itself never imports this file.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, `old` becomes `new`; `test` notices."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = (
    Mutant("Gaussian KL: sign of the mean's term", "distributions.py",
           "return 0.5 * (torch.exp(2 * log_ratio) + scaled.square() - 1) - log_ratio",
           "return 0.5 * (torch.exp(2 * log_ratio) - scaled.square() - 1) - log_ratio",
           "tests/oracles/test_distributions.py::test_kl_of_gaussians_against_torch_quadrature_and_monte_carlo"),
    Mutant("Gaussian KL: minus one forgotten", "distributions.py",
           "return 0.5 * (torch.exp(2 * log_ratio) + scaled.square() - 1) - log_ratio",
           "return 0.5 * (torch.exp(2 * log_ratio) + scaled.square()) - log_ratio",
           "tests/oracles/test_distributions.py::test_kl_of_gaussians_against_torch_quadrature_and_monte_carlo"),
    Mutant("Gaussian density: no log 2 pi", "distributions.py",
           "return -0.5 * scaled.square() - self.log_std - 0.5 * LOG_2PI",
           "return -0.5 * scaled.square() - self.log_std",
           "tests/oracles/test_distributions.py::test_gaussian_density_is_torchs"),
    Mutant("Gaussian sample: variance for deviation", "distributions.py",
           "return self.mean_ + self.std * _noise(self.mean_, k, generator)",
           "return self.mean_ + self.std.square() * _noise(self.mean_, k, generator)",
           "tests/oracles/test_distributions.py::test_gaussian_samples_have_its_moments"),
    Mutant("full Gaussian: half the log-determinant", "distributions.py",
           "return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)",
           "return 0.5 * self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)",
           "tests/oracles/test_latents.py::test_a_full_gaussian_posterior_reaches_log_px_where_the_diagonal_cannot"),
    Mutant("full Gaussian: KL without the dimension", "distributions.py",
           "return (0.5 * (squares - q.mean_.shape[-1]) + p._log_det() - q._log_det()).unsqueeze(-1)",
           "return (0.5 * (squares - 1) + p._log_det() - q._log_det()).unsqueeze(-1)",
           "tests/oracles/test_latents.py::test_every_posterior_goes_with_every_prior"),
    Mutant("Laplace density: log 2 forgotten", "distributions.py",
           "return -(value - self.loc).abs() * torch.exp(-self.log_scale) - self.log_scale - math.log(2)",
           "return -(value - self.loc).abs() * torch.exp(-self.log_scale) - self.log_scale",
           "tests/oracles/test_latents.py::test_every_posterior_goes_with_every_prior"),
    Mutant("Laplace KL: scales swapped", "distributions.py",
           "near = torch.exp(log_ratio - distance * torch.exp(-q.log_scale))",
           "near = torch.exp(-log_ratio - distance * torch.exp(-q.log_scale))",
           "tests/oracles/test_latents.py::test_every_posterior_goes_with_every_prior"),
    Mutant("mixture: weights not normalised", "distributions.py",
           "return torch.logsumexp(torch.log_softmax(self.logits, 0) + self.components.log_prob_all(value), -1)",
           "return torch.logsumexp(self.logits + self.components.log_prob_all(value), -1)",
           "tests/oracles/test_distributions.py::test_densities_in_one_dimension_integrate_to_one"),
    Mutant("flow: sign of the log-determinant", "distributions.py",
           "return -0.5 * (eps.square() + LOG_2PI).sum(-1) - log_det - self.base.log_std.sum(-1)",
           "return -0.5 * (eps.square() + LOG_2PI).sum(-1) + log_det - self.base.log_std.sum(-1)",
           "tests/oracles/test_flows.py::test_densities_integrate_to_one"),
    Mutant("planar flow: determinant of the unconstrained u", "flows.py",
           "log_det = log_det + torch.log1p(allowed * (1 - height.square()))",
           "log_det = log_det + torch.log1p(along * (1 - height.square()))",
           "tests/oracles/test_flows.py::test_log_determinant_is_that_of_the_autograd_jacobian"),
    Mutant("estimate: log K dropped", "trace.py",
           "return torch.logsumexp(log_w.double(), dim) - math.log(log_w.shape[dim])",
           "return torch.logsumexp(log_w.double(), dim)",
           "tests/oracles/test_linear_gaussian.py::test_importance_sampling_bias_falls_like_one_over_k"),
    Mutant("effective sample size: one square missing", "evaluation/importance.py",
           "return float(1 / share.square().sum()), float(share.max())",
           "return float(1 / share.sum()), float(share.max())",
           "tests/oracles/test_importance.py::test_the_exact_posterior_gives_log_px_for_every_k"),
    Mutant("rate: mean over dimensions in place of the sum", "trace.py",
           "return torch.stack([level.kl.flatten(1).sum(1) for level in self.levels]).sum(0)",
           "return torch.stack([level.kl.flatten(1).mean(1) for level in self.levels]).sum(0)",
           "tests/oracles/test_linear_gaussian.py::test_elbo_with_closed_form_rate_is_log_px_in_the_mean"),
    Mutant("log weight: prior forgotten", "trace.py",
           "log_ratio = torch.stack([level.log_p - level.log_q for level in self.levels]).sum(0)",
           "log_ratio = torch.stack([-level.log_q for level in self.levels]).sum(0)",
           "tests/oracles/test_linear_gaussian.py::test_elbo_of_the_exact_posterior_is_log_px"),
    Mutant("MIWAE: M and K swapped", "objectives.py",
           "bound = log_mean_exp(_grouped(self, trace.log_w(), self.m), 1).mean(0)",
           "bound = log_mean_exp(_grouped(self, trace.log_w(), self.m), 0).mean(0)",
           "tests/equivalence/test_objectives.py::test_equal_objectives_have_equal_loss_and_gradient"),
    Mutant("CIWAE: shares swapped", "objectives.py",
           "bound = self.beta * elbo + (1 - self.beta) * log_mean_exp(trace.log_w())",
           "bound = (1 - self.beta) * elbo + self.beta * log_mean_exp(trace.log_w())",
           "tests/equivalence/test_objectives.py::test_equal_objectives_have_equal_loss_and_gradient"),
    Mutant("DReG: the encoder's weights not squared", "objectives.py",
           "return _steered(trace, -(weight * log_w).sum(0).mean(), bound, level.z, weight)",
           "return _steered(trace, -(weight * log_w).sum(0).mean(), bound, level.z, torch.ones_like(weight))",
           "tests/oracles/test_estimators.py::test_signal_to_noise_falls_for_iwae_and_rises_for_dreg"),
    Mutant("PIWAE: the encoder follows all samples", "objectives.py",
           "return _steered(trace, surrogate, bound, level.z, part / whole)",
           "return _steered(trace, surrogate, bound, level.z, torch.ones_like(part))",
           "tests/oracles/test_estimators.py::test_every_parameter_has_the_gradient_of_two_separate_passes"),
    Mutant("free bits: minimum for maximum", "objectives.py",
           "rate = rate + kl.clamp_min(self.floor * dimensions).sum()",
           "rate = rate + kl.clamp_max(self.floor * dimensions).sum()",
           "tests/equivalence/test_objectives.py::test_equal_objectives_have_equal_loss_and_gradient"),
    Mutant("total correlation: minibatch weights without N", "estimators.py",
           "return like.new_full((b, b), -math.log(n * b))",
           "return like.new_full((b, b), -math.log(b))",
           "tests/oracles/test_total_correlation.py::test_with_the_whole_data_set_both_estimators_are_the_mixture"),
    Mutant("stratified estimator: an image's own share", "estimators.py",
           ".fill_diagonal_(-math.log(n))",
           ".fill_diagonal_(-math.log(b))",
           "tests/oracles/test_total_correlation.py::test_stratified_weights_are_unbiased_for_the_mixture"),
    Mutant("MMD: the cross term once", "estimators.py",
           "terms = _kernel(a, a, kernel) + _kernel(b, b, kernel) - 2 * _kernel(a, b, kernel)",
           "terms = _kernel(a, a, kernel) + _kernel(b, b, kernel) - _kernel(a, b, kernel)",
           "tests/oracles/test_total_correlation.py::test_mmd_of_gaussians"),
    Mutant("continuous Bernoulli: no normaliser", "pixels.py",
           "return torch.where(near, 0.5 * logits + series, F.relu(logits) + torch.log(-torch.expm1(-size)) - torch.log(size))",
           "return F.softplus(logits) + 0 * series",
           "tests/oracles/test_pixels.py::test_continuous_bernoulli_integrates_to_one_and_has_its_mean"),
    Mutant("Bernoulli: products underflow", "pixels.py",
           "if float(product.detach().amin()) >= torch.finfo(torch.float32).tiny:",
           "if True:",
           "tests/oracles/test_pixels.py::test_float32_bernoulli_sums_are_those_of_float64"),
    Mutant("discretised logistic: no tails", "pixels.py",
           "return torch.where(x < HALF, below_upper, torch.where(x > 1 - HALF, above_lower, inside))",
           "return inside",
           "tests/oracles/test_pixels.py::test_masses_of_the_256_levels_sum_to_one"),
    Mutant("Gaussian pixels: log std once for all", "pixels.py",
           "return sum_event(-0.5 * scaled.square() - log_std - 0.5 * LOG_2PI, self.event_dim)",
           "return sum_event(-0.5 * scaled.square() - 0.5 * LOG_2PI, self.event_dim) - log_std.sum()",
           "tests/oracles/test_pixels.py::test_cross_log_prob_is_log_prob_of_every_pair"),
    Mutant("quadrature: children not scaled", "quadrature.py",
           "px, log_pz = self._decode(np.concatenate(children), side / 2)",
           "px, log_pz = self._decode(np.concatenate(children), side)",
           "tests/oracles/test_linear_gaussian.py::test_quadrature_is_exact"),
    Mutant("importance sampling: groups not divided", "evaluation/importance.py",
           "return float(groups.logsumexp(1).mean()) - math.log(size)",
           "return float(groups.logsumexp(1).mean())",
           "tests/oracles/test_importance.py::test_the_exact_posterior_gives_log_px_for_every_k"),
    Mutant("importance sampling: sign", "evaluation/importance.py",
           "found.append((p.log_prob(z) - log_r + torch.cat(log_px)).double())",
           "found.append((p.log_prob(z) + log_r + torch.cat(log_px)).double())",
           "tests/oracles/test_importance.py::test_the_exact_posterior_gives_log_px_for_every_k"),
    Mutant("defensive proposal: mixture without its shares", "evaluation/importance.py",
           "of_q, of_p = q.log_prob(z) + math.log(1 - 1 / EVERY), p.log_prob(z) - math.log(EVERY)",
           "of_q, of_p = q.log_prob(z), p.log_prob(z)",
           "tests/oracles/test_importance.py::test_the_weights_are_unbiased_for_px"),
    Mutant("test images drawn with another seed", "data/protocol.py",
           "u = np.random.default_rng(TEST_DRAW_SEED)",
           "u = np.random.default_rng(0)",
           "tests/data/test_protocol.py::test_the_test_draw_is_this_one"),
)  # fmt: skip


def main(wanted: str = "") -> int:
    survivors = 0
    chosen = [m for m in MUTANTS if wanted.lower() in m.name.lower()]
    for mutant in chosen:
        outcome = _try(mutant)
        survivors += outcome != "noticed"
        print(f"{outcome:9}  {mutant.name}  [{mutant.test}]", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults noticed")
    return 1 if survivors or not chosen else 0


def _try(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "src" / "vaelab" / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            return "not found" if mutant.old not in text else "ambiguous"
        if _run(copy, mutant.test) != 0:
            return "broken"  # the test fails without the fault: it shows nothing
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        return "noticed" if _run(copy, mutant.test) == 1 else "SURVIVED"


def _run(copy: Path, test: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
