"""`vaelab fit-prior RUN --kind mixture`: fit a prior to the codes of a trained model."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vaelab.cli import console
from vaelab.cli.console import Output


def fit_prior(
    run: Annotated[Path, Parameter(name="RUN", help="A run folder.")],
    *,
    kind: Annotated[str, Parameter(help="gaussian, mixture, flow or second-stage.")] = "mixture",
    components: Annotated[int, Parameter(converter=console.whole, help="Gaussians in a mixture.")] = 10,
    layers: Annotated[int, Parameter(converter=console.whole, help="Maps in a flow.")] = 2,
    steps: Annotated[
        int, Parameter(converter=console.whole, help="At most so many steps of a flow or a second stage.")
    ] = 3000,
    latent_dim: Annotated[
        int | None, Parameter(help="Dimensions of a second stage; by default as many as the model has.")
    ] = None,
    out: Annotated[Path | None, Parameter(help="The new run folder; by default RUN-KIND, beside RUN.")] = None,
    seed: Annotated[int, Parameter(converter=console.whole, help="Seed of the codes and of the fit.")] = 0,
    data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Fit a prior to the codes of a run's training images, and write a new run that samples from it.

    Example: vaelab fit-prior runs/mnist-1 --kind mixture --components 10
    """
    from vaelab import fitted
    from vaelab.cli.common import data_of, open_run
    from vaelab.data.protocol import protocol
    from vaelab.errors import NoDensity, unknown_name
    from vaelab.posteriors import Delta
    from vaelab.run import claim_folder

    if kind not in fitted.KINDS:
        raise unknown_name("kind of prior", kind, fitted.KINDS)
    opened = open_run(run, output)
    path = out or run.with_name(f"{run.resolve().name}-{kind}")
    stages = console.Stages(output)
    model, data = opened.model(), data_of(opened, data_dir, stages)
    claim_folder(path)
    read = protocol(opened.recipe().protocol)
    try:
        with stages(f"fit {kind}") as update:
            prior = fitted.fit_prior(
                model, data, read, kind, components=components, layers=layers, latent_dim=latent_dim, steps=steps,
                seed=seed, on_progress=lambda done: update(done, ""),
            )  # fmt: skip
        written = fitted.write_run(
            opened, model, prior, path, fitted_kind=kind, fitted_seed=str(seed), fitted_codes=str(len(data.train))
        )
    except Exception:
        _abandon(path)
        raise
    try:
        gain = fitted.gain(model, prior, data, read, seed)
    except NoDensity as error:
        gain = fitted.Quantity.missing(str(error))

    def show() -> None:
        if gain.mean is None:
            console.text(f"bound: n/a, {gain.reason}")
        else:
            se = "" if gain.se is None else f" ± {gain.se:.2f}"
            what = "the log density of the codes" if isinstance(model.posterior, Delta) else "the bound"
            console.text(f"{what} gains {gain.mean:.2f}{se} nats per test image (n = {gain.n:,}; ± is one s.e.)")
        console.text(f"run: {written.path}   next: vaelab sample {written.path}")

    document = {"run": str(written.path), "kind": kind, "gain": gain.mean, "gain_se": gain.se, "reason": gain.reason}
    console.result(document, output, show)


def _abandon(path: Path) -> None:
    """Remove a folder that nothing was written into."""
    if not any(path.iterdir()):
        path.rmdir()
