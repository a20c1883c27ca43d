"""An fp32 ONNX model as an fp16 one, by onnxconverter-common; inputs and outputs stay float32."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from recipes.onnx_model import nodes, tensors

LARGEST, SMALLEST = 65504.0, 2.0**-24  # what fp16 holds
FLOAT32_LARGEST = float(np.finfo(np.float32).max)


def converter_version() -> str:
    """The version of the converter; exits with the remedy where it is missing."""
    try:
        import onnxconverter_common
    except ImportError as error:
        sys.exit(f"fp16 needs a converter of ONNX files ({error}): pip install onnxconverter-common")
    return onnxconverter_common.__version__


def write_fp16(model: onnx.ModelProto, source: Path, path: Path) -> Path:
    """The model's fp16 twin as a file that ONNX's checker accepts; says what fp16 changes."""
    load_external_data_for_model(model, str(source.parent))
    converted, losses = convert(model)
    for line in losses:
        print(f"fp16: {line}")
    onnx.save(converted, path, save_as_external_data=True, location=f"{path.name}.data")
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        sys.exit(f"onnxconverter-common made no valid fp16 model of {source}: {error}")
    return path


def convert(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The model, shapes inferred and weights loaded, in fp16, and a line for each kind of value that fp16 changes.

    The model given is changed too. Operators that the converter knows to need fp32 keep it. Exits where a value is
    beyond fp16: clamped, the model would compute something else. float32's own largest is taken for infinity, which is
    what attention masks and open-ended clamps mean by it, and becomes fp16's.
    """
    converter_version()
    from onnxconverter_common import float16

    for index, node in enumerate(nodes(model.graph)):
        node.name = f"{index}_{node.name}"  # what is added is named after its node: without a name, one twice
    casts = [node.name for node in nodes(model.graph) if node.op_type == "Cast"]
    fp32 = [(name, tensor) for name, tensor in tensors(model.graph) if tensor.data_type == TensorProto.FLOAT]
    before = {name: numpy_helper.to_array(tensor) for name, tensor in fp32}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the float32 number")  # `_losses` says it once for all
            converted = float16.convert_float_to_float16(
                model,
                min_positive_val=SMALLEST,  # rather than to 0: an epsilon keeps a division from failing
                max_finite_val=LARGEST,
                keep_io_types=True,
                disable_shape_infer=True,
                node_block_list=casts,  # one to float32 would go on giving float32
            )
    except ValueError as error:
        sys.exit(f"onnxconverter-common could not convert the model to fp16: {error}")
    changed = {name for name, tensor in tensors(converted.graph) if tensor.data_type == TensorProto.FLOAT16}
    return converted, _losses({name: value for name, value in before.items() if name in changed})


def _losses(values: dict[str, np.ndarray]) -> list[str]:
    beyond, infinite, tiny = {}, 0, 0
    for name, value in values.items():
        size = np.abs(value[np.isfinite(value)])
        open_ended = size == FLOAT32_LARGEST
        infinite += int(open_ended.sum())
        tiny += int(((size > 0) & (size < SMALLEST)).sum())
        if (size[~open_ended] > LARGEST).any():
            beyond[name] = float(size[~open_ended].max())
    if beyond:
        listed = ", ".join(f"{name} ({largest:.4g})" for name, largest in list(beyond.items())[:5])
        more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        sys.exit(f"fp16 ends at {LARGEST:.0f}, and the model has values beyond: {listed}{more}. Build it in tf32.")
    lines = [f"{infinite} values of ±{FLOAT32_LARGEST:.2g} become ±{LARGEST:.0f}"] * bool(infinite)
    return lines + [f"{tiny} values nearer to 0 than {SMALLEST:.1g} become ±{SMALLEST:.1g}"] * bool(tiny)
