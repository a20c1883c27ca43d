"""ONNX → TensorRT: real engines from the real parser, built without a GPU, and an ONNX graph that computes the same."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from tests.helpers import Lambda, build_plan, lowered_program, relative_error, settled
from tests.models import ZOO, small_conv_net, small_transformer
from torchaccel import trt
from torchaccel.backends import onnx_tensorrt
from torchaccel.backends.onnx_tensorrt import OnnxTensorRT, export, save
from torchaccel.errors import BuildError
from torchaccel.precision import PRECISIONS
from torchaccel.program import Program
from torchaccel.weights import WeightStore

BACKEND = OnnxTensorRT()
GPU = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(bool(trt.unavailable()), reason=f"no TensorRT: {trt.unavailable()}")


build, lowered = partial(build_plan, BACKEND), partial(lowered_program, BACKEND)


# --- engines ---


@pytest.mark.parametrize("dynamic_batch", [None, (1, 2, 8)], ids=["static", "dynamic"])
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_a_convolutional_network_becomes_one_engine(precision: str, dynamic_batch: Any) -> None:
    plan = build(small_conv_net(), torch.randn(2, 3, 16, 16), precision=precision, dynamic_batch=dynamic_batch)
    assert plan.backend == "onnx_tensorrt"
    assert len(plan.payload) > 10_000
    assert plan.library == trt.load().name
    assert plan.manifest["flavour"] == trt.load().flavour
    assert [index for index, _ in plan.manifest["inputs"]] == [0]
    assert len(plan.manifest["outputs"]) == 1


def test_resnet18_builds() -> None:
    case = ZOO["resnet18"]
    plan = build(case.module(), *case.inputs(2)[0])
    assert plan.size_mib() > 20, "11.7 million weights of two bytes"
    assert plan.coverage is not None
    assert plan.coverage.inside["aten.conv2d.default"] == 20


def test_mobilenet_with_its_hardswish_builds_in_bf16() -> None:
    case = ZOO["mobilenet_v3_large"]
    plan = build(case.module(), *case.inputs(2)[0], precision="bf16")
    assert plan.coverage is not None
    assert plan.coverage.inside["aten.hardswish_.default"] + plan.coverage.inside["aten.hardswish.default"] > 10
    assert plan.size_mib() > 5


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_transformer_with_a_dynamic_batch_builds(precision: str) -> None:
    plan = build(small_transformer(), torch.randn(2, 3, 32, 32), precision=precision, dynamic_batch=(1, 4, 8))
    assert len(plan.payload) > 10_000


def test_a_language_model_with_integer_inputs_builds() -> None:
    pytest.importorskip("transformers")
    case = ZOO["bert"]
    tokens, mask = case.inputs(2)[1].values()
    module = Lambda(lambda self, t, m: self.bert(t, m).last_hidden_state, bert=case.module())
    assert len(build(module, tokens, mask).manifest["inputs"]) == 2


def test_submodules_kept_in_fp32_build() -> None:
    plan = build(small_conv_net(), torch.randn(2, 3, 16, 16), keep_fp32=["second", "fc"])
    assert len(plan.payload) > 10_000


# --- what is refused ---


def test_an_operator_that_the_parser_refuses_is_named() -> None:
    with pytest.raises(BuildError, match=r"Det \("):
        build(Lambda(lambda self, x: torch.linalg.det(x)), torch.randn(2, 3, 3), precision="tf32")


def test_an_operator_that_onnx_does_not_have_is_named() -> None:
    with pytest.raises(BuildError, match=r"torch\.onnx could not export.*linalg_svd"):
        build(Lambda(lambda self, x: torch.linalg.svd(x)[0]), torch.randn(2, 3, 3), precision="tf32")


# --- the ONNX graph ---


def initializers(model: Any) -> dict[str, torch.Tensor]:
    """The weights of an `onnx_ir.Model`; bfloat16 by its bits."""
    return {
        name: torch.from_numpy(np.array(value.const_value.numpy())) for name, value in model.graph.initializers.items()
    }


@pytest.mark.parametrize("make", [small_conv_net, small_transformer])
def test_weights_keep_their_names_and_values(make: Any) -> None:
    program = lowered(make(), torch.randn(2, 3, 32, 32), dynamic_batch=(1, 2, 4))
    held = initializers(export(program))
    assert program.rules
    for name in program.rules:
        weight = {**program.exported.state_dict, **program.exported.constants}[name]
        assert held[name].dtype is torch.float16
        assert torch.equal(held[name], weight.detach()), name


def test_equal_weights_are_not_merged() -> None:
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    for layer in module:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    held = initializers(export(lowered(module, torch.randn(2, 64))))
    assert {name for name in held if name.startswith("module.")} == {
        f"module.{index}.{kind}" for index in range(3) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("make", [small_conv_net, small_transformer])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_rebuilt_plan_is_what_a_fresh_build_makes(make: Any, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make(), torch.randn(2, 3, 32, 32)
    program = lowered(module, x, precision=precision)
    plan = BACKEND.build(program, PRECISIONS[precision], GPU)
    program.drop_weights()
    with torch.no_grad():
        for tensor in (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())):
            tensor.mul_(1 + 2**-9)
    seen: list[dict[str, tuple[Any, ...]]] = []

    def recorded(model: Any, path: str) -> None:
        held = {name: value.const_value for name, value in model.graph.initializers.items()}
        seen.append({name: (int(v.dtype), list(map(int, v.shape)), bytes(v.tobytes())) for name, v in held.items()})
        save(model, path)

    monkeypatch.setattr(onnx_tensorrt, "save", recorded)
    program.take_weights(WeightStore(), module)
    again = BACKEND.rebuild(plan, program, GPU)
    fresh = BACKEND.build(lowered(module, x, precision=precision), PRECISIONS[precision], GPU)
    assert again.payload != plan.payload
    assert again.manifest == fresh.manifest == plan.manifest
    assert seen[0].keys() == seen[1].keys()
    assert [name for name in seen[0] if seen[0][name] != seen[1][name]] == []


def test_what_a_plan_is_rebuilt_from_holds_no_weights() -> None:
    program = lowered(small_conv_net(), torch.randn(2, 3, 32, 32))
    plan = BACKEND.build(program, PRECISIONS["fp16"], GPU)
    program.drop_weights()
    assert program.rules
    for name in program.rules:
        assert plan.source.graph.initializers[name].const_value is None
        assert {**program.exported.state_dict, **program.exported.constants}[name].is_meta
    assert all(tensor.is_meta for tensor in program.inputs)


def evaluate(program: Program, folder: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    path = str(folder / "model.onnx")
    save(export(program), path)
    onnx.checker.check_model(path)
    evaluator = ReferenceEvaluator(path)
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    results = evaluator.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(np.asarray(result)) for result in results]


@pytest.mark.parametrize("make", [small_conv_net, small_transformer])
def test_the_graph_computes_what_the_module_does_at_every_batch(make: Any, tmp_path: Path) -> None:
    module = make()
    program = lowered(module, torch.randn(2, 3, 32, 32), precision="tf32", dynamic_batch=(1, 2, 4))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            (result,) = evaluate(program, tmp_path, x)
            assert relative_error(result, module(x)) < 1e-5


def test_several_inputs_and_outputs_stay_in_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Lambda(
        lambda self, a, unused, b: (self.fc(a) - b, (a > 0).any(1), b.sum(), b.argmax(1)), fc=settled(nn.Linear(4, 3))
    )
    tensors = torch.randn(5, 4), torch.randn(2), torch.randn(5, 3)
    program = lowered(module, *tensors, precision="tf32")
    results = evaluate(program, tmp_path, *tensors)
    with torch.no_grad():
        expected = module(*tensors)
    assert [result.dtype for result in results] == [result.dtype for result in expected]
    for result, wanted in zip(results, expected, strict=True):
        assert torch.allclose(result.double(), wanted.double(), atol=1e-6)
    plan = build(module, *tensors, precision="tf32")
    assert [index for index, _ in plan.manifest["inputs"]] == [0, 1, 2]
    assert len(plan.manifest["outputs"]) == 4


def test_hardswish_in_bf16_is_gone_from_the_graph() -> None:
    program = lowered(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardswish()), torch.randn(1, 3, 4, 4), precision="bf16")
    operators = {node.op_type for node in export(program).graph}
    assert "HardSwish" not in operators
    assert "Conv" in operators
    kept = lowered(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardswish()), torch.randn(1, 3, 4, 4), precision="fp16")
    assert "HardSwish" in {node.op_type for node in export(kept).graph}


def test_weights_beyond_what_one_file_holds_go_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = export(lowered(nn.Linear(64, 64), torch.randn(2, 64), precision="tf32"))
    save(model, str(tmp_path / "one.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]

    class Huge:
        """A model whose weights say that they take 2 GiB."""

        def __init__(self) -> None:
            weight = SimpleNamespace(const_value=SimpleNamespace(nbytes=1 << 30))
            self.graph = SimpleNamespace(
                initializers={"a": weight, "b": weight, "c": SimpleNamespace(const_value=None)}
            )

    import onnx_ir

    write = onnx_ir.save
    monkeypatch.setattr(onnx_ir, "save", lambda _, path, **options: write(model, path, **options))
    save(Huge(), str(tmp_path / "two.onnx"))
    assert {path.name for path in tmp_path.iterdir()} == {"one.onnx", "two.onnx", "two.onnx.data"}
    profile = [(model.graph.inputs[0].name, *((2, 64),) * 3)]
    assert trt.build_from_onnx(trt.load(), str(tmp_path / "two.onnx"), profile, tf32=True)
