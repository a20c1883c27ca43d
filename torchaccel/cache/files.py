"""Our files in a cache's folder: how they are named, written, listed by age and removed. Others' are passed over."""

import os
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torchaccel.cache import compilers
from torchaccel.locks import hold

AHEAD_NS = 60 * 10**9  # what another machine's clock may be ahead of ours
NAMES = {
    "entries": re.compile("[0-9a-f]{64}"),
    "damaged": re.compile("[0-9a-f]{64}-[0-9a-f]{8}"),
    "busy": re.compile("[0-9a-f]{64}.lock|[0-9a-f]{32}.new"),
}


def write(path: Path, busy: Path, parts: Sequence[bytes]) -> None:
    """Write a file that appears whole or not at all; until then it is in the folder `busy`."""
    temporary = busy / f"{uuid.uuid4().hex}.new"
    descriptor = hold(temporary, deadline_s=None)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            for part in parts:
                file.write(part)
        os.fsync(descriptor)
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def sweep(root: Path) -> None:
    """Remove what processes that are no more were writing or held."""
    for _, path in by_age(root / "busy"):
        with suppress(OSError):  # TimeoutError: its owner lives
            descriptor = hold(path, deadline_s=0.0, create=False)
            try:
                path.unlink()
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def by_age(folder: Path) -> list[tuple[int, Path]]:
    """Our files in one of our folders with their times of last use, the oldest first; none where there is no folder."""
    found = []
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # another process has just removed it
                if NAMES[folder.name].fullmatch(path.name):
                    found.append((past(path.lstat().st_mtime_ns), path))
    return sorted(found)


def past(used_ns: int) -> int:
    """A time of last use; 0 for one that is to come: the clock went back since, and what it dates now is younger."""
    return used_ns if used_ns <= time.time_ns() + AHEAD_NS else 0


def size_of(path: Path) -> int:
    """The bytes of a file; 0 where it is gone."""
    with suppress(OSError):
        return path.lstat().st_size
    return 0


def remove(path: Path) -> int | None:
    """Remove a file, or a folder in its place; its size, or None where another process was quicker."""
    size = size_of(path)
    try:
        path.unlink()
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        compilers.remove(path)
    return size
