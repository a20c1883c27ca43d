"""Files that one process or thread at a time may hold: by the kernel's own locks, which end with their process."""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

POLL_S = 0.02


def hold(path: Path, deadline_s: float | None, *, create: bool = True) -> int:
    """A descriptor of `path` with the kernel's exclusive lock on it; raises `TimeoutError` past the deadline.

    Whoever holds a file may remove it, so what was opened may be gone once it is locked: then once more.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        try:
            _flock(descriptor, path, deadline_s)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, path: Path, deadline_s: float | None) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise TimeoutError(f"another process holds {path}") from None
        time.sleep(POLL_S)
