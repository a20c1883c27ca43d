"""Plans through the cache: what hits, what misses, and how a plan that comes back serves."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import small_conv_net
from torchaccel import trt
from torchaccel.backends.base import Plan
from torchaccel.backends.eager import Eager
from torchaccel.backends.onnx_tensorrt import OnnxTensorRT
from torchaccel.cache import plans
from torchaccel.cache.canonical import key_digest
from torchaccel.cache.plans import Found, plan_for, plan_key
from torchaccel.cache.store import Cache
from torchaccel.capture import capture, engine_input
from torchaccel.errors import BuildError, CacheWarning
from torchaccel.options import Options
from torchaccel.precision import PRECISIONS
from torchaccel.program import Program
from torchaccel.signature import read_call
from torchaccel.weights import WeightStore

GPU = torch.device("cuda", 0)
H200 = {"name": "NVIDIA H200", "compute_capability": [9, 0], "multiprocessors": 132, "memory_mib": 143156}
pytestmark = pytest.mark.skipif(bool(trt.unavailable()), reason=f"no TensorRT: {trt.unavailable()}")


class Counted(OnnxTensorRT):
    """The real backend, with a count of what it builds."""

    def __init__(self) -> None:
        self.builds = 0

    def build(self, *args: Any, **options: Any) -> Plan:
        self.builds += 1
        return super().build(*args, **options)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 30)


def program_of(module: nn.Module, x: torch.Tensor, options: Options) -> Program:
    call = read_call((x,), {})
    found = capture(module, call, call.tensors, PRECISIONS[options.precision], dynamic_batch=options.dynamic_batch)
    OnnxTensorRT().lower(found)
    found.take_weights(WeightStore(), module)
    return found


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def asked(
    module: nn.Module | None = None, batch: int = 2, gpu: dict[str, Any] | None = None, **options: Any
) -> tuple[Program, Options, dict[str, Any]]:
    chosen = Options(**options)
    return program_of(module or linear(), torch.randn(batch, 8), chosen), chosen, gpu or H200


def find(cache: Cache | None, backend: Any, **what: Any) -> Found:
    program, options, gpu = asked(**what)
    return plan_for(backend, program, options, GPU, cache=cache, what="Linear", gpu=gpu)


def key_of(backend: Any, **what: Any) -> dict[str, Any]:
    return plan_key(backend, *asked(**what))


def test_the_second_time_a_plan_comes_from_the_cache_byte_for_byte(cache: Cache) -> None:
    backend = Counted()
    built, found = find(cache, backend), find(cache, backend)
    assert backend.builds == 1
    assert (built.from_cache, found.from_cache) == (False, True)
    for field in dataclasses.fields(Plan):
        if field.name != "source":
            assert getattr(built.plan, field.name) == getattr(found.plan, field.name), field.name
    assert found.plan.source is None
    (entry,) = cache.entries()
    assert (entry.kind, entry.info["what"]) == ("plan", "Linear fp16")


@torch.no_grad()
def test_whatever_an_engine_depends_on_is_another_plan(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counted()
    find(cache, backend)
    changed = linear()
    next(changed.parameters())[0, 0].mul_(1 + 2**-8)
    variants: list[dict[str, Any]] = [
        {"module": changed},
        {"batch": 3},
        {"precision": "bf16"},
        {"precision": "fp32"},
        {"precision": "tf32"},
        {"partial": True},
        {"dynamic_batch": (1, 2, 4)},
        {"gpu": {**H200, "name": "NVIDIA H100"}},
        {"gpu": {**H200, "compute_capability": [8, 9]}},
        {"gpu": {**H200, "multiprocessors": 114}},
    ]
    key = key_of(backend)
    others = [key_of(backend, **variant) for variant in variants]
    assert len({key_digest(one) for one in (key, *others)}) == 1 + len(variants)
    assert [key_of(backend, **variant) for variant in variants] == others
    for name, value in (("library", lambda self: "TensorRT of tomorrow"), ("name", "another")):
        with monkeypatch.context() as patch:
            patch.setattr(Counted, name, value)
            assert key_of(backend) != key, name
    versions = plans.versions()
    for name in versions:
        with monkeypatch.context() as patch:
            patch.setattr(plans, "versions", lambda name=name: {**versions, name: "another"})
            assert key_of(backend) != key, name
    assert not find(cache, backend, **variants[0]).from_cache
    assert {"driver", "cuda", "torch", "torch_tensorrt", "tensorrt", "tensorrt_rtx", "torchaccel"} <= set(versions)
    assert find(cache, backend).from_cache
    assert backend.builds == 2


def test_without_a_cache_everything_is_built(cache: Cache) -> None:
    backend = Counted()
    for _ in range(2):
        assert not find(None, backend).from_cache
    assert backend.builds == 2


def test_plans_of_pytorch_itself_are_not_kept(cache: Cache) -> None:
    found = find(cache, Eager())
    assert (found.from_cache, found.why_not_kept) == (False, "")
    assert cache.entries() == []


def test_a_plan_in_several_parts_is_not_kept_and_says_so(cache: Cache) -> None:
    class InParts(OnnxTensorRT):
        def build(self, *args: Any, **options: Any) -> Plan:
            return dataclasses.replace(super().build(*args, **options), manifest={"program": True})

    for _ in range(2):
        found = find(cache, InParts())
        assert not found.from_cache
        assert "outside engines" in found.why_not_kept
    assert cache.entries() == []


def test_a_damaged_plan_is_built_again(cache: Cache) -> None:
    backend = Counted()
    built = find(cache, backend)
    path = cache.path(built.key)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(CacheWarning, match="damaged"):
        assert not find(cache, backend).from_cache
    assert find(cache, backend).from_cache
    assert backend.builds == 2


def test_a_plan_that_does_not_serve_is_forgotten(cache: Cache) -> None:
    backend = Counted()
    find(cache, backend).discard()
    assert not find(cache, backend).from_cache
    find(None, backend).discard()


def test_a_failed_build_leaves_nothing_and_no_lock(cache: Cache) -> None:
    class Failing(OnnxTensorRT):
        def build(self, *args: Any, **options: Any) -> Plan:
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(BuildError, match="ZeroDivisionError"):
            find(cache, Failing())
    assert cache.entries() == []


@pytest.mark.parametrize("dynamic_batch", [None, (1, 4, 8)])
def test_a_plan_from_the_cache_is_rebuilt_as_a_fresh_one_is(cache: Cache, dynamic_batch: Any) -> None:
    backend, options = OnnxTensorRT(), Options(dynamic_batch=dynamic_batch, precision="fp16")
    module, x = small_conv_net(), torch.randn(2, 3, 16, 16)
    for _ in range(2):
        program = program_of(module, x, options)
        found = plan_for(backend, program, options, GPU, cache=cache, what="", gpu=H200)
    assert found.from_cache
    program.drop_weights()
    plan = found.plan
    for number in (1, 2):  # the first export is the rebuild's own; the second has what it left
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1 + 2**-7)
        program.inputs = (engine_input(x[:1] if dynamic_batch else x, torch.float16),)  # as `Builder.rebuild` does
        program.take_weights(WeightStore(), module)
        plan = backend.rebuild(plan, program, GPU)
        program.drop_weights()
        fresh = backend.build(program_of(module, x, options), PRECISIONS["fp16"], GPU)
        assert plan.source is not None
        assert plan.manifest == fresh.manifest
        assert len(plan.payload) == len(fresh.payload), number
        assert plan.payload == fresh.payload, number
