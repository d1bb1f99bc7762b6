"""`vaelab explore RUN [RUN]`: one page that opens anywhere."""

import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vaelab.cli import console
from vaelab.cli.console import Output


def explore(
    runs: Annotated[tuple[Path, ...], Parameter(name="RUN", help="A run folder, or two to be shown side by side.")],
    /,
    *,
    export: Annotated[Path | None, Parameter(help="Write the page as this .html file, and do not open it.")] = None,
    folder: Annotated[Path | None, Parameter(help="Write the page as a folder to host, and do not open it.")] = None,
    data_dir: Annotated[
        Path | None, Parameter(help="Where the data and the page's runtime are, if not in the cache.")
    ] = None,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Write one self-contained page, RUN/explorer.html, and open it in the browser.

    The map of the codes, what any point of it decodes to, your own drawing encoded: computed in the page, which needs
    neither a server nor a network.

    Example: vaelab explore runs/mnist-1 runs/mnist-2
    """
    from vaelab.cli.common import data_of, open_run
    from vaelab.errors import UsageError
    from vaelab.explore import bundle, pack, runtime
    from vaelab.explore.graph import require

    if not runs:
        raise UsageError("no run was given: vaelab explore RUN")
    if export and folder:
        raise UsageError("both --export and --folder were given: choose one file or one folder")
    require()
    opened = [open_run(path, output) for path in runs]
    exhibits = [bundle.Exhibit(label, run) for label, run in zip(bundle.labels(opened), opened, strict=True)]
    bundle.check(exhibits)
    path = folder or export or runs[0] / "explorer.html"
    (pack.check_folder if folder else pack.check_single)(path)
    stages = console.Stages(output)
    data = data_of(opened[0], data_dir, stages)
    with stages("find the page's runtime"):
        running = runtime.load(data_dir, stages.fetch())
    with stages("models to ONNX, codes and numbers") as update:
        made = bundle.build(exhibits, data, on_progress=update)
    with stages("write the page"):
        written = (pack.write_folder if folder else pack.write_single)(path, made, running)
    missing = [
        f"{run['label']}: {run[part]}"
        for run in made.manifest["runs"]
        for part in ("encoder_missing", "decoder_missing", "metrics_missing")
        if run[part]
    ]
    seen = not (export or folder) and webbrowser.open(written.resolve().as_uri())

    def show() -> None:
        for sentence in missing:
            console.text(f"note: {sentence}")
        size = f" ({written.stat().st_size / 1e6:.1f} MB)" if not folder else ""
        console.text(f"explorer: {written}{size}")
        if not (seen or export or folder):
            console.text("no browser could be opened from here: open that file in one")

    console.result({"file": str(written), "opened": bool(seen), "missing": missing}, output, show)
