"""vaelab: a laboratory for variational autoencoders.

    import vaelab as vl

    data = vl.load_data("mnist")
    model = vl.VAE(encoder, vl.posteriors.Gaussian(512, 2), vl.priors.StandardNormal(2), vl.likelihoods.Bernoulli(decoder))
    vl.fit(model, vl.ELBO(beta=1), data, vl.protocol("dynamic"), vl.Training(epochs=5))

Names are imported when they are first used, so that `import vaelab` costs nothing and brings no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vaelab import likelihoods, nn, objectives, oracles, posteriors, priors, schedules
    from vaelab.data.datasets import Dataset, Images
    from vaelab.data.datasets import load as load_data
    from vaelab.data.protocol import protocol
    from vaelab.evaluation import evaluate, importance_sampled
    from vaelab.fitted import fit_prior, with_prior
    from vaelab.models.vae import VAE
    from vaelab.objectives import ELBO
    from vaelab.quadrature import log_likelihood
    from vaelab.recipes import Recipe, Training, recipe
    from vaelab.run import Run
    from vaelab.running import train
    from vaelab.training import fit

_NAMES = {
    "Dataset": "vaelab.data.datasets:Dataset",
    "ELBO": "vaelab.objectives:ELBO",
    "Images": "vaelab.data.datasets:Images",
    "Recipe": "vaelab.recipes:Recipe",
    "Run": "vaelab.run:Run",
    "Training": "vaelab.recipes:Training",
    "VAE": "vaelab.models.vae:VAE",
    "evaluate": "vaelab.evaluation:evaluate",
    "fit": "vaelab.training:fit",
    "fit_prior": "vaelab.fitted:fit_prior",
    "importance_sampled": "vaelab.evaluation:importance_sampled",
    "likelihoods": "vaelab.likelihoods",
    "load_data": "vaelab.data.datasets:load",
    "log_likelihood": "vaelab.quadrature:log_likelihood",
    "nn": "vaelab.nn",
    "objectives": "vaelab.objectives",
    "oracles": "vaelab.oracles",
    "posteriors": "vaelab.posteriors",
    "priors": "vaelab.priors",
    "protocol": "vaelab.data.protocol:protocol",
    "recipe": "vaelab.recipes:recipe",
    "schedules": "vaelab.schedules",
    "train": "vaelab.running:train",
    "with_prior": "vaelab.fitted:with_prior",
}

__all__ = [
    "ELBO", "VAE", "Dataset", "Images", "Recipe", "Run", "Training", "evaluate", "fit", "fit_prior",
    "importance_sampled", "likelihoods", "load_data", "log_likelihood", "nn", "objectives", "oracles", "posteriors",
    "priors", "protocol", "recipe", "schedules", "train", "with_prior",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _NAMES:
        raise AttributeError(f"module 'vaelab' has no attribute '{name}'")
    module, _, attribute = _NAMES[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
