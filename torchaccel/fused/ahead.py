"""Compiling Triton's kernels many at once, before they are timed: one alone takes up to seconds.

Threads are enough: of a kernel's compilation about a quarter is Python's, for which they wait for each other.
"""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_THREADS = 8
_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


@contextmanager
def compiling() -> Iterator[None]:
    """Have `launch` in this thread compile kernels and not run them; at the end all are compiled.

    One that cannot be compiled says so where it is launched.
    """
    import triton

    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "compiling")
    token = _compiling.set(True)
    try:
        # Triton sets filters of warnings while it compiles, which are the process's: threads would leave them behind.
        with warnings.catch_warnings(), pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _compiling.reset(token)


def is_compiling() -> bool:
    """Whether kernels are compiled in this thread and not run."""
    return _compiling.get()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel of Triton's on a grid, or compile it for these arguments."""
    if _compiling.get():
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)
