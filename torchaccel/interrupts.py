"""Ctrl-C where nothing may be left half done: it is raised a little later, at a place that can take it.

Python raises a KeyboardInterrupt between any two steps of the main thread, even at the first line of an `__exit__` that
was to release a lock or restore a setting. So what takes one is done inside `uninterrupted`.
"""

import inspect
import signal
import threading
import time
from types import TracebackType
from typing import Any

IMPATIENT_AFTER_S = 1.0

# The functions of the interpreter's own, without `signal`'s conversions to enums, which take 20 µs a block.
_get_handler: Any = inspect.unwrap(signal.getsignal)
_set_handler: Any = inspect.unwrap(signal.signal)


class uninterrupted:
    """Hold back a KeyboardInterrupt (SIGINT, to be exact) until the block is done; a second one comes through.

    Inside another such block it does nothing: the outermost holds. Signals reach Python in the main thread alone, so
    other threads have nothing to hold back.
    """

    __slots__ = ("_first_s", "_handler", "_held", "_hold")

    _holding: "uninterrupted | None" = None  # the outermost, which the main thread alone sets

    def __init__(self) -> None:
        self._handler: Any = None
        self._held: tuple[Any, ...] | None = None
        self._first_s = 0.0

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread() or uninterrupted._holding is not None:
            return
        handler = _get_handler(signal.SIGINT)
        if not callable(handler):
            return
        self._handler, self._hold = handler, self._receive  # one bound method, to be told from others
        _set_handler(signal.SIGINT, self._hold)
        uninterrupted._holding = self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._handler is None:
            return
        uninterrupted._holding = None
        if _get_handler(signal.SIGINT) is self._hold:  # unless the block itself has set another
            _set_handler(signal.SIGINT, self._handler)
        self._deliver()

    def _receive(self, *arguments: Any) -> None:
        now = time.monotonic()
        if self._held is None:
            self._held, self._first_s = arguments, now
        elif now - self._first_s > IMPATIENT_AFTER_S:  # not the same key press, forwarded by a launcher
            self._handler(*arguments)

    def _deliver(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._handler(*held)


def interruption_point() -> None:
    """Raise what `uninterrupted` holds back, if anything: between two steps, where nothing is half done."""
    holding = uninterrupted._holding
    if holding is not None and threading.current_thread() is threading.main_thread():
        holding._deliver()
