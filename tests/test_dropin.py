"""The compiled module as a drop-in: its state, methods, hooks and copies are the module's own."""

import copy
import functools
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.helpers import Lambda, assert_fresh, images, in_place, on_cpu, relative_error, same_values
from tests.models import SmallConvNet, small_conv_net
from torchaccel.compiled import CompiledModule
from torchaccel.errors import AccuracyError, BackendWarning, BuildError, OptionError

# --- state and attributes ---


def test_state_parameters_and_attributes_are_the_module_s() -> None:
    module = small_conv_net()
    module.note = "a note"
    model = on_cpu(module)
    assert list(model.state_dict()) == list(module.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), module.parameters(), strict=True))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in module.named_modules()]
    assert model.fc is module.fc
    assert model.note == "a note"
    model.note = "another"
    model.added = nn.Linear(1, 1)
    model.register_buffer("table", torch.zeros(2))
    assert module.note == "another"
    assert "added" in dict(module.named_children())
    assert "table" in dict(module.named_buffers())
    del model.added
    assert not hasattr(module, "added")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model.nothing_of_the_kind
    assert "SmallConvNet" in repr(model)
    assert "fp32" in repr(model)
    assert "eager" in repr(model)


def test_a_saved_state_dict_loads_into_the_plain_module(tmp_path: Any) -> None:
    model = on_cpu(small_conv_net())
    in_place(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    plain = SmallConvNet()
    plain.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert same_values(plain, model.module.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_the_plain_module_s_state_dict_loads_into_the_compiled_one(assign: bool) -> None:
    torch.manual_seed(1)
    trained = SmallConvNet()
    model = on_cpu(small_conv_net())
    assert_fresh(model, images(), builds=1, refreshes=0)
    result = model.load_state_dict(trained.state_dict(), assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert same_values(model.module, trained.state_dict())
    assert_fresh(model, images(), builds=1, refreshes=1)
    with pytest.raises(RuntimeError, match=r"SmallConvNet.*\n.*Missing"):
        model.load_state_dict({})


def test_named_modules_are_the_module_s_with_the_compiled_one_as_the_root() -> None:
    module = small_conv_net()
    model = on_cpu(module)
    (_, root), *others = model.named_modules()
    assert root is model
    assert others == list(module.named_modules())[1:]
    assert list(model.modules()) == [child for _, child in model.named_modules()]
    assert model.get_submodule("") is model
    parent = nn.Sequential(model, module)
    assert [name for name, _ in parent.named_modules()] == [
        "",
        "0",
        "0.first",
        "0.norm",
        "0.second",
        "0.second_norm",
        "0.fc",
    ]
    assert list(parent.named_modules(prefix="a", remove_duplicate=False))[1] == ("a.0", model)


def test_it_is_an_instance_of_the_module_s_class_and_has_its_signature() -> None:
    model = on_cpu(small_conv_net())
    assert isinstance(model, SmallConvNet)
    assert isinstance(model, CompiledModule)
    assert issubclass(type(model), CompiledModule)
    assert not isinstance(model, nn.Linear)
    assert inspect.signature(model.forward) == inspect.signature(model.module.forward)
    assert type(model) is type(on_cpu(small_conv_net()))
    assert set(dir(model)) >= {"fc", "forward", "report", *dir(model.module)}


def test_names_that_the_compiled_module_has_itself_hide_the_module_s_with_a_warning() -> None:
    module = Lambda(lambda self, x: x * 2)
    module.report = "the module's own"
    with pytest.warns(BackendWarning, match=r"model\.module\.report") as caught:
        model: Any = on_cpu(module)
    assert caught[0].filename.endswith("helpers.py"), "where compile() was called"
    assert model.module.report == "the module's own"
    assert model.report().builds == 0
    with pytest.raises(AttributeError, match=r"\.module\.refresh"):
        model.refresh = 3


# --- methods ---


def test_methods_and_properties_of_the_module_are_there() -> None:
    class WithMethods(nn.Linear):
        @property
        def size(self) -> int:
            return self.in_features

        def scaled(self, by: int) -> int:
            return self.size * by

    model: Any = on_cpu(WithMethods(3, 2))
    assert model.size == 3
    assert model.scaled(2) == 6
    assert model.in_features == 3


METHODS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda m: m.state_dict(),
    "_save_to_state_dict": lambda m: nn.Sequential(m).state_dict(),
    "load_state_dict": lambda m: m.load_state_dict(m.module.state_dict()),
    "_load_from_state_dict": lambda m: nn.Sequential(m).load_state_dict(nn.Sequential(m.module).state_dict()),
    "get_extra_state": lambda m: m.get_extra_state(),
    "set_extra_state": lambda m: m.set_extra_state(1),
    "parameters": lambda m: list(m.parameters()),
    "named_parameters": lambda m: list(m.named_parameters()),
    "buffers": lambda m: list(m.buffers()),
    "named_buffers": lambda m: list(m.named_buffers()),
    "children": lambda m: list(m.children()),
    "named_children": lambda m: list(m.named_children()),
    "modules": lambda m: list(m.modules()),
    "named_modules": lambda m: list(m.named_modules()),
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad(),
    "to": lambda m: m.to("cpu"),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "cpu": lambda m: m.cpu(),
    "type": lambda m: m.type(torch.float64),
    "_apply": lambda m: nn.Sequential(m).double(),
    "apply": lambda m: m.apply(lambda _: None),
    "share_memory": lambda m: m.share_memory(),
    "extra_repr": repr,
    "get_submodule": lambda m: m.get_submodule("fc"),
    "register_buffer": lambda m: m.register_buffer("table", torch.ones(1)),
    "add_module": lambda m: m.add_module("more", nn.ReLU()),
    "register_forward_hook": lambda m: m.register_forward_hook(lambda *_: None),
    "compile": lambda m: m.compile(),
}
RETURN_THE_MODEL = {"train", "eval", "requires_grad_", "to", "half", "double", "cpu", "type", "apply", "share_memory"}


def noting(name: str, noted: list[nn.Module]) -> nn.Module:
    """A module whose class has a version of its own of one method."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        noted.append(self)
        if name not in ("get_extra_state", "set_extra_state", "compile"):
            return getattr(nn.Module, name)(self, *args, **kwargs)
        return None

    kind = type("Own", (nn.Module,), {name: method, "forward": lambda self, x: self.fc(x)})
    module = kind()
    module.fc = nn.Linear(2, 2)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_pytorch_s_that_the_class_overrides_is_the_class_s(name: str) -> None:
    noted: list[nn.Module] = []
    model = on_cpu(noting(name, noted))
    noted.clear()
    result = METHODS[name](model)
    assert noted
    assert all(self is model.module for self in noted)
    if name in RETURN_THE_MODEL:
        assert result is model


def test_no_method_of_pytorch_s_is_left_to_the_compiled_module_but_those_that_make_a_call() -> None:
    functions = {name: value for name, value in vars(nn.Module).items() if inspect.isfunction(value)}
    methods = {name for name, value in functions.items() if value.__module__.startswith("torch.")}  # others add to it
    own = {name for name in methods if getattr(CompiledModule, name) is getattr(nn.Module, name)}
    special = {name for name in own if name.startswith("__")}
    assert own - special == {"_call_impl", "_wrapped_call_impl", "compile"}
    assert special == {"__call__", "__getstate__", "__setstate__"}


def test_a_class_s_extra_state_travels_in_the_state_dict() -> None:
    class Counted(nn.Linear):
        count = 3

        def get_extra_state(self) -> int:
            return self.count

        def set_extra_state(self, state: int) -> None:
            self.count = state

    model: Any = on_cpu(Counted(2, 2))
    model.count = 5
    state = nn.Sequential(model).state_dict()
    assert state["0._extra_state"] == 5
    other: Any = on_cpu(Counted(2, 2))
    nn.Sequential(other).load_state_dict(state)
    assert other.module.count == other.count == 5


def test_state_dict_hooks_see_the_module() -> None:
    model = on_cpu(small_conv_net())
    seen: list[Any] = []
    model.register_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model.register_state_dict_post_hook(lambda module, *_: seen.append(module))
    model.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model.register_load_state_dict_post_hook(lambda module, _: seen.append(module))
    model.load_state_dict(model.state_dict())
    assert len(seen) == 4
    assert all(module is model.module for module in seen)


def test_a_version_of_the_class_s_own_is_in_the_metadata() -> None:
    class Second(nn.Linear):
        _version = 2

    model = on_cpu(Second(1, 1))
    assert model._version == 2
    assert nn.Sequential(model).state_dict()._metadata["0"] == {"version": 2}


def test_apply_gives_a_function_the_module_itself() -> None:
    def start(module: nn.Module) -> None:
        if type(module) is nn.Linear:
            nn.init.constant_(module.weight, 2.0)

    model = on_cpu(nn.Linear(3, 1, bias=False))
    assert model.apply(start) is model
    assert_fresh(model, torch.ones(1, 3), builds=1, refreshes=0)
    nn.Sequential(model).apply(lambda module: isinstance(module, nn.Linear) and nn.init.ones_(module.weight))
    assert_fresh(model, torch.ones(1, 3), builds=1, refreshes=1)
    assert model.weight.tolist() == [[1.0, 1.0, 1.0]]


@torch.no_grad()
def test_a_sequential_has_length_items_and_iteration() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    model: Any = on_cpu(module)
    assert len(model) == 3
    assert model[0] is module[0]
    assert list(model) == list(module)
    assert isinstance(model[:2], nn.Sequential)
    model[2] = nn.Linear(2, 4)
    assert model(torch.ones(1, 2)).shape == (1, 4)
    del model[2]
    assert model.append(nn.Linear(2, 5)) is model
    model += nn.Sequential(nn.Linear(5, 6))
    assert isinstance(model, CompiledModule)
    assert model(torch.ones(1, 2)).shape == (1, 6)
    assert_fresh(model, torch.ones(1, 2), builds=2, refreshes=1)


@torch.no_grad()
def test_a_submodule_that_is_taken_out_of_a_sequential_is_gone_from_the_model_too() -> None:
    model, x = on_cpu(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))), torch.randn(2, 4)
    model(x)
    del model[1]
    assert list(model._modules) == ["0", "1"]
    assert torch.allclose(model(x), model.module(x))
    assert model.report().builds == 2


def test_special_methods_are_there_only_where_the_module_s_class_has_them() -> None:
    model: Any = on_cpu(small_conv_net())
    assert model, "true, as a module without a length is"
    with pytest.raises(TypeError, match="len"):
        len(model)
    blocks: Any = on_cpu(nn.ModuleDict({"a": nn.ReLU()}))
    assert "a" in blocks
    assert "b" not in blocks
    assert bool(blocks)
    assert not on_cpu(nn.ModuleList())


class Model(nn.Module):
    """A module with methods that call itself, as language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.frozen = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)

    def generate(self, x: torch.Tensor, steps: int = 2) -> torch.Tensor:
        for _ in range(steps):
            x = self(x)
        return x

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x) * 2

    def freeze(self) -> "Model":
        self.frozen = True
        self.requires_grad_(False)
        return self


@torch.no_grad()
def test_methods_that_call_the_module_run_the_module_itself() -> None:
    model: Any = on_cpu(Model())
    x = torch.ones(1, 2)
    assert torch.equal(model.generate(x, steps=3), model.module.fc(model.module.fc(model.module.fc(x))))
    assert torch.equal(model.encode(x), model.module.fc(x) * 2)
    assert model.report().builds == 0
    assert inspect.signature(model.generate) == inspect.signature(model.module.generate)
    assert inspect.ismethod(model.generate)


def test_a_method_that_returns_the_module_returns_the_compiled_one() -> None:
    model: Any = on_cpu(Model())
    assert model.freeze() is model
    assert model.module.frozen
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_to_and_its_kin_return_the_model_and_move_the_module() -> None:
    model = on_cpu(small_conv_net())
    assert model.to(torch.float64) is model.to("cpu") is model.cpu() is model
    assert model.module.fc.weight.dtype is torch.float64
    with torch.no_grad():
        assert model(images().double()).dtype is torch.float64
    assert model.half() is model
    assert model.module.fc.weight.dtype is torch.float16
    assert model.float() is model
    assert_fresh(model, images(), builds=2, refreshes=1)


@torch.no_grad()
def test_a_call_of_the_class_s_own_runs_around_the_engine() -> None:
    class Scales(Model):
        def __call__(self, x: torch.Tensor, *, by: float = 1.0) -> torch.Tensor:
            return super().__call__(x * by) + 1

    model = on_cpu(Scales())
    x = torch.randn(2, 2)
    for by in (1.0, 3.0):
        assert torch.allclose(model(x, by=by), model.module.fc(x * by) + 1)
    model.train()
    assert torch.allclose(model(x, by=2.0), model.module.fc(x * 2) + 1)
    report = model.report()
    assert (report.builds, report.calls_by_engine, report.calls_by_module) == (1, 2, 1)


@torch.no_grad()
def test_a_wrapper_put_in_the_place_of_forward_wraps_the_engine() -> None:
    model: Any = on_cpu(Model())
    x, old = torch.ones(1, 2), model.forward
    model.forward = lambda *args: old(*args) + 1
    assert torch.allclose(model(x), model.module.fc(x) + 1)
    assert "forward" not in vars(model.module)
    del model.forward
    assert torch.allclose(model(x), model.module.fc(x))
    assert model.report().calls_by_engine == 2


@torch.no_grad()
def test_a_parametrization_of_the_root_is_followed() -> None:
    model: Any = on_cpu(nn.Linear(2, 2))
    assert_fresh(model, torch.ones(1, 2), builds=1, refreshes=0)
    nn.utils.parametrizations.weight_norm(model)
    assert_fresh(model, torch.ones(1, 2), builds=2, refreshes=1)
    model.parametrizations.weight.original0.mul_(3)
    assert_fresh(model, torch.ones(1, 2), builds=2, refreshes=2)


# --- hooks ---


@torch.no_grad()
@pytest.mark.parametrize("mode", ["eval", "train", "requires grad"])
def test_hooks_on_the_root_run_once_whoever_serves(mode: str) -> None:
    module = Lambda(lambda self, x: self.fc(x), fc=nn.Linear(2, 2))
    calls: list[str] = []

    def before(_: nn.Module, args: Any) -> Any:
        calls.append("before")
        return (args[0] * 2,)

    def after(_: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
        calls.append("after")
        return result + 1

    module.register_forward_pre_hook(before)
    model = on_cpu(module)
    model.register_forward_hook(after)
    model.train(mode == "train")
    x = torch.ones(1, 2)
    with torch.set_grad_enabled(mode == "requires grad"):
        result = model(x.requires_grad_(mode == "requires grad"))
    assert calls == ["before", "after"]
    assert torch.allclose(result, module.fc(x * 2) + 1)


@torch.no_grad()
def test_hooks_of_submodules_are_a_part_of_the_model() -> None:
    module = small_conv_net()
    module.fc.register_forward_hook(lambda _, args, result: result * 3)
    model = on_cpu(module)
    x = images()
    assert relative_error(model(x), module(x)) < 2e-6


@torch.no_grad()
def test_hooks_of_submodules_that_come_and_go_after_the_build_are_followed() -> None:
    model, x = on_cpu(small_conv_net()), images()
    plain = model(x)
    handle = model.fc.register_forward_hook(lambda _, args, result: result * 3)
    assert relative_error(model(x), 3 * plain) < 2e-6
    handle.remove()
    assert relative_error(model(x), plain) < 2e-6
    model.register_forward_hook(lambda *_: None)  # the root's own are around the engine
    model(x)
    report = model.report()
    assert (report.builds, report.calls_by_engine, report.calls_by_module) == (3, 4, 0)


@torch.no_grad()
def test_a_submodule_in_training_mode_is_refused_by_its_name_and_not_served_as_if_it_were_not() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    model, x = on_cpu(module), torch.randn(4, 8)
    expected = model(x)
    module[1].train()
    with pytest.raises(AccuracyError, match="'1' are in training mode"):
        model(x)
    module[1].eval()
    assert torch.equal(model(x), expected)
    module[0].train()  # which changes nothing
    assert torch.equal(model(x), expected)


def hooked(calls: list[Any], *, fails: bool = False) -> nn.Module:
    """A module on whose root every kind of forward hook notes what it was given."""

    def forward(self: Any, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        if fails:
            raise ValueError("no result")
        return self.fc(x) * scale

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        calls.append(("before", module, kwargs["scale"]))
        return args, {"scale": kwargs["scale"] * 2}

    def after(module: nn.Module, args: Any, kwargs: Any, result: torch.Tensor) -> torch.Tensor:
        calls.append(("after", module, kwargs["scale"]))
        return result + 1

    def always(module: nn.Module, args: Any, result: Any) -> None:
        calls.append(("always", module, result is None))

    module = Lambda(forward, fc=nn.Linear(2, 2))
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)
    module.register_forward_hook(always, always_call=True)
    return module


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_hooks_with_keywords_run_once_and_are_given_the_compiled_module(training: bool) -> None:
    calls: list[Any] = []
    model = on_cpu(hooked(calls)).train(training)
    x = torch.ones(1, 2)
    result = model(x, scale=1.5)
    assert calls == [("before", model, 1.5), ("after", model, 3.0), ("always", model, False)]
    assert torch.allclose(result, model.module.fc(x) * 3 + 1)
    assert model.report().calls_by_engine == (not training)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_a_hook_that_is_always_called_is_called_after_an_error(training: bool) -> None:
    calls: list[Any] = []
    model = on_cpu(hooked(calls, fails=True)).train(training)
    with pytest.raises(ValueError, match="no result"):
        model(torch.ones(1, 2), scale=1.5)
    assert [call[0] for call in calls] == ["before", "always"]


@torch.no_grad()
def test_a_hook_that_is_removed_runs_no_more() -> None:
    calls: list[int] = []
    model = on_cpu(Model())
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    model(torch.ones(1, 2))
    handle.remove()
    model(torch.ones(1, 2))
    assert calls == [1]


@pytest.mark.parametrize("training", [False, True])
def test_backward_hooks_of_the_root_run(training: bool) -> None:
    model = on_cpu(Model()).train(training)
    calls: list[str] = []
    model.register_full_backward_pre_hook(lambda *_: calls.append("before"))
    model.register_full_backward_hook(lambda *_: calls.append("after"))
    model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert calls == ["before", "after"]


@torch.no_grad()
def test_hooks_of_the_root_run_in_a_stream() -> None:
    model = on_cpu(Model())
    model.register_forward_hook(lambda module, args, result: result + 1)
    (result,) = model.stream([torch.ones(1, 2)])
    assert torch.allclose(result, model.module.fc(torch.ones(1, 2)) + 1)


# --- copies ---


def pickled(model: CompiledModule) -> CompiledModule:
    return pickle.loads(pickle.dumps(model))


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_module_and_engines_of_its_own_and_the_same_options(duplicate: Callable[[Any], Any]) -> None:
    model = on_cpu(small_conv_net(), "fp16", max_runners=3, keep_fp32=["fc"])
    x = images()
    before = model(x)
    other = duplicate(model)
    assert isinstance(other, CompiledModule)
    assert other.module is not model.module
    assert other._state.options == model._state.options
    assert other.report().builds == 0
    assert torch.equal(other(x), before)
    in_place(other)
    assert relative_error(other(x), before) > 0.1
    assert torch.equal(model(x), before)
    assert (model.report().builds, model.report().refreshes) == (1, 0)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled], ids=["copy", "deepcopy", "pickle"])
def test_a_copy_has_the_mode_of_each_submodule_and_leaves_those_of_the_original(
    duplicate: Callable[[Any], Any],
) -> None:
    model = on_cpu(small_conv_net())
    model.train()
    model.norm.eval()
    other = duplicate(model)
    for either in (model, other):
        assert either.training
        assert either.first.training
        assert not either.norm.training


def test_a_dropped_model_and_its_module_are_freed() -> None:
    module = small_conv_net()
    model = on_cpu(module)
    with torch.no_grad():
        model(images())
    dead = weakref.ref(module), weakref.ref(model)
    del module, model
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


@torch.no_grad()
def test_a_shallow_copy_shares_the_module_and_has_engines_of_its_own() -> None:
    model = on_cpu(small_conv_net(), max_runners=3)
    other = copy.copy(model)
    assert other is not model
    assert other.module is model.module
    assert other._state.options == model._state.options
    assert_fresh(other, images(), builds=1, refreshes=0)
    assert model.report().builds == 0
    in_place(model)
    assert_fresh(other, images(), builds=1, refreshes=1)


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_hooks_of_the_root(duplicate: Callable[[Any], Any]) -> None:
    model = on_cpu(small_conv_net())
    model.register_forward_hook(triple)
    other = duplicate(model)
    assert relative_error(other(images()), model.module.fc(torch.zeros(8))) > 0
    x = images()
    other.load_state_dict(model.state_dict())
    assert relative_error(other(x), model.module.forward(x) * 3) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_has_its_own_engine_inside_a_wrapper_of_forward(duplicate: Callable[[Any], Any]) -> None:
    model: Any = on_cpu(small_conv_net())
    model.forward = functools.partial(negated, model.forward)
    other = duplicate(model)
    in_place(other)
    x = images()
    for either in (model, other):
        assert relative_error(either(x), -either.module(x)) < 2e-6
        assert either.report().calls_by_engine == 1


def negated(forward: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return -forward(x)


def triple(module: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
    return result * 3


@torch.no_grad()
def test_a_whole_model_goes_through_torch_save() -> None:
    file = io.BytesIO()
    model = on_cpu(small_conv_net(), "fp16", max_runners=3)
    x = images()
    expected = model(x)
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert isinstance(other, CompiledModule)
    assert other._state.options == model._state.options
    assert torch.equal(other(x), expected)
    assert (other.report().builds, other.report().calls_by_module) == (1, 0)


@torch.no_grad()
def test_a_copy_is_compiled_also_where_the_class_copies_itself_in_its_own_way() -> None:
    model = on_cpu(torch.fx.symbolic_trace(small_conv_net()))
    for other in (copy.deepcopy(model), pickled(model)):
        assert isinstance(other, CompiledModule)
        assert_fresh(other, images(), builds=1, refreshes=0)


def test_a_parent_s_copy_keeps_what_is_one_object_one_object() -> None:
    model = on_cpu(small_conv_net())
    other = copy.deepcopy(nn.ModuleList([model, model.module, model]))
    assert other[0] is other[2]
    assert other[0].module is other[1]
    assert other[1] is not model.module


# --- inside other modules ---


def test_in_a_sequential_it_trains_and_its_engine_serves_in_eval_mode() -> None:
    torch.manual_seed(0)
    model, head = on_cpu(small_conv_net()), nn.Linear(5, 2)
    whole = nn.Sequential(model, head)
    plain = copy.deepcopy(nn.Sequential(model.module, head))
    assert list(whole.state_dict()) == list(plain.state_dict())
    x = images(4)
    for net in (whole, plain):
        optimizer = torch.optim.SGD(net.train().parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert same_values(whole, plain.state_dict())
    assert model.report().calls_by_module == 2
    whole.eval()
    assert not model.module.fc.training
    with torch.no_grad():
        assert relative_error(whole(x), plain.eval()(x)) < 2e-6
    assert (model.report().calls_by_engine, model.report().calls_by_module) == (1, 2)


@pytest.mark.parametrize("enter", [lambda net: net.eval(), lambda net: net.train(False)], ids=["eval", "train(False)"])
def test_a_parent_that_enters_eval_mode_looks_for_untracked_writes(enter: Callable[[nn.Module], Any]) -> None:
    model = on_cpu(small_conv_net())
    whole = nn.Sequential(model)
    assert_fresh(model, images(), builds=1, refreshes=0)
    model.module.fc.weight.data.mul_(-2)
    enter(whole)
    assert_fresh(model, images(), builds=1, refreshes=1)


def test_a_frozen_backbone_s_result_is_used_to_train_a_head() -> None:
    model = on_cpu(small_conv_net()).requires_grad_(False)
    head = nn.Linear(5, 2)
    head(model(images())).sum().backward()
    assert head.weight.grad is not None
    assert model.report().calls_by_engine == 1


@pytest.mark.parametrize("kind", ["equal weights", "exponential"])
def test_an_averaged_model_is_compiled_and_follows_each_update(kind: str) -> None:
    torch.manual_seed(0)
    average = None if kind == "equal weights" else get_ema_multi_avg_fn(0.5)
    model = on_cpu(small_conv_net())
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    plain = AveragedModel(copy.deepcopy(model.module), multi_avg_fn=average, use_buffers=True)
    assert isinstance(averaged.module, CompiledModule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    x = images(4)
    for step in range(3):
        model.train()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
        plain.update_parameters(model.module)
        assert same_values(averaged.module, plain.module.state_dict())
        averaged.eval()
        with torch.no_grad():
            assert relative_error(averaged(x), plain.module.eval()(x)) < 2e-6
        report = averaged.module.report()
        assert (report.builds, report.refreshes, report.calls_by_module) == (1, step, 0)
    assert model.report().builds == 0


def test_a_module_that_holds_a_compiled_one_is_refused_with_the_remedy() -> None:
    model = on_cpu(small_conv_net())
    whole = nn.Sequential(nn.Sequential(model), nn.Linear(5, 2))
    with pytest.raises(OptionError, match=r"submodule '0\.0' is compiled.*`\.module`"):
        on_cpu(whole)
    whole[0][0] = model.module
    assert_fresh(on_cpu(whole), images(), builds=1, refreshes=0)


@torch.no_grad()
def test_a_compiled_module_that_is_put_into_one_later_is_refused_at_the_next_build() -> None:
    model: Any = on_cpu(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    model(torch.ones(1, 2))
    model[0] = on_cpu(nn.Linear(2, 2))
    with pytest.raises(BuildError, match=r"part of another.*`\.module`"):
        model(torch.ones(1, 2))


@torch.no_grad()
def test_export_of_a_compiled_module_is_refused_with_the_remedy() -> None:
    model = on_cpu(small_conv_net())
    for _ in range(2):
        with pytest.raises(BuildError, match=r"cannot be exported.*`\.module`"):
            torch.export.export(model, (images(),))
        assert_fresh(model, images(), builds=1, refreshes=0)
    torch.export.export(model.module, (images(),))


@torch.no_grad()
def test_torch_compile_of_what_holds_a_compiled_module_runs_the_engine() -> None:
    model, head = on_cpu(small_conv_net()), nn.Linear(5, 2)
    compiled = torch.compile(nn.Sequential(model, head), backend="eager")
    x = images()
    for calls in (1, 2):
        assert relative_error(compiled(x), head(model.module(x))) < 2e-6
        assert (model.report().calls_by_engine, model.report().calls_by_module) == (calls, 0)
    in_place(model)
    assert relative_error(compiled(x), head(model.module(x))) < 2e-6
    assert (model.report().builds, model.report().refreshes) == (1, 1)
