"""torch.onnx's export → TensorRT's ONNX parser → an execution context of our own."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from torchaccel import trt
from torchaccel.backends.base import Plan, TensorRTBacked, engine_manifest, has_fp32_products, tensorrt_honours
from torchaccel.errors import BuildError
from torchaccel.precision import Precision
from torchaccel.program import Program
from torchaccel.quiet import quiet
from torchaccel.report import Coverage

# Constants that shapes and axes are computed from are folded up to this size.
FOLDED_INPUT_BYTES, FOLDED_OUTPUT_BYTES = 1024, 1 << 16


class OnnxTensorRT(TensorRTBacked):
    """TensorRT through an ONNX file, all of the module in one engine."""

    name = "onnx_tensorrt"

    def unavailable(self) -> str | None:
        """Why neither TensorRT proper nor TensorRT-RTX can be used."""
        return trt.unavailable()

    def honours(self, precision: Precision, device: torch.device) -> str | None:
        """What the GPU and this TensorRT honour."""
        return tensorrt_honours(trt.load().flavour, precision, device)

    def library(self) -> str:
        """The TensorRT whose parser it is."""
        return self.tensorrt().name

    def tensorrt(self) -> trt.TensorRT:
        """TensorRT proper where it imports, and TensorRT-RTX otherwise."""
        return trt.load()

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        """Export, clean, parse and build; needs no GPU."""
        return self._build(export(program), program, precision, device)

    def rebuild(self, plan: Plan, program: Program, device: torch.device, *, partial: bool = False) -> Plan:
        """Swap the weights of the kept ONNX graph and build that; the export, which takes longest, is spared."""
        if plan.source is None:
            return self.build(program, plan.precision, device, partial=partial)
        put_weights(plan.source, program)
        return self._build(plan.source, program, plan.precision, device)

    def _build(self, model: Any, program: Program, precision: Precision, device: torch.device) -> Plan:
        tensorrt = self.tensorrt()
        names = [value.name for value in model.graph.inputs]
        profile = [(name, *program.shapes(index)) for index, name in enumerate(names)]
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "model.onnx")
                save(model, path)
                serialised = trt.build_from_onnx(tensorrt, path, profile, tf32=precision.tf32, device=device)
        finally:
            drop_weights(model, program)
        outputs = [value.name for value in model.graph.outputs]
        products = has_fp32_products(program)
        manifest = engine_manifest(tensorrt.flavour, list(enumerate(names)), outputs, fp32_products=products)
        coverage = Coverage(inside=program.operators, engines=1)
        return Plan(self.name, precision, serialised, manifest, coverage, tensorrt.name, source=model)


def export(program: Program) -> Any:
    """A program as an `onnx_ir.Model` that TensorRT's parser takes.

    torch.onnx's own optimizer is left out: it merges equal weights, and their names are lost. Without it axes and
    shapes would stay computed, which the parser refuses, so just those are folded here. What is computed from a weight
    (the transposes of linear layers over sequences) is not: all weights keep their names and values.
    """
    import onnx_ir.passes.common as onnx_passes
    import onnxscript.optimizer

    names: dict[str, Any] = {
        "input_names": [f"input_{index}" for index in range(len(program.inputs))],
        "output_names": [f"output_{index}" for index in range(len(program.exported.graph_signature.user_outputs))],
    }
    try:
        with quiet():
            exported = torch.onnx.export(
                program.exported, program.inputs, dynamo=True, optimize=False, verbose=False, **names
            )
    except Exception as error:
        raise BuildError(f"torch.onnx could not export the program: {_root_cause(error)}") from error
    assert exported is not None
    model = exported.model
    onnxscript.optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=FOLDED_INPUT_BYTES,
        output_size_limit=FOLDED_OUTPUT_BYTES,
        should_fold=lambda node: False if any(x is not None and x.name in program.rules for x in node.inputs) else None,
    )
    onnx_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    onnx_passes.RemoveUnusedNodesPass()(model)
    onnx_passes.ClearMetadataAndDocStringPass()(model)  # stack traces, with the paths of this machine
    return model


def put_weights(model: Any, program: Program) -> None:
    """Give the weights of an exported model the values that the program has now."""
    from onnx_ir.tensor_adapters import TorchTensor

    weights = {**program.exported.state_dict, **program.exported.constants}
    for name, value in _weights(model, program):
        value.const_value = TorchTensor(weights[name].detach(), name=name)


def drop_weights(model: Any, program: Program) -> None:
    """Let go of the values of an exported model's weights; names, shapes and dtypes stay."""
    for _, value in _weights(model, program):
        value.const_value = None


def _weights(model: Any, program: Program) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in model.graph.initializers.items() if name in program.rules]


def save(model: Any, path: str) -> None:
    """Write an `onnx_ir.Model`; weights go into a file beside it where one file cannot hold them (2 GiB)."""
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{Path(path).name}.data" if weights > 1 << 30 else None
    onnx_ir.save(model, path, external_data=external)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
