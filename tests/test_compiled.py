"""The compiled module, end to end on the CPU: a drop-in for the module that never serves stale weights."""

import copy
import threading
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import Lambda, assert_fresh, images, in_place, on_cpu, relative_error
from tests.models import small_conv_net
from torchaccel.errors import BackendWarning, BuildError, InputError, StaleWeightsError
from torchaccel.runner import Runner
from torchaccel.weights import WeightRule

Pair = namedtuple("Pair", "first second")


@dataclass
class Result:
    logits: torch.Tensor
    hidden: Any = None


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- what goes in and comes out ---

NESTED: dict[str, Callable[..., Any]] = {
    "a tensor": lambda x, y: x + y,
    "a tuple": lambda x, y: (x + y, x - y),
    "a tuple of one": lambda x, y: (x + y,),
    "a list": lambda x, y: [x + y, [x - y]],
    "a dict": lambda x, y: {"sum": x + y, "more": {"difference": x - y}},
    "a named tuple": lambda x, y: Pair(x + y, (x - y, None)),
    "a dataclass": lambda x, y: Result(x + y, [x - y]),
    "a dataclass with None": lambda x, y: Result(x + y),
    "an input": lambda x, y: (x + y, x),
    "the same twice": lambda x, y: [z := x + y, z],
    "plain values": lambda x, y: (x + y, 3, "text", None, 2.5, x.dtype, x.shape[0]),
    "integers and booleans": lambda x, y: (x + y, (x > y), x.argmax(1)),
    "a view of an input": lambda x, y: (x + y, x.reshape(-1), x[:1]),
    "a scalar": lambda x, y: (x * y).sum(),
    "an empty tensor": lambda x, y: (x + y, x[:0]),
}


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return same(vars(a), vars(b)) if isinstance(a, Result) else a == b


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", NESTED)
def test_results_nest_as_the_module_s_do(name: str) -> None:
    module = Lambda(lambda self, x, y: NESTED[name](x, y))
    model = on_cpu(module)
    for _ in range(2):
        x, y = torch.randn(2, 3), torch.randn(2, 3)
        assert same(model(x, y), module(x, y))
    assert model.report().calls_by_engine == 2


@pytest.mark.usefixtures("no_grad")
def test_a_handed_back_input_is_the_caller_s_own_and_a_repeated_output_one_tensor() -> None:
    model = on_cpu(Lambda(lambda self, x: (y := x * 2, x, y)))
    x = torch.ones(2)
    first, second, third = model(x)
    assert second is x
    assert first is third


@pytest.mark.usefixtures("no_grad")
def test_keywords_defaults_and_nested_arguments_are_the_module_s() -> None:
    def forward(self: Any, x: Any, scale: float = 2.0, *, extra: Any = None) -> torch.Tensor:
        y = x["a"] * scale
        return y if extra is None else y + extra[0]

    model = on_cpu(Lambda(forward))
    x = {"a": torch.ones(2)}
    assert model(x).tolist() == [2.0, 2.0]
    assert model(x, 3.0).tolist() == [3.0, 3.0]
    assert model(x, scale=4.0).tolist() == [4.0, 4.0]
    assert model(x, extra=(torch.ones(2),)).tolist() == [3.0, 3.0]
    assert model(x=x, scale=5).tolist() == [5.0, 5.0]
    assert model(x, 3.0).tolist() == [3.0, 3.0]
    assert model.report().builds == 5
    assert model.report().calls_by_module == 0


@pytest.mark.usefixtures("no_grad")
def test_a_constant_of_another_type_is_another_signature() -> None:
    model = on_cpu(Lambda(lambda self, x, flag: x * (2 if flag is True else 3)))
    assert [model(torch.ones(1), flag).item() for flag in (True, 1, True, 1.0)] == [2, 3, 2, 3]


@pytest.mark.usefixtures("no_grad")
def test_a_tensor_that_is_its_own_parameter_or_constant_can_be_an_output() -> None:
    module = Lambda(lambda self, x: (self.fc(x), self.fc.weight, torch.arange(3)), fc=nn.Linear(2, 2))
    model = on_cpu(module)
    x = torch.randn(1, 2)
    result, weight, numbers = model(x)
    assert torch.allclose(result, module.fc(x))
    assert torch.equal(weight, module.fc.weight)
    assert numbers.tolist() == [0, 1, 2]
    weight.zero_()
    assert module.fc.weight.any()


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("layout", ["transposed", "channels last", "a slice", "expanded"])
def test_inputs_of_every_layout_are_served(layout: str) -> None:
    x = {
        "transposed": torch.randn(2, 3, 9, 8).transpose(2, 3),
        "channels last": images().to(memory_format=torch.channels_last),
        "a slice": torch.randn(4, 6, 8, 8)[::2, ::2],
        "expanded": torch.randn(1, 3, 8, 8).expand(2, 3, 8, 8),
    }[layout]
    model = on_cpu(small_conv_net())
    before = x.clone()
    assert relative_error(model(x), model.module(x)) < 2e-6
    assert torch.equal(x, before)


@pytest.mark.usefixtures("no_grad")
def test_results_are_not_overwritten_by_later_calls() -> None:
    model = on_cpu(small_conv_net())
    first = model(images())
    kept = first.clone()
    for _ in range(3):
        model(images())
    assert torch.equal(first, kept)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_compute_precision_stays_inside(precision: str) -> None:
    model = on_cpu(small_conv_net(), precision)
    x = images()
    result = model(x)
    assert result.dtype is torch.float32
    error = relative_error(result, model.module(x))
    assert error < {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]
    if precision != "fp32":
        assert error > 1e-6, "computed in the smaller precision indeed"
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())


def test_a_call_without_a_tensor_is_an_input_error() -> None:
    with torch.no_grad(), pytest.raises(InputError, match="no tensor"):
        on_cpu(Lambda(lambda self, x: torch.ones(x)))(3)


def test_an_argument_that_an_engine_would_keep_is_an_input_error() -> None:
    with torch.no_grad(), pytest.raises(InputError, match="object"):
        on_cpu(Lambda(lambda self, x, y: x))(torch.ones(1), object())


def test_a_sparse_tensor_is_an_input_error() -> None:
    with torch.no_grad(), pytest.raises(InputError, match="sparse"):
        on_cpu(Lambda(lambda self, x: x.to_dense() * 2))(torch.eye(3).to_sparse())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantized_tensor_is_an_input_error() -> None:
    x = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.quint8)
    with torch.no_grad(), pytest.raises(InputError, match="dequantize"):
        on_cpu(Lambda(lambda self, x: x.dequantize() * 2))(x)


def test_a_module_s_own_complaint_about_its_inputs_comes_through() -> None:
    model = on_cpu(small_conv_net())
    with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 4, 8, 8))


@pytest.mark.usefixtures("no_grad")
def test_a_failed_build_leaves_nothing_behind() -> None:
    model = on_cpu(small_conv_net())
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 4, 8, 8))
    x = images()
    assert relative_error(model(x), model.module(x)) < 2e-6
    assert model.report().builds == 1


# --- modes ---


def test_train_runs_the_module_with_autograd_and_eval_engines() -> None:
    module = small_conv_net()
    model = on_cpu(module)
    twin = copy.deepcopy(module)
    x = images(4)
    assert model.train() is model
    assert module.training
    assert all(child.training for child in module.modules())
    model(x).square().sum().backward()
    twin.train()(x).square().sum().backward()
    for (name, parameter), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, other.grad), name
    assert model.report().calls_by_module == 1
    assert model.eval() is model
    assert not module.training
    assert_fresh(model, x, builds=1, refreshes=0)


def test_the_mode_is_the_module_s_own() -> None:
    model = on_cpu(small_conv_net())
    model.module.train()
    assert model.training
    model.module.eval()
    assert not model.training
    model.training = True
    assert model.module.training


def test_inputs_that_require_grad_go_through_the_module_with_the_right_gradients() -> None:
    module = small_conv_net()
    model = on_cpu(module)
    x, y = images().requires_grad_(), None
    model(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    module(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    report = model.report()
    assert (report.calls_by_module, report.calls_by_engine, report.builds) == (1, 0, 0)
    with torch.no_grad():
        model(x)
    assert model.report().calls_by_engine == 1


def test_a_nested_input_that_requires_grad_counts() -> None:
    model = on_cpu(Lambda(lambda self, x: x["a"][0] * 2))
    x = torch.ones(2, requires_grad=True)
    model({"a": [x]}).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_one_warning_says_that_no_gradient_will_flow_and_points_at_the_caller() -> None:
    model = on_cpu(small_conv_net())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = model(images())
        model(images())
        model(images(3))
    (warning,) = caught
    assert warning.category is BackendWarning
    assert "gradient" in str(warning.message)
    assert warning.filename == __file__
    assert not first.requires_grad
    assert model.report().calls_by_engine == 3


@pytest.mark.parametrize("frozen", ["no_grad", "inference_mode", "requires_grad_(False)", "no parameters"])
def test_there_is_no_such_warning_where_no_gradient_is_expected(frozen: str) -> None:
    module: nn.Module = small_conv_net()
    context: AbstractContextManager[Any] = warnings.catch_warnings()
    if frozen == "no_grad":
        context = torch.no_grad()
    elif frozen == "inference_mode":
        context = torch.inference_mode()
    elif frozen == "requires_grad_(False)":
        module.requires_grad_(False)
    else:
        module = Lambda(lambda self, x: x * 2)
    with context:
        on_cpu(module)(images())


def test_the_warning_comes_when_frozen_parameters_are_thawed() -> None:
    model = on_cpu(small_conv_net().requires_grad_(False))
    model(images())
    model.requires_grad_(True)
    with pytest.warns(BackendWarning, match="gradient"):
        model(images())


@pytest.mark.parametrize("first", ["inference_mode", "no_grad"])
def test_inference_mode_and_no_grad_may_alternate_with_changes_of_the_weights_between(first: str) -> None:
    model = on_cpu(small_conv_net())
    x = images()
    modes = (
        [torch.inference_mode, torch.no_grad] if first == "inference_mode" else [torch.no_grad, torch.inference_mode]
    )
    for step in range(4):
        with modes[step % 2]():
            result = model(x)
            assert relative_error(result, model.module(x)) < 2e-6
        with torch.no_grad():
            model.module.norm.running_mean.add_(0.5)
            model.module.fc.weight.mul_(-1.5)
    assert model.report().builds == 1
    assert model.report().refreshes == 3


@pytest.mark.usefixtures("no_grad")
def test_outputs_in_inference_mode_are_like_the_module_s_and_others_are_ordinary() -> None:
    model = on_cpu(small_conv_net())
    with torch.inference_mode():
        assert model(images()).is_inference()
    assert not model(images()).is_inference()


@pytest.mark.usefixtures("no_grad")
def test_under_autocast_the_dtype_is_what_the_module_returns() -> None:
    model = on_cpu(small_conv_net())
    x = images()
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x)
        assert result.dtype is model.module(x).dtype is torch.bfloat16
    assert torch.equal(result, plain.bfloat16())
    assert model(x).dtype is torch.float32
    assert model.report().builds == 2


# --- new weights: how they can change is in test_freshness.py ---


@pytest.mark.usefixtures("no_grad")
def test_a_recurrent_network_compiles_quietly_and_takes_new_weights() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(4, 8, batch_first=True)
    model = on_cpu(module)
    x = torch.randn(2, 3, 4)
    for refreshes in range(3):
        (y, (h, c)), (yr, (hr, cr)) = model(x), module(x)
        assert max(relative_error(y, yr), relative_error(h, hr), relative_error(c, cr)) < 1e-5
        assert model.report().refreshes == refreshes
        if refreshes == 0:
            module.weight_ih_l0.mul_(3)
        else:
            module.bias_hh_l0 = nn.Parameter(torch.randn(32))
    assert model.report().builds == 1


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    "held",
    [[nn.Linear(4, 4)], (nn.Linear(4, 4),), {"a": torch.randn(4)}, [torch.randn(4)]],
    ids=["a list of modules", "a tuple of modules", "a dict", "a list"],
)
def test_a_weight_in_a_plain_container_is_warned_of_by_the_container_s_name(held: Any) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        (item,) = self.inner.held.values() if isinstance(self.inner.held, dict) else self.inner.held
        return item(x) if isinstance(item, nn.Module) else item + x

    module = Lambda(forward, inner=nn.Identity())
    module.inner.held, module.inner.unused = held, [torch.randn(4)]
    with pytest.warns(BackendWarning, match=r"\(inner\.held\): engines keep the values of now"):
        on_cpu(module)(torch.ones(4))


@pytest.mark.usefixtures("no_grad")
def test_a_literal_in_the_forward_is_no_weight() -> None:
    module = Lambda(lambda self, x: x + torch.tensor([1.0, 2.0]))
    module.held = [torch.tensor([1.0, 2.0])]
    assert on_cpu(module)(torch.zeros(2)).tolist() == [1.0, 2.0]


@pytest.mark.usefixtures("no_grad")
def test_a_tensor_that_is_neither_parameter_nor_buffer_is_followed_or_warned_of() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.full((4,), 2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = on_cpu(Scaled())
        model(torch.ones(4))
    model.module.scale.mul_(3)
    fresh = model(torch.ones(4)).tolist() == [6.0] * 4
    warned = any(issubclass(warning.category, BackendWarning) and "scale" in str(warning.message) for warning in caught)
    assert fresh or warned


@pytest.mark.usefixtures("no_grad")
def test_raise_refuses_to_serve_until_refresh() -> None:
    model = on_cpu(small_conv_net(), on_weight_change="raise")
    x = images()
    before = model(x)
    in_place(model)
    for _ in range(2):
        with pytest.raises(StaleWeightsError, match=r"SmallConvNet.*refresh\(\)"):
            model(x)
    with pytest.raises(StaleWeightsError):
        model(images(3))
    model.refresh()
    assert_fresh(model, x, builds=1, refreshes=1)
    assert relative_error(model(x), before) > 0.1


@pytest.mark.usefixtures("no_grad")
def test_raise_speaks_of_untracked_writes_at_eval() -> None:
    model = on_cpu(small_conv_net(), on_weight_change="raise")
    model(images())
    model.module.fc.weight.data.add_(1)
    with pytest.raises(StaleWeightsError, match="does not track"):
        model.eval()
    for batch in (2, 3):  # nothing more has changed since
        with pytest.raises(StaleWeightsError, match="does not track"):
            model(images(batch))


@pytest.mark.usefixtures("no_grad")
def test_ignore_serves_the_old_weights_until_refresh() -> None:
    model = on_cpu(small_conv_net(), on_weight_change="ignore")
    x = images()
    before = model(x)
    in_place(model)
    model.eval()
    assert torch.equal(model(x), before)
    assert model.report().refreshes == 0
    model.refresh()
    assert_fresh(model, x, builds=1, refreshes=1)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("policy", ["ignore", "refresh"])
def test_weights_that_changed_unseen_do_not_fail_the_build_for_another_shape(policy: str) -> None:
    model = on_cpu(small_conv_net(), on_weight_change=policy)
    model(images(2))
    model.module.fc.weight.data.mul_(-2)
    x = images(3)
    assert relative_error(model(x), model.module(x)) < 2e-6


@pytest.mark.usefixtures("no_grad")
def test_writes_behind_pytorch_s_back_are_found_every_so_many_calls() -> None:
    model = on_cpu(small_conv_net(), check_weights_every=3)
    x = images()
    before = model(x)
    model.module.fc.weight.data.mul_(-2)
    results = [model(x) for _ in range(4)]
    assert [torch.equal(result, before) for result in results] == [True, False, False, False] or [
        torch.equal(result, before) for result in results
    ] == [True, True, False, False]
    assert model.report().refreshes == 1
    assert_fresh(model, x, builds=1, refreshes=1)
    assert any("does not track" in event for event in model.report().events)


@pytest.mark.usefixtures("no_grad")
def test_every_signature_is_fresh_after_one_refresh() -> None:
    model = on_cpu(small_conv_net())
    inputs = [images(1), images(2), images(3)]
    for x in inputs:
        model(x)
    in_place(model)
    for x in inputs:
        assert relative_error(model(x), model.module(x)) < 2e-6
    assert (model.report().builds, model.report().refreshes) == (3, 1)


@pytest.mark.usefixtures("no_grad")
def test_a_change_before_the_first_call_is_no_refresh() -> None:
    model = on_cpu(small_conv_net())
    in_place(model)
    assert_fresh(model, images(), builds=1, refreshes=0)


# --- what is refused, and what is shared ---


def test_a_module_that_writes_to_its_buffers_in_eval_mode_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return x * self.seen

    with torch.no_grad(), pytest.raises(BuildError, match=r"buffers in eval mode \(seen\)"):
        on_cpu(Counts())(torch.ones(1))


@pytest.mark.usefixtures("no_grad")
def test_a_module_can_be_compiled_several_times() -> None:
    module = small_conv_net()
    one, two = on_cpu(module), on_cpu(module, "bf16")
    x = images()
    one(x)
    two(x)
    in_place(one)
    assert_fresh(one, x, builds=1, refreshes=1)
    assert relative_error(two(x), module(x)) < 5e-2
    assert two.report().refreshes == 1


# --- threads ---


def run_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            with torch.no_grad():
                work(index)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("name", ["record", "plan_key"])
def test_calls_of_other_threads_disturb_neither_a_report_nor_a_refresh(name: str) -> None:
    model = on_cpu(nn.Linear(4, 2).requires_grad_(False), on_weight_change="ignore")  # so no call waits for a refresh
    for batch in (1, 2, 3):
        model(torch.ones(batch, 4))

    def meddling(runner: Runner) -> Any:
        """The attribute, read while another thread calls."""
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=model, args=(torch.ones(1, 4),))
            thread.start()
            thread.join()
        return vars(runner)[name]

    for runner in model._state.runners.values():
        runner.__class__ = type("Meddled", (Runner,), {name: property(meddling)})
    if name == "record":
        assert len(model.report().runners) == 3
    else:
        model.refresh()
        assert model.report().refreshes == 1


def test_many_threads_get_their_own_results_and_each_signature_is_built_once() -> None:
    model = on_cpu(small_conv_net(), max_runners=2)
    wrong: list[float] = []

    def work(index: int) -> None:
        for turn in range(6):
            x = torch.randn(1 + (index + turn) % 3, 3, 8, 8, generator=torch.Generator().manual_seed(index * 10 + turn))
            error = relative_error(model(x), model.module(x))
            if error > 2e-6:
                wrong.append(error)

    run_threads(4, work)
    assert wrong == []
    report = model.report()
    assert report.builds == 3
    assert report.calls_by_engine == 24


def test_every_result_comes_from_exactly_one_completed_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    refresh = WeightRule.refresh

    def slowly(rule: WeightRule, held: torch.Tensor, tensors: Any) -> None:
        time.sleep(0.002)
        refresh(rule, held, tensors)

    monkeypatch.setattr(WeightRule, "refresh", slowly)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model = on_cpu(module, on_weight_change="ignore")

    def fill(scale: float) -> None:
        module[0].bias.fill_(scale)
        module[1].weight.fill_(scale)

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        fill(1.0)
        assert model(torch.ones(1, 4)).item() == 4
    seen: list[float] = []

    def work(index: int) -> None:
        for turn in range(20):
            if index == 0:
                fill(float(turn + 2))
                model.refresh()
            else:
                time.sleep(0.003)
                seen.append(model(torch.ones(1, 4)).item())

    run_threads(3, work)
    assert len(seen) == 40
    assert len(set(seen)) > 3
    assert model.report().refreshes == 20  # a call that comes meanwhile refreshes nothing
    assert not {value for value in seen if value not in {4.0 * scale**2 for scale in range(1, 22)}}
