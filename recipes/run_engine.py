"""An engine of recipes.build_engine, timed: `python -m recipes.run_engine resnet18_fp16.trt 32`.

It refuses an engine that another version of TensorRT or another kind of GPU made, and one that is not the file its
manifest describes. 100 calls on random inputs are timed after a warm-up, from tensors on the GPU to tensors on the GPU.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.engine_manifest import Manifest, ManifestError, Tensor, read
from torchaccel import trt
from torchaccel.backends.base import Plan, engine_manifest, tensorrt_honours
from torchaccel.backends.onnx_tensorrt import OnnxTensorRT
from torchaccel.combinations import device_problem
from torchaccel.errors import MeasurementWarning, TorchAccelError
from torchaccel.figures import Timing
from torchaccel.pool import Pool
from torchaccel.precision import PRECISIONS
from torchaccel.probes import gpus
from torchaccel.runner import Runner
from torchaccel.signature import split_outputs
from torchaccel.timing import measure

SAMPLES = 100
OLDEST = (8, 0)  # what TensorRT-RTX builds for unless it is told otherwise: Ampere and later


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, load, time, print; exits with a message where the engine cannot run here or its outputs are not finite."""
    given = _parser().parse_args(arguments)
    try:
        manifest = read(given.engine)
        batch = chosen_batch(manifest, given.batch)
        check_library(manifest)
        device = usable_gpu(manifest)
        tensors = random_inputs(manifest, batch, device)
        timed = time_runner(load_runner(given.engine, manifest, tensors), tensors)
    except OSError as error:
        sys.exit(f"could not read {given.engine}: {error.strerror}")
    except ManifestError as error:
        sys.exit(str(error))
    except (TorchAccelError, RuntimeError) as error:
        sys.exit(f"{given.engine} could not be run: {error}")
    library = f"{manifest.library} {manifest.library_version}"
    print(f"{given.engine}: {manifest.precision}, {library}, on {gpus()[device.index].name}")
    print(summary(timed, batch))
    if batch != manifest.batches()[1]:
        print(f"  note: the engine is at its best at batch {manifest.batches()[1]}")
    if timed.not_finite:
        advice = " fp16 overflows beyond 65504: build it in tf32." if manifest.precision == "fp16" else ""
        sys.exit(f"not finite, on random inputs: {', '.join(timed.not_finite)}.{advice}")


# --- whether it can run here ---


def chosen_batch(manifest: Manifest, given: int | None) -> int:
    """The batch to run: the one given, or the engine's best; exits where the engine does not take it."""
    low, best, high = manifest.batches()
    if given is None or low <= given <= high:
        return given or best
    allowed = f"{low} alone" if low == high else f"{low} to {high}"
    sys.exit(f"batch {given}: {manifest.engine} takes {allowed}. --batch of recipes.build_engine sets the range.")


def check_library(manifest: Manifest) -> None:
    """Exit where the TensorRT that built the engine is not the one here, to the version."""
    if manifest.flavour not in trt.FLAVOURS or manifest.precision not in PRECISIONS:
        sys.exit(f"{manifest.engine} is of {manifest.flavour} in {manifest.precision}, which are not both known here")
    here = trt.load(manifest.flavour)
    if here.api.__version__ != manifest.library_version:
        sys.exit(
            f"{manifest.engine} was built with {manifest.library} {manifest.library_version}, and here is {here.name}: "
            f"an engine runs only on the version that built it. Build it again from {manifest.onnx}."
        )


def usable_gpu(manifest: Manifest) -> torch.device:
    """The GPU; exits where there is none, or not one that the engine is for."""
    if not gpus():
        sys.exit(f"{manifest.engine} needs an NVIDIA GPU to run: {device_problem(manifest.flavour)}")
    device = torch.device("cuda", torch.cuda.current_device())
    if problem := tensorrt_honours(manifest.flavour, PRECISIONS[manifest.precision], device):
        sys.exit(f"{manifest.engine} cannot run here: {problem}")
    gpu = gpus()[device.index]
    here = ".".join(map(str, gpu.compute_capability))
    made_for = manifest.compute_capability
    if made_for is not None and tuple(made_for) != gpu.compute_capability:
        sys.exit(
            f"{manifest.engine} was built on {manifest.gpu}, compute capability {'.'.join(map(str, made_for))}, and "
            f"here is {gpu.name}, {here}: an engine of TensorRT runs on that kind of GPU. Build it here, from "
            f"{manifest.onnx}."
        )
    if made_for is None and gpu.compute_capability < OLDEST:
        sys.exit(f"{manifest.engine} is for Ampere and later GPUs, compute capability 8.0; {gpu.name} has {here}")
    return device


# --- the run ---


@dataclass(frozen=True)
class Timed:
    """What 100 calls took, and the engine alone: the CUDA graph's replays on buffers as they are.

    `not_finite` has the outputs, by number, with a value that is not finite; `notes` what makes the times less certain.
    """

    call: Timing
    replay: Timing
    why_no_graph: str
    not_finite: tuple[str, ...]
    notes: tuple[str, ...]


def random_inputs(manifest: Manifest, batch: int, device: torch.device) -> list[torch.Tensor]:
    """Inputs on a device: noise, the same at every run, and zeros where whole numbers or truths are wanted."""
    generator = torch.Generator(device).manual_seed(0)

    def random(tensor: Tensor) -> torch.Tensor:
        dtype, shape = getattr(torch, tensor.dtype), tensor.of_batch(batch)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator, device=device).to(dtype)
        return torch.zeros(shape, dtype=dtype, device=device)

    return [random(tensor) for tensor in manifest.inputs]


def load_runner(path: Path, manifest: Manifest, tensors: Sequence[torch.Tensor]) -> Runner:
    """The engine on the GPU that `tensors` are on, behind static buffers of their shapes and a CUDA graph."""
    loading = engine_manifest(
        manifest.flavour,
        list(enumerate(tensor.name for tensor in manifest.inputs)),
        [tensor.name for tensor in manifest.outputs],
        fp32_products=PRECISIONS[manifest.precision].dtype is torch.float32,
    )
    plan = Plan(OnnxTensorRT.name, PRECISIONS[manifest.precision], path.read_bytes(), loading)
    device = tensors[0].device
    engine = OnnxTensorRT().load(plan, device)
    results, outputs = split_outputs(list(engine(*tensors)), tensors)
    dtypes = [result.dtype for result in results]
    return Runner(engine, tensors, dtypes, outputs, Pool(device), path.name)


def time_runner(runner: Runner, tensors: Sequence[torch.Tensor]) -> Timed:
    """Time calls of a runner, and its engine alone."""
    with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MeasurementWarning)
        call = measure(runner, tensors, samples=SAMPLES)
        replay = measure(runner.replay, samples=SAMPLES, device=runner.pool.device)
        results = runner(tensors)
    not_finite = [f"output {index}" for index, result in enumerate(results) if not result.isfinite().all()]
    notes = dict.fromkeys(str(warning.message) for warning in caught)
    return Timed(call, replay, runner.record.why_no_graph, tuple(not_finite), tuple(notes))


def summary(timed: Timed, batch: int) -> str:
    """The figures, a line each."""
    graph = "in a CUDA graph" if not timed.why_no_graph else f"without a CUDA graph: {timed.why_no_graph}"
    lines = [f"batch {batch}, {timed.call.count} calls, {graph}"]
    for name, timing in (("latency of a call", timed.call), ("the engine alone", timed.replay)):
        lines.append(
            f"  {name}: median {timing.median_ms:.4g} ms, mean {timing.mean_ms:.4g}, p95 {timing.p95_ms:.4g}, "
            f"p99 {timing.p99_ms:.4g}"
        )
    lines.append(f"  throughput: {1000 * batch / timed.call.mean_ms:.5g} items/s")
    return "\n".join([*lines, *(f"  note: {note}" for note in timed.notes)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.run_engine", description=(__doc__ or "").partition(": `")[0] + "."
    )
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="the .trt file; its .json lies beside it")
    parser.add_argument("batch", type=int, nargs="?", metavar="BATCH", help="the batch (the engine's own, or its best)")
    return parser


if __name__ == "__main__":
    main()
