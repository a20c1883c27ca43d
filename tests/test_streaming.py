"""stream() without a GPU: the same results, in the same order, with errors where they belong."""

import re
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.helpers import Lambda, on_cpu
from tests.models import small_conv_net
from torchaccel.compiled import CompiledModule
from torchaccel.errors import InputError, OptionError
from torchaccel.streaming import SLOTS, check_preprocess, preprocessed, read_batch


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def doubling(**options: Any) -> CompiledModule:
    return on_cpu(Lambda(lambda self, x, scale=2.0: x * scale), **options)


# --- batches ---


def test_a_batch_is_one_argument_or_several_or_keywords() -> None:
    x = torch.ones(2)
    assert read_batch(x) == ((x,), {})
    assert read_batch((x, 3)) == ((x, 3), {})
    assert read_batch([x, 3]) == ((x, 3), {})
    assert read_batch({"x": x}) == ((), {"x": x})
    assert read_batch(UserDict(x=x)) == ((), {"x": x})  # as tokenizers return
    assert read_batch(()) == ((), {})


def test_arrays_become_tensors_that_share_their_memory_however_deep() -> None:
    array = np.zeros(3, dtype=np.float32)
    (x,), _ = read_batch(array)
    assert x.dtype is torch.float32
    array[0] = 7
    assert x[0] == 7
    _, kwargs = read_batch({"a": [array, {"b": array}]})
    assert isinstance(kwargs["a"][0], torch.Tensor)
    assert isinstance(kwargs["a"][1]["b"], torch.Tensor)


def test_a_flipped_array_is_served() -> None:
    pixels = np.arange(12.0, dtype=np.float32).reshape(2, 2, 3)
    for flipped in (pixels[..., ::-1], pixels[::-1, :, 1:]):
        (got,) = doubling().stream([flipped])
        assert np.array_equal(got.numpy(), 2 * flipped)


def test_the_result_of_preprocess_is_read_like_a_batch() -> None:
    x = torch.ones(2)
    assert preprocessed((x,), {"y": 1}, None) == ((x,), {"y": 1})
    assert preprocessed((1,), {"y": 2}, lambda a, y: (a, y)) == ((1, 2), {})
    assert preprocessed((1,), {}, lambda a: {"x": a}) == ((), {"x": 1})
    assert preprocessed((1,), {}, lambda a: a) == ((1,), {})


def test_preprocess_must_be_a_function() -> None:
    check_preprocess(None)
    check_preprocess(len)
    with pytest.raises(OptionError, match="preprocess='norm'"):
        check_preprocess("norm")
    with pytest.raises(OptionError, match="preprocess=3"):
        doubling().stream([torch.ones(1)], preprocess=3)


@pytest.mark.parametrize("pinned_buffers", [0, -1, 2.0, True, None, "2"])
def test_pinned_buffers_must_be_a_number_of_them(pinned_buffers: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(f"pinned_buffers={pinned_buffers!r}: give how many")):
        doubling().stream([torch.ones(1)], pinned_buffers=pinned_buffers)
    assert [result.item() for result in doubling().stream([torch.ones(1)] * 3, pinned_buffers=2)] == [2.0] * 3


# --- streams ---


def test_results_come_in_the_order_of_the_batches() -> None:
    model = doubling()
    results = list(model.stream(torch.full((2,), float(i)) for i in range(1, 11)))
    assert [result[0].item() for result in results] == [2.0 * i for i in range(1, 11)]
    assert model.report().calls_by_engine == 10
    assert model.report().builds == 1


def test_results_are_those_of_calls_one_by_one() -> None:
    module = small_conv_net()
    model = on_cpu(module)
    batches = [torch.randn(2, 3, 8, 8) for _ in range(5)]
    for result, batch in zip(model.stream(batches), batches, strict=True):
        assert torch.equal(result, model(batch))


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2),
        np.ones(2, dtype=np.float32),
        (torch.ones(2),),
        [np.ones(2, dtype=np.float32)],
        {"x": torch.ones(2)},
        {"x": np.ones(2, dtype=np.float32)},
    ],
    ids=["tensor", "array", "tuple", "list of arrays", "dict", "dict of arrays"],
)
def test_every_kind_of_batch_is_served(batch: Any) -> None:
    (result,) = doubling().stream([batch])
    assert isinstance(result, torch.Tensor)
    assert result.tolist() == [2.0, 2.0]


def test_batches_of_several_sizes_and_further_arguments_are_served() -> None:
    model = doubling()
    batches = [torch.ones(2), (torch.ones(3), 5.0), {"x": torch.ones(2), "scale": 7.0}, torch.ones(2)]
    assert [result[0].item() for result in model.stream(batches)] == [2.0, 5.0, 7.0, 2.0]
    assert model.report().builds == 3


def test_preprocess_runs_on_each_batch() -> None:
    def decode(raw: torch.Tensor) -> dict[str, Any]:
        return {"x": raw.float() / 255, "scale": 3.0}

    model = doubling()
    results = list(model.stream([np.full(2, 255, dtype=np.uint8), np.zeros(2, dtype=np.uint8)], preprocess=decode))
    assert [result.tolist() for result in results] == [[3.0, 3.0], [0.0, 0.0]]


def test_no_batches_give_no_results() -> None:
    assert list(doubling().stream([])) == []


def test_an_error_of_the_source_comes_after_the_results_before_it() -> None:
    def source() -> Iterator[torch.Tensor]:
        yield torch.ones(1)
        yield torch.ones(1)
        raise OSError("the disk is full")

    results = []
    with pytest.raises(OSError, match="the disk is full"):
        for result in doubling().stream(source()):
            results.append(result)
    assert len(results) == 2


def test_an_error_of_a_batch_comes_at_its_place() -> None:
    module = Lambda(lambda self, x: x @ torch.ones(3, 2))
    stream = on_cpu(module).stream([torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3)])
    assert torch.equal(next(stream), torch.full((2, 2), 3.0))
    next(stream)
    with pytest.raises(RuntimeError):
        next(stream)


def test_an_error_of_preprocess_comes_at_its_place() -> None:
    def decode(x: torch.Tensor) -> torch.Tensor:
        if x[0] == 1:
            raise KeyError("one")
        return x

    stream = doubling().stream([torch.full((1,), 2.0), torch.ones(1)], preprocess=decode)
    assert next(stream).item() == 4
    with pytest.raises(KeyError, match="one"):
        next(stream)


def test_the_source_is_read_no_further_than_needed_and_can_be_left() -> None:
    read: list[int] = []

    def source() -> Iterator[torch.Tensor]:
        for i in range(100):
            read.append(i)
            yield torch.ones(1)

    stream = doubling().stream(source())
    next(stream)
    assert len(read) <= 4
    stream.close()


def test_in_training_mode_the_module_itself_serves() -> None:
    model = doubling()
    model.train()
    assert [result.item() for result in model.stream([torch.ones(1)] * 2)] == [2.0, 2.0]
    assert model.report().calls_by_module == 2
    assert model.report().builds == 0
    with torch.no_grad():
        (result,) = on_cpu(torch.nn.Linear(2, 2)).train().stream([torch.ones(1, 2)])
    assert not result.requires_grad


def test_new_weights_are_used_from_the_next_batch_on() -> None:
    module = small_conv_net()
    model = on_cpu(module)
    x = torch.randn(2, 3, 8, 8)
    stream = model.stream([x, x])
    before = next(stream)
    module.fc.weight.mul_(-1)
    module.fc.bias.mul_(-1)
    assert torch.allclose(next(stream), -before, rtol=1e-5)


# --- sources of every kind, and what they leave behind ---


class Source:
    """Batches one by one; it notes how many were asked for, and whether it was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.asked = 0
        self.closed = False
        self._count = count
        self._fails_at = fails_at

    def __iter__(self) -> Iterator[torch.Tensor]:
        try:
            for index in range(self._count):
                self.asked += 1
                if index == self._fails_at:
                    raise OSError(f"batch {index} cannot be read")
                yield torch.full((2,), index + 1.0)
        finally:
            self.closed = True


class Rows(Dataset[torch.Tensor]):
    """Eleven rows, for the workers of a loader; one of them may fail."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.fails_at:
            raise ValueError(f"row {index} is broken")
        return torch.full((2,), float(index))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_s_batches_are_served_with_a_ragged_last_one(workers: int) -> None:
    model = doubling()
    loader = DataLoader(Rows(), batch_size=4, num_workers=workers)
    for _ in range(2):
        results = list(model.stream(loader))
        assert [len(result) for result in results] == [4, 4, 3]
        assert torch.cat(results)[:, 0].tolist() == [2.0 * row for row in range(11)]
    assert model.report().builds == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_s_error_comes_at_its_batch_and_the_model_goes_on(workers: int) -> None:
    model = doubling()
    results = []
    with pytest.raises(ValueError, match="row 9 is broken"):
        for result in model.stream(DataLoader(Rows(fails_at=9), batch_size=4, num_workers=workers)):
            results.append(result)
    assert torch.cat(results)[:, 0].tolist() == [2.0 * row for row in range(8)]
    assert len(list(model.stream(DataLoader(Rows(), batch_size=4, num_workers=workers)))) == 3


def test_a_ragged_last_batch_is_served_by_a_dynamic_engine_without_a_build() -> None:
    model = on_cpu(small_conv_net(), dynamic_batch=(1, 4, 4))
    batches = [torch.randn(size, 3, 8, 8) for size in (4, 4, 3)]
    for result, batch in zip(model.stream(batches), batches, strict=True):
        assert torch.allclose(result, model.module(batch), atol=1e-5)
    assert model.report().builds == 1


def test_the_source_is_never_more_than_the_slots_ahead_of_the_results() -> None:
    source = Source(20)
    for taken, _ in enumerate(doubling().stream(source), start=1):
        assert taken <= source.asked <= taken + SLOTS
    assert source.asked == 20
    assert source.closed


def test_nothing_is_read_before_the_first_result_is_asked_for() -> None:
    source = Source(3)
    stream = doubling().stream(source)
    assert source.asked == 0
    next(stream)


def test_an_error_of_the_source_ends_the_stream_and_leaves_the_model_usable() -> None:
    model, source = doubling(), Source(5, fails_at=3)
    stream = model.stream(source)
    assert [next(stream)[0].item() for _ in range(3)] == [2.0, 4.0, 6.0]
    with pytest.raises(OSError, match="batch 3 cannot be read"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert source.closed
    assert len(list(model.stream(Source(4)))) == 4
    assert model(torch.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("who", ["the module", "an input that no engine takes"])
def test_an_error_of_the_model_comes_at_its_batch_ends_the_stream_and_closes_the_source(who: str) -> None:
    bad: Any = torch.ones(2, 4) if who == "the module" else (torch.ones(2, 3), object())
    expected = RuntimeError if who == "the module" else InputError
    closed = []

    def source() -> Iterator[Any]:
        try:
            yield from (torch.ones(2, 3), torch.ones(2, 3), bad, torch.ones(2, 3))
        finally:
            closed.append(True)

    model = on_cpu(Lambda(lambda self, x, y=None: x @ torch.ones(3, 2)))
    stream = model.stream(source())
    assert all(torch.equal(next(stream), torch.full((2, 2), 3.0)) for _ in range(2))
    with pytest.raises(expected):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    del stream
    assert closed == [True]
    assert len(list(model.stream([torch.ones(2, 3)] * 4))) == 4


def test_a_stream_that_is_closed_early_closes_its_source_and_another_can_start() -> None:
    model, source = doubling(), Source(100)
    stream: Any = model.stream(source)
    next(stream)
    stream.close()
    assert source.closed
    assert source.asked <= 1 + SLOTS
    assert len(list(model.stream(Source(5)))) == 5


def test_two_streams_of_one_model_do_not_mix() -> None:
    model = doubling()
    first, second = model.stream(Source(5)), model.stream(torch.full((3,), -1.0 - i) for i in range(5))
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one.tolist() == [2.0 * index + 2] * 2
        assert other.tolist() == [-2.0 * index - 2] * 3


def test_results_stay_when_further_ones_come_and_arrays_are_not_changed() -> None:
    arrays = [np.full(2, float(i), dtype=np.float32) for i in range(1, 7)]
    results = list(doubling().stream(arrays))
    assert [result.tolist() for result in results] == [[2.0 * i] * 2 for i in range(1, 7)]
    assert [array.tolist() for array in arrays] == [[float(i)] * 2 for i in range(1, 7)]


def test_with_gradients_enabled_engines_serve_without_a_warning_and_training_mode_has_gradients() -> None:
    model = on_cpu(small_conv_net())
    with torch.enable_grad():
        (result,) = model.stream([torch.randn(2, 3, 8, 8)])
        assert not result.requires_grad
        assert model.report().calls_by_engine == 1
        model.train()
        (result,) = model.stream([torch.randn(2, 3, 8, 8)])
        assert result.requires_grad
