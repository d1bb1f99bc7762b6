"""Recipes: a run is a function that returns its whole configuration.

A recipe's keyword arguments are its fields: ``vaelab train mnist --latent-dim 10 --beta 2`` calls
``mnist(shape, latent_dim=10, beta=2)``. What it returns is plain data (specs, see `vaelab.registry`), so that reading,
listing and storing recipes imports no torch.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vaelab import compositions
from vaelab.data.protocol import protocol as protocol_named
from vaelab.errors import RunError, UsageError, unknown_name
from vaelab.registry import Spec, spec

Shape = tuple[int, ...]

FIELDS: dict[str, str] = {
    "data": "mnist, digits, a folder of images in class sub-folders, or an .npz file.",
    "protocol": "How pixels are read: dynamic, static, threshold, levels, dequantised or grey.",
    "network": "dense, conv or residual (convolutional).",
    "channels": "Channels of the convolutions, from the image inwards.",
    "posterior": "q(z|x): Gaussian, FullGaussian, Laplace, Delta, InverseAutoregressive, Planar or NeuralSpline; "
    'with arguments as in "Planar(layers=8)".',
    "prior": "p(z): StandardNormal, Laplace, MixtureOfGaussians, VampPrior, Flow or LabelGaussian; "
    'with arguments as in "VampPrior(pseudo_inputs=500)".',
    "likelihood": "p(x|z): auto (by the protocol), Bernoulli, ContinuousBernoulli, Gaussian, Laplace, DiscretisedLogistic, "
    "DiscretisedLogisticMixture, Categorical or GreyCrossEntropy.",
    "objective": "ELBO, FreeBits, Capacity, IWAE, MIWAE, PIWAE, CIWAE, STL, DReG, BetaTC, DIP, InfoVAE, WAE or RAE; "
    'with arguments as in "ELBO(beta=4)".',
    "classes": "Labels that encoder and decoder read (a conditional model); 0 for none.",
    "frequency": "Typical frequency of those sines, in radians per unit of z.",
    "latent_dim": "Dimensions of z.",
    "hidden": "Widths of the encoder's hidden layers; mirrored in the decoder, unless the recipe has --decoder.",
    "decoder": "Widths of the decoder's hidden layers.",
    "activation": "Between the layers: relu, silu, gelu, tanh, elu, leaky-relu.",
    "beta": "Weight of the KL term; 0 removes it.",
    "epochs": "Passes over the training images.",
    "batch_size": "Images a step.",
    "k": "Posterior samples for each image in a step.",
    "optimiser": "adam, nadam (with Nesterov's momentum), or muon for wide matrices with adam for the rest.",
    "lr": "Peak learning rate.",
    "schedule": "Of the learning rate: constant, linear, cosine, warm-cosine, warm-linear, one-cycle.",
    "beta2": "Adam's decay of the squared gradient.",
    "rates": "Learning rates of the layers: equal, or fan-in (larger for few inputs, and for biases).",
    "start": "Where the networks start: random, or mean (of the training images, which the encoder then reads centred).",
    "clip": "Largest norm of the gradient; 0 for no clipping.",
    "frequencies": "Sines of z that the decoder sees beside z; 0 for none.",
    "average": "Decay of the averaged weights that are evaluated and saved; 0 for none.",
    "precision": "auto, float32 or bfloat16.",
    "seed": "The root of all randomness.",
}
"""What each field means, for the command line."""

OPTIMISERS = ("adam", "nadam", "muon")
SCHEDULES = ("constant", "linear", "cosine", "warm-cosine", "warm-linear", "one-cycle")
RATES = ("equal", "fan-in")
STARTS = ("random", "mean")
PRECISIONS = ("auto", "float32", "bfloat16")
ON_NONFINITE = ("stop", "skip")


@dataclass(frozen=True)
class Training:
    """How a model is fitted.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        k: posterior samples for each image in a step.
        optimiser: `adam`, `nadam`, or `muon` for wide matrices with Adam for the rest.
        lr: the peak learning rate.
        schedule: of the learning rate, over the whole of training.
        clip: largest norm of the gradient of a step; 0 for no clipping.
        average: decay a step of the exponential moving average of the weights that is evaluated and saved; 0 for none.
        precision: `auto` (bfloat16 matrix products where the processor has them), `float32` or `bfloat16`.
        on_nonfinite: `stop` at a step whose loss or gradient is not finite, or `skip` it: no update, and it is counted.
        beta2: Adam's decay of the squared gradient a step; smaller for short trainings.
        rates: `equal`, or `fan-in`: each layer's own multiple of `lr`, see `vaelab.optim`.
    """

    epochs: int = 10
    batch_size: int = 128
    k: int = 1
    optimiser: str = "adam"
    lr: float = 1e-3
    schedule: str = "constant"
    clip: float = 0.0
    average: float = 0.0
    precision: str = "auto"
    on_nonfinite: str = "stop"
    beta2: float = 0.999
    rates: str = "equal"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "k"):
            _at_least_one(name, getattr(self, name))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr is {self.lr}: the learning rate must be a finite number above 0")
        if not self.clip >= 0:
            raise UsageError(f"clip is {self.clip}: the largest gradient norm is 0 (no clipping) or more")
        if not 0 <= self.average < 1:
            raise UsageError(f"average is {self.average}: the decay of the averaged weights lies in [0, 1)")
        if not 0 <= self.beta2 < 1:
            raise UsageError(f"beta2 is {self.beta2}: the decay of the squared gradient lies in [0, 1)")
        for kind, known in (
            ("optimiser", OPTIMISERS),
            ("rates", RATES),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("on_nonfinite", ON_NONFINITE),
        ):
            if getattr(self, kind) not in known:
                raise unknown_name(kind, getattr(self, kind), known)


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on, besides the code: what ``config.json`` holds."""

    name: str
    data: str
    protocol: str
    model: Spec
    objective: Spec
    training: Training = field(default_factory=Training)
    seed: int = 0

    def __post_init__(self) -> None:
        protocol_named(self.protocol)
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}: expected an integer of 0 or more")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`. Raises RunError for a missing or unknown field, or a value of another type."""
        try:
            training = data["training"]
            unknown = (set(data) - {f.name for f in fields(cls)}) | (set(training) - {f.name for f in fields(Training)})
            if unknown:
                shown = ", ".join(sorted(map(str, unknown)))[:300]
                raise RunError(f"this configuration has fields that this version does not know: {shown}")
            for kind, values in ((cls, data), (Training, training)):
                _check_types(kind, values)
            return cls(**{**data, "training": Training(**training)})
        except (TypeError, KeyError) as error:
            raise RunError(f"this configuration is incomplete: {error}") from None


def _check_types(kind: type, values: dict[str, Any]) -> None:
    """Hold values that were read to the types of a dataclass's fields. Raises RunError."""
    for one in fields(kind):
        accepted = {str: (str,), int: (int,), float: (int, float)}.get(one.type, (dict,))  # type: ignore[call-overload]
        if one.name in values and type(values[one.name]) not in accepted:
            given = str(values[one.name])[:60]
            raise RunError(f"'{one.name}' is {given!a} in this configuration: expected {accepted[-1].__name__}")


def mnist(
    shape: Shape = (1, 28, 28),
    *,
    data: str = "mnist",
    protocol: str = "grey",
    latent_dim: int = 20,
    hidden: tuple[int, ...] = (400,),
    activation: str = "relu",
    beta: float = 1.0,
    epochs: int = 10,
    batch_size: int = 128,
    k: int = 1,
    optimiser: str = "adam",
    lr: float = 3e-3,
    schedule: str = "one-cycle",
    clip: float = 0.0,
    average: float = 0.0,
    precision: str = "auto",
    seed: int = 0,
) -> Recipe:
    """The 784-400-20 network of the classic PyTorch example, on grey levels (a cross-entropy, not a likelihood)."""
    return Recipe(
        "mnist", data, protocol, dense_vae(shape, latent_dim, hidden, hidden[::-1], activation, protocol),
        _elbo(beta), Training(epochs, batch_size, k, optimiser, lr, schedule, clip, average, precision), seed,
    )  # fmt: skip


def mnist_fast(
    shape: Shape = (1, 28, 28),
    *,
    data: str = "mnist",
    protocol: str = "grey",
    latent_dim: int = 20,
    hidden: tuple[int, ...] = (400,),
    activation: str = "silu",
    start: str = "mean",
    beta: float = 1.0,
    epochs: int = 2,
    batch_size: int = 500,
    k: int = 1,
    optimiser: str = "adam",
    lr: float = 2e-2,
    schedule: str = "warm-linear",
    beta2: float = 0.98,
    rates: str = "fan-in",
    clip: float = 0.0,
    average: float = 0.0,
    precision: str = "auto",
    seed: int = 0,
) -> Recipe:
    """`mnist` in two epochs: from the mean image, with a smooth activation and each layer's own learning rate."""
    return Recipe(
        "mnist-fast", data, protocol,
        dense_vae(shape, latent_dim, hidden, hidden[::-1], activation, protocol, start=start), _elbo(beta),
        Training(epochs, batch_size, k, optimiser, lr, schedule, clip, average, precision, beta2=beta2, rates=rates), seed,
    )  # fmt: skip


def mnist_2d(
    shape: Shape = (1, 28, 28),
    *,
    data: str = "mnist",
    protocol: str = "dynamic",
    latent_dim: int = 2,
    hidden: tuple[int, ...] = (256, 256, 256),
    decoder: tuple[int, ...] = (256, 256, 256),
    frequencies: int = 128,
    frequency: float = 0.4,
    activation: str = "silu",
    start: str = "mean",
    beta: float = 1.0,
    epochs: int = 10,
    batch_size: int = 200,
    k: int = 1,
    optimiser: str = "nadam",
    lr: float = 3e-3,
    schedule: str = "warm-linear",
    beta2: float = 0.98,
    rates: str = "fan-in",
    clip: float = 200.0,
    average: float = 0.0,
    precision: str = "auto",
    seed: int = 0,
) -> Recipe:
    """The lab's model: two latent dimensions, on binary pixels, so that its likelihood can be computed exactly."""
    return Recipe(
        "mnist-2d", data, protocol,
        dense_vae(shape, latent_dim, hidden, decoder, activation, protocol, frequencies, frequency, start), _elbo(beta),
        Training(epochs, batch_size, k, optimiser, lr, schedule, clip, average, precision, beta2=beta2, rates=rates), seed,
    )  # fmt: skip


def vae(
    shape: Shape = (1, 28, 28),
    *,
    data: str = "mnist",
    protocol: str = "dynamic",
    network: str = "dense",
    latent_dim: int = 20,
    hidden: tuple[int, ...] = (400,),
    channels: tuple[int, ...] = (32, 64),
    activation: str = "silu",
    posterior: str = "Gaussian",
    prior: str = "StandardNormal",
    likelihood: str = "auto",
    objective: str = "ELBO",
    classes: int = 0,
    images: int = 60_000,
    epochs: int = 10,
    batch_size: int = 128,
    k: int = 1,
    optimiser: str = "adam",
    lr: float = 2e-3,
    schedule: str = "warm-cosine",
    clip: float = 200.0,
    average: float = 0.0,
    precision: str = "auto",
    seed: int = 0,
) -> Recipe:
    """Any composition: posterior, prior, likelihood and objective as expressions, networks dense or convolutional."""
    model = compositions.compose(
        shape, measure=protocol_named(protocol).measure, network=network, latent_dim=latent_dim, hidden=hidden,
        channels=channels, activation=activation, posterior=posterior, prior=prior, likelihood=likelihood,
        classes=classes,
    )  # fmt: skip
    return Recipe(
        "vae", data, protocol, model, compositions.objective(objective, images),
        Training(epochs, batch_size, k, optimiser, lr, schedule, clip, average, precision), seed,
    )  # fmt: skip


def dense_vae(
    shape: Shape,
    latent_dim: int,
    encoder: tuple[int, ...],
    decoder: tuple[int, ...],
    activation: str,
    protocol: str,
    frequencies: int = 0,
    frequency: float = 1.0,
    start: str = "random",
) -> Spec:
    """The spec of a VAE of dense layers: Gaussian posterior, standard normal prior, Bernoulli pixels."""
    _at_least_one("latent_dim", latent_dim)
    if not encoder or not decoder:
        raise UsageError("hidden or decoder is empty: give the width of at least one hidden layer, as in --hidden 400")
    for width in (*encoder, *decoder):
        _at_least_one("hidden", width)
    if frequencies < 0:
        raise UsageError(f"frequencies is {frequencies}: expected 0 (none) or more")
    if not (math.isfinite(frequency) and frequency > 0):
        raise UsageError(f"frequency is {frequency}: expected a finite number above 0")
    if start not in STARTS:
        raise unknown_name("start", start, STARTS)
    sines = {"frequencies": frequencies, "scale": frequency} if frequencies else {}
    likelihood = "likelihoods.GreyCrossEntropy" if protocol == "grey" else "likelihoods.Bernoulli"
    encoding = spec("nn.MLP", in_shape=list(shape), hidden=list(encoder[:-1]), out_shape=[encoder[-1]],
                    activation=activation, out_activation=True)  # fmt: skip
    decoding = spec("nn.FourierMLP" if sines else "nn.MLP", in_shape=[latent_dim], hidden=list(decoder),
                    out_shape=list(shape), activation=activation, **sines)  # fmt: skip
    if start == "mean":
        encoding = spec("nn.Centred", network=encoding, shape=list(shape))
        decoding = spec("nn.AroundMean", network=decoding, shape=list(shape))
    return spec(
        "VAE",
        encoder=encoding,
        posterior=spec("posteriors.Gaussian", features=encoder[-1], dim=latent_dim),
        prior=spec("priors.StandardNormal", dim=latent_dim),
        likelihood=spec(likelihood, decoder=decoding),
    )


def _elbo(beta: float) -> Spec:
    if not (math.isfinite(beta) and beta >= 0):
        raise UsageError(f"beta is {beta}: the weight of the KL term must be a finite number of 0 or more")
    return spec("objectives.ELBO", beta=float(beta))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name} is {value}: expected an integer of 1 or more")


RECIPES: dict[str, Callable[..., Recipe]] = {
    "mnist": mnist,
    "mnist-fast": mnist_fast,
    "mnist-2d": mnist_2d,
    "vae": vae,
}


def recipe(name: str, shape: Shape = (1, 28, 28), **values: Any) -> Recipe:
    """The recipe called `name` for images of a shape (C, H, W), with some of its fields changed.

    Raises:
        UsageError: unknown name, unknown field, or a value out of range.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    known = set(RECIPES[name].__kwdefaults__ or {})
    for value in values:
        if value not in known:
            raise unknown_name(f"field of recipe {name}", value, known)
    return RECIPES[name](shape, **values)
