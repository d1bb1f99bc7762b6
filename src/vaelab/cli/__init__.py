"""The command line: one short module per command, registered by import path so that `--help` imports no torch."""

import gc
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from vaelab import __version__
from vaelab.errors import VaelabError

COMMANDS = {
    "study": ("vaelab.cli.study:app", "Run a study and write its report.", "study removing-kl --seeds 3"),
    "train": (
        "vaelab.cli.train:app",
        "Train a recipe into a run folder, or go on with a training.",
        "train mnist --latent-dim 10",
    ),
    "evaluate": ("vaelab.cli.evaluate:evaluate", "Measure runs on their test images.", "evaluate runs/mnist-1 -k 5000"),
    "compare": ("vaelab.cli.compare:compare", "Pair runs image by image.", "compare runs/mnist-1 runs/mnist-2"),
    "sample": ("vaelab.cli.sample:sample", "Draw images from a model.", "sample runs/mnist-1 -n 64 --out samples.png"),
    "fit-prior": (
        "vaelab.cli.fit_prior:fit_prior",
        "Fit a prior to the codes of a trained model.",
        "fit-prior runs/mnist-1 --kind mixture",
    ),
    "report": ("vaelab.cli.report:report", "Figures and a page for one run.", "report runs/mnist-1"),
    "explore": (
        "vaelab.cli.explore:explore",
        "One page to explore a run, or two side by side.",
        "explore runs/mnist-1 runs/mnist-2",
    ),
    "export": ("vaelab.cli.export:export", "A model's parts as ONNX files.", "export runs/mnist-1 --to onnx"),
    "recipes": ("vaelab.cli.tables:recipes", "The recipes of train.", "recipes --json"),
    "studies": ("vaelab.cli.tables:studies", "The studies of study.", "studies"),
    "data": ("vaelab.cli.tables:data", "The data sets, and where each was found.", "data"),
}
"""Each command: its import path, so that only the one that runs is imported, its line in the help, and an example."""


def app() -> App:
    """The whole command line."""
    root = App(
        name="vaelab",
        help="A laboratory for variational autoencoders.\n\nExample: vaelab study removing-kl",
        version=__version__,
        help_format="plaintext",  # markdown would import a parser first
        suppress_keyboard_interrupt=False,
    )
    for name, (path, help, example) in COMMANDS.items():
        root.command(path, name=name, help=f"{help}\n\nExample: vaelab {example}")
    return root


def _tell(message: str, debug: bool) -> None:
    from vaelab.cli import console  # which `--help` can do without

    console.error(message, debug)


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code. Errors of the user's become one message, `--debug` adds the traceback."""
    debug = "--debug" in arguments
    try:
        command, bound, _ = app().parse_args(list(arguments), print_error=False, exit_on_error=False)
        gc.enable()
        command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except VaelabError as error:
        _tell(str(error), debug)
        return error.exit_code
    except CycloptsError as error:
        from vaelab.cli import console

        _tell(f"{console.plain(error)}; see `{console.usage(arguments, COMMANDS)} --help`", debug)
        return 2
    except KeyboardInterrupt:
        _tell("interrupted", debug)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:
        if end.code != 1:  # a second signal
            raise
        return 0  # rich, where the reader of a pipe has gone
    except Exception as error:
        _tell(
            f"unexpected {type(error).__name__}: {error}; this is a defect of vaelab: please report it with the output "
            "of the same command and --debug", debug,
        )  # fmt: skip
        return 1
    return 0
