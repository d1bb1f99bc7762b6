"""Priors fitted afterwards: p(z) replaced by a density of the codes that a trained model really has.

Training ties q(z|x) to a prior, and never quite: samples of the prior then fall where no image is coded. Given the other
parts, the prior that is best for the bound is the aggregate posterior (Hoffman & Johnson 2016):

    elbo with prior p  =  elbo with prior q(z)  -  KL(q(z) || p(z)),     q(z) = E_x q(z|x)

so a density estimate of q(z) makes samples better and, where it is a density, the bound and the likelihood too. For an
autoencoder (a Dirac posterior) it is the only prior there is (Ghosh et al. 2020, arXiv 1903.12436).

    kind           what is fitted                                                              how
    gaussian       one Gaussian of full covariance                                             sample moments: exact
    mixture        Gaussians of full covariance                                                EM, from k-means
    flow           a neural spline flow over a Gaussian                                        gradient, early stop
    second-stage   a second VAE of the codes (Dai & Wipf 2019, arXiv 1903.05789): no density   gradient, early stop

What they are fitted to: one sample of q(z|x) for each training image, or its code where the posterior is a Dirac. Never
the posterior means of a model that has a spread: they are narrower than the aggregate by E Var(z|x), and a prior of their
shape would be paid for in the rate. "Early stop" watches a tenth of the codes that is held out.

In a conditional model the fitted prior does not depend on the label: it is the aggregate over labels, too.
"""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vaelab.data.datasets import Dataset, Images
from vaelab.data.protocol import Protocol
from vaelab.distributions import FullGaussian, Mixture
from vaelab.errors import NonFiniteError, UsageError, unknown_name
from vaelab.evaluation.codes import features_of
from vaelab.evaluation.quantity import Quantity, to_numpy
from vaelab.models.vae import VAE
from vaelab.priors import Flow, MixtureOfGaussians, Prior, SecondStage
from vaelab.registry import to_spec
from vaelab.rng import stream, stream_seed
from vaelab.run import Run
from vaelab.training import evaluating, labels_for

KINDS = ("gaussian", "mixture", "flow", "second-stage")
HELD_OUT = 0.1
BATCH = 512
CHECKED = 100
"""Steps between two looks at the held-out codes."""
PATIENCE = 5
"""So many looks in a row without a better one end the fit; after three the learning rate is divided by three."""
LEARNING_RATE = 2e-3

OnProgress = Callable[[float], None]
P = TypeVar("P", bound=Prior)


def fit_prior(
    model: VAE,
    data: Dataset,
    protocol: Protocol,
    kind: str = "mixture",
    *,
    components: int = 10,
    layers: int = 2,
    hidden: tuple[int, ...] | None = None,
    latent_dim: int | None = None,
    steps: int = 3000,
    seed: int = 0,
    on_progress: OnProgress = lambda done: None,
) -> Prior:
    """A prior fitted to the codes of the training images; the model is left as it is.

    Args:
        model: a trained model.
        data: its training images are encoded.
        protocol: how they are read.
        kind: one of `KINDS`.
        components: of a mixture.
        layers: of a flow.
        hidden: widths of the networks of a flow, by default (64,), or of a second stage, (256, 256).
        latent_dim: of a second stage; by default as many as the model has.
        steps: at most so many, of a flow or a second stage.
        seed: of the codes and the fit: the same seed gives the same prior.
        on_progress: called with the fraction done.

    Raises:
        UsageError: unknown kind, a number below one, or too few codes.
        NonFiniteError: codes that are not finite.
    """
    codes = aggregate_codes(model, data.train, protocol, seed)
    return fit(
        codes, kind, components=components, layers=layers, hidden=hidden, latent_dim=latent_dim, steps=steps, seed=seed,
        on_progress=on_progress,
    )  # fmt: skip


def aggregate_codes(model: VAE, images: Images, protocol: Protocol, seed: int = 0, test: bool = False) -> Tensor:
    """One sample of q(z|x) for each image, (N, D) float32 on the CPU; of a Dirac posterior its code.

    `test` images are those that the protocol has drawn once and for all.
    """
    c = labels_for(model, images, model.device)
    x = (
        protocol.test_set(images.pixels)
        if test
        else protocol.training_batch(torch.from_numpy(images.pixels), stream(seed, "fit-images"))
    )
    with evaluating(model):
        q = model.posterior(features_of(model, x.to(model.device), c))
        return q.draw(1, stream(seed, "fit-codes", device=model.device))[0][0].float().cpu()


def fit(
    codes: Tensor,
    kind: str,
    *,
    components: int = 10,
    layers: int = 2,
    hidden: tuple[int, ...] | None = None,
    latent_dim: int | None = None,
    steps: int = 3000,
    seed: int = 0,
    on_progress: OnProgress = lambda done: None,
) -> Prior:
    """A prior fitted to codes (N, D); see `fit_prior`."""
    if kind not in KINDS:
        raise unknown_name("kind of prior", kind, KINDS)
    for name, value in {"components": components, "layers": layers, "steps": steps, "latent_dim": latent_dim}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: expected an integer of 1 or more")
    bad = (~codes.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"the codes of {len(bad)} of {len(codes)} training images are not finite (image {bad[0]} first): no prior can be "
            "fitted; train again with a lower learning rate"
        )
    n, dim = codes.shape
    wanted = {"gaussian": 1, "mixture": components}.get(kind)
    least = 20 * dim if wanted is None else wanted * (dim + 2)
    if n < least:
        what = f"a {kind}" if wanted is None else f"{wanted} full covariance{'s' if wanted > 1 else ''}"
        raise UsageError(
            f"there are {n} codes of {dim} dimensions, too few for {what}: expected {least} or more; take "
            + ("fewer components or " if kind == "mixture" else "--kind gaussian or " if wanted is None else "")
            + "more training images"
        )
    if kind == "gaussian":
        return _mixture(codes, 1, seed)
    if kind == "mixture":
        return _mixture(codes, components, seed)
    if kind == "flow":
        return _flow(codes, layers, hidden or (64,), steps, seed, on_progress)
    return _second_stage(codes, latent_dim or dim, hidden or (256, 256), steps, seed, on_progress)


def with_prior(model: VAE, prior: Prior) -> VAE:
    """A model with another prior, that shares the other parts of this one."""
    changed = VAE(model.encoder, model.posterior, prior.to(model.device), model.likelihood)
    return changed.train(model.training)


def gain(model: VAE, prior: Prior, data: Dataset, protocol: Protocol, seed: int = 0) -> Quantity:
    """What the bound gains on the test images by another prior: E_q(z) log p_new(z) - log p_old(z), in nats per image.

    Raises:
        NoDensity: one of the two has none.
    """
    z = aggregate_codes(model, data.test, protocol, seed, test=True).to(model.device)
    fitted = with_prior(model, prior)
    with torch.no_grad():
        new, old = (
            one.latent_prior(labels_for(one, data.test, z.device)).log_prob(z.unsqueeze(0))[0]
            for one in (fitted, model)
        )
    return Quantity.over_images(to_numpy(new) - to_numpy(old))


def write_run(run: Run, model: VAE, prior: Prior, path: Path, **facts: str) -> Run:
    """A new run folder for a run's model with a fitted prior: as complete as the first, and independent of it.

    Args:
        run: where the model came from; its records of training are copied, which were made with its own prior.
        model: of the run.
        prior: the fitted one.
        path: the new folder.
        facts: how the prior was fitted; they join env.json.

    Raises:
        UsageError: the folder cannot be made or is not empty; or the run's model has no prior of its own to replace.
    """
    recipe, environment = run.recipe(), run.environment()
    if "prior" not in recipe.model:
        raise UsageError(
            f"'{run.path}' holds a {recipe.model.get('class')}, which has no one prior that could be replaced"
        )
    kept = {key: environment[key] for key in KEPT if key in environment}
    fitted = with_prior(model, prior)
    spec = {**recipe.model, "prior": to_spec(prior)}
    new = Run.create(path, replace(recipe, model=spec), **kept, fitted_from=str(run.path.resolve()), **facts)
    for record in run.history():
        new.append(record)
    new.save_model(fitted)
    return new


KEPT = ("device", "data_fingerprint", "data_source", "precision", "precision_reason")
"""What a run with a fitted prior takes over from the env.json of the run it was made from."""


def maximum_likelihood(z: np.ndarray, components: int, seed: int = 0) -> Mixture:
    """A mixture of Gaussians of full covariance fitted to z (N, D): sample moments, or EM from k-means; float64."""
    mean, std = z.mean(0), z.std(0)
    if components == 1:
        weights, means, covariances = (
            np.ones(1),
            mean[None],
            np.cov(z, rowvar=False, bias=True).reshape(1, len(mean), -1),
        )
    else:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        # standardised: what is added to the diagonals for stability is then 1e-6 of the codes' own variance
        em: Any = GaussianMixture(components, max_iter=300, random_state=stream_seed(seed, "fit") % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps of EM are a good fit, converged or not
            em.fit((z - mean) / std)
        weights, means, covariances = em.weights_, mean + std * em.means_, em.covariances_ * np.outer(std, std)
    roots = np.linalg.cholesky(covariances)
    logits, centres, scales = (torch.from_numpy(np.ascontiguousarray(t)) for t in (np.log(weights), means, roots))
    return Mixture(logits, FullGaussian(centres, scales))


def _mixture(codes: Tensor, components: int, seed: int) -> MixtureOfGaussians:
    z = codes.double().numpy()
    constant = np.flatnonzero(z.std(0) <= 1e-6 * np.abs(z).max())
    if len(constant):
        raise UsageError(
            f"latent dimension {constant[0]} is the same for all training images, so the codes have no density: train "
            "again with fewer latent dimensions"
        )
    try:
        fit = maximum_likelihood(z, components, seed)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise UsageError(f"a covariance of the codes is singular ({error}): take fewer components") from None
    prior = _built(lambda: MixtureOfGaussians(z.shape[1], components, covariance="full"), seed)
    roots = fit.components.scale_tril  # type: ignore[attr-defined]
    prior.fill(fit.logits.exp(), fit.components.mean, roots @ roots.mT)
    return prior.eval()


def _flow(codes: Tensor, layers: int, hidden: tuple[int, ...], steps: int, seed: int, on_progress: OnProgress) -> Flow:
    prior = _built(lambda: Flow(codes.shape[1], "spline", layers, hidden), seed)
    with torch.no_grad():
        prior.mean.copy_(codes.mean(0))
        prior.log_std.copy_(codes.std(0).clamp_min(1e-6).log())
    _descend(prior, lambda z, noise: -prior().log_prob(z.unsqueeze(0)).mean(), codes, steps, seed, on_progress)
    return prior.eval()


def _second_stage(
    codes: Tensor, latent_dim: int, hidden: tuple[int, ...], steps: int, seed: int, on_progress: OnProgress
) -> SecondStage:
    prior = _built(lambda: SecondStage(codes.shape[1], latent_dim, hidden), seed)
    centre = codes.mean(0)
    scale = (codes - centre).square().mean().sqrt().clamp_min(1e-6)

    def loss(z: Tensor, noise: torch.Generator) -> Tensor:
        trace = prior.vae.trace(z, generator=noise)
        return (trace.distortion + trace.rate).mean()

    _descend(prior, loss, (codes - centre) / scale, steps, seed, on_progress)
    _unscale(prior.vae, centre, scale)
    return prior.eval()


@torch.no_grad()
def _unscale(vae: VAE, centre: Tensor, scale: Tensor) -> None:
    """Turn a VAE of (z - centre) / scale into the same one of z: the maps at its two ends absorb the difference."""
    reader = next(m for m in vae.encoder.modules() if isinstance(m, nn.Linear))
    writer = [m for m in vae.likelihood.modules() if isinstance(m, nn.Linear)][-1]
    reader.weight.div_(scale)
    reader.bias.sub_(reader.weight @ centre)
    writer.weight.mul_(scale)
    writer.bias.mul_(scale).add_(centre)
    vae.likelihood.log_scale.add_(scale.log())  # type: ignore[operator]


def _built(make: Callable[[], P], seed: int) -> P:
    """A prior with its first weights drawn from the stream `fit`, not from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "fit"))
        return make()


def _descend(
    prior: Prior,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    codes: Tensor,
    steps: int,
    seed: int,
    on_progress: OnProgress,
) -> None:
    """Minimise a loss (nats per code) by Adam, and keep the weights that were best on the held-out codes."""
    order = torch.randperm(len(codes), generator=stream(seed, "fit-split"))
    count = max(1, round(HELD_OUT * len(codes)))
    held, train = codes[order[:count]], codes[order[count:]]
    optimiser = torch.optim.Adam(prior.parameters(), LEARNING_RATE)
    best, kept, since = math.inf, copy.deepcopy(prior.state_dict()), 0
    prior.train()
    for step in range(1, steps + 1):
        noise = stream(seed, "fit-step", step)
        batch = train[torch.randint(len(train), (min(BATCH, len(train)),), generator=noise)]
        optimiser.zero_grad()
        loss(batch, noise).backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 10.0)
        optimiser.step()
        if step % CHECKED and step < steps:
            continue
        on_progress(step / steps)
        with evaluating(prior):
            value = loss(held, stream(seed, "fit-held")).item()
        if value < best:
            best, kept, since = value, copy.deepcopy(prior.state_dict()), 0
            continue
        since += 1
        if since == PATIENCE:
            break
        if since == 3:
            for group in optimiser.param_groups:
                group["lr"] /= 3
    if not math.isfinite(best):
        raise NonFiniteError("the loss on the held-out codes was never finite: the prior could not be fitted")
    prior.load_state_dict(kept)
