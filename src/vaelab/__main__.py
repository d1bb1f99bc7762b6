"""Where the command `vaelab` begins, and `python -m vaelab`."""

import gc
import sys


def main() -> None:
    """Run the command line and leave with its exit code.

    Imports make no garbage, and looking for it in between is an eighth of `vaelab --help`; on leaving, it is a quarter of a second
    where torch was imported.
    """
    gc.disable()  # until the command is known: `vaelab.cli.run`
    try:
        from vaelab.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before there was anything to interrupt
        code = 130
    gc.freeze()
    sys.exit(code)


if __name__ == "__main__":
    main()
