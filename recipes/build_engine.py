"""A TensorRT engine from an fp32 ONNX file: `python -m recipes.build_engine resnet18.onnx resnet18 fp16`.

It writes PREFIX.trt (fp32), PREFIX_tf32.trt or PREFIX_fp16.trt, and beside it a JSON file that says what it was built
from and by what. TensorRT-RTX needs no GPU for it; TensorRT builds on the GPU that will run the engine. How far the
engine's outputs are from the model's is not checked here: `torchaccel.compile` does that.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from recipes.engine_manifest import Manifest, Tensor, path_of, sha256
from recipes.onnx_model import as_tensor, input_shapes, read_model
from recipes.onnx_to_fp16 import converter_version, write_fp16
from torchaccel import trt
from torchaccel.backends.base import flavour_honours, tensorrt_honours
from torchaccel.errors import TorchAccelError
from torchaccel.precision import PRECISIONS
from torchaccel.probes import distribution_version, gpus

ENDINGS = {"fp32": ".trt", "tf32": "_tf32.trt", "fp16": "_fp16.trt"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, convert, build, put in place; exits with a message, and without files, where any of it fails."""
    given = _parser().parse_args(arguments)
    engine = given.prefix.with_name(given.prefix.name + ENDINGS[given.precision])
    try:
        tensorrt, gpu = usable_tensorrt(given.precision)
        model, files = read_model(given.model)
        inputs = input_shapes(model, given.batch)
        engine.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{engine.name}.", dir=engine.parent) as folder:
            source = given.model
            if given.precision == "fp16":
                source = write_fp16(model, given.model, Path(folder, "fp16.onnx"))
            print(f"building {engine} with {tensorrt.name}", flush=True)
            started = time.perf_counter()
            built, manifest = Path(folder, engine.name), Path(folder, path_of(engine).name)
            built.write_bytes(build(tensorrt, source, inputs, given.precision))
            build_ms = 1000 * (time.perf_counter() - started)
            record = Manifest(
                engine=engine.name,
                engine_sha256=sha256(built),
                precision=given.precision,
                inputs=inputs,
                outputs=[as_tensor(value) for value in model.graph.output],
                build_ms=round(build_ms, 1),
                versions=versions(given.precision),
                **files,
                **described(tensorrt, gpu),
            )
            manifest.write_text(record.to_json(), encoding="utf-8")
            put_in_place(built, manifest, engine)
    except TorchAccelError as error:
        sys.exit(f"no engine was built: {error}")
    except OSError as error:
        sys.exit(f"could not write {engine}: {error}")
    print(_summary(engine, record))


def usable_tensorrt(precision: str) -> tuple[trt.TensorRT, int | None]:
    """The TensorRT that builds, and the GPU that it builds for, None for any; exits where it lacks the precision."""
    tensorrt = trt.load()
    if gpus():
        device = torch.device("cuda", torch.cuda.current_device())
        reason = tensorrt_honours(tensorrt.flavour, PRECISIONS[precision], device)
    elif tensorrt.is_rtx:
        device, reason = None, flavour_honours(tensorrt.flavour, PRECISIONS[precision])
    else:
        device, reason = None, "TensorRT builds on the GPU that will run the engine, and PyTorch sees none here"
    if reason:
        sys.exit(f"{precision} cannot be had here: {reason}")
    return tensorrt, None if device is None or tensorrt.is_rtx else device.index


def put_in_place(built: Path, manifest: Path, engine: Path) -> None:
    """Both files, or neither: the manifest comes first, since the one of before can be kept meanwhile."""
    place = path_of(engine)
    before = place.read_bytes() if place.is_file() else None
    # Should a kill come between the two: an engine beside another's manifest is known by its SHA-256.
    os.replace(manifest, place)
    try:
        os.replace(built, engine)
    except BaseException:
        if before is None:
            place.unlink()
        else:
            manifest.write_bytes(before)
            os.replace(manifest, place)
        raise


# --- the engine ---


def build(tensorrt: trt.TensorRT, path: Path, inputs: Sequence[Tensor], precision: str) -> bytes:
    """The serialised engine of an ONNX file."""
    profile = [(tensor.name, tuple(tensor.min), tuple(tensor.best), tuple(tensor.max)) for tensor in inputs]
    return trt.build_from_onnx(tensorrt, str(path), profile, tf32=PRECISIONS[precision].tf32)


def described(tensorrt: trt.TensorRT, gpu: int | None) -> dict[str, Any]:
    """What the manifest says of the TensorRT that built and of the GPU that it built for."""
    return {
        "flavour": tensorrt.flavour,
        "library": trt.FLAVOURS[tensorrt.flavour],
        "library_version": tensorrt.api.__version__,
        "gpu": None if gpu is None else gpus()[gpu].name,
        "compute_capability": None if gpu is None else list(gpus()[gpu].compute_capability),
    }


def versions(precision: str) -> dict[str, str | None]:
    """The versions of whatever else took part; None for a torchaccel that is not installed."""
    found = {"torchaccel": distribution_version("torchaccel")}
    found |= {"torch": str(torch.__version__), "onnx": onnx.__version__}
    if precision == "fp16":
        found["onnxconverter-common"] = converter_version()
    return found


def _summary(engine: Path, manifest: Manifest) -> str:
    size_mib = engine.stat().st_size / 2**20
    lines = [f"{engine}: {size_mib:.1f} MiB, {manifest.precision}, built in {manifest.build_ms / 1000:.1f} s"]
    for tensor in manifest.inputs:
        shapes = [tensor.best] if tensor.min == tensor.max else [tensor.min, tensor.best, tensor.max]
        lines.append(f"  input {tensor.name}: {tensor.dtype} {', '.join(map(str, shapes))}")
    lines += [f"  output {tensor.name}: {tensor.dtype}" for tensor in manifest.outputs]
    lines.append(f"  for {manifest.gpu or 'Ampere and later GPUs'}")
    return "\n".join([*lines, f"  to run it: python -m recipes.run_engine {engine}"])


# --- the command line ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.build_engine", description=(__doc__ or "").partition(": `")[0] + "."
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="the fp32 ONNX file")
    parser.add_argument("prefix", type=_prefix, metavar="PREFIX", help="where the engine goes, without its ending")
    parser.add_argument(
        "precision",
        type=_precision,
        metavar="PRECISION",
        help="fp32 (PREFIX.trt; not with TensorRT-RTX), tf32 (PREFIX_tf32.trt) or fp16 (PREFIX_fp16.trt)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs=3,
        action=_Batch,
        metavar=("MIN", "BEST", "MAX"),
        help="the batches that the engine takes, where the file's first dimension is free (1 8 32)",
    )
    return parser


class _Batch(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        low, best, high = values
        if not 1 <= low <= best <= high or low == high:
            parser.error(f"--batch {low} {best} {high}: allowed is 1 <= MIN <= BEST <= MAX, with MIN < MAX")
        namespace.batch = (low, best, high)


def _prefix(text: str) -> Path:
    if text.endswith(("/", ".")) or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no beginning of a file's name; engines/resnet18 would be one")
    return Path(text)


def _precision(name: str) -> str:
    if name == "bf16":
        raise argparse.ArgumentTypeError(
            "the ONNX converter knows no bf16; from the module, torchaccel.compile(module, 'bf16', "
            "backend='onnx_tensorrt') has it. Here there are fp32, tf32 and fp16."
        )
    if name not in ENDINGS:
        raise argparse.ArgumentTypeError(f"{name!r} is no precision of this recipe: there are fp32, tf32 and fp16")
    return name


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of the temporary folder's removal
    main()
