"""Every argument of compile() is checked, and an OptionError says what is allowed."""

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchaccel
from tests.models import SmallConvNet
from torchaccel.errors import OptionError, TorchAccelError
from torchaccel.options import BACKENDS, ON_WEIGHT_CHANGE, Options, check_module_names, make_options
from torchaccel.precision import PRECISIONS


def compile_with(**options: Any) -> torchaccel.CompiledModule:
    return torchaccel.compile(nn.Linear(2, 2), **{"precision": "fp32", "backend": "eager", "device": "cpu", **options})


WRONG: list[tuple[str, Any, tuple[str, ...]]] = [
    ("precision", "fp8", tuple(PRECISIONS)),
    ("precision", "FP16", tuple(PRECISIONS)),
    ("precision", torch.float16, tuple(PRECISIONS)),
    ("precision", None, tuple(PRECISIONS)),
    ("backend", "tensorrt", ("auto", *BACKENDS)),
    ("backend", ["eager"], ("auto", *BACKENDS)),
    ("fallback", "auto", BACKENDS),
    ("fallback", 3, BACKENDS),
    ("on_weight_change", "warn", ON_WEIGHT_CHANGE),
    ("on_weight_change", None, ON_WEIGHT_CHANGE),
    ("objective", "energy", ("latency",)),
    ("partial", 1, ("True", "False")),
    ("cuda_graph", "yes", ("True", "False")),
    ("cuda_graph", None, ("True", "False")),
    ("max_runners", 0, ("at least 1",)),
    ("max_runners", True, ("at least 1",)),
    ("max_runners", 2.0, ("at least 1",)),
    ("max_runners", None, ("at least 1",)),
    ("check_weights_every", 0, ("None", "at least 1")),
    ("check_weights_every", -3, ("None", "at least 1")),
    ("check_weights_every", True, ("None", "at least 1")),
    ("tolerance", 0, ("None", "positive")),
    ("tolerance", -1e-3, ("None", "positive")),
    ("tolerance", math.nan, ("None", "positive")),
    ("tolerance", math.inf, ("None", "positive")),
    ("tolerance", True, ("None", "positive")),
    ("tolerance", "1e-3", ("None", "positive")),
    ("dynamic_batch", (1, 2), ("min", "opt", "max")),
    ("dynamic_batch", (1, 4, 2), ("min <= opt <= max",)),
    ("dynamic_batch", (4, 2, 8), ("min <= opt <= max",)),
    ("dynamic_batch", (0, 1, 2), ("1 <= min",)),
    ("dynamic_batch", (1, 1, 1), ("max >= 2",)),
    ("dynamic_batch", (1, 2.0, 4), ("whole numbers",)),
    ("dynamic_batch", True, ("None",)),
    ("dynamic_batch", 8, ("min", "opt", "max")),
    ("device", "gpu", ("None", "'cpu'", "'cuda'", "'cuda:N'")),
    ("device", "meta", ("None", "'cpu'", "'cuda'", "'cuda:N'")),
    ("device", 1.5, ("None", "'cpu'", "'cuda'", "'cuda:N'")),
    ("device", "cuda:99", ("torchaccel env",)),
    ("keep_fp32", "fc", ("list of submodule names",)),
    ("keep_fp32", None, ("list of submodule names",)),
    ("keep_fp32", [3], ("name (str)",)),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG, ids=[f"{name}={value!r}" for name, value, _ in WRONG])
def test_a_wrong_value_is_answered_with_what_was_given_and_what_is_allowed(
    name: str, value: Any, allowed: tuple[str, ...]
) -> None:
    with pytest.raises(OptionError) as caught:
        compile_with(**{name: value})
    message = str(caught.value)
    assert f"{name}={value!r}" in message
    for text in allowed:
        assert text in message


def test_an_option_error_is_a_value_error_and_a_torchaccel_error() -> None:
    with pytest.raises(ValueError, match="precision"):
        compile_with(precision="fp8")
    with pytest.raises(TorchAccelError, match="precision"):
        compile_with(precision="fp8")


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "eager", "fallback": "eager"},
        {"backend": "eager", "partial": True},
        {"backend": "onnx_tensorrt", "partial": True},
    ],
    ids=str,
)
def test_a_combination_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        compile_with(**options)
    assert options["backend"] in str(caught.value)


def test_keep_fp32_is_refused_where_the_engine_computes_fp32_in_tf32() -> None:
    with pytest.raises(OptionError, match="keep_fp32 belongs to 'fp16' and 'bf16'"):
        make_options("tf32", "cpu", ["fc"], None)
    assert make_options("fp32", "cpu", ["fc"], None).keep_fp32 == ("fc",)


def test_a_wrong_name_is_answered_with_the_close_ones() -> None:
    with pytest.raises(OptionError, match=r"'dynamic_batches'.*'dynamic_batch'"):
        compile_with(dynamic_batches=(1, 2, 4))
    with pytest.raises(OptionError, match=r"'xyz'.*'precision'"):
        make_options("fp32", None, (), None, xyz=1)


def test_keep_fp32_suggests_names_that_are_close_and_otherwise_lists_what_there_is() -> None:
    with pytest.raises(OptionError, match=r"'fcc'.*Did you mean 'fc'"):
        torchaccel.compile(SmallConvNet(), "fp32", backend="eager", device="cpu", keep_fp32=["first", "fcc"])
    with pytest.raises(OptionError) as caught:
        check_module_names(SmallConvNet(), ["zzzzzz"])
    assert all(repr(name) in str(caught.value) for name, _ in SmallConvNet().named_children())
    many = nn.Sequential(*(nn.ReLU() for _ in range(100)))
    with pytest.raises(OptionError) as caught:
        check_module_names(many, ["zzzzzz"])
    assert str(caught.value).count("'") == 2 * 21
    assert "…" in str(caught.value)
    with pytest.raises(OptionError, match=r"There are none\."):
        check_module_names(nn.Linear(2, 2), ["fc"])


def test_keep_fp32_names_of_the_module_are_taken_from_any_iterable() -> None:
    options = make_options("fp16", "cpu", (name for name in ("first", "fc")), None)
    check_module_names(SmallConvNet(), options.keep_fp32)
    assert options.keep_fp32 == ("first", "fc")
    assert make_options("fp16", "cpu", {"fc"}, None).keep_fp32 == ("fc",)


def test_the_whole_module_is_not_a_name_of_keep_fp32() -> None:
    with pytest.raises(OptionError, match="keep_fp32"):
        torchaccel.compile(SmallConvNet(), "fp16", backend="eager", device="cpu", keep_fp32=[""])


@pytest.mark.parametrize(
    "thing", [SmallConvNet, lambda x: x, None, torch.ones(1)], ids=["class", "function", "None", "tensor"]
)
def test_what_is_no_module_is_refused(thing: Any) -> None:
    with pytest.raises(OptionError, match=r"torch\.nn\.Module"):
        torchaccel.compile(thing, "fp32", backend="eager", device="cpu")


def test_a_compiled_module_is_refused() -> None:
    with pytest.raises(OptionError, match=r"\.module"):
        torchaccel.compile(compile_with(), "fp32", backend="eager", device="cpu")


def test_a_module_with_a_compiled_submodule_is_refused_with_its_name() -> None:
    with pytest.raises(OptionError, match=r"its submodule '1' is compiled already: put its `\.module` there"):
        torchaccel.compile(nn.Sequential(nn.ReLU(), compile_with()), "fp32", backend="eager", device="cpu")


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore:`torch.jit.trace:DeprecationWarning")
def test_torchscript_is_refused_wherever_it_is() -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    for module, where in ((traced, "module is"), (nn.Sequential(nn.ReLU(), traced), r"its submodule '1' is")):
        with pytest.raises(OptionError, match=f"{where} TorchScript.*give the module that it is from"):
            torchaccel.compile(module, "fp32", backend="eager", device="cpu")


@pytest.mark.parametrize(
    ("module", "remedy"),
    [(nn.Linear(2, 2, device="meta"), "to_empty"), (nn.LazyLinear(2), "run the module once")],
    ids=["meta", "lazy"],
)
def test_a_module_whose_weights_have_no_values_is_refused(module: nn.Module, remedy: str) -> None:
    with pytest.raises(OptionError, match=f"'weight' of .*Linear has no values yet.*{remedy}"):
        torchaccel.compile(module.train(), "fp32", backend="eager", device="cpu")
    assert module.training


def test_what_torch_export_gives_is_refused() -> None:
    exported = torch.export.export(nn.Linear(2, 2).eval(), (torch.ones(1, 2),)).module()
    with pytest.raises(OptionError, match=r"refuses eval\(\).*give the module that it was exported from"):
        torchaccel.compile(exported, "fp32", backend="eager", device="cpu")


def test_a_refused_argument_leaves_the_module_as_it_was() -> None:
    module = SmallConvNet().train()
    for wrong in ({"precision": "fp8"}, {"keep_fp32": ["nothing"]}, {"max_runners": 0}):
        with pytest.raises(OptionError):
            torchaccel.compile(module, **{"backend": "eager", "device": "cpu", **wrong})
    assert module.training


def test_a_device_is_taken_in_any_of_its_spellings() -> None:
    assert make_options("fp32", "cpu", (), None).device == torch.device("cpu")
    assert make_options("fp32", torch.device("cpu"), (), None).device == torch.device("cpu")
    assert make_options("fp32", None, (), None).device is None


def test_a_cuda_device_that_is_not_there_says_how_many_are() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(OptionError, match=r"0 usable CUDA device"):
        make_options("fp32", "cuda", (), None)


def test_dynamic_batch_may_be_a_list() -> None:
    assert make_options("fp32", None, (), [1, 2, 4]).dynamic_batch == (1, 2, 4)


def test_the_bound_is_the_tolerance_or_the_precision_s_own() -> None:
    assert Options("bf16").bound == PRECISIONS["bf16"].bound
    assert Options("bf16", tolerance=0.25).bound == 0.25
    assert Options("bf16", tolerance=1).bound == 1


def test_beside_a_coarser_module_the_bound_is_the_coarser_one_s_unless_a_tolerance_is_given() -> None:
    bounds = {name: row.bound for name, row in PRECISIONS.items()}
    for name in ("fp32", "tf32"):
        assert Options(name).bound_beside([torch.float32, torch.int64, torch.float64]) == bounds[name]
        assert Options(name).bound_beside([torch.float32, torch.float16]) == bounds["fp16"]
    assert Options("fp16").bound_beside([torch.float32]) == bounds["fp16"]
    assert Options("fp16").bound_beside([torch.bfloat16, torch.float16]) == bounds["bf16"]
    assert Options("fp32", tolerance=1e-6).bound_beside([torch.bfloat16]) == 1e-6


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().precision = "fp32"  # type: ignore[misc]


def test_compile_and_options_have_the_same_arguments_and_defaults() -> None:
    arguments = {
        name: parameter.default
        for name, parameter in inspect.signature(torchaccel.compile).parameters.items()
        if name not in ("module", "inputs") and parameter.kind is not parameter.VAR_KEYWORD
    }
    assert arguments == {field.name: field.default for field in dataclasses.fields(Options)}


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.sampled_from([torch.float16, torch.device("cpu"), torch.ones(2), torch.tensor(1), object(), int, nn.Linear]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=6,
)


NASTY: list[Any] = [
    10**400,
    2**70,
    -1,
    torch.tensor(1),
    torch.tensor(2.5),
    np.array([1, 2]),
    np.array(["fastest", "eager"]),
    np.float64(0.5),
    float("nan"),
    "",
    "cuda:-1",
    "cuda:99999999999999999999",
    "cpu:1",
    [["fc"]],
    {"fc": 1},
    (float("nan"),) * 3,
    (1, 10**400, 10**401),
    nn.Linear,
    type,
    [[]],
]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Options)])
def test_not_even_a_nasty_value_brings_out_another_exception(name: str) -> None:
    for value in NASTY:
        try:
            compile_with(**{name: value})
        except OptionError as error:
            assert name in str(error)
        except torchaccel.BackendError:
            assert name == "device"


@settings(max_examples=400)
@given(name=st.sampled_from([field.name for field in dataclasses.fields(Options)]), value=JUNK)
def test_whatever_is_given_is_taken_or_refused_with_an_option_error(name: str, value: Any) -> None:
    given_options = {"precision": "fp16", "device": None, "keep_fp32": (), "dynamic_batch": None, name: value}
    try:
        options = make_options(**given_options)
    except OptionError as error:
        assert name in str(error)
        return
    assert is_allowed(name, value)
    assert isinstance(options, Options)


def is_allowed(name: str, value: Any) -> bool:
    """Which values are right, said once more in other words."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    rules = {
        "precision": lambda: value in list(PRECISIONS),
        "backend": lambda: value in ["auto", *BACKENDS],
        "fallback": lambda: value is None or value in list(BACKENDS),
        "dynamic_batch": lambda: value is None or (len(value) == 3 and 1 <= value[0] <= value[1] <= value[2] >= 2),
        "device": lambda: value is None or torch.device(value).type in ("cpu", "cuda"),
        "tolerance": lambda: value is None or (is_number and 0 < value < math.inf),
        "keep_fp32": lambda: not isinstance(value, str) and all(type(item) is str for item in value),
        "partial": lambda: value is True or value is False,
        "cuda_graph": lambda: value is True or value is False,
        "max_runners": lambda: type(value) is int and value >= 1,
        "on_weight_change": lambda: value in list(ON_WEIGHT_CHANGE),
        "check_weights_every": lambda: value is None or (type(value) is int and value >= 1),
        "objective": lambda: value == "latency",
        "race_budget_s": lambda: value is None,
        "cache_dir": lambda: value is None or value is False or (isinstance(value, str | Path) and str(value) != ""),
    }
    return rules[name]()
