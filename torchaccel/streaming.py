"""The host-to-host ring behind `stream()`: copy in, compute and copy out overlap, outputs come in order."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

Preprocess = Callable[..., Any]


def read_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of a call: a tuple or list is positional, a dict is keywords, the rest is one argument.

    NumPy arrays become tensors that share their memory, where PyTorch can have such: a flipped one is copied.

    >>> read_batch((1, np.zeros(2)))
    ((1, tensor([0., 0.], dtype=torch.float64)), {})
    """
    if isinstance(batch, torch.Tensor):  # the common batch, without the walk
        return (batch,), {}
    if isinstance(batch, Mapping) and not isinstance(batch, dict):  # such as what tokenizers return
        batch = dict(batch)
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


def check_pinned_buffers(pinned_buffers: Any) -> None:
    """Raise `OptionError` unless it is a number of buffers."""
    if not isinstance(pinned_buffers, int) or isinstance(pinned_buffers, bool) or pinned_buffers < 1:
        raise OptionError(
            f"pinned_buffers={pinned_buffers!r}: give how many pinned buffers the source fills in turn, 1 or more."
        )


def _event() -> torch.cuda.Event:
    """CUDA's class is looked up when one is made: tests put another in its place."""
    return torch.cuda.Event()


@dataclass
class _Lane:
    """A runner that belongs to the ring: its buffers are filled while another lane's engine runs."""

    runner: Runner
    filled: torch.cuda.Event = field(default_factory=_event)
    computed: torch.cuda.Event = field(default_factory=_event)
    emptied: torch.cuda.Event = field(default_factory=_event)


@dataclass
class _Slot:
    """One place in the ring: a lane for each runner, pinned buffers, events, and the call that it serves.

    It serves the next call only when the results of the last are on the host: nothing of it is in use then.
    """

    copied_in: torch.cuda.Event = field(default_factory=_event)
    copied_out: torch.cuda.Event = field(default_factory=_event)
    lanes: "dict[weakref.ref[Runner], _Lane]" = field(default_factory=dict)
    buffers: dict[Any, torch.Tensor] = field(default_factory=dict)
    reads_pinned: bool = False  # whether what is being copied in is in the caller's own pinned memory
    results: list[torch.Tensor] = field(default_factory=list)
    assemble: Callable[[list[torch.Tensor]], Any] = list

    def pinned(self, what: str, index: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """This slot's own pinned buffer for tensor number `index` of what comes or goes: one for all shapes."""
        held = self.buffers.get((what, index))
        if held is None or held.shape != shape or held.dtype != dtype:
            held = self.buffers[what, index] = _reshaped(held, shape, dtype)
        return held

    def drop_dead_lanes(self) -> None:
        """Forget the lanes of runners that are no longer kept; of a slot that serves no call."""
        self.lanes = {runner: lane for runner, lane in self.lanes.items() if runner() is not None}


def _reshaped(held: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A pinned buffer of that shape and dtype, in the memory of `held` where that is large enough."""
    size = shape.numel() * dtype.itemsize
    with torch.inference_mode(False):  # the next batch may come outside it
        if held is None or held.untyped_storage().nbytes() < size:
            held = torch.empty((size,), dtype=torch.uint8, device="cpu", pin_memory=True)
        return torch.empty((0,), dtype=dtype, device="cpu").set_(held.untyped_storage()).resize_(shape)


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


def _give_back(lanes: "dict[weakref.ref[Runner], _Lane]") -> None:
    """Keep lanes for the next stream, for as long as their runners live."""
    with _spare_lock:
        for reference, lane in lanes.items():
            if (runner := reference()) is not None:
                _spare.setdefault(runner, []).append(lane)
    lanes.clear()


class Ring:
    """Slots on three streams: while one copies in and is preprocessed, another computes and a third copies out.

    Each slot has a lane for every runner, which is a runner of its own: what it copies in is where the engine reads it.

    `find` gives the runner of a call; `keywords` are the names of the module's own arguments. A source that gives its
    own pinned memory fills `pinned_buffers` buffers in turn.
    """

    def __init__(
        self,
        device: torch.device,
        find: Callable[[Call], Runner],
        preprocess: Preprocess | None,
        keywords: frozenset[str] = frozenset(),
        pinned_buffers: int = 1,
    ) -> None:
        self._device = device
        self._find = find
        self._preprocess = preprocess
        self._keywords = keywords
        self._copy_in, self._compute, self._copy_out = (torch.cuda.Stream(device) for _ in range(3))
        self._asked = torch.cuda.Event()
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._pinned_buffers = min(pinned_buffers, SLOTS)  # so many batches are in flight
        self._reading: deque[torch.cuda.Event] = deque()  # the ends of copies from the caller's own pinned memory

    def serve(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The result of each batch, in order, on the CPU.

        At most three batches are in flight; further ones are not read until a result is taken. An exception, of the
        source or of the model, is raised where the result of its batch would have come.
        """
        try:
            yield from self._serve(batches)
        finally:
            for slot in self._slots:
                _give_back(slot.lanes)

    def _serve(self, batches: Iterable[Any]) -> Iterator[Any]:
        free = deque(self._slots)
        busy: deque[_Slot] = deque()
        failure: BaseException | None = None
        source = iter(batches)
        while failure is None:
            if not free:
                slot = busy.popleft()
                yield self._finish(slot, self._pinned_buffers - 1)
                free.append(slot)
            try:
                self._wait_for_reading(self._pinned_buffers - 1)
                batch = next(source)
                self._start(free[0], batch)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised below, after the results that come before it
                failure = error
            else:
                busy.append(free.popleft())
        while busy:
            yield self._finish(busy.popleft(), 0)
        if failure is not None:
            raise failure

    def _start(self, slot: _Slot, batch: Any) -> None:
        """Enqueue all of a batch's work; what it costs the host counts, for small batches as much as the engine."""
        args, kwargs = read_batch(batch)
        with torch.cuda.device(self._device), torch.no_grad():
            callers = torch.cuda.current_stream()
            # What the caller has enqueued may write the batch, the weights, or what `preprocess` reads.
            self._asked.record(callers)
            self._copy_in.wait_event(self._asked)
            try:
                torch.cuda.set_stream(self._copy_in)
                if self._preprocess is not None:
                    args, kwargs = self._decode(slot, args, kwargs)
                call = read_call(args, kwargs, self._keywords)
                runner = self._find(call)  # which may build an engine, or refresh the weights
                slot.drop_dead_lanes()
                lane = slot.lanes.pop(weakref.ref(runner), None) or _take_lane(runner)
                self._fill(slot, lane, call)
                torch.cuda.set_stream(self._compute)
                results = self._run(lane, runner)
                torch.cuda.set_stream(self._copy_out)
                self._empty(slot, lane, results, call, runner)
                slot.lanes[weakref.ref(runner)] = lane  # one that failed half-way is not used again
            finally:
                torch.cuda.set_stream(callers)

    def _decode(self, slot: _Slot, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copy the batch in as it is, and preprocess it beside the engine, which works on the batch before."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                leaves[index] = self._on_host(slot, "given", index, leaf, leaf.dtype).to(
                    self._device, non_blocking=True
                )
        self._note_reading(slot)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return preprocessed(args, kwargs, self._preprocess)

    def _fill(self, slot: _Slot, lane: _Lane, call: Call) -> None:
        """Copy a call's tensors into the lane's buffers: straight from the host where nothing is to be changed."""
        tensors = []
        for index, (tensor, buffer) in enumerate(zip(call.tensors, lane.runner.inputs, strict=True)):
            there = self._on_host(slot, "in", index, tensor, buffer.dtype)
            straight = there.dtype == buffer.dtype and there.is_contiguous() and buffer.is_contiguous()
            tensors.append(there if straight else there.to(self._device, non_blocking=True))
        self._copy_in.wait_event(lane.emptied)  # of an earlier stream that was left before its end
        lane.runner.load_inputs(tensors)
        lane.filled.record(self._copy_in)
        self._note_reading(slot)

    def _on_host(self, slot: _Slot, what: str, index: int, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor where the GPU can read it. One in pageable memory is staged, and cast to a narrower `dtype`."""
        if tensor.is_cuda:
            tensor.record_stream(self._copy_in)  # the caller may let go of it
            return tensor
        if tensor.is_pinned():
            slot.reads_pinned = True
            return tensor
        narrows = tensor.is_floating_point() and dtype.is_floating_point and dtype.itemsize < tensor.itemsize
        return slot.pinned(what, index, tensor.shape, dtype if narrows else tensor.dtype).copy_(tensor)

    def _note_reading(self, slot: _Slot) -> None:
        """Where the batch is in the caller's own pinned memory: that is read until here."""
        if slot.reads_pinned:
            slot.copied_in.record(self._copy_in)
            self._reading.append(slot.copied_in)
            slot.reads_pinned = False

    def _run(self, lane: _Lane, runner: Runner) -> tuple[torch.Tensor, ...]:
        """Run a lane's engine."""

        def compute() -> tuple[torch.Tensor, ...]:
            self._compute.wait_event(lane.filled)
            results = lane.runner.run()
            runner.count_call()
            lane.computed.record(self._compute)
            return results

        return runner.pool.turn(compute, self._compute)

    def _empty(self, slot: _Slot, lane: _Lane, results: Sequence[torch.Tensor], call: Call, runner: Runner) -> None:
        """Copy a lane's results out."""
        self._copy_out.wait_event(lane.computed)
        inputs = call.tensors if runner.outputs.reads_inputs else ()
        outputs = [*lane.runner.cast(results), *inputs]
        copies = [self._copy_out_of(slot, index, output) for index, output in enumerate(outputs)]
        slot.results, handed_back = copies[: len(results)], copies[len(results) :]
        for tensor in (*results, *inputs):
            if tensor.is_cuda:
                tensor.record_stream(self._copy_out)
        slot.copied_out.record(self._copy_out)
        lane.emptied = slot.copied_out
        slot.assemble = lambda outputs: runner.outputs.assemble(
            outputs, [copy.clone() if copy.is_pinned() else copy for copy in handed_back]
        )

    def _copy_out_of(self, slot: _Slot, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in this slot's own memory on the host, once `copied_out` has come."""
        if tensor.is_cuda:
            return slot.pinned("out", index, tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
        return tensor.clone()

    def _wait_for_reading(self, left: int) -> None:
        """Before the caller's code runs: all copies from its own pinned memory but the last `left` have ended.

        Not as soon as they are enqueued: until the result of an earlier batch is there, most have ended by themselves.
        """
        while len(self._reading) > left:
            self._reading.popleft().synchronize()

    def _finish(self, slot: _Slot, left: int) -> Any:
        """The result of a slot's batch; `left` as above."""
        slot.copied_out.synchronize()
        result = slot.assemble([result.clone() for result in slot.results])
        self._wait_for_reading(left)
        return result
