"""Compiled modules whose engines come from the cache, with a backend whose plans are bytes and which needs no GPU."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchaccel
from tests.cache.damage import rewrite
from tests.helpers import on_cpu
from torchaccel.backends.base import Backend, Engine, NativeEngine, Plan
from torchaccel.cache import plans
from torchaccel.cache.store import Cache
from torchaccel.compiler import BACKENDS
from torchaccel.errors import AccuracyError, BuildError, CacheWarning
from torchaccel.precision import Precision
from torchaccel.program import Program

X = torch.tensor([1.0, -2.0])
MANIFEST = {"flavour": None, "inputs": [(0, "x")], "outputs": [], "fp32_products": False}


class Scale(nn.Module):
    """A module with one weight."""

    def __init__(self, factor: float = 3.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Bytes(Backend):
    """Its plan is the weight's bytes, its engine a product."""

    name = "onnx_tensorrt"
    error = 1.0

    def __init__(self) -> None:
        self.builds = 0

    def unavailable(self) -> str | None:
        return None

    def honours(self, precision: Precision, device: torch.device) -> str | None:
        return None

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        self.builds += 1
        (weight,) = program.exported.state_dict.values()
        return Plan(self.name, precision, struct.pack("d", float(weight) * self.error), MANIFEST.copy())

    def load(self, plan: Plan, device: torch.device) -> Engine:
        if len(plan.payload) != 8:
            raise BuildError("this is no engine")
        (factor,) = struct.unpack("d", plan.payload)
        return _Product(lambda x: [x * factor], plan.precision)


class _Product(NativeEngine):
    shares_store = False


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Bytes:
    backend = Bytes()
    monkeypatch.setitem(BACKENDS, "onnx_tensorrt", backend)
    monkeypatch.setattr(plans, "describe_gpu", lambda _: {"name": "none"})
    return backend


@pytest.fixture
def cache(tmp_path: Path, backend: Bytes) -> Cache:
    return Cache(tmp_path / "cache", 1 << 20)


def model_of(cache: Cache, factor: float = 3.0, **options: Any) -> torchaccel.CompiledModule:
    return on_cpu(Scale(factor), backend="onnx_tensorrt", **{"cache_dir": cache.folder, **options})


@torch.no_grad()
def served(model: torchaccel.CompiledModule, factor: float = 3.0) -> dict[str, Any]:
    """What the report says of the engine, once it has served and was right."""
    assert torch.allclose(model(X), X * factor)
    assert model.report().calls_by_module == 0
    return model.report().to_dict()["engines"][-1]


def replace(cache: Cache, payload: bytes) -> None:
    """Put another plan in the place of the only one, as whole as it was."""
    (entry,) = cache.entries()
    found = restored(json.loads(entry.path.read_bytes().splitlines()[1])["key"])
    assert cache.path(found) == entry.path
    cache.put(found, {"engine": payload}, entry.info)


def restored(value: Any) -> Any:
    """A key as it was before it became JSON."""
    if isinstance(value, list):
        return [restored(item) for item in value]
    if isinstance(value, dict):
        return (
            tuple(map(restored, value["$tuple"])) if "$tuple" in value else {k: restored(v) for k, v in value.items()}
        )
    return value


def test_the_second_model_serves_from_the_cache_and_says_so(cache: Cache, backend: Bytes) -> None:
    first, second = model_of(cache), model_of(cache)
    assert served(first)["from_cache"] is False
    record = served(second)
    assert record["from_cache"] is True
    assert record["gates"], "it was checked like any other"
    assert record["build_ms"] > 0
    assert backend.builds == 1
    assert "• the engine for float32[2] came from the cache" in str(second.report())
    assert "from the cache" not in str(first.report())
    assert cache.entries()[0].info["what"] == "Scale float32[2] fp32"


def test_other_weights_are_another_engine(cache: Cache, backend: Bytes) -> None:
    served(model_of(cache))
    assert served(model_of(cache, 4.0), 4.0)["from_cache"] is False
    assert backend.builds == 2


@torch.no_grad()
def test_new_weights_after_a_hit_are_taken(cache: Cache, backend: Bytes) -> None:
    served(model_of(cache))
    model = model_of(cache)
    assert served(model)["from_cache"] is True
    model.module.factor.fill_(5.0)
    served(model, 5.0)
    assert backend.builds == 2
    assert len(cache.entries()) == 1, "what training leaves behind is not kept"


@pytest.mark.parametrize("payload", [struct.pack("d", 7.0), b"no engine"], ids=["wrong", "not to be loaded"])
def test_an_engine_from_the_cache_that_does_not_serve_is_built_again(
    cache: Cache, backend: Bytes, payload: bytes
) -> None:
    served(model_of(cache))
    replace(cache, payload)
    model = model_of(cache)
    with pytest.warns(CacheWarning, match="does not serve, and is built again"):
        record = served(model)
    assert record["from_cache"] is False
    assert len(record["gates"]) == 1
    assert backend.builds == 2
    assert cache.entries() == []
    assert served(model_of(cache))["from_cache"] is False
    assert served(model_of(cache))["from_cache"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"manifest": ...},
        {"manifest": []},
        {"manifest": {**MANIFEST, "inputs": [0]}},
        {"manifest": {**MANIFEST, "inputs": 3}},
        {"manifest": {**MANIFEST, "flavour": "tensorrt"}},
        {"coverage": [{}, {}]},
        {"coverage": [{"add": "1"}, {}, 1]},
        {"library": None},
    ],
)
def test_an_entry_that_describes_no_engine_is_moved_aside_and_built_again(
    cache: Cache, backend: Bytes, changes: dict[str, Any]
) -> None:
    served(model_of(cache))
    (entry,) = cache.entries()
    info = {**entry.info, **changes}
    rewrite(entry.path, info={name: value for name, value in info.items() if value is not ...})
    with pytest.warns(CacheWarning, match="damaged"):
        assert served(model_of(cache))["from_cache"] is False
    assert served(model_of(cache))["from_cache"] is True
    assert backend.builds == 2


def test_an_entry_without_an_engine_is_moved_aside_and_built_again(cache: Cache, backend: Bytes) -> None:
    served(model_of(cache))
    (entry,) = cache.entries()
    rewrite(entry.path, files=[])
    entry.path.write_bytes(b"".join(entry.path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.warns(CacheWarning, match="damaged .it has no 'engine'"):
        assert served(model_of(cache))["from_cache"] is False


def test_an_engine_that_fails_its_check_is_not_left_in_the_cache(cache: Cache, backend: Bytes) -> None:
    backend.error = 2.0
    with pytest.raises(AccuracyError):
        served(model_of(cache))
    assert cache.entries() == []
    backend.error = 1.0
    assert served(model_of(cache))["from_cache"] is False


def test_memory_that_runs_out_is_no_reason_to_forget_an_engine(
    cache: Cache, backend: Bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(model_of(cache))

    def load(plan: Plan, device: torch.device) -> Engine:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "load", load)
        with pytest.raises(torchaccel.errors.DeviceMemoryError):
            served(model_of(cache))
    assert served(model_of(cache))["from_cache"] is True


def test_it_can_be_switched_off(cache: Cache, backend: Bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(cache.folder))
    for _ in range(2):
        assert served(model_of(cache, cache_dir=False))["from_cache"] is False
    monkeypatch.setenv("TORCHACCEL_CACHE_LIMIT_GIB", "0")
    for _ in range(2):
        assert served(model_of(cache, cache_dir=None))["from_cache"] is False
    assert not cache.folder.exists()
    monkeypatch.delenv("TORCHACCEL_CACHE_LIMIT_GIB")
    served(model_of(cache, cache_dir=None))
    assert len(cache.entries()) == 1


def test_a_folder_that_cannot_be_used_is_a_warning_and_the_build_serves(tmp_path: Path, backend: Bytes) -> None:
    (tmp_path / "file").write_text("mine")
    model = on_cpu(Scale(), backend="onnx_tensorrt", cache_dir=tmp_path / "file")
    with pytest.warns(CacheWarning, match=r"Engines serve all the same.*TORCHACCEL_CACHE_DIR"):
        assert served(model)["from_cache"] is False


def test_what_cannot_be_kept_says_why(cache: Cache, backend: Bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: Program) -> Any:
        raise plans.NoKeyError("the operator mine.own, whose meaning no version of PyTorch fixes")

    monkeypatch.setattr(plans, "program_key", refuse)
    model = model_of(cache)
    assert "mine.own" in served(model)["not_cached_because"]
    assert "not kept in the cache, since it has the operator mine.own" in " ".join(str(model.report()).split())


# --- engines that have weights of their own, which no refresh in place reaches ---


class Observed(Bytes):
    """It notes whether the examples that it is given have values."""

    def __init__(self) -> None:
        super().__init__()
        self.had_values: list[bool] = []

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        self.had_values.append(not any(example.is_meta for example in program.inputs))
        return super().build(program, precision, device, partial=partial)


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Observed:
    backend = Observed()
    monkeypatch.setitem(BACKENDS, "onnx_tensorrt", backend)
    return backend


def of_its_own(**options: Any) -> torchaccel.CompiledModule:
    return on_cpu(Scale(), backend="onnx_tensorrt", cache_dir=False, **options)


@torch.no_grad()
@pytest.mark.parametrize("dynamic_batch", [None, (1, 2, 8)])
def test_every_signature_s_engine_is_built_again_for_a_change_that_the_check_cannot_tell(
    observed: Observed, dynamic_batch: Any
) -> None:
    model = of_its_own(dynamic_batch=dynamic_batch)
    inputs = [torch.rand(size) for size in (1, 2, 3)]
    plans_needed = 3 if dynamic_batch is None else 1
    for factor in (3.0, 3.000001, 3.000002):
        model.module.factor.fill_(factor)
        for x in inputs:
            assert torch.equal(model(x), x * model.module.factor)
    for built in model._state.built.values():
        assert built.program is not None
        (weight,) = built.program.exported.state_dict.values()
        assert weight.is_meta, "the engine has the weights; what it is built again from needs none"
    assert observed.builds == 3 * plans_needed
    assert observed.had_values == [True] * observed.builds
    report = model.report()
    assert (report.builds, report.refreshes, report.calls_by_module) == (plans_needed, 2, 0)
    assert [len(engine.gates) for engine in report.engines] == [len(set(dynamic_batch or (1,)))] * plans_needed


@torch.no_grad()
def test_whatever_is_raised_where_an_engine_is_built_again_is_a_build_error(
    observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of_its_own()
    model(X)
    model.module.factor.fill_(5.0)

    def rebuild(*_: Any, **__: Any) -> Any:
        raise ValueError("a converter's bug")

    with monkeypatch.context() as patch, pytest.raises(BuildError, match=r"built again \(ValueError\): a conv"):
        patch.setattr(observed, "rebuild", rebuild)
        model(X)
    assert torch.equal(model(X), X * 5)


@torch.no_grad()
def test_an_engine_that_could_not_be_built_again_serves_no_more_until_it_can(observed: Observed) -> None:
    model = of_its_own()
    model(X)
    model.module.factor.fill_(5.0)
    observed.error = 2.0
    for _ in range(2):
        with pytest.raises(AccuracyError):
            model(X)
    (built,) = model._state.built.values()
    assert built.program is not None
    (weight,) = built.program.exported.state_dict.values()
    assert weight.is_meta, "no weights are left with the error"
    observed.error = 1.0
    assert torch.equal(model(X), X * 5)
