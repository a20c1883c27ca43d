"""The gate: every output against the module's own, with TF32 and autocast off, on inputs of its own."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.helpers import Lambda, same_values, state_of
from tests.models import small_conv_net
from torchaccel.errors import AccuracyError, BuildError
from torchaccel.gate import FLOOR_RMS, compare_outputs, output_error, reference, reproduced, require, run_module
from torchaccel.precision import tf32_state
from torchaccel.signature import read_call, split_outputs

NAN, INF = math.nan, math.inf


def error_of(y: Any, r: Any, bound: float = 1e-3) -> Any:
    return output_error("output 0", torch.as_tensor(y), torch.as_tensor(r), bound)


# --- the figures ---


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.integers(0, 99))
def test_the_relative_error_is_the_norm_of_the_difference_over_the_norm(values: list[float], seed: int) -> None:
    r = torch.tensor(values)
    y = r + torch.randn(r.shape, generator=torch.Generator().manual_seed(seed)) * 1e-2
    figures = error_of(y, r, 1e-3)
    floor = FLOOR_RMS * math.sqrt(len(values))
    expected = (y.double() - r.double()).norm().item() / max(r.double().norm().item(), floor)
    assert figures.relative_error == pytest.approx(expected, rel=1e-9)
    assert figures.max_abs_error == pytest.approx((y.double() - r.double()).abs().max().item())
    assert figures.passed == (figures.relative_error <= 1e-3)


def test_the_bound_itself_passes() -> None:
    assert error_of([1.5], [1.0], 0.5).passed
    assert not error_of([1.5], [1.0], 0.4999).passed


def test_an_output_of_zeros_is_compared_with_a_floor() -> None:
    assert error_of(torch.zeros(4), torch.zeros(4)).relative_error == 0
    tiny = error_of(torch.full((4,), FLOOR_RMS / 10), torch.zeros(4), 0.2)
    assert tiny.relative_error == pytest.approx(0.1)
    assert tiny.passed
    assert not error_of(torch.full((4,), 1e-3), torch.zeros(4), 0.2).passed
    assert tiny.is_zero
    assert not error_of(torch.ones(4), torch.ones(4)).is_zero


@pytest.mark.parametrize(("value", "is_zero"), [(0.0, True), (1e-7, True), (1e-5, False)])
def test_an_output_of_next_to_nothing_counts_as_zero(value: float, is_zero: bool) -> None:
    r = torch.full((100,), value)
    assert output_error("y", r, r, 1e-2).is_zero is is_zero


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_output_that_is_not_finite_is_not_next_to_nothing(value: float) -> None:
    for r in (torch.full((4,), value), torch.tensor([0.0, 0.0, value])):
        found = output_error("y", r, r, 1e-2)
        assert (found.passed, found.is_zero) == (True, False)


def test_a_failed_check_in_fp32_proposes_what_there_is() -> None:
    record = compare_outputs([torch.zeros(2)], [torch.ones(2)], 1e-5)
    with pytest.raises(AccuracyError, match="Try another backend, or pass tolerance="):
        require(record, "eager", "fp32")
    with pytest.raises(AccuracyError, match="Try keep_fp32="):
        require(record, "eager", "fp16")


def test_errors_are_added_up_in_double() -> None:
    r = torch.full((1000,), 60000.0, dtype=torch.float16)
    figures = error_of(r.clone(), r)
    assert figures.relative_error == 0
    assert not figures.not_finite
    assert error_of(-r, r).relative_error == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_of_integers_and_booleans_the_fraction_that_differs_counts(dtype: torch.dtype) -> None:
    r = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1]).to(dtype)
    y = r.clone()
    assert error_of(y, r).relative_error == 0
    y[:2] = torch.tensor([1, 0]).to(dtype)
    figures = error_of(y, r, 0.25)
    assert figures.relative_error == 0.25
    assert figures.max_abs_error == 1
    assert figures.passed
    assert not error_of(y, r, 0.2).passed


def test_complex_outputs_are_compared_as_such() -> None:
    r = torch.tensor([3 + 4j])
    assert error_of(r * 1.1, r).relative_error == pytest.approx(0.1, rel=1e-5)
    assert error_of(r * 1j, r).relative_error == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("y", "r", "count"),
    [
        ([1.0, NAN], [1.0, 2.0], 1),
        ([1.0, 2.0], [1.0, NAN], 1),
        ([1.0, INF], [1.0, 2.0], 1),
        ([1.0, 2.0], [1.0, INF], 1),
        ([1.0, INF], [1.0, -INF], 1),
        ([NAN, NAN], [1.0, INF], 2),
    ],
)
def test_what_is_finite_in_only_one_of_the_two_fails_whatever_the_bound(y: Any, r: Any, count: int) -> None:
    figures = error_of(y, r, 1e9)
    assert not figures.passed
    assert figures.not_finite.startswith(f"{count} of 2 ")
    place = next(i for i in range(2) if repr(y[i]) != repr(r[i]))
    assert f"[{place}]" in figures.not_finite
    assert math.isfinite(figures.relative_error)


def test_what_is_not_finite_in_both_alike_passes_and_does_not_count() -> None:
    figures = error_of([NAN, INF, -INF, 1.001], [NAN, INF, -INF, 1.0])
    assert figures.not_finite == ""
    assert figures.relative_error == pytest.approx(1e-3, rel=1e-3)
    assert error_of([NAN, INF], [NAN, INF]).passed


def test_an_empty_output_passes_and_another_shape_or_dtype_kind_does_not() -> None:
    assert error_of(torch.zeros(0, 3), torch.zeros(0, 3)).passed
    wrong = error_of(torch.zeros(3, 2), torch.zeros(2, 3), 1e9)
    assert not wrong.passed
    assert "[3, 2]" in wrong.not_finite
    assert not error_of(torch.zeros(1), torch.zeros(()), 1e9).passed
    assert not error_of(torch.tensor([1.5]), torch.tensor([1]), 1e-3).passed


# --- all outputs ---


def test_a_wrong_second_output_is_an_accuracy_error_with_the_figures_of_each() -> None:
    r = (torch.ones(3), torch.ones(2, 2), torch.tensor([1, 2]))
    y = (torch.ones(3), torch.ones(2, 2) * 1.5, torch.tensor([1, 2]))
    record = compare_outputs(y, r, 1e-2, batch=7)
    assert [output.passed for output in record.outputs] == [True, False, True]
    assert not record.passed
    assert record.relative_error == pytest.approx(0.5)
    with pytest.raises(AccuracyError) as caught:
        require(record, "a_backend", "fp16")
    message = str(caught.value)
    assert "a_backend" in message
    assert "fp16" in message
    assert "batch 7" in message
    assert "ok   output 0 [3]: relative error 0 " in message
    assert "FAIL output 1 [2, 2]: relative error 0.5 (bound 0.01), largest absolute error 0.5" in message
    assert "ok   output 2" in message
    assert "keep_fp32" in message
    assert "tolerance" in message
    assert "bf16" not in message


def test_an_overflow_suggests_bf16() -> None:
    record = compare_outputs([torch.tensor([INF])], [torch.tensor([1e6])], 1e-2)
    with pytest.raises(AccuracyError, match="bf16, which has fp32's range"):
        require(record, "a_backend", "fp16")


def test_a_record_that_passed_is_let_through() -> None:
    require(compare_outputs([torch.ones(2)], [torch.ones(2)], 1e-2), "a_backend", "fp16")


def test_another_number_of_outputs_is_an_accuracy_error() -> None:
    with pytest.raises(AccuracyError, match=r"1 outputs.*2"):
        compare_outputs([torch.ones(1)], [torch.ones(1)] * 2, 1.0)


# --- the reference ---


def reference_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call = read_call(args, kwargs)
    return reference(module, call, call.tensors)


def test_the_reference_is_the_module_s_own_result_and_leaves_it_and_its_inputs_as_they_were() -> None:
    module = small_conv_net()
    state, x = state_of(module), torch.randn(2, 3, 8, 8, requires_grad=True)
    before = x.detach().clone()
    found = reference_of(module, x)
    with torch.no_grad():
        assert torch.equal(found.leaves[0], module(x))
    assert not found.leaves[0].requires_grad
    assert found.inputs[0].data_ptr() != x.data_ptr()
    assert torch.equal(x, before)
    assert same_values(module, state)


def test_the_reference_runs_without_tf32_or_autocast_or_inference_mode() -> None:
    seen: dict[str, Any] = {}

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen["tf32"] = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        seen["autocast"] = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        seen["modes"] = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return self.fc(x)

    module = Lambda(forward, fc=nn.Linear(2, 2))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), tf32_state(True):
        found = reference_of(module, torch.ones(1, 2))
    assert seen == {"tf32": (False, False), "autocast": (False, False), "modes": (False, False)}
    assert found.leaves[0].dtype is torch.float32
    call = read_call((torch.ones(1, 2),), {})
    with torch.autocast("cpu", torch.bfloat16):
        assert run_module(module, call, call.tensors, tf32=True, autocast=True).dtype is torch.bfloat16
    assert seen["tf32"] == (True, True)


def test_a_result_that_nests_otherwise_at_every_run_is_refused() -> None:
    class Alternates(nn.Module):
        as_list = False

        def forward(self, x: torch.Tensor) -> Any:
            self.as_list = not self.as_list
            return [x + 1] if self.as_list else (x + 1,)

    x = torch.ones(2)
    with pytest.raises(BuildError, match=r"depends on Python attributes .*as_list"):
        reference(Alternates().eval(), read_call((x,), {}), [x])


def test_hooks_of_the_root_are_not_run() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: pytest.fail("called"))
    reference_of(module, torch.ones(1, 2))


WRITES: dict[str, Any] = {
    "x.add_(1)": lambda self, x: x.add_(1) * 2,
    "x[:, 0] = 0": lambda self, x: x.__setitem__((slice(None), 0), 0) or x * 2,
    "a view of x": lambda self, x: x.view(-1)[1:].zero_().sum() + x,
    "relu_": lambda self, x: nn.functional.relu(x, inplace=True) + 1,
}


@pytest.mark.parametrize("what", WRITES)
def test_a_module_that_writes_to_its_input_is_refused_with_the_input_s_number(what: str) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(BuildError, match="writes to its input 1"):
        reference_of(Lambda(lambda self, _, x: WRITES[what](self, x)), torch.ones(1), x)
    assert torch.equal(x, torch.ones(2, 3))


class Counts(nn.Module):
    def __init__(self, replace: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.replace = replace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.replace:
            self.seen = self.seen + 1
        else:
            self.seen += 1
        return x * 2


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "by another tensor"])
def test_a_module_that_writes_to_its_buffers_is_refused_with_their_names(replace: bool) -> None:
    with pytest.raises(BuildError, match=r"buffers in eval mode \(inner\.seen\)"):
        reference_of(Lambda(lambda self, x: self.inner(x), inner=Counts(replace)), torch.ones(2))


NOT_DENSE: dict[str, tuple[Any, str]] = {
    "sparse": (lambda y: y.to_sparse(), r"sparse_coo: use \.to_dense\(\)"),
    "sparse rows": (lambda y: y.to_sparse_csr(), r"sparse_csr: use \.to_dense\(\)"),
    "nested": (lambda y: torch.nested.nested_tensor(list(y)), r"nested: use torch\.nested\.to_padded_tensor"),
    "jagged": (
        lambda y: torch.nested.as_nested_tensor(list(y), layout=torch.jagged),
        r"nested: use torch\.nested\.to_padded_tensor",
    ),
    "quantized": (lambda y: torch.quantize_per_tensor(y, 0.1, 0, torch.qint8), r"quantized \(torch.qint8\): use \.deq"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_an_output_that_is_not_dense_is_refused_with_its_number_and_the_remedy(kind: str) -> None:
    make, message = NOT_DENSE[kind]
    with pytest.raises(BuildError, match=f"output 1 is {message}"):
        reference_of(Lambda(lambda self, x: {"dense": x + 1, "other": make(x * 2)}), torch.ones(2, 3))


# --- from the reference to what is returned ---


def test_values_and_handed_back_inputs_of_the_result_are_the_reference_s() -> None:
    call = read_call((torch.ones(2), torch.ones(2)), {})

    def forward(self: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        return {"out": x + 1, "dtype": x.dtype, "cast": y.float(), "same": x}

    found = reference(Lambda(forward), call, call.tensors)
    half = [tensor.half() for tensor in call.tensors]
    _, program = split_outputs(Lambda(forward)(*half), half)
    spec = found.output_spec(program)
    inputs = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    result = spec.assemble([torch.zeros(2)] * 2, inputs)
    assert result["dtype"] is torch.float32
    assert result["same"] is inputs[0]
    assert torch.equal(result["out"], torch.zeros(2))


def test_an_input_that_the_module_casts_and_the_program_hands_back_is_cast() -> None:
    call = read_call((torch.ones(2, dtype=torch.float16),), {})

    def forward(self: Any, x: torch.Tensor) -> Any:
        return x.float(), x * 2

    found = reference(Lambda(forward), call, call.tensors)
    single = [tensor.float() for tensor in call.tensors]
    _, program = split_outputs(Lambda(forward)(*single), single)
    assert program.sources[0] == ("input", 0)
    spec = found.output_spec(program)
    assert spec.reads_inputs
    x = torch.tensor([1.0, 2.0], dtype=torch.float16)
    cast, _ = spec.assemble([torch.zeros(2)], [x])
    assert cast.dtype is torch.float32
    assert cast.tolist() == [1.0, 2.0]


def test_a_result_that_nests_otherwise_at_this_precision_is_a_build_error() -> None:
    call = read_call((torch.ones(2),), {})
    found = reference(Lambda(lambda self, x: [x + 1]), call, call.tensors)
    _, program = split_outputs((torch.ones(2),), call.tensors)
    with pytest.raises(BuildError, match=r"list.*tuple"):
        found.output_spec(program)


def test_two_runs_are_alike_where_every_output_is() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])
    assert reproduced([one, NAN, one], [one * (1 + 1e-6), NAN, one])
    assert not reproduced([one, 1], [one, 2])
    assert not reproduced([one, one], [one, other])
    assert not reproduced([one, one], [other, one])
