"""The rivals, each as its own users run it at its best: its best input dtype, layout and mode."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from benchmarks.candidates import Candidate, noting, refusal
from torchaccel.precision import PRECISIONS, tf32_state
from torchaccel.timing import measure

NAMES = {
    "eager": "eager",
    "graph": "eager in a CUDA graph",
    "compile": "torch.compile",
    "torch_tensorrt": "Torch-TensorRT",
}
COMPILE_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile on a GPU; the second takes minutes a shape
Run = tuple[Callable[[], Tensor], Callable[[], object] | None]


def names_for(device: torch.device) -> tuple[str, ...]:
    """The peers that a device can have: a CPU has neither CUDA graphs nor TensorRT."""
    return tuple(NAMES) if device.type == "cuda" else ("eager", "compile")


def build(  # noqa: PLR0917
    peer: str,
    module: nn.Module,
    precision: str,
    images: Tensor,
    stay: ExitStack,
    modes: Sequence[str] = COMPILE_MODES,
) -> Candidate:
    """A peer's fastest variant on `images`; what makes a variant or the whole peer fail is said in the row.

    `stay` closes what has to stay open while the peer is measured.
    """
    candidate = Candidate("peer", NAMES[peer], precision, len(images))
    candidate.input_dtype = str(PRECISIONS[precision].dtype).removeprefix("torch.")
    native = "torch_tensorrt" if peer == "torch_tensorrt" else "eager"
    if refused := refusal(native, precision, images.device):
        candidate.reason = refused[1]
        return candidate
    tried: list[str] = []
    started, best = time.perf_counter(), float("inf")
    for variant, make in _variants(peer, images.device, modes):
        try:
            with _state(precision), noting([]):
                run = make(*_prepared(module, precision, images, variant), stay)
                few = {"samples": 20, "warmup": 3} if images.is_cuda else {"samples": 3, "warmup": 1}
                spent = measure(run[1] or run[0], device=images.device, **few).median_ms
        # What a rival raises, and from how deep, is up to the rival: all of it is a reason in its row.
        except Exception as error:  # noqa: BLE001
            tried.append(f"{variant}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            continue
        tried.append(f"{variant}: {spent:.4g} ms")
        if spent < best:
            best, candidate.variant, candidate.replay = spent, variant, run[1]
            candidate.call = run[0] if _is_half(precision) else partial(_with_state, precision, run[0])
            candidate.layout = "channels_last" if "channels-last" in variant else "contiguous"
    candidate.graph = peer in ("graph", "torch_tensorrt") or (peer == "compile" and images.is_cuda)
    candidate.build_ms = 1000 * (time.perf_counter() - started)
    candidate.notes = [f"{NAMES[peer]} {precision} batch {len(images)}, tried {'; '.join(tried)}"]
    if candidate.call is None:
        candidate.reason = "; ".join(tried)
    return candidate


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


def _prepared(module: nn.Module, precision: str, images: Tensor, variant: str) -> tuple[nn.Module, Tensor]:
    dtype = PRECISIONS[precision].dtype
    layout = torch.channels_last if "channels-last" in variant else torch.contiguous_format
    with torch.inference_mode(False):
        copied = copy.deepcopy(module).to(dtype).to(memory_format=layout)
        return copied, images.to(dtype=dtype, memory_format=layout)


def _variants(peer: str, device: torch.device, modes: Sequence[str]) -> Iterator[tuple[str, Callable[..., Run]]]:
    layouts = ("channels-last", "contiguous")
    if peer in ("eager", "graph"):
        yield from ((layout, _eager if peer == "eager" else _graph) for layout in layouts)
    elif peer == "compile":
        for mode in modes if device.type == "cuda" else ("default",):
            yield f"{mode}, frozen, channels-last", partial(_compiled, mode)
    else:
        yield "its own CUDA graphs", _torch_tensorrt


def _eager(module: nn.Module, images: Tensor, stay: ExitStack) -> Run:
    def call() -> Tensor:
        with _searching():
            return module(images)

    return call, None


def _graph(module: nn.Module, images: Tensor, stay: ExitStack) -> Run:
    static, stream = images.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(static)

    def call(_weights: nn.Module = module) -> Tensor:  # the graph reads them where they lie, so they have to stay
        static.copy_(images)
        graph.replay()
        return output.clone()

    return call, graph.replay


def _compiled(mode: str, module: nn.Module, images: Tensor, stay: ExitStack) -> Run:
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    # Every variant is another compilation of the same forward: past the limit, torch.compile would run eager.
    with dynamo.patch(recompile_limit=256, accumulated_recompile_limit=4096), inductor.patch(freezing=True):
        compiled = torch.compile(module, mode=mode, dynamic=False, fullgraph=True)
        for _ in range(3):  # CUDA graph trees warm up, then record
            compiled(images)
    return lambda: compiled(images), None


def _torch_tensorrt(module: nn.Module, images: Tensor, stay: ExitStack) -> Run:
    import torch_tensorrt

    options = {"min_block_size": 1, "use_explicit_typing": True, "disable_tf32": not cudnn.allow_tf32}
    built = torch_tensorrt.compile(module, ir="dynamo", inputs=[images], **options)
    fast = stay.enter_context(torch_tensorrt.runtime.enable_cudagraphs(built))
    return lambda: fast(images), None
