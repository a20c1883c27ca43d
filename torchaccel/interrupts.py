"""Ctrl-C at a moment where nothing may be left half done: it is raised a little later."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

IMPATIENT_AFTER_S = 1.0


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back a KeyboardInterrupt (SIGINT, to be exact) until the block is done; a second one comes through.

    PyTorch's tracing is not safe against interrupts: one that comes while it takes a mode off its stack leaves the
    stack wrong for whatever the thread does next (seen with PyTorch 2.11). Signals reach Python in the main thread
    alone, so other threads have nothing to hold back.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[Any, ...]] = []
    first_s: list[float] = []

    def hold(*arguments: Any) -> None:
        held.append(arguments)
        first_s.append(time.monotonic())
        if first_s[-1] - first_s[0] > IMPATIENT_AFTER_S:  # not the same key press, forwarded by a launcher
            handler(*arguments)

    _replace(handler, hold)
    try:
        yield
    finally:
        _replace(hold, handler)
        if held:
            handler(*held[0])


def _replace(present: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Set the handler of SIGINT, unless the block itself has set another."""
    if signal.getsignal(signal.SIGINT) is present:
        signal.signal(signal.SIGINT, new)
