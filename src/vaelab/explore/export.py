"""Models as ONNX graphs: written only after they agree with torch.

A graph is the model's arithmetic without Python, for other programs: onnxruntime, a browser, a phone. The encoder and the
decoder become one each, with any number of images N in a batch.

    encoder    x (N, *X) [, c (N,)]  to  mean (N, D)        of q(z|x), the code
                                         log_sigma (N, D)   log of each dimension's standard deviation; not of a Dirac
                                         scale_tril (N, D, D)   L of the covariance L L^T; of a full Gaussian only
                                         kl (N, D)          KL(q(z|x) || p(z)) in nats, where it has a closed form; (N, 1)
                                                            where only the total has (a full Gaussian)
    decoder    z (N, D) [, c (N,)]   to  mean (N, *X)       E[x|z], and each parameter of p(x|z) by its name, (N, …)
    scorer     z (N, D), x (N, *X), u (N, 2, *X) [, c (N,)]  to  mean (N, *X), log_px (N,)    log p(x|z) in nats
                                         sample (N, *X)     a draw of p(x|z) made of the uniform numbers u, see
                                                            `vaelab.explore.draws`; where there is one

c are the labels of a conditional model, int64. Of a full Gaussian log_sigma is the log of the marginal deviations
sqrt((L L^T)_dd), of a Laplace log b + log(2) / 2.

Each is compared with torch before anybody gets it, see `vaelab.explore.graph`.

What has no graph: a flow's posterior. Its code is known, but no sigma or KL describes it, and its noise goes through a
network; a page that drew an ellipse for it would be wrong. A network of one's own may use what ONNX has no word for.
Decoders of such models are exported all the same.
"""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vaelab import __version__
from vaelab.distributions import Delta, DiagGaussian, Distribution, FullGaussian, Laplace, Transformed, closed_form_kl
from vaelab.errors import UsageError, unknown_name
from vaelab.explore.draws import draw
from vaelab.explore.graph import Graph, NoGraph, Refill, require, translate
from vaelab.models.vae import VAE
from vaelab.pixels import HALF, LEVELS, LogisticMixture
from vaelab.rng import stream
from vaelab.run import Run, replacing

PARTS = ("encoder", "decoder")

Like = tuple[Graph, VAE]
Graphs = dict[Path, dict[str, Graph | NoGraph]]
"""By the folder of a run and its part."""
OnProgress = Callable[[float, str], None]


def log_sigma(q: Distribution) -> Tensor | None:
    """log of the standard deviation of each latent dimension, (B, D); None for a Dirac.

    Raises:
        UsageError: a posterior whose deviations are not known.
    """
    if isinstance(q, DiagGaussian):
        return q.log_std
    if isinstance(q, Laplace):
        return q.log_scale + 0.5 * math.log(2)
    if isinstance(q, FullGaussian):
        return 0.5 * q.scale_tril.tril().square().sum(-1).log()
    if isinstance(q, Delta):
        return None
    kind = "flow" if isinstance(q, Transformed) else type(q).__name__
    raise UsageError(f"its posterior is a {kind}, whose spread no mean and sigma describe")


def scale_tril(q: Distribution) -> Tensor | None:
    """L of a covariance L L^T, (B, D, D) with zeros above the diagonal; None of a posterior that has no full one."""
    return q.scale_tril.tril() if isinstance(q, FullGaussian) else None


class _Encoder(nn.Module):
    """Images to mean and, where there are such, log_sigma, scale_tril and kl."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model
        _, x, c = _codes(model, 1)
        self.names = list(self._found(x, c))

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(self._found(x, c).values())

    def _found(self, x: Tensor, c: Tensor | None) -> dict[str, Tensor]:
        q = self.model.encode(x, c)
        found = {
            "mean": q.mean, "log_sigma": log_sigma(q), "scale_tril": scale_tril(q), "kl": _closed_form_kl(q, self.model, c),
        }  # fmt: skip
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def _closed_form_kl(q: Distribution, model: VAE, c: Tensor | None) -> Tensor | None:
    p = model.latent_prior(c)
    if isinstance(q, FullGaussian) and isinstance(p, DiagGaussian):
        # the general formula solves a triangular system, for which ONNX has no operator; here p's is diagonal
        scaled = q.scale_tril.tril() * torch.exp(-p.log_std).unsqueeze(-1)
        moved = (q.mean_ - p.mean_) * torch.exp(-p.log_std)
        log_ratio = p.log_std - q.scale_tril.diagonal(dim1=-2, dim2=-1).log()
        squares = scaled.square().sum(-1) + moved.square()
        return (0.5 * (squares - 1) + log_ratio).sum(-1, keepdim=True)
    return closed_form_kl(q, p)


class _Decoder(nn.Module):
    """Codes to the mean and the parameters of p(x|z)."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model
        z, _, c = _codes(model, 1)
        self.names = list(_parameters(model.decode(z.unsqueeze(0), c)))

    def forward(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(_parameters(self.model.decode(z.unsqueeze(0), c)).values())


def _parameters(px: Distribution) -> dict[str, Tensor]:
    """The mean and the parameters (1, N, …) of p(x|z) without their first axis; one number for all pixels is repeated."""
    found = {"mean": _mean(px)}
    for field in dataclasses.fields(px):
        value = getattr(px, field.name)
        if isinstance(value, Tensor):
            found[field.name.rstrip("_")] = value[0] if value.dim() else value.expand(found["mean"].shape)
    return found


def _mean(px: Distribution) -> Tensor:
    """E[x|z] (N, *X) of p(x|z) (1, N, *X)."""
    if not isinstance(px, LogisticMixture):
        return px.mean[0]
    # the same sum over 255 edges as px.mean, 17 at a time: a graph unrolls the loop, and took 14 s to make instead of 2
    weight, centre, log_scale = px._parts()
    inverse = torch.exp(-log_scale).unsqueeze(-1)
    edges = (2 * torch.arange(LEVELS - 1) + 1) * HALF
    total = sum(torch.sigmoid((centre.unsqueeze(-1) - some) * inverse).sum(-1) for some in edges.split(17))
    return (weight.exp() * total).sum(-px.event_dim - 1)[0] / (LEVELS - 1)


class _Scorer(nn.Module):
    """Codes, images and noise to the mean of p(x|z), log p(x|z) and, where p(x|z) can be drawn from, a draw."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model
        z, x, c = _codes(model, 1)
        self.names = list(self._found(z, x, _uniform(x), c))

    def forward(self, z: Tensor, x: Tensor, u: Tensor, c: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(self._found(z, x, u, c).values())

    def _found(self, z: Tensor, x: Tensor, u: Tensor, c: Tensor | None) -> dict[str, Tensor]:
        px = self.model.decode(z.unsqueeze(0), c)
        found = {"mean": _mean(px), "log_px": px.log_prob(x)[0]}
        made = draw(px, u) if self.model.likelihood.normalised else None
        return found if made is None else found | {"sample": made}


def _uniform(x: Tensor) -> Tensor:
    """Uniform numbers (n, 2, *X) in (0, 1] for images (n, *X)."""
    return 1 - torch.rand(len(x), 2, *x.shape[1:], generator=stream(0, "export draws", len(x)))


def encoder(model: VAE, about: Mapping[str, str] | None = None, like: Like | None = None) -> Graph:
    """The graph from images to the posterior; see the module's notes.

    Args:
        model: a trained model; it is left as it is.
        about: facts for the file's metadata.
        like: the same graph of a model that differs in its weights alone, and that model: then only weights are exchanged,
            which takes 0.04 s instead of 1.8 to 2.9.

    Raises:
        NoGraph: a part that ONNX cannot carry, or a graph that disagrees with torch.
        UsageError: the packages for ONNX are missing.
    """
    with _ready(model) as copied:
        try:
            module = _Encoder(copied)
        except UsageError as error:
            raise NoGraph("encoder", str(error)) from None
        return _translated(module, "encoder", ("x",), lambda n: _codes(copied, n)[1:], about, like)


def decoder(model: VAE, about: Mapping[str, str] | None = None) -> Graph:
    """The graph from codes to the parameters of p(x|z); arguments and errors as in `encoder`."""
    with _ready(model) as copied:
        return _translated(_Decoder(copied), "decoder", ("z",), lambda n: _codes(copied, n)[::2], about)


def scorer(model: VAE, about: Mapping[str, str] | None = None, like: Like | None = None) -> Graph:
    """The graph from codes, images and noise to the mean of p(x|z), log p(x|z) and a draw; the rest as in `encoder`."""
    with _ready(model) as copied:

        def given(n: int) -> tuple[Tensor | None, ...]:
            z, x, c = _codes(copied, n)
            return z, x, _uniform(x), c

        return _translated(_Scorer(copied), "decoder", ("z", "x", "u"), given, about, like)


def graphs(runs: Sequence[Run], on_progress: OnProgress = lambda done, text: None) -> Graphs:
    """Encoders and scorers of runs, or why there are none: what a page of them needs.

    Raises:
        UsageError: the packages for ONNX are missing.
        RunError: a run without a trained model.
    """
    require()
    models = [run.model() for run in runs]
    alike = all(run.recipe().model == runs[0].recipe().model for run in runs)
    made: Graphs = {run.path: {} for run in runs}
    for i, (part, make) in enumerate({"encoder": encoder, "decoder": scorer}.items()):
        like: Like | None = None
        for j, (run, model) in enumerate(zip(runs, models, strict=True)):
            on_progress((i + j / len(runs)) / len(PARTS), f"{part} of {run.path.name}")
            try:
                graph = made[run.path][part] = make(model, about(run), like)
            except NoGraph as error:
                made[run.path][part] = error
            else:
                like = (graph, model) if alike else None
    return made


def export_run(run: Run, folder: Path, parts: Sequence[str] = PARTS) -> dict[str, Graph]:
    """Write encoder.onnx and decoder.onnx of a run; both are made and compared before either is written.

    Args:
        run: a run with a trained model.
        folder: where to; made where it is missing.
        parts: which of `PARTS`.

    Returns:
        The graphs by file name.

    Raises:
        NoGraph: as `encoder`.
        UsageError: as `encoder`; an unknown part; or a folder that cannot be written.
    """
    for part in parts:
        if part not in PARTS:
            raise unknown_name("part", part, PARTS)
    model, makers = run.model(), {"encoder": encoder, "decoder": decoder}
    graphs = {f"{part}.onnx": makers[part](model, about(run)) for part in parts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, graph in graphs.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(graph.content)
    except OSError as error:
        raise UsageError(f"cannot write to '{folder}': {error.strerror or error}; choose another --out") from None
    return graphs


def about(run: Run) -> dict[str, str]:
    """What a file says of the run it was made from: names without folders, and twelve hex digits over its weights."""
    recipe = run.recipe()
    return {
        "run": run.path.resolve().name, "recipe": recipe.name, "data": Path(recipe.data).name, "protocol": recipe.protocol,
        "weights": weights_of(run),
    }  # fmt: skip


def weights_of(run: Run) -> str:
    """Twelve hex digits over a run's weights, as its evaluation.json has them."""
    return hashlib.sha256(run.weights.read_bytes()).hexdigest()[:12]


def image_shape(model: VAE) -> tuple[int, ...]:
    """*X of the images that a model decodes."""
    c = None if model.classes is None else torch.zeros(1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        return tuple(model.decode(torch.zeros(1, 1, model.latent_dim, device=model.device), c).mean.shape[2:])


# --- how ---


@contextmanager
def _ready(model: VAE) -> Iterator[VAE]:
    """A copy on the CPU in float32 and evaluation mode, without gradients."""
    require()
    with torch.no_grad():
        yield copy.deepcopy(model).cpu().float().eval()


def _codes(model: VAE, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (n, D) twice as wide as a standard normal, images (n, *X) and labels (n,) where the model has them.

    The images are noise, a third of it black and white, which no model expects: of what a model expects the log-densities are
    near zero, where an overflow far out does not show.
    """
    noise = stream(0, "export", n)
    z = 2 * torch.randn(n, model.latent_dim, generator=noise)
    x = torch.randint(-64, 320, (n, *image_shape(model)), generator=noise).clamp(0, 255) / 255
    return z, x, None if model.classes is None else torch.arange(n) % model.classes


def _translated(
    module: _Encoder | _Decoder | _Scorer,
    part: str,
    inputs: Sequence[str],
    given: Callable[[int], Sequence[Tensor | None]],
    about: Mapping[str, str] | None,
    like: Like | None = None,
) -> Graph:
    """The graph of a part; `given` makes its inputs for a batch, labels last."""
    model = module.model
    before = None if like is None else Refill(like[0].content, like[1].state_dict(), model.state_dict())
    return translate(
        module.eval(), (*inputs, *(() if model.classes is None else ("c",))), module.names,
        lambda n: tuple(t for t in given(n) if t is not None), {**(about or {}), **_facts(model), "part": part}, ("sample",),
        before,
    )  # fmt: skip


def _facts(model: VAE) -> dict[str, str]:
    return {
        "vaelab": __version__,
        "posterior": type(model.posterior).__name__,
        "prior": type(model.prior).__name__,
        "likelihood": type(model.likelihood).__name__,
        "latent_dim": str(model.latent_dim),
        "image_shape": " ".join(map(str, image_shape(model))),
        "classes": str(model.classes or 0),
    }
