"""torch.export of a prepared module: flat tensors in, a tuple of tensors out, and a batch that may vary."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.helpers import Lambda, captured, relative_error, same_values, state_of
from tests.models import small_conv_net
from torchaccel.capture import batch_size, batched_inputs, capture, engine_input, resize_batch
from torchaccel.errors import BuildError, InputError
from torchaccel.precision import PRECISIONS
from torchaccel.program import count_operators
from torchaccel.signature import read_call
from torchaccel.weights import WeightStore

FP32 = PRECISIONS["fp32"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_operator_computes_in_the_precision_s_dtype(precision: str) -> None:
    program = captured(small_conv_net(), torch.randn(2, 3, 8, 8), precision=precision)
    dtype = PRECISIONS[precision].dtype
    values = [
        node.meta["val"] for node in program.exported.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    assert {value.dtype for value in values if value.is_floating_point()} == {dtype}
    assert program.inputs[0].dtype is dtype
    assert {rule.dtype for rule in program.rules.values()} == {dtype}


def test_the_program_says_what_it_holds() -> None:
    program = captured(small_conv_net(), torch.randn(2, 3, 8, 8))
    assert program.folded == 2
    assert program.operators["aten.conv2d.default"] == 2
    assert program.operators["aten.linear.default"] == 1
    assert "aten.batch_norm.default" not in program.operators
    assert program.operators == count_operators(program.exported.graph)
    assert program.convolutional
    assert not captured(nn.Linear(2, 2), torch.zeros(1, 2)).convolutional
    assert not captured(nn.Conv1d(2, 2, 1), torch.zeros(1, 2, 3)).convolutional
    assert program.shapes(0) == ((2, 3, 8, 8),) * 3


def test_weights_come_from_the_store_and_are_shared_with_other_programs() -> None:
    module = small_conv_net()
    state, store = state_of(module), WeightStore()
    programs = [captured(module, torch.randn(batch, 3, 8, 8)) for batch in (1, 2)]
    for program in programs:
        program.take_weights(store, module, channels_last=True)
        assert program.channels_last
    one, two = (program.exported.state_dict for program in programs)
    for name in programs[0].rules:
        assert one[name].data_ptr() == two[name].data_ptr()
        assert not one[name].requires_grad
        if one[name].dim() == 4:
            assert one[name].is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for tensor in one.values():
            tensor.zero_()
    assert same_values(module, state)


def test_channels_last_is_for_networks_with_2d_convolutions() -> None:
    module = nn.Linear(2, 2)
    program = captured(module, torch.zeros(1, 2))
    program.take_weights(WeightStore(), module, channels_last=True)
    assert not program.channels_last


def test_buffers_that_are_not_in_the_state_dict_are_weights_too() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
    holder = Lambda(lambda self, x: self.inner(x) * self.inner.scale, inner=module)
    x = torch.randn(3, 2)
    program = captured(holder, x)
    store = WeightStore()
    program.take_weights(store, holder)
    run = program.exported.module(check_guards=False)
    with torch.no_grad():
        assert torch.equal(run(x)[0], holder(x))
        module.scale.mul_(2)
        store.refresh(holder)
        assert torch.equal(run(x)[0], holder(x))


def test_nesting_and_plain_values_stay_outside_the_program() -> None:
    def forward(self: Any, images: list[torch.Tensor], *, scale: float, extra: dict[str, Any]) -> dict[str, Any]:
        y = images[0] * scale + extra["bias"]
        return {"y": y, "again": y, "input": images[1], "note": "text", "pair": (images[1] + 1, None)}

    tensors = torch.ones(2), torch.zeros(2), torch.full((2,), 5.0)
    call = read_call(([tensors[0], tensors[1]],), {"scale": 2.0, "extra": {"bias": tensors[2]}})
    program = capture(Lambda(forward), call, call.tensors, FP32)
    assert len(program.inputs) == 3
    outputs = program.exported.module(check_guards=False)(*tensors)
    assert len(outputs) == 2
    result = program.outputs.assemble(outputs, tensors)
    assert torch.equal(result["y"], torch.full((2,), 7.0))
    assert result["again"] is result["y"]
    assert result["input"] is tensors[1]
    assert result["note"] == "text"
    assert torch.equal(result["pair"][0], torch.ones(2))


def test_capture_works_in_inference_mode_and_under_autocast() -> None:
    module = small_conv_net()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 3, 8, 8)
        program = captured(module, x)
        program.take_weights(WeightStore(), module)
    assert not program.inputs[0].is_inference()
    assert not any(tensor.is_inference() for tensor in program.exported.state_dict.values())
    with torch.no_grad():
        assert relative_error(program.exported.module(check_guards=False)(x.clone())[0], module(x.clone())) < 1e-6


def test_examples_are_contiguous_tensors_of_their_own_in_the_compute_dtype() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    example = engine_input(x.T, torch.float16)
    assert example.dtype is torch.float16
    assert example.is_contiguous()
    assert not example.requires_grad
    same = engine_input(x, torch.float32)
    assert same.data_ptr() != x.data_ptr()
    assert engine_input(torch.tensor([1]), torch.float16).dtype is torch.int64


# --- what cannot be captured ---


def test_what_torch_export_refuses_is_a_build_error_with_its_reason_and_the_module_s_name() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(BuildError, match=r"could not capture Branches \(.+\): .+") as caught:
        captured(Branches(), torch.ones(2))
    assert caught.value.__cause__ is not None
    assert "dynamic batch" not in str(caught.value)


def test_a_batch_that_the_module_fixes_is_a_build_error_that_speaks_of_the_dynamic_batch() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, -1)

    with pytest.raises(BuildError, match="could not capture Fixed with a dynamic batch") as caught:
        captured(Fixed(), torch.ones(4, 3), dynamic_batch=(1, 4, 8))
    assert "by chance" not in str(caught.value)


def test_where_an_input_may_have_the_batch_s_size_by_chance_the_error_says_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, mask = Lambda(lambda self, n, x, mask: x @ mask * n), torch.ones(4, 4)
    n = torch.tensor(2.0)
    with pytest.raises(BuildError, match=r"inputs 1, 2 is 4, .*by chance, build first with a batch of another size"):
        captured(module, n, torch.ones(4, 4), mask, dynamic_batch=(1, 8, 8))
    assert captured(module, n, torch.ones(3, 4), mask, dynamic_batch=(1, 8, 8)).batched == (False, True, False)
    with pytest.raises(BuildError) as caught:
        captured(module, n, torch.ones(4, 4), mask[:3])
    assert "by chance" not in str(caught.value)
    assert not caplog.records, "PyTorch's words are in the error"


@pytest.mark.parametrize("result", [3, None, (), "x"], ids=repr)
def test_a_module_that_returns_no_tensor_is_a_build_error(result: Any) -> None:
    with pytest.raises(BuildError, match="no tensor"):
        captured(Lambda(lambda self, x: result), torch.ones(2))


def test_a_module_that_only_hands_its_input_back_is_a_build_error() -> None:
    with pytest.raises(BuildError, match="nothing to compile"):
        captured(Lambda(lambda self, x: x), torch.ones(2))


def test_an_output_of_a_strange_type_is_an_input_error_and_keeps_its_message() -> None:
    with pytest.raises(InputError, match="ndarray"):
        captured(Lambda(lambda self, x: (x + 1, np.zeros(1))), torch.ones(2))


def test_a_module_that_fails_by_itself_is_a_build_error_with_its_message() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the picture is upside down")

    with pytest.raises(BuildError, match=r"ValueError.*upside down"):
        captured(Lambda(forward), torch.ones(2))


# --- a batch that varies ---


@pytest.mark.parametrize("example", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 2, 8), (2, 2, 2), (3, 4, 5)])
def test_one_program_takes_every_batch_of_its_range(example: int, sizes: tuple[int, int, int]) -> None:
    module = small_conv_net()
    program = captured(module, torch.randn(example, 3, 8, 8), dynamic_batch=sizes)
    program.take_weights(WeightStore(), module)
    assert program.shapes(0) == tuple((size, 3, 8, 8) for size in sizes)
    assert program.inputs[0].shape[0] == max(2, sizes[1])
    run = program.exported.module(check_guards=False)
    for size in range(sizes[0], sizes[2] + 1):
        x = torch.randn(size, 3, 8, 8)
        with torch.no_grad():
            assert relative_error(run(x)[0], module(x)) < 1e-6


def test_inputs_without_the_batch_stay_as_they_are() -> None:
    module = Lambda(lambda self, x, scale, table, y: x * scale + table + y)
    tensors = torch.randn(3, 2), torch.tensor(2.0), torch.randn(1, 2), torch.randn(3, 1)
    call = read_call(tensors, {})
    program = capture(module, call, call.tensors, FP32, dynamic_batch=(1, 4, 8))
    assert program.batched == (True, False, False, True)
    assert [program.shapes(index) for index in range(4)] == [
        ((1, 2), (4, 2), (8, 2)), ((), (), ()), ((1, 2),) * 3, ((1, 1), (4, 1), (8, 1)),
    ]  # fmt: skip
    for size in (1, 5, 8):
        x, y = torch.randn(size, 2), torch.randn(size, 1)
        got = program.exported.module(check_guards=False)(x, tensors[1], tensors[2], y)
        assert torch.allclose(got[0], module(x, tensors[1], tensors[2], y))


def test_the_batch_is_the_first_dimension_of_the_first_tensor_that_has_one() -> None:
    assert batch_size([torch.tensor(1.0), torch.zeros(5, 2), torch.zeros(7)]) == 5
    assert batched_inputs([torch.tensor(1.0), torch.zeros(5, 2), torch.zeros(7), torch.zeros(5)]) == (
        False, True, False, True,
    )  # fmt: skip
    with pytest.raises(InputError, match="dynamic_batch"):
        batch_size([torch.tensor(1.0)])
    with pytest.raises(InputError, match="dynamic_batch"):
        batch_size([])


@given(st.integers(0, 5), st.integers(1, 9))
def test_a_batch_is_made_longer_by_repeating_its_rows_and_shorter_by_cutting(rows: int, size: int) -> None:
    x = torch.arange(rows * 2).reshape(rows, 2)
    other = torch.arange(3)
    resized, same = resize_batch([x, other], (True, False), size)
    assert same is other
    assert resized.shape == (size, 2)
    assert all(torch.equal(resized[i], x[i % rows] if rows else torch.zeros(2)) for i in range(size))


def test_modules_are_captured_in_several_threads_at_once() -> None:
    captured(
        nn.Linear(4, 2), torch.ones(3, 4)
    )  # PyTorch 2.11 crashes where its first export is one of several threads'
    done: list[Any] = []

    def work(width: int) -> None:
        try:
            for rows in (2, 3, 5):
                module = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width))
                done.append(captured(module, torch.randn(rows, 4)).operators["aten.linear.default"])
        except BuildError as error:
            done.append(error)

    threads = [threading.Thread(target=work, args=(width,)) for width in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [2] * 12
