"""Every model of the zoo through the CPU path, checked against the module."""

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.helpers import on_cpu, relative_error
from tests.models import ZOO, small_conv_net
from torchaccel.compiled import CompiledModule
from torchaccel.compiler import BACKENDS
from torchaccel.precision import PRECISIONS


def assert_agrees(model: CompiledModule, precision: str, *args: Any, **kwargs: Any) -> None:
    """The engine's result nests like the module's, with its dtypes, and is within the precision's bound."""
    with torch.no_grad():
        got, spec = pytree.tree_flatten(model(*args, **kwargs))
        wanted, expected_spec = pytree.tree_flatten(model.module(*args, **kwargs))
    assert spec == expected_spec
    for y, r in zip(got, wanted, strict=True):
        assert type(y) is type(r)
        if isinstance(r, torch.Tensor):
            assert (y.shape, y.dtype) == (r.shape, r.dtype)
            assert r.any()
            assert relative_error(y, r) < PRECISIONS[precision].bound
    report = model.report()
    assert report.calls_by_module == 0
    assert report.calls_by_engine > 0


@pytest.mark.parametrize("name", ZOO)
def test_a_model_of_the_zoo_computes_the_same(name: str) -> None:
    if name == "bert":
        pytest.importorskip("transformers")
    case = ZOO[name]
    args, kwargs = case.inputs(2)
    model = on_cpu(case.module())
    assert_agrees(model, "fp32", *args, **kwargs)
    assert model.report().builds == 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "bert"])
def test_half_precisions_stay_within_their_bounds(name: str, precision: str) -> None:
    if name == "bert":
        pytest.importorskip("transformers")
    case = ZOO[name]
    args, kwargs = case.inputs(2)
    assert_agrees(on_cpu(case.module(), precision), precision, *args, **kwargs)


@pytest.mark.parametrize("name", ["resnet18", "fpn_resnet18", "bert"])
def test_a_dynamic_batch_serves_every_size_with_one_engine(name: str) -> None:
    if name == "bert":
        pytest.importorskip("transformers")
    case = ZOO[name]
    model = on_cpu(case.module(), dynamic_batch=(1, 2, 4))
    for batch in (3, 1, 4):
        args, kwargs = case.inputs(batch)
        assert_agrees(model, "fp32", *args, **kwargs)
    assert model.report().builds == 1


def test_batch_norms_of_a_real_network_are_folded() -> None:
    case = ZOO["resnet18"]
    model = on_cpu(case.module(), inputs=case.inputs(1)[0])
    assert model.report().engines[0].folded_batch_norms == 20


@pytest.mark.parametrize(("name", "precision"), [("resnet18", "fp32"), ("bert", "fp32")])
def test_inductor_computes_the_same(name: str, precision: str) -> None:
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    if name == "bert":
        pytest.importorskip("transformers")
    case = ZOO[name]
    args, kwargs = case.inputs(2)
    assert_agrees(on_cpu(case.module(), precision, "inductor"), precision, *args, **kwargs)


def test_inductor_serves_a_dynamic_batch_with_one_engine() -> None:
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    model = on_cpu(small_conv_net(), backend="inductor", dynamic_batch=(1, 2, 8))
    for batch in (2, 1, 5, 8):
        assert_agrees(model, "fp32", torch.randn(batch, 3, 8, 8))
    assert model.report().builds == 1
