"""The command line: `python -m torchaccel env [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from torchaccel.environment import environment


def _env(arguments: argparse.Namespace) -> int:
    found = environment()
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    from rich.console import Console

    # a pipe or a notebook has no width of its own, and rich's 80 columns would break reasons into slivers;
    # soft_wrap leaves a long command on one line, to be copied
    Console(width=None if sys.stdout.isatty() else 120).print(found, soft_wrap=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (the process's own arguments if None) and return the exit status."""
    parser = argparse.ArgumentParser(prog="torchaccel", description="One line makes a trained PyTorch model run fast.")
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    env = commands.add_parser("env", help="show versions, GPUs, what is usable and what mends the rest")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=_env)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
