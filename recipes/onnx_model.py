"""What `recipes.build_engine` has to know of an ONNX file before TensorRT reads it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, ValueInfoProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from recipes.engine_manifest import DTYPES, Tensor, sha256

DEFAULT_BATCH = (1, 8, 32)
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")


def read_model(path: Path) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model with its shapes inferred, and the names and SHA-256 of its files; exits where it is no fp32 model.

    Weights in files of their own stay there.
    """
    try:
        onnx_sha256 = sha256(path)
        onnx.checker.check_model(path)
        model = onnx.load(path, load_external_data=False)
        beside = {ExternalDataInfo(t).location for _, t in tensors(model.graph) if uses_external_data(t)}
        external = {name: sha256(path.parent / name) for name in sorted(beside)}
    except OSError as error:
        sys.exit(f"could not read {path}: {error.strerror}")
    except (onnx.checker.ValidationError, DecodeError) as error:
        sys.exit(f"{path} is no valid ONNX file: {error}")
    if found := _other_than_fp32(model):
        sys.exit(f"{path} is no fp32 model: {found}. Every engine is built from the fp32 file.")
    files = {"onnx": path.name, "onnx_sha256": onnx_sha256, "external_data_sha256": external}
    return onnx.shape_inference.infer_shapes(model), files


def _other_than_fp32(model: onnx.ModelProto) -> str | None:
    """What in a model computes in something else, whatever precision is asked for."""
    for name, tensor in tensors(model.graph):
        if tensor.data_type in HALF:
            return f"{name} is {dtype_name(tensor.data_type)}"
    for value in model.graph.input:
        if value.type.tensor_type.elem_type in HALF:
            return f"input {value.name} is {dtype_name(value.type.tensor_type.elem_type)}"
    for node in nodes(model.graph):
        if node.op_type in QUANTIZED:
            return f"it is quantized ({node.op_type} {node.name})"
        if node.op_type == "Cast" and any(attribute.i in HALF for attribute in node.attribute):
            return f"it casts to half precision ({node.name})"
    return None


# --- its parts ---


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside it: the branches of an If, the body of a Loop."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from graphs(inner)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of those inside it."""
    return (node for inner in graphs(graph) for node in inner.node)


def tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Every weight and constant of a graph and of those inside it, with its name or that of its node's output."""
    for inner in graphs(graph):
        yield from ((initializer.name, initializer) for initializer in inner.initializer)
    for node in nodes(graph):
        yield from ((node.output[0], attribute.t) for attribute in node.attribute if attribute.HasField("t"))


# --- shapes ---


def input_shapes(model: onnx.ModelProto, batch: tuple[int, int, int] | None) -> list[Tensor]:
    """The inputs, each with its smallest, best and largest shape; exits where they fit no engine, or no `batch`."""
    weights = {initializer.name for initializer in model.graph.initializer}  # older files list them as inputs
    inputs = [_input(value, batch or DEFAULT_BATCH) for value in model.graph.input if value.name not in weights]
    if not inputs:
        sys.exit("the model has no inputs")
    free = {tensor.shape[0] for tensor in inputs if tensor.min != tensor.max}
    if batch and not free:
        sys.exit("--batch is for files whose first dimension is free; the shapes of this one are fixed")
    if len(free) > 1:
        sys.exit(
            f"the inputs' first dimensions are different ones ({', '.join(sorted(map(str, free)))}): one may be free"
        )
    return inputs


def as_tensor(value: ValueInfoProto) -> Tensor:
    """An input or output as its file describes it."""
    kind = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim]
    return Tensor(value.name, dtype_name(kind.elem_type), shape)


def _input(value: ValueInfoProto, batch: tuple[int, int, int]) -> Tensor:
    """An input with its three shapes; exits where TensorRT lacks its type, or more than its first dimension is free."""
    tensor = as_tensor(value)
    if tensor.dtype not in DTYPES:
        sys.exit(f"input {tensor.name!r} is of {tensor.dtype}; TensorRT takes {', '.join(DTYPES)}")
    if not value.type.tensor_type.HasField("shape"):
        sys.exit(f"input {tensor.name!r} has no shape: export the model with one")
    sizes = [size for size in tensor.shape if isinstance(size, int)]
    if len(sizes) == len(tensor.shape):
        return replace(tensor, min=sizes, best=sizes, max=sizes)
    for index, size in enumerate(tensor.shape[1:], start=1):
        if not isinstance(size, int):
            name = f" ({size})" if size else ""
            sys.exit(
                f"dimension {index}{name} of input {tensor.name!r} is free: only the first may be. Export the model "
                f"with a fixed size for it."
            )
    low, best, high = ([first, *sizes] for first in batch)
    return replace(tensor, min=low, best=best, max=high)


def dtype_name(kind: int) -> str:
    """PyTorch's name of an ONNX type."""
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    name = TensorProto.DataType.Name(kind)
    return names.get(name, name.lower())
