"""`vaelab study NAME`: run a study and write its folder."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from vaelab.cli import console
from vaelab.cli.console import Output
from vaelab.cli.fields import command_from
from vaelab.recipes import RECIPES, recipe
from vaelab.studies import STUDIES, study

if TYPE_CHECKING:
    from vaelab.explore.export import Graphs

app = App(name="study", help="Run a study and write its report.\n\nExample: vaelab study removing-kl --seeds 3")


def _body(name: str) -> Any:
    def body(
        *,
        out: Annotated[Path, Parameter(help="Folder for the report, the images and the runs.")] = Path(name),
        seeds: Annotated[int, Parameter(converter=console.whole, help="Runs of each arm.")] = 1,
        overwrite: Annotated[
            bool, Parameter(negative="", help="Replace a study with other settings that is in the folder.")
        ] = False,
        data_dir: Annotated[Path | None, Parameter(help="Where the data files are, if not in the cache.")] = None,
        device: Annotated[str, Parameter(help="Where to train: cpu, cuda …")] = "cpu",
        workers: Annotated[
            int,
            Parameter(
                converter=console.whole,
                help="Processes that train side by side on the CPU, which share its cores: 0 for as many as there are "
                "cores (OMP_NUM_THREADS, where it is set) and runs, 1 for one run after another in this process.",
            ),
        ] = 0,
        output: Output = Output(),  # noqa: B008
        fields: dict[str, Any],
    ) -> None:
        start = time.perf_counter()
        given = {key: value for key, value in fields.items() if value is not None}
        recipe(study(name).recipe, **{k: v for k, v in given.items() if k != "data"})  # out-of-range values end here
        from vaelab import native
        from vaelab.crew import check_workers, hired
        from vaelab.heap import importing

        check_workers(workers)
        native.ahead()
        with hired(workers, len(study(name).arms) * max(1, seeds), device) as staff:  # they import torch meanwhile
            with importing():
                from vaelab import training  # noqa: F401
                from vaelab.cli.common import absolute, check_device, load_data
                from vaelab.explore.runtime import fetch_ahead
                from vaelab.report.page import text_table
                from vaelab.studies import PAGE, recipes_of, run_study, write_explorer

            check_device(device)
            stages = console.Stages(output)
            data_name, seed = given.pop("data"), given.pop("seed")
            data = load_data(data_name, data_dir, stages)
            recipes = recipes_of(name, data, absolute(data_name), seeds, seed, **given)
            ahead: Graphs = {}
            fetched = fetch_ahead(data_dir)
            with console.interruptible() as stop:
                report = run_study(
                    name, out, data, recipes, overwrite=overwrite, device=device, staff=staff, ahead=ahead, stage=stages,
                    stop=stop,
                )  # fmt: skip
        absent = write_explorer(
            name,
            out,
            data,
            seed,
            ahead=ahead,
            fetched=fetched,
            data_dir=data_dir,
            fetching=stages.fetch(),
            stage=stages,
        )

        def show() -> None:
            console.table(text_table(report))
            for observation in report["observations"]:
                console.text(f"- {observation['text']}")
            console.text(f"\nreport: {out / 'report.html'}   ({time.perf_counter() - start:.0f} s)")
            console.text(absent or f"explorer: {out / PAGE}")

        console.result(report, output, show)

    return body


for _name, _study in STUDIES.items():
    app.command(
        command_from(
            RECIPES[_study.recipe], _body(_name), without=("beta",), unset=("epochs",),
            doc=f"{_study.summary[0].upper()}{_study.summary[1:]}.\n\nExample: vaelab study {_name} --data digits",
        ),
        name=_name,
    )  # fmt: skip
