"""torch.compile(module, backend="torchaccel") on the CPU: Dynamo's graphs through engines, and never stale."""

import copy
import gc
import io
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchaccel
from tests.helpers import Lambda, relative_error, settled
from tests.models import small_conv_net
from torchaccel.compiled import CompiledModule
from torchaccel.dynamo import ALLOWED, REFUSED, backend, models
from torchaccel.errors import AccuracyError, BackendError, BackendWarning, OptionError, StaleWeightsError

FP32 = {"precision": "fp32", "backend": "eager"}


_earlier: "weakref.WeakSet[CompiledModule]" = weakref.WeakSet()


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()  # Dynamo itself keeps the graph before a graph break, even so
    gc.collect()
    _earlier.update(models())


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compiled(module: Any, options: dict[str, Any] | None = None, **how: Any) -> Callable[..., Any]:
    return torch.compile(module, backend=backend, options=FP32 | (options or {}), **how)


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def made() -> list[CompiledModule]:
    """The compiled modules of this test that are alive."""
    gc.collect()
    return [model for model in models() if model not in _earlier]


def only() -> CompiledModule:
    """The one compiled module of this test."""
    (model,) = made()
    return model


# --- what goes in and comes out ---


@pytest.mark.usefixtures("no_grad")
def test_an_engine_serves_and_is_right() -> None:
    module = settled(small_conv_net())
    fast = compiled(module)
    x = torch.randn(2, 3, 16, 16)
    for _ in range(3):
        assert relative_error(fast(x), module(x)) < 2e-6
    report = only().report()
    assert (report.calls_by_engine, report.calls_by_module, report.builds) == (3, 0, 1)
    assert report.backend == "eager"
    assert report.engines[0].folded_batch_norms > 0
    assert report.engines[0].gates[0].passed


@pytest.mark.usefixtures("no_grad")
def test_the_precision_is_fp16_unless_said_otherwise() -> None:
    module, x = linear(), torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendWarning)  # "auto" without TensorRT
        result = torch.compile(module, backend=backend, options={"backend": "eager"})(x)
    assert result.dtype is torch.float32
    assert 1e-6 < relative_error(result, module(x)) < 1e-2
    assert only().report().precision == "fp16"


@pytest.mark.usefixtures("no_grad")
def test_keywords_dictionaries_and_plain_values_are_the_module_s() -> None:
    def forward(self: Any, x: torch.Tensor, *, extra: Any = None) -> dict[str, Any]:
        y = self.fc(x)
        return {"logits": y if extra is None else y + extra["bias"], "rows": x.shape[0], "name": "fc", "none": None}

    module = Lambda(forward, fc=nn.Linear(4, 2))
    fast = compiled(module)
    x, extra = torch.randn(3, 4), {"bias": torch.randn(2)}
    for kwargs in ({"x": x}, {"x": x, "extra": extra}):
        result, expected = fast(**kwargs), module(**kwargs)
        assert torch.equal(result.pop("logits"), expected.pop("logits"))
        assert result == expected == {"rows": 3, "name": "fc", "none": None}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_every_shape_is_served_right_whatever_dynamo_makes_of_it(dynamic: bool | None) -> None:
    module = Lambda(lambda self, x: (self.fc(x) * x.shape[0], x.shape[0] + 1), fc=nn.Linear(4, 2))
    fast = compiled(module, dynamic=dynamic)
    for rows in (3, 5, 7, 5, 3, 1):
        x = torch.randn(rows, 4)
        (y, number), (expected, _) = fast(x), module(x)
        assert torch.equal(y, expected)
        assert number == rows + 1
    reports = [model.report() for model in made()]
    assert sum(report.calls_by_engine for report in reports) == 6
    assert sum(report.builds for report in reports) <= 5


@pytest.mark.usefixtures("no_grad")
def test_each_side_of_a_graph_break_is_compiled() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).tanh()
        torch._dynamo.graph_break()
        return self.b(y)

    module = Lambda(forward, a=nn.Linear(4, 3), b=nn.Linear(3, 2))
    fast = compiled(module)
    x = torch.randn(2, 4)
    for _ in range(2):
        assert torch.equal(fast(x), module(x))
    assert [model.report().calls_by_engine for model in made()] == [2, 2]


@pytest.mark.usefixtures("no_grad")
def test_a_function_is_compiled_with_the_module_that_it_calls() -> None:
    module = linear()

    @torch.compile(backend=backend, options=FP32)
    def function(x: torch.Tensor) -> torch.Tensor:
        return module(x).softmax(1)

    x = torch.randn(3, 4)
    assert torch.equal(function(x), module(x).softmax(1))
    module[0].bias.add_(1)
    assert torch.equal(function(x), module(x).softmax(1))
    assert only().report().calls_by_engine == 2


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("context", ["autocast outside", "autocast inside", "inference mode", "no_grad inside"])
def test_contexts_are_the_caller_s_and_the_module_s(context: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if context == "no_grad inside":
            with torch.no_grad():
                return self.fc(x) * 2
        if context == "autocast inside":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.fc(x) * 2
        return self.fc(x) * 2

    module = Lambda(forward, fc=nn.Linear(4, 2))
    fast = compiled(module)
    outside = {
        "autocast outside": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference mode": torch.inference_mode(),
    }
    with outside.get(context, nullcontext()):
        x = torch.randn(3, 4)
        for _ in range(2):
            y, r = fast(x), module(x)
            assert y.dtype is r.dtype
            assert relative_error(y, r) < (5e-3 if r.dtype is torch.bfloat16 else 2e-6)
    assert only().report().calls_by_engine == 2


@pytest.mark.usefixtures("no_grad")
def test_checkpointed_layers_and_branches_on_data_run_in_engines() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self.a, x, use_reentrant=False)
        return torch.cond(y.sum() > 0, lambda y: self.b(y) + 1, lambda y: self.b(y) * 2, (y,))

    module = Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    fast = compiled(module)
    x = torch.randn(3, 4)
    for sign in (1, -1):
        module.a.bias.fill_(sign * 10.0)
        assert torch.equal(fast(x), module(x))
    assert only().report().calls_by_module == 0


@pytest.mark.usefixtures("no_grad")
def test_inductor_serves_too() -> None:
    from torchaccel.compiler import BACKENDS

    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    module, x = linear(), torch.randn(3, 4)
    fast = compiled(module, {"backend": "inductor"})
    assert relative_error(fast(x), module(x)) < 2e-6
    module[0].weight.mul_(-1)
    assert relative_error(fast(x), module(x)) < 2e-6
    report = only().report()
    assert (report.backend, report.calls_by_engine, report.refreshes) == ("inductor", 2, 1)


# --- weights ---


def step(module: Any) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load(module: Any) -> None:
    module.load_state_dict({name: torch.randn_like(value) for name, value in module.state_dict().items()})


def assign(module: Any) -> None:
    module.load_state_dict({n: torch.randn_like(v) for n, v in module.state_dict().items()}, assign=True)


def replace(module: Any) -> None:
    module.fc.bias = nn.Parameter(torch.randn(2))


def replace_first(module: Any) -> None:
    module.fc.weight = nn.Parameter(torch.randn(2, 4))


def write(module: Any) -> None:
    module.fc.weight.mul_(-1)


def write_buffer(module: Any) -> None:
    module.scale.add_(1)


def replace_buffer(module: Any) -> None:
    module.scale = torch.randn(2)


def replace_attribute(module: Any) -> None:
    module.shift = torch.randn(2)


CHANGES = (step, load, assign, replace, replace_first, write, write_buffer, replace_buffer, replace_attribute)


def with_everything() -> nn.Module:
    """A module with parameters, a buffer, and a tensor that is a plain attribute."""
    module = Lambda(lambda self, x: self.fc(x) * self.scale + self.shift, fc=nn.Linear(4, 2))
    module.register_buffer("scale", torch.randn(2))
    module.shift = torch.randn(2)
    return module


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_has_the_new_weights_bit_for_bit(change: Callable[[Any], None]) -> None:
    module = with_everything()
    fast = compiled(module)
    x = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(fast(x), module(x))
        before = module(x)
        change(module)
        assert not torch.equal(module(x), before)
        assert torch.equal(fast(x), module(x))
    assert all(model.report().calls_by_module == 0 for model in made())


@pytest.mark.usefixtures("no_grad")
def test_the_weights_are_the_module_s_own_objects_and_no_inputs() -> None:
    module = with_everything()
    compiled(module)(torch.randn(3, 4))
    model = only()
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert held == {id(t) for t in (module.fc.weight, module.fc.bias, module.scale, module.shift)}
    assert model.report().engines[0].signature == "float32[3, 4]"


@pytest.mark.usefixtures("no_grad")
def test_a_replaced_weight_is_refreshed_and_not_built_anew() -> None:
    module, x = with_everything(), torch.randn(3, 4)
    fast = compiled(module)
    fast(x)
    replace(module)
    fast(x)
    report = only().report()
    assert (report.builds, report.refreshes, report.calls_by_engine) == (1, 1, 2)


@pytest.mark.usefixtures("no_grad")
def test_modules_of_the_same_code_keep_engines_of_their_own() -> None:
    first, second = with_everything(), with_everything()
    fast = [compiled(first), compiled(second)]
    x = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(fast[0](x), first(x))
        assert torch.equal(fast[1](x), second(x))
    assert sorted((m.report().builds, m.report().refreshes) for m in made()) == [(1, 0), (1, 0)]


@pytest.mark.usefixtures("no_grad")
def test_modules_that_share_a_parameter_are_told_apart() -> None:
    first, second = with_everything(), with_everything()
    second.fc.weight = first.fc.weight
    fast = [compiled(first), compiled(second)]
    x = torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(fast[0](x), first(x))
        assert torch.equal(fast[1](x), second(x))


@pytest.mark.usefixtures("no_grad")
def test_an_untracked_write_is_found_when_asked_to_look() -> None:
    module, x = with_everything(), torch.randn(3, 4)
    fast = compiled(module, {"check_weights_every": 1})
    fast(x)
    module.fc.weight.data.mul_(-1)
    assert torch.equal(fast(x), module(x))
    other = compiled(module, {"check_weights_every": None})
    other(x)
    module.fc.weight.data.mul_(-2)
    for model in made():
        model.refresh()
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("gradients", [False, True], ids=["without gradients", "with gradients"])
def test_running_statistics_that_training_has_written_are_followed(gradients: bool) -> None:
    module = settled(small_conv_net())
    fast = compiled(module)
    x = torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendWarning)  # PyTorch runs the graph of training
        for scale in (2, 3, 4):
            module.eval()
            with torch.no_grad():
                assert relative_error(fast(x), module(x)) < 2e-6
            module.train()
            with torch.set_grad_enabled(gradients):
                fast(scale * x)
    module.eval()
    with torch.no_grad():
        assert relative_error(fast(x), module(x)) < 2e-6
    assert sum(model.report().calls_by_engine for model in made()) == 4


@pytest.mark.filterwarnings("ignore::torchaccel.BackendWarning")
def test_a_graph_that_pytorch_runs_and_that_writes_nothing_has_no_engine_refreshed() -> None:
    module, other = linear(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fast, training = compiled(module), compiled(other)
    x = torch.randn(3, 4)
    for _ in range(3):
        with torch.no_grad():
            fast(x)
        fast(x)
        training(x)
    assert {model.report().refreshes for model in made()} == {0}


@pytest.mark.usefixtures("no_grad")
def test_on_weight_change_raises_where_it_is_to() -> None:
    module, x = with_everything(), torch.randn(3, 4)
    fast = compiled(module, {"on_weight_change": "raise"})
    fast(x)
    module.fc.weight.mul_(-1)
    with pytest.raises(StaleWeightsError, match="changed"):
        fast(x)
    only().refresh()
    assert torch.equal(fast(x), module(x))


# --- what runs in no engine ---


def test_training_runs_the_graph_with_right_gradients_and_one_warning() -> None:
    module = linear()
    twin, x = copy.deepcopy(module), torch.randn(3, 4)
    fast = compiled(module)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, twin)]
    with pytest.warns(BackendWarning, match=r"no_grad\(\)") as caught:
        for _ in range(3):
            for run, optimizer in zip((fast, twin), optimizers, strict=True):
                optimizer.zero_grad()
                run(x).square().sum().backward()
                optimizer.step()
    assert len(caught) == 1
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))
    report = only().report()
    assert (report.calls_by_engine, report.calls_by_module) == (0, 3)
    assert "gradients are enabled" in report.events[0]
    with torch.no_grad():
        assert torch.equal(fast(x), twin(x))
    assert sum(model.report().calls_by_engine for model in made()) == 1


def test_an_input_that_requires_grad_gets_its_gradient() -> None:
    module = linear().requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.warns(BackendWarning, match="gradients enabled"):
        compiled(module)(x).sum().backward()
    assert x.grad is not None


def test_gradients_enabled_without_anything_that_requires_them_runs_the_engine() -> None:
    module, x = linear().requires_grad_(False), torch.randn(3, 4)
    assert torch.equal(compiled(module)(x), module(x))
    assert only().report().calls_by_engine == 1


class WritesBatchNorm(nn.Module):
    """Running statistics that batch_norm writes to without bumping a version counter; no counter of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.mean, self.variance, training=True)


def shares(self: Any, x: torch.Tensor) -> Any:
    return x[0], self.fc(x)


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm in training mode": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "writes to its inputs"),
    "running statistics alone": (WritesBatchNorm, "writes to its inputs or weights"),
    "dropout in training mode": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), "random numbers"),
    "an input written to": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), "writes to its inputs"),
    "a view of an input": (lambda: Lambda(shares, fc=nn.Linear(4, 4)), "shares memory"),
    "two views of an output": (lambda: Lambda(lambda self, x: (x + 1).chunk(2)), "shares memory"),
    "no tensor in": (lambda: Lambda(lambda self, x: self.fc.weight * 2, fc=nn.Linear(4, 4)), "no tensor among"),
}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", UNFIT)
def test_what_no_engine_can_stand_for_runs_as_it_is_and_says_so(name: str) -> None:
    make, reason = UNFIT[name]
    module = make().train()
    twin = copy.deepcopy(module)
    fast = compiled(module)
    with pytest.warns(BackendWarning, match=reason) as caught:
        for _ in range(3):
            x = torch.randn(4, 4)
            results = []
            for run in (fast, twin):
                torch.manual_seed(0)
                given = x.clone()
                results.append((run(given), given))
            for y, r in zip(*map(torch.utils._pytree.tree_leaves, results), strict=True):
                assert torch.equal(y, r)
    assert len(caught) == 1
    assert all(torch.equal(p, q) for p, q in zip(module.buffers(), twin.buffers(), strict=True))
    report = only().report()
    assert (report.calls_by_engine, report.calls_by_module, report.builds) == (0, 3, 0)
    assert reason in report.events[0]


@pytest.mark.usefixtures("no_grad")
def test_a_view_that_is_written_to_after_a_graph_break_writes_to_the_input() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.view(-1)
        torch._dynamo.graph_break()
        y.add_(1)
        return x * 2

    x = torch.zeros(2, 2)
    with pytest.warns(BackendWarning, match="shares memory|writes to its inputs") as caught:
        assert torch.equal(compiled(Lambda(forward))(x), torch.full((2, 2), 2.0))
    assert len(caught) == 2
    assert x.eq(1).all()


@pytest.mark.usefixtures("no_grad")
def test_a_python_float_that_changes_is_followed() -> None:
    module = Lambda(lambda self, x, scale: self.fc(x) * scale, fc=nn.Linear(4, 2))
    fast = compiled(module)
    x = torch.randn(3, 4)
    with pytest.warns(BackendWarning, match="pass it as a tensor"):
        for scale in (1.0, 2.5, 3.5, 2.5):
            assert torch.equal(fast(x, scale), module(x, scale))


@pytest.mark.usefixtures("no_grad")
def test_a_mode_of_the_module_is_a_graph_of_its_own() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(3, 4)
    fast = compiled(module.eval())
    assert torch.equal(fast(x), module(x))
    module.train()
    with pytest.warns(BackendWarning, match="random"):
        assert fast(x).eq(0).any()
    module.eval()
    assert torch.equal(fast(x), module(x))
    assert sorted(m.report().calls_by_engine for m in made()) == [0, 2]


# --- options and errors: what torchaccel.compile raises, at the first call, and not wrapped by Dynamo ---


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precison": "fp16"}, "'precison'; allowed are 'precision', 'backend'"),
        ({"precision": "fp17"}, "precision='fp17': allowed are 'fp32', 'tf32', 'fp16', 'bf16'"),
        ({"backend": "tensorrt"}, "backend='tensorrt': allowed are 'auto', 'fastest', 'torch_tensorrt'"),
        ({"max_runners": 0}, "max_runners=0: allowed is"),
        ({"device": "meta"}, "device='meta': allowed are"),
        ({"race_budget_s": 1.0}, "race_budget_s belongs to"),
        *(({name: 1}, f"'{name}', which torch.compile cannot pass on: ") for name in REFUSED),
    ],
)
def test_a_wrong_option_is_said_to_the_caller_at_every_call(options: dict[str, Any], message: str) -> None:
    fast = torch.compile(linear(), backend=backend, options=options)
    for _ in range(2):
        with pytest.raises(OptionError) as caught:
            fast(torch.randn(3, 4))
        assert message in str(caught.value)


def test_a_wrong_option_is_said_where_gradients_run_the_graph_too() -> None:
    with pytest.raises(OptionError, match="allowed are"):
        torch.compile(linear(), backend=backend, options={"precision": "fp17"})(torch.randn(3, 4))


@pytest.mark.usefixtures("no_grad")
def test_suppress_errors_does_not_hide_one() -> None:
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(OptionError, match="allowed are"):
        torch.compile(linear(), backend=backend, options={"precision": "fp17"})(torch.randn(3, 4))


def test_every_argument_of_compile_is_an_option_or_is_refused_with_a_reason() -> None:
    import inspect

    arguments = set(inspect.signature(torchaccel.compile).parameters) - {"unknown"}
    assert set(ALLOWED) | set(REFUSED) == arguments
    assert not set(ALLOWED) & set(REFUSED)


@pytest.mark.usefixtures("no_grad")
def test_modes_are_inductor_s() -> None:
    fast = torch.compile(linear(), backend=backend, mode="reduce-overhead")
    with pytest.raises(OptionError, match=r"mode='reduce-overhead'.*allowed is none.*options="):
        fast(torch.randn(3, 4))


@pytest.mark.usefixtures("no_grad")
def test_the_module_s_device_may_be_named() -> None:
    module, x = linear(), torch.randn(3, 4)
    assert torch.equal(compiled(module, {"device": "cpu"})(x), module(x))
    if torch.cuda.is_available():
        with pytest.raises(OptionError, match=r"here 'cpu'.*\.to\('cuda:0'\)"):
            compiled(linear(), {"device": "cuda:0"})(x)


@pytest.mark.usefixtures("no_grad")
def test_a_backend_that_cannot_be_met_raises() -> None:
    with pytest.raises(BackendError, match="precision='tf32' on cpu"):
        compiled(linear(), {"precision": "tf32"})(torch.randn(3, 4))


@pytest.mark.usefixtures("no_grad")
def test_an_engine_that_fails_its_check_raises() -> None:
    module = nn.Linear(4, 2)
    module.weight.fill_(1e6)
    with pytest.raises(AccuracyError, match="bf16"):
        compiled(module, {"precision": "fp16"})(torch.ones(3, 4))


@pytest.mark.usefixtures("no_grad")
def test_auto_without_tensorrt_warns_and_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchaccel.backends.inductor import Inductor

    monkeypatch.setattr(Inductor, "unavailable", lambda _: "the test has no time for a compiler")
    module, x = linear(), torch.randn(3, 4)
    fast = torch.compile(module, backend=backend, options={"precision": "fp32"})
    with pytest.warns(BackendWarning, match="backend='auto' serves through eager"):
        assert torch.equal(fast(x), module(x))


# --- life and threads ---


@pytest.mark.usefixtures("no_grad")
def test_a_reset_compiles_anew() -> None:
    module, x = linear(), torch.randn(3, 4)
    fast = compiled(module)
    fast(x)
    first = weakref.ref(only())
    torch._dynamo.reset()
    assert torch.equal(fast(x), module(x))
    assert only() is not first()


@pytest.mark.usefixtures("no_grad")
def test_compiled_modules_go_with_their_module() -> None:
    module, x = linear(), torch.randn(3, 4)
    fast = compiled(module)
    fast(x)
    assert only().report().calls_by_engine == 1
    del module, fast
    gc.collect()
    assert made() == []


@pytest.mark.usefixtures("no_grad")
def test_a_replaced_first_weight_is_not_kept() -> None:
    module, x = with_everything(), torch.randn(3, 4)
    fast = compiled(module)
    for _ in range(5):
        fast(x)
        replace_first(module)
    assert torch.equal(fast(x), module(x))
    only()


@pytest.mark.usefixtures("no_grad")
def test_weights_are_copied_and_saved_as_if_nothing_hung_on_them() -> None:
    module, x = with_everything(), torch.randn(3, 4)
    fast = compiled(module)
    fast(x)
    copied = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(list(module.parameters()), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert all(torch.equal(p, q) for p, q in zip(loaded, module.parameters(), strict=True))
    copied.fc.weight.add_(1)
    assert torch.equal(compiled(copied)(x), copied(x))
    assert torch.equal(fast(x), module(x))
    fast_loaded = with_everything()
    fast_loaded.fc.weight = loaded[0]
    assert torch.equal(compiled(fast_loaded)(x), fast_loaded(x))


@pytest.mark.usefixtures("no_grad")
def test_threads_get_what_one_would_while_graphs_and_engines_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamo puts back, in one thread, settings that it saw while another's engine ran; here, that is undone
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    modules = [with_everything(), with_everything()]
    fast = [compiled(module) for module in modules]
    fast[0](torch.randn(2, 4))  # PyTorch 2.11 without a GPU crashes where its first export is one of several threads'
    wrong: list[Any] = []

    def work(which: int) -> None:
        try:
            with torch.no_grad():
                for rows in (3, 5, 7) * 5:
                    x = torch.randn(rows, 4)
                    if not torch.equal(fast[which](x), modules[which](x)):
                        wrong.append(which)
        except Exception as error:  # noqa: BLE001 - the main thread shows it
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(which % 2,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_importing_torchaccel_imports_no_dynamo() -> None:
    script = """
import sys, torch
before = set(sys.modules)
import torchaccel
torchaccel.dynamo.backend
assert not [name for name in set(sys.modules) - before if name.startswith("torch.")], set(sys.modules) - before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
