"""The command line: one short module per command, registered by import path so that `--help` imports no torch."""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from vaelab import __version__
from vaelab.errors import VaelabError


def app() -> App:
    """The whole command line."""
    root = App(
        name="vaelab",
        help="A laboratory for variational autoencoders.\n\nExample: `vaelab study removing-kl`",
        version=__version__,
        help_format="markdown",
        suppress_keyboard_interrupt=False,
    )
    root.command("vaelab.cli.study:app", name="study")
    root.command("vaelab.cli.train:app", name="train")
    root.command("vaelab.cli.evaluate:evaluate", name="evaluate")
    root.command("vaelab.cli.sample:sample", name="sample")
    root.command("vaelab.cli.report:report", name="report")
    root.command("vaelab.cli.tables:recipes", name="recipes")
    root.command("vaelab.cli.tables:studies", name="studies")
    root.command("vaelab.cli.tables:data", name="data")
    return root


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code. Errors of the user's become one message, `--debug` adds the traceback."""
    from vaelab.cli import console

    debug = "--debug" in arguments
    try:
        app()(list(arguments), print_error=False, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()
    except VaelabError as error:
        console.error(str(error), debug)
        return error.exit_code
    except CycloptsError as error:
        console.error(f"{console.plain(error)}; see `{console.usage(arguments)} --help`", debug)
        return 2
    except KeyboardInterrupt:
        console.error("interrupted", debug)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        console.error(
            f"unexpected {type(error).__name__}: {error}; this is a defect of vaelab: please report it with the output "
            "of the same command and --debug", debug,
        )  # fmt: skip
        return 1
    return 0
