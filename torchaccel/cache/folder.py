"""The folder that is a cache's own, and marked as such: in no other is anything of ours written or removed.

The marker is that of the Cache Directory Tagging Specification (https://bford.info/cachedir/), with our name: backups
leave such a folder out.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

MARKER = "CACHEDIR.TAG"
TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# A cache of torchaccel, which removes files in it at will.\n"
OWN = "torchaccel-cache"  # the sub-folder beside what others have in a folder


def own_folder(folder: Path) -> Path | None:
    """The cache in a folder: the folder itself, or a sub-folder of it; None where neither is marked."""
    return next((path for path in (folder, folder / OWN) if _mark(path) == TEXT), None)


def make_own_folder(folder: Path) -> Path:
    """The same, begun in the folder where that is empty, and beside others' files in the sub-folder.

    Raises `OSError` where it cannot be. Any number of processes may begin at once, and be killed at any moment: each
    writes the same bytes, and nothing else before they are whole.
    """
    for path in (folder, folder / OWN):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_empty = set(os.listdir(path)) <= {MARKER}  # looked at first: what another process begins is marked by then
        if is_empty and TEXT.startswith(_mark(path)):
            _write(path / MARKER)
        if _mark(path) == TEXT:
            return path
    raise FileExistsError(errno.EEXIST, "it is not empty, and no cache of torchaccel's", str(path))


def _mark(folder: Path) -> bytes:
    """How a folder's marker begins, at most as long as ours; b"" where there is none."""
    with suppress(FileNotFoundError), (folder / MARKER).open("rb") as file:
        return file.read(len(TEXT))
    return b""


def _write(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, TEXT)
    finally:
        os.close(descriptor)
