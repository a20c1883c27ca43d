"""The command line: `python -m torchaccel env [--json]` and `python -m torchaccel cache [list|verify|clear]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchaccel.cache.store import Cache, cache_folder, limit_bytes
from torchaccel.environment import environment
from torchaccel.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console


def _env(arguments: argparse.Namespace) -> int:
    found = environment()
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    # soft_wrap leaves a long command on one line, to be copied
    _console().print(found, soft_wrap=True)
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    try:
        cache = Cache(arguments.dir or cache_folder(), limit_bytes())
    except OptionError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        if cache.root is None:
            print(f"there is no cache in {cache.folder}: --dir names the folder of another", file=sys.stderr)
            return 1
        return {"list": _list, "verify": _verify, "clear": _clear}[arguments.action](cache)
    except OSError as error:
        print(f"the cache in {cache.folder} cannot be read or changed: {error}", file=sys.stderr)
        return 1


def _list(cache: Cache) -> int:
    from rich.table import Table
    from rich.text import Text

    entries = cache.entries() + cache.compiled()
    total = sum(entry.size_bytes for entry in entries)
    share = f"{len(entries)} entries, {total / 2**20:.1f} of at most {cache.limit_bytes / 2**20:.0f} MiB"
    table = Table("kind", "what", "MiB", "last used", title=f"{cache.root}: {share}", title_justify="left")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used_s))
        cells = entry.kind, str(entry.info.get("what", "")), f"{entry.size_bytes / 2**20:.1f}", used
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    _console().print(table)
    return 0


def _verify(cache: Cache) -> int:
    found = cache.verify()
    damaged = {path: why for path, why in found.items() if why}
    for path, why in damaged.items():
        print(f"damaged: {path}: {why}")
    advice = "; they are built again where they are needed, or removed by `clear`" if damaged else ""
    print(f"{cache.root}: {len(found) - len(damaged)} of {len(found)} entries are whole{advice}")
    return 1 if damaged else 0


def _clear(cache: Cache) -> int:
    files, size = cache.clear()
    print(f"{cache.root}: removed {files} entries, {size / 2**20:.1f} MiB")
    return 0


def _console() -> Console:
    from rich.console import Console

    # a pipe or a notebook has no width of its own, and rich's 80 columns would break reasons into slivers
    return Console(width=None if sys.stdout.isatty() else 120)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (the process's own arguments if None) and return the exit status."""
    parser = argparse.ArgumentParser(prog="torchaccel", description="One line makes a trained PyTorch model run fast.")
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    env = commands.add_parser("env", help="show versions, GPUs, what is usable and what mends the rest")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=_env)
    cache = commands.add_parser("cache", help="list what is kept between processes, look for damage, or remove it")
    cache.add_argument("action", nargs="?", choices=("list", "verify", "clear"), default="list")
    cache.add_argument("--dir", help="the folder (default: $TORCHACCEL_CACHE_DIR, or the user's cache folder)")
    cache.set_defaults(run=_cache)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
