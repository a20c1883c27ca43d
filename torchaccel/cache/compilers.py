"""The caches that PyTorch's Inductor and Triton keep for themselves: two folders beside our entries.

Both read from the environment, for the whole process, where their files are to be. So a build that compiles sets it,
unless the user has, and then sets what PyTorch itself does at its first compilation.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FOLDERS = {"inductor": "TORCHINDUCTOR_CACHE_DIR", "triton": "TRITON_CACHE_DIR"}


class _UnderWay:
    """The builds under way in this process, which share the folders of the first of them."""

    lock = threading.Lock()
    count = 0
    after: dict[str, str] | None = None  # what the last one sets; None where the user has named a folder


@contextmanager
def kept_in(make_folder: Callable[[], Path], device: Any) -> Iterator[None]:
    """Have what is compiled meanwhile for a `torch.device` kept in one folder; raises `OSError` where it cannot be.

    Nothing changes, and no folder is made, where the user has named one; nor under a compilation: its end is waited
    for. What other threads compile meanwhile is kept there too.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock, _UnderWay.lock:
        if _UnderWay.count == 0:
            _UnderWay.after = _defaults(device)
            if _UnderWay.after is not None:
                folder = make_folder()
                os.environ.update({FOLDERS[name]: _made(folder / name) for name in FOLDERS})
        _UnderWay.count += 1
    try:
        yield
    finally:
        with compile_lock, _UnderWay.lock:
            _UnderWay.count -= 1
            if _UnderWay.count == 0 and _UnderWay.after is not None:
                for variable in FOLDERS.values():
                    os.environ.pop(variable, None)
                os.environ.update(_UnderWay.after)


def _defaults(device: Any) -> dict[str, str] | None:
    """What PyTorch sets for itself at a compilation; None where the environment has something else, the user's."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = default_cache_dir()
    kernels = os.path.join(folder, "triton")
    inductor, triton = map(os.environ.get, FOLDERS.values())
    if inductor not in (None, folder) or not (triton or kernels).startswith(kernels):
        return None
    if device.type == "cuda":
        triton = os.path.join(kernels, str(device.index or 0))
    return {FOLDERS["inductor"]: folder, **({FOLDERS["triton"]: triton} if triton else {})}


def _made(folder: Path) -> str:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not to be written")
    return str(folder.absolute())


def parts(folder: Path) -> list[tuple[int, Path, int]]:
    """What can go by itself, with the time of its last use in ns and its bytes: Inductor's files, Triton's kernels."""
    found = [_measured(path, [path]) for path in (folder / "inductor").rglob("*")]
    for kernel in (folder / "triton").glob("*"):
        found.append(_measured(kernel, kernel.rglob("*")))
    return [part for part in found if part[2]]  # empty files are locks


def _measured(path: Path, files: Any) -> tuple[int, Path, int]:
    last_used, size = 0, 0
    for file in files:
        with suppress(FileNotFoundError):  # another process has just removed it
            state = file.stat()
            if not file.is_dir():
                # a hit only reads, and most file systems note that once a day at least
                last_used, size = max(last_used, state.st_atime_ns, state.st_mtime_ns), size + state.st_size
    return last_used, path, size


def remove(path: Path) -> None:
    """Remove a part, or all of one of the folders."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
