"""The ring behind stream() without a GPU: its results, and that nothing is touched before its turn.

Engines are stand-ins here, and CUDA's streams are simulated (tests/simulated_cuda.py); tests/gpu/test_stream_gpu.py has
the real ones.
"""

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulated_cuda import Event, Race, SimulatedCuda, Stream, simulated_cuda
from torchaccel import streaming
from torchaccel.report import RunnerRecord
from torchaccel.signature import split_outputs

SHAPE = (2, 3)


class Turns:
    """The pool: runs come one after the other, since their graphs share memory."""

    def __init__(self, cuda: SimulatedCuda, shape: tuple[int, ...] = SHAPE) -> None:
        self.done = Event(cuda)
        with torch.inference_mode(False):
            self.shared = cuda.empty(shape, device=True)

    def turn(self, work: Callable[[], Any], stream: Stream) -> Any:
        stream.wait_event(self.done)
        result = work()
        self.done.record(stream)
        return result


class PlusOne:
    """A runner that adds one; `hands_back` has it return its input too, `graph` its result in a static buffer."""

    alive: ClassVar["weakref.WeakSet[PlusOne]"] = weakref.WeakSet()

    def __init__(
        self,
        cuda: SimulatedCuda,
        *,
        hands_back: bool = False,
        graph: bool = True,
        pool: Turns | None = None,
        shape: tuple[int, ...] = SHAPE,
    ) -> None:
        self.cuda, self.pool, self.options = cuda, pool or Turns(cuda, shape), (hands_back, graph, shape)
        self.graph = graph
        self.alive.add(self)
        with torch.inference_mode(False):
            self.inputs = (cuda.empty(shape, device=True),)
            self.result = cuda.empty(shape, device=True)
        self.record, self.calls, self.fails = RunnerRecord("float32", graph=graph), 0, False
        self.results: list[tuple[torch.Tensor, Stream]] = []
        x = torch.zeros(shape)
        y = torch.zeros(shape)
        self.outputs = split_outputs((y, x) if hands_back else y, [x])[1]

    def twin(self) -> "PlusOne":
        hands_back, graph, shape = self.options
        twin = PlusOne(self.cuda, hands_back=hands_back, graph=graph, pool=self.pool, shape=shape)
        twin.results = self.results
        return twin

    def load_inputs(self, tensors: Sequence[torch.Tensor]) -> None:
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor)

    def run(self) -> tuple[torch.Tensor, ...]:
        if self.fails:
            raise RuntimeError("the engine failed")
        self.pool.shared.copy_(self.inputs[0])
        computed = self.pool.shared + 1
        if not self.graph:
            self.results.append((computed, self.cuda.current))
            return (computed,)
        self.result.copy_(computed)
        return (self.result,)

    def cast(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(results)

    def count_call(self) -> None:
        self.calls += 1


@pytest.fixture
def cuda() -> Iterator[SimulatedCuda]:
    with simulated_cuda() as simulated:
        yield simulated


def ring(cuda: SimulatedCuda, runner: Any, preprocess: Any = None, pinned_buffers: int = 1) -> streaming.Ring:
    return streaming.Ring(cuda.device, lambda call: runner, preprocess, frozenset(), pinned_buffers)


def batches(count: int = 8) -> list[torch.Tensor]:
    return [torch.full(SHAPE, float(index)) for index in range(count)]


def from_pinned(cuda: SimulatedCuda, count: int, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each in one of `count` pinned buffers, filled anew in turn."""
    buffers = [cuda.empty(SHAPE) for _ in range(count)]
    for index, tensor in enumerate(tensors):
        yield buffers[index % count].copy_(tensor)


def same(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return len(results) == len(expected) and all(map(torch.equal, results, expected))


@pytest.mark.parametrize("preprocess", [None, lambda x: x + 1], ids=["", "preprocess"])
@pytest.mark.parametrize("source", ["pageable", "device", "one pinned buffer", "two pinned buffers"])
def test_nothing_is_touched_before_its_turn(source: str, preprocess: Any, cuda: SimulatedCuda) -> None:
    given: Any = batches()
    more = 1.0 if preprocess is None else 2.0
    expected = [tensor + more for tensor in given]
    if source == "device":
        given = [tensor.to(cuda.device) for tensor in given]
    buffers = {"one pinned buffer": 1, "two pinned buffers": 2}.get(source, 0)
    runner = PlusOne(cuda)
    for _ in range(2):  # the second goes on with the lanes of the first
        handed = from_pinned(cuda, buffers, given) if buffers else given
        assert same(list(ring(cuda, runner, preprocess, max(1, buffers)).serve(handed)), expected)
    assert runner.calls == 2 * len(expected)
    assert len(streaming._spare[runner]) == streaming.SLOTS  # type: ignore[index]


def test_more_buffers_than_there_are_would_be_filled_too_early(cuda: SimulatedCuda) -> None:
    with pytest.raises(Race):
        list(ring(cuda, PlusOne(cuda), pinned_buffers=2).serve(from_pinned(cuda, 1, batches())))


@pytest.mark.parametrize("source", ["pageable", "device", "one pinned buffer"])
def test_an_input_that_is_handed_back_is_the_caller_s_own(source: str, cuda: SimulatedCuda) -> None:
    given: Any = batches()
    expected = [(tensor + 1, tensor.clone()) for tensor in given]
    if source == "device":
        given = [tensor.to(cuda.device) for tensor in given]
    handed = from_pinned(cuda, 1, given) if source == "one pinned buffer" else given
    results = []
    for result, back in ring(cuda, PlusOne(cuda, hands_back=True)).serve(handed):
        results.append((result.clone(), back.clone()))
        assert not back.is_pinned()
        back.copy_(torch.full(SHAPE, -1.0))
    assert all(same(*pair) for pair in zip(results, expected, strict=True))
    if source != "device":
        assert same(given, batches())


def test_the_caller_may_fill_the_buffer_between_results_too(cuda: SimulatedCuda) -> None:
    buffer, noise, results = cuda.empty(SHAPE), torch.full(SHAPE, -1.0), []
    for result in ring(cuda, PlusOne(cuda)).serve(buffer.copy_(tensor) for tensor in batches()):
        results.append(result)
        buffer.copy_(noise)
    assert same(results, [tensor + 1 for tensor in batches()])


def test_when_the_source_has_ended_all_its_buffers_have_been_read(cuda: SimulatedCuda) -> None:
    buffers, noise, results, ended = [cuda.empty(SHAPE) for _ in range(2)], torch.full(SHAPE, -1.0), [], []

    def source() -> Iterator[torch.Tensor]:
        for index, tensor in enumerate(batches()):
            yield buffers[index % 2].copy_(tensor)
        ended.append(True)

    for result in ring(cuda, PlusOne(cuda), pinned_buffers=2).serve(source()):
        results.append(result)
        for buffer in buffers if ended else ():
            buffer.copy_(noise)
    assert same(results, [tensor + 1 for tensor in batches()])


def test_the_caller_s_stream_is_current_wherever_its_code_runs(cuda: SimulatedCuda) -> None:
    def source() -> Iterator[torch.Tensor]:
        for tensor in batches():
            assert cuda.current is cuda.callers
            yield tensor

    for _ in ring(cuda, PlusOne(cuda)).serve(source()):
        assert cuda.current is cuda.callers


def test_calls_beside_a_stream_take_their_turns(cuda: SimulatedCuda) -> None:
    runner = PlusOne(cuda)
    for _ in ring(cuda, runner).serve(batches()):
        runner.pool.turn(runner.run, cuda.callers)


def test_what_a_stream_reads_is_not_given_to_others_before(cuda: SimulatedCuda) -> None:
    """The caller may let go of its tensors, and an engine without a graph of its results, before the work is done."""
    given = [tensor.to(cuda.device) for tensor in batches()]
    runner = PlusOne(cuda, graph=False)
    assert same(list(ring(cuda, runner).serve(given)), [tensor + 1 for tensor in batches()])
    assert all(cuda.may_be_freed(tensor, cuda.callers) for tensor in given)
    assert runner.results
    assert all(cuda.may_be_freed(*result) for result in runner.results)


def test_inference_mode_may_begin_and_end_between_batches(cuda: SimulatedCuda) -> None:
    results, stream = [], ring(cuda, PlusOne(cuda)).serve(batches())
    for number in range(8):
        with torch.inference_mode(number % 2 == 0):
            results.append(next(stream))
    assert same(results, [tensor + 1 for tensor in batches()])


@settings(max_examples=100, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(["pageable", "pinned", "device"]), st.integers(1, 3)), max_size=9),
    pinned_buffers=st.integers(1, 4),
    with_preprocess=st.booleans(),
    moments=st.lists(st.booleans(), min_size=10, max_size=10),
)
def test_whatever_comes_nothing_is_touched_before_its_turn(
    kinds: list[tuple[str, int]], pinned_buffers: int, with_preprocess: bool, moments: list[bool]
) -> None:
    """Batches of several shapes, from everywhere, and inference mode on and off."""
    with simulated_cuda() as cuda:
        runners = {rows: PlusOne(cuda, shape=(rows, 3)) for rows in (1, 2, 3)}
        given = [torch.full((rows, 3), float(index)) for index, (_, rows) in enumerate(kinds)]
        buffers = {rows: [cuda.empty((rows, 3)) for _ in range(pinned_buffers)] for rows in runners}
        turns = itertools.count()

        def source() -> Iterator[torch.Tensor]:
            for (kind, rows), tensor in zip(kinds, given, strict=True):
                if kind == "pinned":
                    yield buffers[rows][next(turns) % pinned_buffers].copy_(tensor)
                else:
                    yield tensor.to(cuda.device) if kind == "device" else tensor

        served = streaming.Ring(
            cuda.device,
            lambda call: runners[len(call.tensors[0])],  # type: ignore[arg-type,return-value]
            (lambda x: x + 1) if with_preprocess else None,
            pinned_buffers=pinned_buffers,
        ).serve(source())
        results = []
        for inference in moments:
            with torch.inference_mode(inference):
                results += [result for result in [next(served, None)] if result is not None]
        assert same(results, [tensor + (2 if with_preprocess else 1) for tensor in given])


def test_a_stream_that_is_left_leaves_its_lanes_in_order(cuda: SimulatedCuda) -> None:
    runner = PlusOne(cuda)
    left = ring(cuda, runner).serve(batches())
    next(left)
    left.close()
    assert same(list(ring(cuda, runner).serve(batches())), [tensor + 1 for tensor in batches()])
    assert len(streaming._spare[runner]) == streaming.SLOTS  # type: ignore[index]


def test_a_lane_that_failed_half_way_is_not_used_again(cuda: SimulatedCuda) -> None:
    runner = PlusOne(cuda)
    assert same(list(ring(cuda, runner).serve(batches())), [tensor + 1 for tensor in batches()])
    lanes = streaming._spare[runner]  # type: ignore[index]
    lanes[-1].runner.fails = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the engine failed"):
        list(ring(cuda, runner).serve(batches()))
    assert len(lanes) == streaming.SLOTS - 1
    assert same(list(ring(cuda, runner).serve(batches())), [tensor + 1 for tensor in batches()])


def test_results_are_the_caller_s_own(cuda: SimulatedCuda) -> None:
    results = []
    for result in ring(cuda, PlusOne(cuda)).serve(batches()):
        results.append(result)
        result.add_(100)
    assert same(results, [tensor + 101 for tensor in batches()])


def test_runners_that_are_no_longer_kept_go_with_their_lanes_while_the_stream_goes_on(cuda: SimulatedCuda) -> None:
    pool, counts = Turns(cuda), []
    gc.collect()
    before = len(PlusOne.alive)

    def find(_: Any) -> Any:  # as where more shapes take turns than runners are kept
        return PlusOne(cuda, pool=pool)

    serving = streaming.Ring(cuda.device, find, None)
    for index, result in enumerate(serving.serve(batches(30))):
        assert torch.equal(result, batches(30)[index] + 1)
        gc.collect()
        counts.append(len(PlusOne.alive) - before)
    assert max(counts) <= 3 * streaming.SLOTS


@pytest.mark.parametrize("preprocess", [None, lambda x: x[:, :3] + 0], ids=["", "preprocess"])
def test_pinned_memory_is_one_buffer_for_all_shapes(preprocess: Any, cuda: SimulatedCuda) -> None:
    runners = {columns: PlusOne(cuda, shape=(2, columns)) for columns in range(3, 23)}
    serving = streaming.Ring(cuda.device, lambda call: runners[call.tensors[0].shape[1]], preprocess)  # type: ignore[arg-type,return-value]
    given = [torch.full((2, columns), float(columns)) for columns in (*range(3, 23), *range(22, 2, -1))]
    expected = [tensor if preprocess is None else preprocess(tensor) for tensor in given]
    pinned = []
    for result, tensor in zip(serving.serve(given), expected, strict=True):
        assert torch.equal(result, tensor + 1)
        pinned.append(len(cuda.pinned))
    buffers = [buffer for slot in serving._slots for buffer in slot.buffers.values()]
    assert len(buffers) == 2 * streaming.SLOTS
    assert all(map(torch.Tensor.is_pinned, buffers))
    assert pinned[25] == pinned[-1]


def test_batches_of_several_dtypes_take_turns_in_a_buffer(cuda: SimulatedCuda) -> None:
    given = [torch.full(SHAPE, 0.1, dtype=(torch.float16, torch.float32)[index % 2]) for index in range(8)]
    assert same(list(ring(cuda, PlusOne(cuda)).serve(given)), [tensor.float() + 1 for tensor in given])


def test_what_preprocess_makes_on_the_host_is_not_staged_where_the_batch_was(cuda: SimulatedCuda) -> None:
    results = list(ring(cuda, PlusOne(cuda), lambda _: torch.ones(SHAPE)).serve(batches()))
    assert same(results, [torch.full(SHAPE, 2.0)] * 8)
