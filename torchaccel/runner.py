"""One engine at one input signature: static buffers, a captured CUDA graph, and stream order.

The order, in both directions: a call waits, on the caller's stream, for the call before it, copies its inputs into the
static buffers, replays the graph, copies the outputs out and leaves an event for the next call to wait for. All of it
is enqueued under one lock and the host waits for none of it.
"""

import functools
import weakref
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch

from torchaccel.backends.base import Engine
from torchaccel.edges import complete
from torchaccel.errors import BuildError
from torchaccel.memory import is_out_of_memory
from torchaccel.pool import Pool
from torchaccel.report import RunnerRecord
from torchaccel.signature import OutputSpec

WARM_UP_RUNS = 3
_NO_GUARD = nullcontext()


class Runner:
    """Serves calls of one signature.

    `examples` are tensors as the engine takes them at this signature; `dtypes` are those of the outputs that the module
    would return. Where a graph cannot be captured the engine runs without, and `record` says why.
    """

    def __init__(  # noqa: PLR0917
        self,
        engine: Engine,
        examples: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        outputs: OutputSpec,
        pool: Pool,
        signature: str,
        cuda_graph: bool = True,
    ) -> None:
        self.outputs = outputs
        self.pool = pool
        self.plan_key: Any = None
        self.last_use = 0  # the number of the call that it served last
        self.record = RunnerRecord(signature, graph=False)
        self._is_cuda = pool.device.type == "cuda"
        self._engine = engine
        self._graph_wanted = cuda_graph
        self._dtypes = tuple(dtypes)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: tuple[torch.Tensor, ...] = ()
        with torch.inference_mode(False):
            self._inputs = tuple(engine.input_buffer(index, example) for index, example in enumerate(examples))
        if not self._is_cuda:
            self.record.why_no_graph = "CUDA graphs need a GPU"
        elif not cuda_graph:
            self.record.why_no_graph = "cuda_graph=False"
        else:
            self._capture()
        if self._engine.graph_only and self._graph is None:
            raise BuildError(
                "the engine's results are right in a CUDA graph alone: TensorRT-RTX's tf32 kernels overlap on Hopper "
                f"GPUs where they must not. There is none: {self.record.why_no_graph}. Ask for 'fp16' or 'bf16' "
                "without keep_fp32, or for another backend."
            )
        if self._is_cuda:
            # Its buffers go back to the allocator, and its kernels away, only when the device is done with them.
            weakref.finalize(self, pool.wait).atexit = False
            self.record.device_mib += sum(map(_size_bytes, self._inputs)) / 2**20

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs, new tensors in the module's dtypes, on the device that the inputs are on.

        Tensors on the GPU are read on the current stream, without synchronisation. Tensors on the CPU go through pinned
        memory; then the host waits for the outputs, since they are to be read there.
        """
        on_cpu = [tensor.is_cpu for tensor in tensors]
        from_host = self._is_cuda and all(on_cpu)
        with self._device_guard():
            if self._is_cuda and any(on_cpu):
                tensors = [self._stage(tensor, reuse_pinned=from_host) for tensor in tensors]
            results = self.pool.turn(functools.partial(self._serve, tensors, counted=True))
        return to_host(results) if from_host else results

    def _serve(self, tensors: Sequence[torch.Tensor], counted: bool) -> list[torch.Tensor]:
        self.load_inputs(tensors)
        if counted:
            self.count_call()
        return self.own(self.run())

    def compute(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What a call does for tensors on the device; it counts as none."""
        with self._device_guard():
            return self.pool.turn(functools.partial(self._serve, tensors, counted=False))

    def check(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the engine computes for tensors on its device, in its own dtypes: for the gate; it counts as no call."""

        def run() -> list[torch.Tensor]:
            self.load_inputs(tensors)
            return [result.clone() for result in self.run()]

        with self._device_guard():
            return self.pool.turn(run)

    def outside_time_shares(self) -> dict[str, float]:
        """The share of a run's time that each operator outside TensorRT engines takes; waits for the device."""
        with self._device_guard():
            return self.pool.turn(functools.partial(self._engine.outside_time_shares, *self._inputs))

    def load_inputs(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy a call's tensors into the static buffers, casting on the way; hold the pool's turn."""
        for buffer, tensor in zip(self._inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)

    def count_call(self) -> None:
        """Count a call that this runner, or a twin of it, serves; hold the pool's turn."""
        self.record.calls += 1
        self.pool.calls += 1

    @property
    def overlaps(self) -> bool:
        """Whether nothing keeps its engine's kernels apart that must not overlap: now and then a result is wrong."""
        return self._graph is None and self._engine.overlaps

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The static buffers that the engine reads; hold the pool's turn, or own the runner, to write to them."""
        return self._inputs

    def cast(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """An engine's results in the dtypes that the module would return, themselves where they are that already."""
        return [result.to(dtype) for result, dtype in zip(results, self._dtypes, strict=True)]

    def own(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of an engine's results, in the dtypes that the module would return."""
        return [_own(result, dtype) for result, dtype in zip(results, self._dtypes, strict=True)]

    def twin(self) -> "Runner":
        """One more runner of this signature on the same engine, with buffers and a graph of its own."""
        engine, signature = self._engine.another(), self.record.signature
        return Runner(engine, self._inputs, self._dtypes, self.outputs, self.pool, signature, self._graph_wanted)

    def run(self) -> tuple[torch.Tensor, ...]:
        """Run the engine on the static buffers; hold the pool's turn. A graph overwrites its last results."""
        if self._graph is None:
            return self._engine(*self._inputs)
        self._graph.replay()
        return self._results

    def replay(self) -> None:
        """One run on the static buffers as they are, without copies: what the engine alone costs."""
        with self._device_guard():
            self.pool.turn(self.run)

    def _device_guard(self) -> Any:
        """A graph replays on the current device's stream, whatever device it was captured on."""
        if not self._is_cuda or torch._C._cuda_getDevice() == self.pool.device.index:
            return _NO_GUARD
        return torch.cuda.device(self.pool.device)

    def engine_bytes(self) -> int:
        """Device memory that the engine holds outside PyTorch's allocator."""
        return self._engine.device_bytes()

    def _stage(self, tensor: torch.Tensor, reuse_pinned: bool) -> torch.Tensor:
        """A CPU tensor on the device; the caller's own pinned memory is read directly only if the call waits for it."""
        if not tensor.is_cpu:
            return tensor
        if not (reuse_pinned and tensor.is_pinned()):
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor.detach())
        return tensor.to(self.pool.device, non_blocking=True)

    def _capture(self) -> None:
        """Warm up and capture on a side stream; only this thread's CUDA calls are watched meanwhile."""
        device = self.pool.device
        side, current = self.pool.capture_stream, torch.cuda.current_stream(device)
        assert side is not None
        side.wait_stream(current)
        try:
            with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
                self.pool.turn(functools.partial(self._capture_on, side), side)
        finally:  # what a failure frees, the caller's stream may take only after the side stream has done with it
            current.wait_stream(side)

    def _capture_on(self, side: torch.cuda.Stream) -> None:
        device = self.pool.device
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self._engine(*self._inputs)
        side.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        generator = torch.cuda.default_generators[device.index]
        random_state = generator.clone_state()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            # cuBLAS's workspace of this stream, made in the warm-up, is not the graph's: whoever clears the workspaces,
            # as torch.compile's graphs do, would free it. So the capture makes one, in the pool; and no other graph
            # gets that one, which goes with the pool.
            torch._C._cuda_clearCublasWorkspaces()
            with torch.cuda.graph(graph, pool=self.pool.handle, stream=side, capture_error_mode="thread_local"):
                self._results = self._engine(*self._inputs)
            torch._C._cuda_clearCublasWorkspaces()
            complete(graph)
            self._graph, self.record.graph = graph, True
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.record.why_no_graph = f"the engine cannot be captured: {str(error).strip().splitlines()[0]}"
        finally:
            if self._graph is None:
                self._results = ()
                self._recover(generator, random_state)
        self.record.device_mib = (torch.cuda.memory_reserved(device) - before) / 2**20

    def _recover(self, generator: torch.Generator, random_state: torch.Generator) -> None:
        """Undo what a failed capture leaves behind: a generator and an allocator that take it for still under way."""
        generator.graphsafe_set_state(random_state)
        with suppress(RuntimeError):  # it refuses where the capture, though it failed, was ended in order
            torch._C._cuda_endAllocateToPool(self.pool.device.index, self.pool.handle)
            torch._C._cuda_releasePool(self.pool.device.index, self.pool.handle)  # no graph will
        self.pool.handle = torch.cuda.graph_pool_handle()


def to_host(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Device tensors as CPU tensors of the caller's own, through pinned memory; waits for them."""
    pinned = [torch.empty(result.shape, dtype=result.dtype, device="cpu", pin_memory=True) for result in results]
    for target, result in zip(pinned, results, strict=True):
        target.copy_(result, non_blocking=True)
    torch.cuda.current_stream(results[0].device).synchronize()
    return [target.clone() for target in pinned]


def _own(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy in the dtype that the module would return: no later call changes it."""
    return result.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _size_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
