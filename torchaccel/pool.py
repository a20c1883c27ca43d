"""What the runners of one compiled module share on a device: memory, one lock and one chain of events."""

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from torchaccel.forking import follow, forked_error

T = TypeVar("T")


class Pool:
    """What the runners of one compiled module share on a device: a memory pool, one lock and one chain of events.

    Graphs that share a memory pool must never overlap, so whoever uses one takes a turn: it holds the lock while it
    enqueues, and on the device comes after the turn before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls = 0
        self._lock: Any = threading.RLock()
        self._is_cuda = device.type == "cuda"
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._done = torch.cuda.Event() if self._is_cuda else None
        # Without PyTorch's wrapper in Python, at whose first line an interrupt could come.
        self._record: Any = functools.partial(torch._C._CudaEventBase.record, self._done) if self._done else None
        self.handle: Any = torch.cuda.graph_pool_handle() if self._is_cuda else None
        # One for all captures: the allocator gives a block again only on the stream that it was first given on. The
        # kernels of a graph keep its priority, so that what stream() copies and preprocesses beside it waits for them.
        self.capture_stream = torch.cuda.Stream(device, priority=-1) if self._is_cuda else None
        follow(self)

    def after_fork(self) -> None:
        """A lock of the child's own; on a GPU there are no more turns."""
        self._lock = threading.RLock()
        if self._is_cuda:
            self.__class__ = _ForkedPool

    def turn(self, work: Callable[[], T], stream: Any = None) -> T:
        """What `work` returns, which enqueues on `stream` or on the caller's current one.

        A function and no context manager: an interrupt at the first line of an `__exit__` would leave the lock taken.
        """
        with self._lock:
            if self._done is None:
                return work()
            stream = stream or self._current_stream()
            stream.wait_event(self._done)
            try:
                return work()
            finally:
                self._record(stream)

    def wait_for_callers(self) -> None:
        """Have the current stream wait for what is enqueued on those that calls came from; hold the turn."""
        if not self._is_cuda:
            return
        current = self._current_stream()
        for stream in (torch.cuda.default_stream(self.device), *self._streams.values()):
            if stream != current:
                current.wait_stream(stream)

    def synchronize(self) -> None:
        """Wait on the host for everything that was enqueued on the device."""
        if self._is_cuda:
            torch.cuda.synchronize(self.device)

    def wait(self) -> None:
        """Wait on the host for the last turn."""
        if self._done is not None:
            self._done.synchronize()

    def _current_stream(self) -> torch.cuda.Stream:
        """`torch.cuda.current_stream`, whose object is made once for each stream rather than at each call."""
        raw = torch._C._cuda_getCurrentRawStream(self.device.index)
        stream = self._streams.get(raw)
        if stream is None:
            stream = self._streams[raw] = torch.cuda.current_stream(self.device)
        return stream


class _ForkedPool(Pool):
    """What a pool on a GPU is in a forked child, so that no call has to look whether it is in one."""

    def turn(self, work: Callable[[], T], stream: Any = None) -> T:
        raise forked_error()

    def synchronize(self) -> None:
        raise forked_error()
