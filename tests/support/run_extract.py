"""`python run_extract.py INPUT...`: the command by itself."""

from __future__ import annotations

import argparse
import sys

from dinov3_lite.extraction import command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dinov3_lite extract")
    command.add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return command.run(args)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"dinov3_lite: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
