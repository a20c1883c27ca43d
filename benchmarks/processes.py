"""One process for each GPU, each on its own share of the CPU's cores: none takes another's while that measures."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"


def on_each_gpu(count: int, work: Callable[..., Any], *arguments: Any) -> list[int]:
    """Run `work(*arguments)` in `count` processes, and return their exit codes, negative where a signal ended one.

    The first `count` GPUs that this process may use are one process's each: its only one, number 0. What is run is
    imported anew in each, and has to be pickled: a function of a module. They end with this process, however it ends.
    """
    gpus, cores = visible(count, os.environ), sorted(os.sched_getaffinity(0))
    started = []
    for gpu, share in zip(gpus, shares(cores, count), strict=True):
        process = get_context("spawn").Process(target=_work, args=(work, arguments))
        with _as_if_alone(gpu, share):  # a process begins as the one that starts it is, before it imports anything
            process.start()
        started.append(process)
    for process in started:
        process.join()
    return [int(process.exitcode or 0) for process in started]


def _work(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(*arguments)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def visible(count: int, environment: Mapping[str, str]) -> list[str]:
    """The first `count` GPUs, as CUDA_VISIBLE_DEVICES names each.

    >>> visible(2, {}), visible(2, {"CUDA_VISIBLE_DEVICES": "3,GPU-5a,1"})
    (['0', '1'], ['3', 'GPU-5a'])
    """
    named = environment.get(VISIBLE)
    return [name.strip() for name in named.split(",")][:count] if named else list(map(str, range(count)))


def shares(cores: Sequence[int], count: int) -> list[set[int]]:
    """Neighbouring cores for each of `count` processes, none for two; all for each where there are fewer cores.

    >>> shares([0, 1, 2, 3, 4], 2), shares([0], 2)
    ([{0, 1}, {2, 3}], [{0}, {0}])
    """
    each = len(cores) // count
    return [set(cores[index * each : (index + 1) * each] or cores) for index in range(count)]


@contextmanager
def _as_if_alone(gpu: str, cores: set[int]) -> Iterator[None]:
    """Have this process, for a moment, see one GPU and run on some cores."""
    named, before = os.environ.get(VISIBLE), os.sched_getaffinity(0)
    os.environ[VISIBLE] = gpu
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        if named is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = named
