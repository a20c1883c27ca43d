"""The host-to-host ring behind `stream()`: copy in, compute and copy out overlap, outputs come in order."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from torchaccel.errors import OptionError
from torchaccel.interrupts import uninterrupted
from torchaccel.runner import Runner
from torchaccel.signature import Call, read_call

SLOTS = 3
LANES = 2

Preprocess = Callable[..., Any]


def read_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of a call: a tuple or list is positional, a dict is keywords, the rest is one argument.

    NumPy arrays become tensors that share their memory, where PyTorch can have such: a flipped one is copied.

    >>> read_batch((1, np.zeros(2)))
    ((1, tensor([0., 0.], dtype=torch.float64)), {})
    """
    batch = pytree.tree_map(lambda leaf: _as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, dict):
        return (), batch
    return (batch,), {}


def _as_tensor(array: "np.ndarray[Any, Any]") -> torch.Tensor:
    """Channels reversed by `[..., ::-1]`, as OpenCV's users do, have a negative stride, which no tensor has."""
    return torch.from_numpy(array.copy() if min(array.strides, default=0) < 0 else array)


def preprocessed(
    args: tuple[Any, ...], kwargs: dict[str, Any], preprocess: Preprocess | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments after `preprocess`, whose result is read like a batch."""
    return (args, kwargs) if preprocess is None else read_batch(preprocess(*args, **kwargs))


def check_preprocess(preprocess: Any) -> None:
    """Raise `OptionError` unless it is None or callable."""
    if preprocess is not None and not callable(preprocess):
        raise OptionError(f"preprocess={preprocess!r}: give a function of a batch's tensors on the device, or None.")


@dataclass
class _Slot:
    """One place in the ring: the events that order its steps, its pinned buffers, and the call that it serves."""

    copied_in: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    copied_out: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    pinned: dict[Any, torch.Tensor] = field(default_factory=dict)
    results: list[torch.Tensor] = field(default_factory=list)
    assemble: Callable[[list[torch.Tensor]], Any] = list

    def staging(self, index: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """This slot's pinned buffer for the batch's tensor number `index`."""
        key = (index, shape, dtype)
        if key not in self.pinned:
            self.pinned[key] = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
        return self.pinned[key]


@dataclass
class _Lane:
    """A runner that belongs to the ring: its buffers are filled while the other lane's engine runs."""

    runner: Runner
    filled: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    computed: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    emptied: torch.cuda.Event = field(default_factory=torch.cuda.Event)


_spare: "weakref.WeakKeyDictionary[Runner, list[_Lane]]" = weakref.WeakKeyDictionary()
_spare_lock = threading.Lock()


def _take_lane(runner: Runner) -> _Lane:
    """A lane of a runner: one of an earlier stream where there is one to spare, else a new one."""
    with _spare_lock:
        spare = _spare.get(runner)
        if spare:
            return spare.pop()
    with uninterrupted():
        lane = _Lane(runner.twin())
        runner.record.device_mib += lane.runner.record.device_mib
        return lane


def _give_back(lanes: dict[Runner, deque[_Lane]]) -> None:
    """Keep lanes for the next stream, for as long as their runners live."""
    with _spare_lock:
        for runner, used in lanes.items():
            _spare.setdefault(runner, []).extend(used)
    lanes.clear()


class Ring:
    """Slots on three streams: while one copies in and is preprocessed, another computes and a third copies out.

    Engines run in two lanes, runners of the ring's own: while one computes, the other's buffers are filled.

    `find` gives the runner of a call; `keywords` are the names of the module's own arguments.
    """

    def __init__(
        self,
        device: torch.device,
        find: Callable[[Call], Runner],
        preprocess: Preprocess | None,
        keywords: frozenset[str] = frozenset(),
    ) -> None:
        self._device = device
        self._find = find
        self._preprocess = preprocess
        self._keywords = keywords
        self._copy_in, self._compute, self._copy_out = (torch.cuda.Stream(device) for _ in range(3))
        self._lanes: dict[Runner, deque[_Lane]] = {}

    def serve(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The result of each batch, in order, on the CPU.

        At most three batches are in flight; further ones are not read until a result is taken. An exception, of the
        source or of the model, is raised where the result of its batch would have come.
        """
        try:
            yield from self._serve(batches)
        finally:
            _give_back(self._lanes)

    def _serve(self, batches: Iterable[Any]) -> Iterator[Any]:
        free = deque(_Slot() for _ in range(SLOTS))
        busy: deque[_Slot] = deque()
        failure: BaseException | None = None
        source = iter(batches)
        while failure is None:
            if not free:
                slot = busy.popleft()
                yield self._finish(slot)
                free.append(slot)
            try:
                batch = next(source)
                self._start(free[0], batch)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised below, after the results that come before it
                failure = error
            else:
                busy.append(free.popleft())
        while busy:
            yield self._finish(busy.popleft())
        if failure is not None:
            raise failure

    def _start(self, slot: _Slot, batch: Any) -> None:
        args, kwargs = read_batch(batch)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        with torch.cuda.device(self._device), torch.no_grad():
            # What the caller has enqueued may write the batch, the weights, or what `preprocess` reads.
            self._copy_in.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copy_in):
                if self._preprocess is not None:
                    args, kwargs = self._decode(slot, args, kwargs)
                call = read_call(args, kwargs, self._keywords)
                runner = self._find(call)  # which may build an engine, or refresh the weights
                lane = self._next_lane(runner)
                self._fill(slot, lane, call)
            self._run(slot, lane, call, runner)
        if any(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in given):
            slot.copied_in.synchronize()  # the source may fill its own pinned buffer anew for the next batch

    def _decode(self, slot: _Slot, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copy the batch in as it is, and preprocess it beside the engine, which works on the batch before."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        on_device = [
            self._copy(slot, index, leaf, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
            for index, leaf in enumerate(leaves)
        ]
        slot.copied_in.record(self._copy_in)
        args, kwargs = pytree.tree_unflatten(on_device, spec)
        return preprocessed(args, kwargs, self._preprocess)

    def _copy(self, slot: _Slot, index: int, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the device. One in pageable memory is staged, and cast to a narrower `dtype` on the way."""
        if tensor.device.type == "cpu" and not tensor.is_pinned():
            narrows = tensor.is_floating_point() and dtype.is_floating_point and dtype.itemsize < tensor.itemsize
            tensor = slot.staging(index, tensor.shape, dtype if narrows else tensor.dtype).copy_(tensor)
        if tensor.is_cuda:
            tensor.record_stream(self._copy_in)  # the caller may let go of it
        return tensor.to(self._device, non_blocking=True)

    def _fill(self, slot: _Slot, lane: _Lane, call: Call) -> None:
        """Copy a call's tensors into the lane's buffers, as soon as the batch before in it is done."""
        pairs = zip(call.tensors, lane.runner.input_dtypes, strict=True)
        tensors = [self._copy(slot, index, tensor, dtype) for index, (tensor, dtype) in enumerate(pairs)]
        if self._preprocess is None:
            slot.copied_in.record(self._copy_in)
        self._copy_in.wait_event(lane.emptied)
        lane.runner.load_inputs(tensors)
        lane.filled.record(self._copy_in)

    def _run(self, slot: _Slot, lane: _Lane, call: Call, runner: Runner) -> None:
        """Run a lane's engine and copy its results out, each on its own stream."""
        inputs = call.tensors if runner.outputs.reads_inputs else ()

        def compute() -> tuple[torch.Tensor, ...]:
            self._compute.wait_event(lane.filled)
            results = lane.runner.run()
            runner.count_call()
            lane.computed.record(self._compute)
            return results

        with torch.cuda.stream(self._compute):
            results = runner.pool.turn(compute)
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(lane.computed)
            slot.results = [_copy_out(result) for result in lane.runner.own(results)]
            handed_back = [_copy_out(tensor) if tensor.is_cuda else tensor.clone() for tensor in inputs]
            for tensor in (*results, *inputs):
                if tensor.is_cuda:
                    tensor.record_stream(self._copy_out)
            lane.emptied.record(self._copy_out)
            slot.copied_out.record(self._copy_out)
        slot.assemble = lambda outputs: runner.outputs.assemble(outputs, [tensor.clone() for tensor in handed_back])

    def _next_lane(self, runner: Runner) -> _Lane:
        """The one of a runner's two lanes that was used longer ago; each is made when it is first needed."""
        lanes = self._lanes.setdefault(runner, deque())
        if len(lanes) < LANES:
            lanes.append(_take_lane(runner))
        else:
            lanes.rotate()
        return lanes[-1]

    def _finish(self, slot: _Slot) -> Any:
        slot.copied_out.synchronize()
        return slot.assemble([result.clone() for result in slot.results])


def _copy_out(result: torch.Tensor) -> torch.Tensor:
    return torch.empty(result.shape, dtype=result.dtype, device="cpu", pin_memory=True).copy_(result, non_blocking=True)
