"""The rivals, each as its own users run it at its best: its best input dtype, layout and mode."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.utils import _pytree

from benchmarks.candidates import Candidate, named, noting, quick_ms, refusal
from torchaccel import trt
from torchaccel.memory import release
from torchaccel.precision import PRECISIONS, tf32_state
from torchaccel.quiet import quiet

NAMES = {
    "eager": "eager",
    "graph": "eager in a CUDA graph",
    "compile": "torch.compile",
    "torch_tensorrt": "Torch-TensorRT",
    "onnx_tensorrt": "ONNX to TensorRT",
}
USUAL = ("eager", "graph", "compile", "torch_tensorrt")
ON_A_CPU = ("eager", "compile")  # which has neither CUDA graphs nor TensorRT
COMPILE_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile on a GPU; the second takes minutes a shape
Run = tuple[Callable[[], Any], Callable[[], object] | None]


def names_for(device: torch.device, of: Sequence[str] = USUAL) -> tuple[str, ...]:
    """Of these peers, those that a device can have."""
    return tuple(name for name in of if device.type == "cuda" or name in ON_A_CPU)


def build(  # noqa: PLR0917
    peer: str,
    module: nn.Module,
    precision: str,
    inputs: Tensor,
    stay: ExitStack,
    modes: Sequence[str] = COMPILE_MODES,
) -> Candidate:
    """A peer's fastest variant on `inputs`; what makes a variant or the whole peer fail is said in the row.

    `stay` closes what has to stay open while the peer is measured.
    """
    candidate = Candidate("peer", NAMES[peer], precision, len(inputs))
    candidate.input_dtype = str(_dtype(inputs, precision)).removeprefix("torch.")
    if refused := refusal(peer if "tensorrt" in peer else "eager", precision, inputs.device):
        candidate.reason = refused[1]
        return candidate
    tried: list[str] = []
    started, best = time.perf_counter(), float("inf")
    for variant, make in _variants(peer, inputs, modes):
        layout = torch.channels_last if "channels-last" in variant else torch.contiguous_format
        ready = partial(prepared, module, precision, inputs, layout)
        try:
            run, spent = _tried(make, ready, precision, inputs.device, stay)
        # What a rival raises, and from how deep, is up to the rival: all of it is a reason in its row.
        except Exception as error:  # noqa: BLE001
            tried.append(f"{variant}: {named(error)}")
            run = None
        if run is None:
            release(inputs.device)  # only here is the error gone, and with it what its frames hold
            continue
        tried.append(f"{variant}: {spent:.4g} ms")
        if spent < best:
            best, candidate.variant, candidate.replay = spent, variant, run[1]
            candidate.call = run[0] if _is_half(precision) else partial(_with_state, precision, run[0])
            candidate.layout = "channels_last" if "channels-last" in variant else "contiguous"
    candidate.graph = peer in ("graph", "torch_tensorrt", "onnx_tensorrt") or (peer == "compile" and inputs.is_cuda)
    candidate.build_ms = 1000 * (time.perf_counter() - started)
    candidate.notes = [f"{NAMES[peer]} {precision} batch {len(inputs)}, tried {'; '.join(tried)}"]
    if candidate.call is None:
        candidate.reason = "; ".join(tried)
    return candidate


def _tried(
    make: Callable[..., Run],
    ready: Callable[[], tuple[nn.Module, Tensor]],
    precision: str,
    device: torch.device,
    stay: ExitStack,
) -> tuple[Run, float]:
    """A variant, ready to run, and the milliseconds that it takes."""
    with _state(precision), noting([]):
        run = make(*ready(), stay)
        return run, quick_ms(run[1] or run[0], device)


def _is_half(precision: str) -> bool:
    """Whether TF32 does not matter; torch.compile would compile anew where it changed, so it is left alone."""
    return PRECISIONS[precision].dtype is not torch.float32


@contextmanager
def _searching() -> Iterator[None]:
    """Let cuDNN try its algorithms for each shape and keep the fastest."""
    before = cudnn.benchmark
    cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark = before


@contextmanager
def _state(precision: str) -> Iterator[None]:
    with _searching(), nullcontext() if _is_half(precision) else tf32_state(PRECISIONS[precision].tf32):
        yield


def _with_state(precision: str, call: Callable[[], Tensor]) -> Tensor:
    with tf32_state(PRECISIONS[precision].tf32):
        return call()


def prepared(
    module: nn.Module, precision: str, inputs: Tensor, layout: torch.memory_format
) -> tuple[nn.Module, Tensor]:
    """A copy of the module and the inputs in the precision's dtype, both in `layout` where they have one."""
    with torch.inference_mode(False):
        copied = copy.deepcopy(module).to(PRECISIONS[precision].dtype).to(memory_format=layout)
        return copied, cast(inputs, precision, layout)


def cast(inputs: Tensor, precision: str, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The inputs in the precision's dtype and in `layout`; ids stay ids, and only inputs have a layout."""
    fits = layout if inputs.dim() == 4 else torch.contiguous_format
    return inputs.to(dtype=_dtype(inputs, precision), memory_format=fits)


def _dtype(inputs: Tensor, precision: str) -> torch.dtype:
    return PRECISIONS[precision].dtype if inputs.is_floating_point() else inputs.dtype


def _variants(peer: str, inputs: Tensor, modes: Sequence[str]) -> Iterator[tuple[str, Callable[..., Run]]]:
    """The variants that differ on these inputs: only images have layouts.

    Torch-TensorRT's and TensorRT's engines take contiguous inputs, and copy any others.
    """
    layouts = ("channels-last", "contiguous") if inputs.dim() == 4 else ("contiguous",)
    if peer in ("eager", "graph"):
        yield from ((layout, _eager if peer == "eager" else _graph) for layout in layouts)
    elif peer == "compile":
        first, *others = modes if inputs.is_cuda else ("default",)
        yield from ((f"{first}, frozen, {layout}", partial(_compiled, first)) for layout in layouts)
        yield from ((f"{mode}, frozen, {layouts[0]}", partial(_compiled, mode)) for mode in others)
    elif peer == "torch_tensorrt":
        yield "its own CUDA graphs", _torch_tensorrt
    else:
        yield "in a CUDA graph", _onnx_tensorrt


def _eager(module: nn.Module, inputs: Tensor, stay: ExitStack) -> Run:
    def call() -> Any:
        with _searching():
            return module(inputs)

    return call, None


def _graph(module: Callable[[Tensor], Any], inputs: Tensor, stay: ExitStack) -> Run:
    static, stream = inputs.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Else cuBLAS would go on in a workspace of the graph before, which goes with that.
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph):
        output = module(static)
    torch._C._cuda_clearCublasWorkspaces()

    def call(_weights: object = module) -> Any:  # the graph reads them where they lie, so they have to stay
        static.copy_(inputs)
        graph.replay()
        return _pytree.tree_map(torch.clone, output)

    return call, graph.replay


def _compiled(mode: str, module: nn.Module, inputs: Tensor, stay: ExitStack) -> Run:
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    # Every variant is another compilation of the same forward: past the limit, torch.compile would run eager.
    with dynamo.patch(recompile_limit=256, accumulated_recompile_limit=4096), inductor.patch(freezing=True):
        compiled = torch.compile(module, mode=mode, dynamic=False, fullgraph=True)
        for _ in range(3):  # CUDA graph trees warm up, then record
            compiled(inputs)
    return lambda: compiled(inputs), None


def _torch_tensorrt(module: nn.Module, inputs: Tensor, stay: ExitStack) -> Run:
    import torch_tensorrt

    options = {"min_block_size": 1, "use_explicit_typing": True, "disable_tf32": not cudnn.allow_tf32}
    built = torch_tensorrt.compile(module, ir="dynamo", inputs=[inputs], **options)
    fast = stay.enter_context(torch_tensorrt.runtime.enable_cudagraphs(built))
    return lambda: fast(inputs), None


def _onnx_tensorrt(module: nn.Module, inputs: Tensor, stay: ExitStack) -> Run:
    tensorrt = trt.load()
    with tempfile.TemporaryDirectory() as folder:
        serialised = onnx_engine(tensorrt, module, inputs, str(Path(folder, "model.onnx")))
    return _graph(trt.TensorRTEngine(tensorrt, serialised, inputs.device), inputs, stay)


def onnx_engine(tensorrt: trt.TensorRT, module: nn.Module, inputs: Tensor, path: str) -> bytes:
    """What TensorRT's parser and builder make of PyTorch's own export to ONNX; needs no GPU with TensorRT-RTX."""
    with quiet():
        torch.onnx.export(_folded(module), (inputs,), path, dynamo=True, verbose=False, input_names=["input"])
    shape = tuple(inputs.shape)
    return trt.build_from_onnx(tensorrt, path, [("input", shape, shape, shape)], tf32=cudnn.allow_tf32)


def _folded(module: nn.Module) -> nn.Module:
    """With BatchNorm folded, as is done by hand: the exporter would fold it into FP32 weights beside BF16 inputs."""
    from torch.fx.experimental.optimization import fuse

    if not any(isinstance(child, nn.BatchNorm2d) for child in module.modules()):
        return module
    dtype = next(module.parameters()).dtype
    return fuse(module.float()).to(dtype)
