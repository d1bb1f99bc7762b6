"""What several commands do: load the data, open a run with its data, check a device."""

from pathlib import Path

from vaelab.cli.console import Output, Stages, note
from vaelab.data import datasets
from vaelab.data.datasets import Dataset
from vaelab.errors import DataError, UsageError
from vaelab.run import Run


def load_data(name: str, data_dir: Path | None, stages: Stages) -> Dataset:
    """The data set of that name, with progress where it is fetched."""
    return datasets.load(name, data_dir, stages.fetch())


def absolute(name: str) -> str:
    """A data name as a run keeps it: paths made absolute, so that the run finds its data from any folder."""
    return name if name in datasets.NAMES else str(Path(name).resolve())


def data_of(run: Run, data_dir: Path | None, stages: Stages) -> Dataset:
    """The data a run was trained on. Raises DataError where it is gone, or is no longer the same."""
    data = load_data(run.recipe().data, data_dir, stages)
    expected = run.environment().get("data_fingerprint", data.fingerprint)
    if data.fingerprint != expected:
        raise DataError(
            f"the data '{run.recipe().data}' has changed since '{run.path}' was trained (fingerprint {data.fingerprint}, "
            f"then {expected}): bring back the data of then, or train again"
        )
    return data


def open_run(path: Path, output: Output) -> Run:
    """A run, with a note where its training was not finished."""
    run = Run.open(path)
    if run.interrupted:
        note(f"{path}: {run.interrupted}", output)
    return run


def check_device(device: str) -> None:
    """Raises UsageError for a device that is not there."""
    if device == "cpu":
        return
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"device '{device}' cannot be used: expected cpu, cuda or cuda:N")
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}; try --device cpu") from None
