"""`vaelab export RUN --to onnx`: a model's parts as files for other programs."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from vaelab.cli import console
from vaelab.cli.console import Output


def export(
    run: Annotated[Path, Parameter(name="RUN", help="A run folder.")],
    *,
    to: Annotated[Literal["onnx"], Parameter(help="The format.")] = "onnx",
    part: Annotated[Literal["both", "encoder", "decoder"], Parameter(help="What is exported.")] = "both",
    out: Annotated[Path | None, Parameter(help="Folder of the files; by default RUN/onnx.")] = None,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Write encoder.onnx (x to mean, log_sigma, kl) and decoder.onnx (z to the mean and the parameters of p(x|z)).

    Each is compared with torch on batches of 1, 2 and 7 images before anything is written.

    Example: vaelab export runs/mnist-1 --to onnx
    """
    from vaelab.cli.common import open_run
    from vaelab.explore import export as onnx
    from vaelab.explore.graph import require

    require()
    opened, folder = open_run(run, output), out or run / to
    with console.Stages(output)("export and compare with torch"):
        graphs = onnx.export_run(opened, folder, onnx.PARTS if part == "both" else (part,))
    document = {
        name: {
            "file": str(folder / name), "bytes": len(graph.content), "inputs": graph.inputs, "outputs": graph.outputs,
            "largest_difference": graph.error,
        }
        for name, graph in graphs.items()
    }  # fmt: skip

    def show() -> None:
        rows = [["file", "kB", "inputs", "outputs", "largest difference from torch"]]
        for graph in document.values():
            rows.append(
                [
                    graph["file"], f"{graph['bytes'] / 1e3:,.0f}", ", ".join(graph["inputs"]), ", ".join(graph["outputs"]),
                    f"{graph['largest_difference']:.1g}",
                ]
            )  # fmt: skip
        console.table(rows)

    console.result(document, output, show)
