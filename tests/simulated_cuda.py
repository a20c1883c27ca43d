"""CUDA's streams and events without a GPU: who is ordered after whom, and what is touched without being so.

Work on "the device" is done at once, in the order in which it is enqueued; what is simulated is what a GPU would be
free to do in another order. Each stream, and the host, has a vector clock (Fidge, Mattern): an event takes that of its
stream, who waits for it merges it. A tensor that one writes while another may still read or write it is a race.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Clock = dict[str, int]


def merged(one: Clock, other: Clock) -> Clock:
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in one.keys() | other.keys()}


class Race(AssertionError):
    """Two touch a tensor, one of them to write, and neither is ordered after the other."""


class Stream:
    def __init__(self, cuda: "SimulatedCuda", name: str) -> None:
        self.cuda, self.name, self.clock = cuda, name, dict[str, int]()

    def wait_event(self, event: "Event") -> None:
        self.enqueue()
        self.clock = merged(self.clock, event.clock)

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self.cuda)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.cuda.host = merged(self.cuda.host, self.enqueue())

    def enqueue(self) -> Clock:
        """One more step, after all that the host knows of; its time."""
        self.clock = merged(self.clock, self.cuda.host)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock


class Event:
    def __init__(self, cuda: "SimulatedCuda") -> None:
        self.cuda, self.clock = cuda, dict[str, int]()

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.enqueue())

    def synchronize(self) -> None:
        self.cuda.host = merged(self.cuda.host, self.clock)


class _EventBase:
    record = staticmethod(Event.record)


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.add.Tensor)


class SimulatedCuda(TorchDispatchMode):
    """What runners and the ring behind `stream()` use of CUDA; `patch` puts it there, the mode watches every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", 0)
        self.host: Clock = {}
        self.streams = 0
        self.callers = self.current = self.stream()
        self.on_device: set[int] = set()
        self.pinned: set[int] = set()
        self.kept: list[torch.Tensor] = []  # so that no address comes twice
        self.writes: dict[int, tuple[str, Clock]] = {}
        self.reads: dict[int, list[tuple[str, Clock]]] = {}
        self.users: dict[int, set[str]] = {}  # the streams that have touched a tensor on the device
        self.recorded: dict[int, set[str]] = {}  # those that the allocator waits for when it is freed

    def stream(self, *_: Any, priority: int = 0) -> Stream:
        self.streams += 1
        return Stream(self, f"stream {self.streams}")

    def empty(self, shape: Any, dtype: torch.dtype = torch.float32, *, device: bool = False) -> torch.Tensor:
        tensor = torch.zeros(tuple(shape), dtype=dtype)
        (self.on_device if device else self.pinned).add(tensor.data_ptr())
        return tensor

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        set_stream: Callable[[Stream], None] = lambda stream: setattr(self, "current", stream)  # noqa: E731
        for name, value in {
            "Stream": self.stream,
            "Event": lambda: Event(self),
            "current_stream": lambda *_: self.current,
            "default_stream": lambda *_: self.callers,
            "set_stream": set_stream,
            "device": lambda _: nullcontext(),
            "graph_pool_handle": object,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name, value in {
            "_CudaEventBase": _EventBase,
            "_cuda_getCurrentRawStream": lambda _: id(self.current),
            "_cuda_getDevice": lambda: 0,
        }.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)
        empty, to = torch.empty, torch.Tensor.to
        on_device = property(lambda tensor: tensor.data_ptr() in self.on_device)

        def pinned(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            return self.empty(*shape, options["dtype"]) if pin_memory else empty(*shape, **options)

        def moved(tensor: torch.Tensor, *where: Any, **options: Any) -> torch.Tensor:
            if self.device not in where:
                return to(tensor, *where, **options)
            if tensor.is_cuda:
                return tensor
            return self.empty(tensor.shape, tensor.dtype, device=True).copy_(tensor)

        def recorded(tensor: torch.Tensor, stream: Stream) -> None:
            self.recorded.setdefault(tensor.data_ptr(), set()).add(stream.name)

        monkeypatch.setattr(torch, "empty", pinned)
        monkeypatch.setattr(torch.Tensor, "to", moved)
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_device)
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: not tensor.is_cuda))
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in self.pinned)
        monkeypatch.setattr(torch.Tensor, "record_stream", recorded)

    def may_be_freed(self, tensor: torch.Tensor, owner: Stream) -> bool:
        """Whether the allocator knows of every stream that works on a tensor of `owner`'s."""
        place = tensor.data_ptr()
        return self.users.get(place, set()) <= {owner.name} | self.recorded.get(place, set())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        self.kept += [result] if isinstance(result, torch.Tensor) else []
        if func is torch.ops.aten.copy_.default:
            self.touch(written=given[:1], read=given[1:])
        elif func in _COPIES:
            if given[0].data_ptr() in self.on_device:
                self.on_device.add(result.data_ptr())
            self.touch(written=[result], read=given)
        return result

    def touch(self, written: Iterable[torch.Tensor], read: Iterable[torch.Tensor]) -> None:
        """One step of the current stream, if a tensor on the device has a part in it, or else of the host."""
        writes, reads = ([tensor.data_ptr() for tensor in tensors] for tensors in (written, read))
        name, clock = "host", self.host
        if not self.on_device.isdisjoint(writes + reads):
            name, clock = self.current.name, self.current.enqueue()
        for place in {*writes, *reads} & self.on_device:
            self.users.setdefault(place, set()).add(name)
        for place in {*writes, *reads}:
            before = [self.writes[place]] if place in self.writes else []
            for who, when in before + (self.reads.get(place, []) if place in writes else []):
                if who not in {name, "host"} and clock.get(who, 0) < when.get(who, 0):
                    raise Race(f"{name} touches what {who} does, and is not ordered after it")
            if place in writes:
                self.writes[place], self.reads[place] = (name, dict(clock)), []
            else:
                self.reads.setdefault(place, []).append((name, dict(clock)))


@contextmanager
def simulated_cuda() -> Iterator[SimulatedCuda]:
    """CUDA, simulated, in the place of PyTorch's."""
    with pytest.MonkeyPatch.context() as monkeypatch, SimulatedCuda() as simulated:
        simulated.patch(monkeypatch)
        yield simulated
