"""Any composition, from a few expressions: what the recipe `vae` is made of.

Each of the four places of a model, and its objective, is written as it would be in Python, by the names of the registry:

    vaelab train vae --posterior FullGaussian --prior "VampPrior(pseudo_inputs=500)" --objective "IWAE()" -k 50
    vaelab train vae --likelihood DiscretisedLogistic --protocol levels --network conv
    vaelab train vae --objective "ELBO(beta=Linear(0, 1, 5000))"

An expression is read, never run: names of one family, keywords, and plain values. What follows from the rest of the model
(`dim`, `features`, the image's shape, the number of training images) is filled in.

`PYTHAE` writes the model classes of pythae 0.1.2 (Chadebec et al. 2022, arXiv 2206.08309) as such expressions, and
`NOT_HERE` says what each of the others would need.
"""

import ast
import math
from typing import Any

from vaelab.errors import UsageError, unknown_name
from vaelab.registry import COMPONENTS, Spec, spec

Shape = tuple[int, ...]

NETWORKS = ("dense", "conv", "residual")
LIKELIHOODS = {
    "binary": "Bernoulli",
    "grey": "GreyCrossEntropy",
    "levels256": "DiscretisedLogistic",
    "continuous": "Gaussian",
}
"""The likelihood of each measure where none is asked for."""


def parse(text: str, family: str) -> Spec:
    """The spec that an expression of one family stands for: ``"BetaTC(beta=6)"`` or ``"Delta"``.

    Args:
        text: a class name of the family, with keyword arguments in brackets or without.
        family: `posteriors`, `priors`, `likelihoods` or `objectives`; schedules may stand inside.

    Raises:
        UsageError: not such an expression, or an unknown name.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _unreadable(text, family) from None
    return _component(tree, family, text)


def _component(node: ast.AST, family: str, text: str) -> Spec:
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    if not isinstance(name, ast.Name):
        raise _unreadable(text, family)
    known = {(own := path.split(".")[1]).lower(): own for path in COMPONENTS if path.startswith(f"{family}.")}
    if name.id.lower() not in known:
        raise unknown_name(family.removesuffix("s"), name.id, known.values())
    own = known[name.id.lower()]
    arguments: dict[str, Any] = {}
    if call:
        positional = ("start", "end") if family == "schedules" else ()
        if family == "schedules":
            positional = (*positional, "period" if own == "Cyclic" else "steps")
        if len(call.args) > len(positional):
            raise UsageError(f"'{text}': name the arguments, as in ELBO(beta=4)")
        arguments |= {key: _value(item, text, family) for key, item in zip(positional, call.args, strict=False)}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise _unreadable(text, family)
            if keyword.arg in arguments:
                raise UsageError(f"'{text}' gives {keyword.arg} twice")
            arguments[keyword.arg] = _value(keyword.value, text, family)
    return {"class": f"{family}.{own}", **arguments}


def _value(node: ast.AST, text: str, family: str) -> Any:
    if isinstance(node, ast.Call):
        return _component(node, "schedules", text)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise _unreadable(text, family) from None
    plain = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, str | int | float | bool) for item in plain):
        raise _unreadable(text, family)
    return list(value) if isinstance(value, tuple) else value


def _unreadable(text: str, family: str) -> UsageError:
    shown = text if len(text) <= 60 else text[:60] + "…"
    return UsageError(
        f"'{shown}' is not one of {family}: expected a name with keyword arguments, "
        'as in ELBO, "ELBO(beta=4)" or "ELBO(beta=Linear(0, 1, 5000))"'
    )


def compose(
    shape: Shape,
    *,
    measure: str,
    network: str,
    latent_dim: int,
    hidden: tuple[int, ...],
    channels: tuple[int, ...],
    activation: str,
    posterior: str,
    prior: str,
    likelihood: str,
    classes: int,
) -> Spec:
    """The spec of a VAE for images of `shape` (C, H, W).

    Args:
        shape: of the images.
        measure: of the data's protocol; decides the likelihood where that is "auto".
        network: `dense`, `conv` or `residual` (convolutional).
        latent_dim: dimensions of z.
        hidden: widths of the dense layers; of a convolutional network the last one is the features' width.
        channels: of the convolutions.
        activation: between the layers.
        posterior, prior, likelihood: expressions, see `parse`.
        classes: labels that encoder and decoder read; 0 for none.

    Raises:
        UsageError: an unknown name, or a value out of range.
    """
    if network not in NETWORKS:
        raise unknown_name("network", network, NETWORKS)
    for name, values in (("latent_dim", (latent_dim,)), ("hidden", hidden), ("channels", channels)):
        if not values or min(values) < 1:
            raise UsageError(f"{name} is {' '.join(map(str, values)) or 'empty'}: expected integers of 1 or more")
    if classes < 0:
        raise UsageError(f"classes is {classes}: expected 0 (not conditional) or the number of labels")
    features = hidden[-1]
    pixels = parse(LIKELIHOODS[measure] if likelihood == "auto" else likelihood, "likelihoods")
    out_shape = [outputs(pixels) * shape[0], *shape[1:]]
    encoder_in = list(shape)
    if classes:
        encoder_in = [math.prod(shape) + classes] if network == "dense" else [shape[0] + classes, *shape[1:]]
    decoder_in = [latent_dim + classes]
    if network == "dense":
        encoder = spec(
            "nn.MLP", in_shape=encoder_in, hidden=list(hidden[:-1]), out_shape=[features], activation=activation,
            out_activation=True, exact_input=False,
        )  # fmt: skip
        decoder = spec(
            "nn.MLP", in_shape=decoder_in, hidden=list(hidden[::-1]), out_shape=out_shape, activation=activation,
        )  # fmt: skip
    else:
        residual = network == "residual"
        encoder = spec(
            "nn.ConvEncoder", in_shape=encoder_in, channels=list(channels), features=features, residual=residual,
            activation=activation,
        )  # fmt: skip
        decoder = spec(
            "nn.ConvDecoder", in_shape=decoder_in, channels=list(channels[::-1]), out_shape=out_shape,
            residual=residual, activation=activation,
        )  # fmt: skip
    if classes:
        encoder, decoder = (spec("nn.WithLabel", network=part, classes=classes) for part in (encoder, decoder))
    p = parse(prior, "priors")
    p.setdefault("dim", latent_dim)
    if p["class"] == "priors.VampPrior":
        p.setdefault("shape", list(shape))
    if p["class"] == "priors.LabelGaussian":
        if not classes:
            raise UsageError("the prior LabelGaussian reads labels: give --classes, the number of labels")
        p.setdefault("classes", classes)
    q = parse(posterior, "posteriors")
    q.setdefault("features", features)
    q.setdefault("dim", latent_dim)
    return spec("VAE", encoder=encoder, posterior=q, prior=p, likelihood={**pixels, "decoder": decoder})


def objective(text: str, images: int) -> Spec:
    """The spec of an objective's expression; `images` is the number of training images, for the estimators that need it."""
    found = parse(text, "objectives")
    if found["class"] == "objectives.BetaTC":
        found.setdefault("data_size", images)
    return found


def outputs(likelihood: Spec) -> int:
    """How many numbers a pixel and channel a likelihood reads from its decoder."""
    name = likelihood["class"].split(".")[1]
    if name in ("Gaussian", "Laplace"):
        return 2 if likelihood.get("scale") == "per-pixel" else 1
    if name == "DiscretisedLogisticMixture":
        components = likelihood.get("components", 5)
        if not isinstance(components, int) or components < 1:
            raise UsageError(f"components is {components!r}: expected an integer of 1 or more")
        return 3 * components
    return {"DiscretisedLogistic": 2, "Categorical": 256}.get(name, 1)


PYTHAE: dict[str, dict[str, Any]] = {
    "AE": {"posterior": "Delta", "likelihood": "Gaussian", "protocol": "dequantised", "objective": "ELBO(beta=0)"},
    "VAE": {"objective": "ELBO"},
    "BetaVAE": {"objective": "ELBO(beta=4)"},
    "DisentangledBetaVAE": {"objective": "Capacity(capacity=Linear(0, 25, 5000), gamma=10)"},
    "BetaTCVAE": {"objective": "BetaTC(alpha=1, beta=6, gamma=1)"},
    "INFOVAE_MMD": {"objective": "InfoVAE(alpha=0, scale=10)"},
    "WAE_MMD": {
        "posterior": "Delta", "likelihood": "Gaussian", "protocol": "dequantised", "objective": "WAE(scale=10)",
    },
    "IWAE": {"objective": "IWAE", "k": 5},
    "MIWAE": {"objective": "MIWAE(m=2)", "k": 10},
    "PIWAE": {"objective": "PIWAE(m=2)", "k": 10},
    "CIWAE": {"objective": "CIWAE(beta=0.05)", "k": 5},
    "VAE_LinNF": {"posterior": "Planar(layers=5)"},
    "VAE_IAF": {"posterior": "InverseAutoregressive(layers=2)"},
    "VAMP": {"prior": "VampPrior(pseudo_inputs=50)", "objective": "ELBO(beta=Linear(0, 1, 5000))"},
    "RAE_L2": {
        "posterior": "Delta", "likelihood": "Gaussian", "protocol": "dequantised",
        "objective": "RAE(l2=0.01, gradient_penalty=0)",
    },
    "RAE_GP": {
        "posterior": "Delta", "likelihood": "Gaussian", "protocol": "dequantised",
        "objective": "RAE(l2=0.01, gradient_penalty=0.001)",
    },
}  # fmt: skip
"""Model classes of pythae -> fields of the recipe `vae`."""

NOT_HERE: dict[str, str] = {
    "FactorVAE": "a critic: a second network with its own optimiser estimates the total correlation; BetaTC estimates it without",
    "Adversarial_AE": "a critic on codes",
    "VAEGAN": "a critic on images, and a likelihood in its features",
    "MSSSIM_VAE": "a similarity index in place of a likelihood; no density",
    "SVAE": "a von Mises-Fisher posterior on the sphere",
    "PoincareVAE": "a wrapped normal on the Poincaré ball",
    "HVAE": "Hamiltonian steps after the encoder",
    "RHVAE": "Hamiltonian steps under a learned metric",
    "VQVAE": "a codebook: a sibling of VAE with the same trace",
    "HRQVAE": "residual codebooks",
}
"""Model classes of pythae that need a part this library does not have, and which."""
