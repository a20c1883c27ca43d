"""The contract that every backend keeps, tested on all that this machine has."""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchaccel
from tests.helpers import captured, images, relative_error, settled, without_compiler
from tests.models import small_conv_net
from torchaccel.backends.base import Engine, NativeEngine, Plan, native_honours
from torchaccel.compiler import AUTO, BACKENDS
from torchaccel.errors import BackendError, BuildError
from torchaccel.options import BACKENDS as BACKEND_NAMES
from torchaccel.precision import PRECISIONS, tf32_state
from torchaccel.program import Program
from torchaccel.weights import WeightStore

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FP32 = PRECISIONS["fp32"]
NATIVE = [name for name, backend in BACKENDS.items() if backend.native]
HERE = [
    pytest.param(name, marks=pytest.mark.skipif(bool(backend.unavailable()), reason=str(backend.unavailable())))
    for name, backend in BACKENDS.items()
]


class TwoOutputs(nn.Module):
    """A BatchNorm to fold, an input that is not used, and two outputs, one of them of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return y, y.argmax(1)


@cache
def example() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return settled(TwoOutputs()), torch.randn(2, 3, 6, 6), torch.zeros(5)


def lowered(name: str, module: nn.Module, store: WeightStore) -> Program:
    _, x, unused = example()
    program = captured(module, x, unused)
    BACKENDS[name].lower(program)
    program.take_weights(store, module, channels_last=BACKENDS[name].native)
    return program


@cache
def built(name: str) -> tuple[Plan, nn.Module, WeightStore]:
    module, store = settled(TwoOutputs()), WeightStore()
    module.load_state_dict(example()[0].state_dict())
    device = CPU if BACKENDS[name].native else GPU
    return BACKENDS[name].build(lowered(name, module, store), FP32, device), module, store


@cache
def loaded(name: str) -> tuple[Engine, nn.Module, WeightStore]:
    plan, module, store = built(name)
    return BACKENDS[name].load(plan, CPU), module, store


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, nn.Module, WeightStore]]:
    """An engine that runs on a CPU; its module gets its weights back afterwards."""
    if reason := BACKENDS[request.param].unavailable():
        pytest.skip(reason)
    engine, module, store = loaded(request.param)
    yield engine, module, store
    module.load_state_dict(example()[0].state_dict())
    store.refresh(module)


# --- what a backend says of itself ---


def test_the_table_the_options_and_auto_name_the_same_backends() -> None:
    assert tuple(BACKENDS) == BACKEND_NAMES
    assert all(backend.name == name for name, backend in BACKENDS.items())
    assert set(AUTO) <= set(BACKENDS)


@pytest.mark.parametrize("name", BACKENDS)
def test_it_is_available_or_has_a_reason(name: str) -> None:
    reason = BACKENDS[name].unavailable()
    assert reason is None or (isinstance(reason, str) and len(reason) > 10)
    (row,) = (row for row in torchaccel.backends() if row.name == name)
    if reason is not None:
        assert (row.available, row.reason) == (False, reason)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.filterwarnings("ignore:backend='auto'", "ignore:gradients")
def test_a_backend_that_is_said_to_be_available_serves_here(name: str) -> None:
    (row,) = (row for row in torchaccel.backends() if row.name == name)
    assert row.available == (row.reason == "")
    if row.available:
        torchaccel.compile(torch.nn.Linear(4, 2), "fp16", backend=name, inputs=torch.ones(3, 4))
    else:
        with pytest.raises(BackendError, match=re.escape(row.reason)):
            torchaccel.compile(torch.nn.Linear(4, 2), "fp16", backend=name)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_honours_a_precision_on_the_cpu_or_has_a_reason(name: str, precision: str) -> None:
    reason = BACKENDS[name].honours(PRECISIONS[precision], CPU)
    if not BACKENDS[name].native:
        assert reason is not None
        assert "GPU" in reason
    elif precision == "tf32":
        assert reason is not None
        assert "TF32" in reason
    else:
        assert reason is None


@pytest.mark.parametrize(
    ("capability", "refused"), [((7, 5), {"tf32", "bf16"}), ((8, 0), set()), ((8, 6), set()), ((12, 0), set())]
)
def test_turing_has_neither_tf32_nor_bf16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: set[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    reasons = {name: native_honours(row, GPU) for name, row in PRECISIONS.items()}
    assert {name for name, reason in reasons.items() if reason} == refused
    for name in refused:
        assert "NVIDIA T4" in str(reasons[name])
        assert name in str(reasons[name])


def test_tensorrt_rtx_is_never_asked_for_ieee_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchaccel.backends import base

    monkeypatch.setattr(base, "device_problem", lambda flavour, index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "TF32" in str(base.tensorrt_honours("tensorrt_rtx", FP32, GPU))
    assert base.tensorrt_honours("tensorrt", FP32, GPU) is None
    for name in ("tf32", "fp16", "bf16"):
        assert base.tensorrt_honours("tensorrt_rtx", PRECISIONS[name], GPU) is None
    monkeypatch.setattr(base, "device_problem", lambda flavour, index: f"{flavour} does not know this GPU")
    assert base.tensorrt_honours("tensorrt_rtx", PRECISIONS["fp16"], GPU) == "tensorrt_rtx does not know this GPU"


@pytest.mark.parametrize(
    ("flavour", "compute", "capability", "marks"),
    [
        ("tensorrt_rtx", ("fp16", ()), (9, 0), (True, False)),
        ("tensorrt_rtx", ("fp16", ("fc",)), (9, 0), (True, True)),
        ("tensorrt_rtx", ("fp16", ("norm",)), (9, 0), (True, False)),
        ("tensorrt_rtx", ("tf32", ()), (9, 0), (True, True)),
        ("tensorrt_rtx", ("tf32", ()), (8, 9), (False, False)),
        ("tensorrt", ("tf32", ()), (9, 0), (False, False)),
    ],
)
def test_engines_that_need_a_graph_are_marked(
    flavour: str, compute: Any, capability: tuple[int, int], marks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchaccel.backends import base

    precision, keep_fp32 = compute
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    program = captured(small_conv_net(), images(), precision=precision, keep_fp32=keep_fp32)
    engine = base.NativeEngine(lambda: (), PRECISIONS[precision])
    assert base.keep_apart(engine, flavour, base.has_fp32_products(program), GPU) is engine
    assert (engine.overlaps, engine.graph_only) == marks


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_what_another_precision_has_in_fp32_is_computed_without_tf32(kept: bool, known: bool) -> None:
    program = captured(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4), precision="fp16", keep_fp32=["0"] * kept)
    seen: list[bool] = []

    def run(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return (x,)

    with tf32_state(True):
        NativeEngine(run, PRECISIONS["fp16"], program if known else None)(torch.ones(1))
    assert seen == [known and not kept]  # nothing is set where nothing computes in float32


def test_backends_never_import_each_other() -> None:
    folder = Path(torchaccel.__file__).parent / "backends"
    for path in folder.glob("*.py"):
        imported = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        }
        others = {other for other in BACKENDS if other != path.stem}
        assert not {name for name in imported if name.removeprefix("torchaccel.backends.") in others}, path.name


# --- build ---


@pytest.mark.parametrize("name", HERE)
def test_a_plan_is_bytes_and_plain_data_or_a_program(name: str) -> None:
    plan, _, _ = built(name)
    assert plan.backend == name
    assert plan.precision is FP32
    assert plan.library
    assert json.loads(json.dumps(plan.manifest)) is not None
    if BACKENDS[name].native:
        assert isinstance(plan.payload, Program)
        assert plan.size_mib() == 0
    else:
        assert isinstance(plan.payload, bytes)
        assert plan.size_mib() == len(plan.payload) / 2**20
        assert plan.coverage is not None
        assert plan.coverage.engines == 1
        assert not plan.coverage.outside
        assert plan.coverage.inside["aten.conv2d.default"] == 1


# --- load ---


def test_an_engine_returns_a_tuple_of_what_the_module_computes(
    native: tuple[Engine, nn.Module, WeightStore],
) -> None:
    engine, module, _ = native
    _, x, unused = example()
    before = x.clone()
    results = engine(x, unused)
    assert isinstance(results, tuple)
    with torch.no_grad():
        expected = module(x, unused)
    assert relative_error(results[0], expected[0]) < 1e-6
    assert torch.equal(results[1], expected[1])
    assert results[1].dtype is torch.int64
    assert torch.equal(x, before)
    assert not results[0].requires_grad


def test_an_engine_does_not_heed_inference_mode_autocast_or_grad_mode(
    native: tuple[Engine, nn.Module, WeightStore],
) -> None:
    engine, _, _ = native
    _, x, unused = example()
    with torch.no_grad():
        expected = engine(x, unused)[0].clone()
    contexts: list[Any] = [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()]
    for context in contexts:
        with context:
            result = engine(x, unused)[0]
        assert torch.equal(result, expected)
        assert result.dtype is torch.float32
        assert not result.requires_grad
        assert not result.is_inference()


def test_an_engine_s_other_self_computes_the_same(native: tuple[Engine, nn.Module, WeightStore]) -> None:
    engine, _, _ = native
    _, x, unused = example()
    first = engine(x, unused)[0].clone()
    assert torch.equal(engine.another()(x, unused)[0], first)
    assert engine.device_bytes() == 0


def test_a_native_engine_runs_on_the_store_s_own_weights(native: tuple[Engine, nn.Module, WeightStore]) -> None:
    engine, module, store = native
    _, x, unused = example()
    assert engine.shares_store
    assert engine.channels_last
    with torch.no_grad():
        module.fc.weight.mul_(-3)
        module.norm.running_var.mul_(2)
        expected = module(x, unused)[0]
    assert relative_error(engine(x, unused)[0], expected) > 0.1
    store.refresh(module)
    assert relative_error(engine(x, unused)[0], expected) < 1e-6


def test_inductor_s_failure_is_a_build_error() -> None:
    backend = BACKENDS["inductor"]
    module = nn.Sequential(nn.Linear(3, 7), nn.GELU())
    program = captured(module, torch.randn(11, 3))
    program.take_weights(WeightStore(), module)
    with without_compiler(), pytest.raises(BuildError, match="Inductor could not compile"):
        backend.load(backend.build(program, FP32, CPU), CPU)
