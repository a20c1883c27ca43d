"""A torchvision classifier as an ONNX file: `python -m recipes.export_onnx --model resnet18`.

The weights are torchvision's, fetched once into PyTorch's cache and verified, or yours. Each BatchNorm is folded into
the convolution before it. The file must pass `onnx.checker`, and ONNX's own reference evaluator must compute from it
what the module does; only then does it take its place.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import hashlib
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import onnx
import onnx_ir
import torch
import torchvision
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from torchaccel.backends.onnx_tensorrt import export, save
from torchaccel.capture import capture
from torchaccel.errors import TorchAccelError
from torchaccel.precision import PRECISIONS
from torchaccel.signature import read_call
from torchaccel.weights import WeightStore

FP32 = PRECISIONS["fp32"]
LARGEST_BATCH = 4096  # torch.export wants to know; the file itself takes any


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, check, compare, put in place; exits with a message, and without a file, where any of it fails."""
    given = _parser().parse_args(arguments)
    output = given.output or Path("models", f"{given.model}.onnx")
    try:
        if output.is_dir():
            sys.exit(f"--output {output} is a folder: name a file in it, such as {output / given.model}.onnx")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            path = Path(folder, output.name)
            images = random_images(2 if given.dynamic_batch else 1, image_size(given.model))
            module = load(given.model, given.weights)
            print(f"exporting {given.model}", flush=True)
            save(onnx_model(module, images, dynamic_batch=given.dynamic_batch), str(path))
            onnx.checker.check_model(path, full_check=True)
            print("comparing: seconds, but minutes for GoogLeNet, Inception and the largest models", flush=True)
            batches = [images, images[:1]] if given.dynamic_batch else [images]
            errors = {len(batch): relative_errors(path, module, batch) for batch in batches}
            text = describe(path, errors)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # from 1 GiB on, weights have their own file
                os.replace(file, output.with_name(file.name))
    except (TorchAccelError, onnx.checker.ValidationError) as error:
        sys.exit(f"{given.model} could not be exported: {error}")
    except OSError as error:
        sys.exit(f"could not write {output}: {error}")
    print(f"{output}: {text}")


def image_size(name: str) -> int:
    """The height and width of the images that a model was trained on."""
    return get_model_weights(name).DEFAULT.transforms().crop_size[0]


def random_images(batch: int, size: int) -> Tensor:
    """Noise in the shape of images, the same at every run."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def load(name: str, weights: str) -> nn.Module:
    """The model in eval mode: with torchvision's "default" weights, "none" (random ones), or a state_dict's."""
    if weights == "default":
        return pretrained(name).eval()
    torch.manual_seed(0)
    module = get_model(name, weights=None)
    if weights == "none":
        return look_trained(module, image_size(name))
    try:
        module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except OSError as error:
        sys.exit(f"--weights {weights}: {error.strerror}; allowed are default, none and the path of a state_dict")
    except (RuntimeError, TypeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        sys.exit(f"--weights {weights} is no state_dict of {name}: {_shortened(str(error))}")
    return module.eval()


def pretrained(name: str) -> nn.Module:
    """The model with torchvision's best weights, from PyTorch's cache or fetched into it, their SHA-256 verified."""
    weights = get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    beginning = cached.stem.rpartition("-")[2]
    if cached.exists() and not hashlib.sha256(cached.read_bytes()).hexdigest().startswith(beginning):
        sys.exit(f"{cached} is damaged: its SHA-256 does not begin with {beginning}. Delete it and run this again.")
    try:
        return get_model(name, weights=weights)  # which verifies what it fetches
    except (OSError, HTTPException, RuntimeError) as error:
        sys.exit(
            f"could not fetch {weights.url} into {cached.parent}: {error}. Without it, --weights none exports random "
            f"weights, and --weights PATH those of a state_dict of yours."
        )


@torch.no_grad()
def look_trained(module: nn.Module, size: int) -> nn.Module:
    """Random weights with what the comparison needs: BatchNorm statistics, and no layer that starts at zero.

    Without, signals fade with depth and the output is the last layer's bias, whatever went wrong before.
    """
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    module.eval()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = 1.0
            child.train()
    module(random_images(4, size))
    return module.eval()


def onnx_model(module: nn.Module, images: Tensor, *, dynamic_batch: bool) -> onnx_ir.Model:
    """The module as ONNX, BatchNorm folded: images [N, 3, H, W] in, logits [N, classes] out, both float32."""
    call = read_call((images,), {})
    sizes = (1, len(images), LARGEST_BATCH) if dynamic_batch else None
    program = capture(module, call, call.tensors, FP32, dynamic_batch=sizes)
    program.take_weights(WeightStore(), module)
    model = export(program)
    for node in model.graph:
        # With a stride of 1 there is nothing to round, but the reference evaluator pads for it.
        if node.op_type == "MaxPool" and set(node.attributes["strides"].as_ints()) == {1}:
            node.attributes.pop("ceil_mode", None)
    name_ends(model.graph)
    return model


def name_ends(graph: onnx_ir.Graph) -> None:
    """Call the input `images`, the output `logits` and a dynamic dimension `batch`, wherever it stands."""
    images, logits = graph.inputs[0], graph.outputs[0]
    images.name, logits.name = "images", "logits"
    batch = images.shape[0]
    for value in (images, *(output for node in graph for output in node.outputs)):
        if isinstance(batch, onnx_ir.SymbolicDim) and value.shape is not None:
            value.shape = onnx_ir.Shape(
                str(dim).replace(str(batch), "batch") if isinstance(dim, onnx_ir.SymbolicDim) else dim
                for dim in value.shape
            )


def relative_errors(path: Path, module: nn.Module, images: Tensor) -> tuple[float, float]:
    """‖y−r‖/‖r‖ of the file's logits y and of the module's own, r being the module's in float64.

    Exits where the file's are off by more than FP32's bound and three times what the module itself loses to rounding.
    """
    (logits,) = ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(images.double())
        errors = [
            ((y.double() - exact).norm() / exact.norm()).item() for y in (torch.from_numpy(logits), module(images))
        ]
    allowed = max(FP32.bound, 3 * errors[1])
    if not errors[0] <= allowed:
        sys.exit(
            f"the file does not compute what the module does at batch {len(images)}: its relative error is "
            f"{errors[0]:.2g}, and {allowed:.2g} is allowed. Nothing was written."
        )
    return errors[0], errors[1]


def describe(path: Path, errors: dict[int, tuple[float, float]]) -> str:
    """What the file holds: its size, opset, inputs and outputs, and how far its output is off."""
    model = onnx.load(path, load_external_data=False)
    size_mib = sum(file.stat().st_size for file in path.parent.iterdir()) / 2**20
    lines = [f"{size_mib:.1f} MiB, opset {model.opset_import[0].version}"]
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            dims = [str(dim.dim_param or dim.dim_value) for dim in value.type.tensor_type.shape.dim]
            lines.append(f"  {kind} {value.name}: float32 [{', '.join(dims)}]")
    for batch, (error, own) in errors.items():
        lines.append(f"  relative error against float64 at batch {batch}: {error:.1e}; the module's own: {own:.1e}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.export_onnx", description=(__doc__ or "").partition(": `")[0] + "."
    )
    parser.add_argument("--model", type=_model, default="resnet18", help="a classifier of torchvision (resnet18)")
    parser.add_argument(
        "--weights",
        default="default",
        help="default (torchvision's own), none (random, seeded) or the path of a state_dict (default)",
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help="the file to write (models/MODEL.onnx)")
    parser.add_argument("--dynamic-batch", action="store_true", help="let the file take any batch size, not just 1")
    return parser


def _model(name: str) -> str:
    known = list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known
        raise argparse.ArgumentTypeError(f"torchvision has no classifier {name!r}. There are: {', '.join(close)}")
    return name


def _shortened(text: str, limit: int = 800) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]} …"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of the temporary folder's removal
    main()
