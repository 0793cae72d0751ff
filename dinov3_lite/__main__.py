"""`python -m dinov3_lite COMMAND ...`, installed as `dinov3-lite` too: finds the command and runs it.

A command is a module with `add_arguments(parser)`, which describes it and gives an example, and `run(args)`, which
returns the exit status (None for 0). It is imported when it is asked for, and imports torch when it runs. Exit status:
0 all done, 1 bad input (one line on stderr names it), 2 bad usage, for which `run` may raise argparse.ArgumentError;
`extract` has more.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from . import console

# name: (module, one line of help)
COMMANDS = {
    "features": (".commands.features", "features of pictures, saved and drawn"),
    "export": (".commands.export", "write the model as one file for another runtime, and check it"),
    "extract": (".extraction.command", "features of whole data sets, resumed where they stopped"),
    "fit": (".commands.fit", "fit a dense head on a frozen backbone to pictures and masks"),
    "predict": (".commands.predict", "masks of pictures, by a head that fit wrote"),
    "evaluate": (".commands.evaluate", "S, weighted F, mean E, F, MAE and IoU of predictions, by data set"),
    "probe": (".commands.probe", "k-NN and logistic regression on a folder of classes"),
    "match": (".commands.match", "the same places in two pictures"),
    "track": (".commands.track", "carry the masks of a first frame through a video"),
    "explore": (".commands.explore", "a page to look at features with, offline"),
    "sample": (".commands.sample", "write a made checkpoint to try things with (not trained)"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv)
    finally:
        console.flush()


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=console.called_as("dinov3-lite", "dinov3_lite"),
        description="DINOv3 features from the command line.",
        epilog="`%(prog)s COMMAND --help` tells of a command and gives an example.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, formatter_class=console.HelpFormatter)
        if argv[:1] == [name]:
            asked_for = import_module(module, __package__)
            asked_for.add_arguments(command)
            command.set_defaults(run=asked_for.run, usage_error=command.error)
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    args = parser.parse_args(argv)
    try:
        return console.exit_status("dinov3_lite", lambda: args.run(args))
    except argparse.ArgumentError as error:
        return args.usage_error(str(error))


if __name__ == "__main__":
    sys.exit(main())
