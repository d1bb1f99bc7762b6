"""`vaelab sample RUN -n 64`: draw images from a model."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vaelab.cli import console
from vaelab.cli.console import Output


def sample(
    run: Annotated[Path, Parameter(name="RUN", help="A run folder.")],
    *,
    n: Annotated[int, Parameter(converter=console.whole, name=["-n", "--n"], help="How many images.")] = 64,
    out: Annotated[Path | None, Parameter(help="The picture to write; by default RUN/samples.png.")] = None,
    pixels: Annotated[
        bool, Parameter(negative="", help="Draw pixels too, instead of showing the decoder's mean.")
    ] = False,
    label: Annotated[
        int | None, Parameter(help="The label of all images, for a conditional model; by default all labels in turn.")
    ] = None,
    seed: Annotated[int, Parameter(converter=console.whole, help="Seed of the samples.")] = 0,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Draw images from a model: z from the prior, then the decoder.

    Example: vaelab sample runs/mnist-1 -n 64 --out samples.png
    """
    from vaelab.cli.common import open_run
    from vaelab.errors import UsageError

    if not 1 <= n <= 10_000:
        raise UsageError(f"n is {n}: expected 1 to 10,000 images")
    opened = open_run(run, output)
    path = out or run / "samples.png"
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out is '{path}': expected a name that ends in .png")
    if not path.parent.is_dir():
        raise UsageError(f"the folder '{path.parent}' does not exist: make it, or choose another --out")
    model = opened.model()

    import torch

    from vaelab.report import figures
    from vaelab.report.build import prior_of
    from vaelab.rng import stream

    if label is not None and not (model.classes and 0 <= label < model.classes):
        known = f"0 to {model.classes - 1}" if model.classes else "none: it is not conditional"
        raise UsageError(f"--label is {label}: this model's labels are {known}")
    noise = stream(seed, "sample")
    c = None
    if model.classes:
        c = torch.arange(n) % model.classes if label is None else torch.full((n,), label)
    with torch.no_grad():
        px = model.sample(n, c, generator=noise)
        images = px.rsample(1, noise)[0, 0] if pixels else px.mean[0]
    how = "pixels drawn" if pixels else "decoder mean"
    try:
        figures.save(figures.generation(images.numpy(), "Samples of the prior", f"{prior_of(model)}, {how}"), path)
    except OSError as error:
        raise UsageError(f"cannot write '{path}': {error.strerror or error}; choose another --out") from None
    console.result(
        {"file": str(path), "n": n, "shows": how},
        output,
        lambda: console.text(f"{n} drawn: {path}"),
    )
