"""The one file that imports `tensorrt` or `tensorrt_rtx` and knows how they differ.

Which of the two: Torch-TensorRT uses the one that it was built with, and an engine runs only on the one that built it.
The ONNX route takes TensorRT proper where it imports, and TensorRT-RTX otherwise.
"""

import importlib
import logging
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from torchaccel.errors import BackendError, BuildError, CacheWarning
from torchaccel.probes import import_problem

logger = logging.getLogger(__name__)

FLAVOURS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


Shape = tuple[int, ...]


class TensorRT:
    """TensorRT proper or TensorRT-RTX: its module, and a logger that keeps the errors of the current thread."""

    if TYPE_CHECKING:
        import tensorrt as api  # what the two have in common is type-checked against TensorRT proper

    def __init__(self, flavour: str, api: Any) -> None:
        self.flavour = flavour
        self.__dict__["api"] = api
        self.log = _make_logger(api)
        self._kernels: dict[torch.device, Any] = {}
        self._known_kernels: dict[torch.device, bytes] = {}  # what an earlier process had, or the cache was given
        self._timings: dict[torch.device, bytes] = {}
        self._refused: dict[torch.device, str] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The product's name and version, such as `TensorRT-RTX 1.4.0.76`."""
        return f"{FLAVOURS[self.flavour]} {self.api.__version__}"

    @property
    def is_rtx(self) -> bool:
        """Whether kernels are specialised on the GPU at the first run rather than chosen by timing at the build."""
        return self.flavour == "tensorrt_rtx"

    def share_kernels(self, config: Any, device: torch.device) -> None:
        """Let a context use, and add to, the kernels that this process has specialised for a device (RTX alone)."""
        with self._lock:
            if device not in self._kernels:
                self._kernels[device] = config.create_runtime_cache()
                earlier = self._known_kernels.get(device)
                if earlier is not None and not self._kernels[device].deserialize(earlier):
                    warnings.warn(f"{self.name} refuses the kernels in the cache: new ones are made.", CacheWarning, 2)
            config.set_runtime_cache(self._kernels[device])

    def has_kernels(self, device: torch.device) -> bool:
        """Whether this process has begun to specialise kernels for a device."""
        return device in self._kernels

    def begin_with_kernels(self, device: torch.device, serialised: bytes) -> None:
        """Let the first context on a device begin with the kernels of an earlier process."""
        with self._lock:
            self._known_kernels[device] = serialised

    def new_kernels(self, device: torch.device) -> bytes | None:
        """The kernels that this process has for a device, serialised; None where nothing is new since last time."""
        with self._lock:
            if device not in self._kernels:
                return None
            serialised = bytes(self._kernels[device].serialize())
            if serialised == self._known_kernels.get(device):
                return None
            self._known_kernels[device] = serialised
            return serialised

    def timings(self, device: torch.device) -> bytes:
        """What builds for a device have timed so far, serialised; empty at first, and always on TensorRT-RTX."""
        return self._timings.get(device, b"")

    def begin_with_timings(self, device: torch.device, serialised: bytes) -> None:
        """Let the next build for a device begin with what an earlier process has timed."""
        self._timings[device] = serialised

    def reuse_timings(self, config: "TensorRT.api.IBuilderConfig", device: torch.device) -> None:
        """Let a build time no kernel that an earlier one for the device has timed (TensorRT proper alone).

        Timings that it refuses are dropped; `take_refusal` has its reason.
        """
        if self.is_rtx:
            return
        for serialised in dict.fromkeys((self.timings(device), b"")):
            timings: Any = config.create_timing_cache(serialised)
            if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
                return
            self._refused[device] = self.log.take_errors() or "it gives no reason"
            self._timings.pop(device, None)

    def take_refusal(self, device: torch.device) -> str:
        """Why the timings of earlier builds were refused since last time; "" where they were not."""
        return self._refused.pop(device, "")

    def keep_timings(self, config: "TensorRT.api.IBuilderConfig", device: torch.device) -> None:
        """After a build: keep what it has timed for the next one."""
        if self.is_rtx:
            return
        timings: Any = config.get_timing_cache()
        if timings is not None and (serialised := timings.serialize()) is not None:
            self._timings[device] = bytes(serialised)


def unavailable(flavour: str | None = None) -> str | None:
    """Why neither (or not this) TensorRT can be used, or None where one can."""
    wanted = (flavour,) if flavour else tuple(FLAVOURS)
    problems = {name: import_problem(name) for name in wanted}
    if any(problem is None for problem in problems.values()):
        return None
    return "; ".join(f"{FLAVOURS[name]}: {problem}" for name, problem in problems.items())


def load(flavour: str | None = None) -> TensorRT:
    """The TensorRT of that name, or, for None, the one that the ONNX route takes; raises `BackendError`.

    There is one object for each, which has what was timed and specialised with it.
    """
    problem = unavailable(flavour)
    if problem:
        raise BackendError(f"no TensorRT is usable here: {problem}. Run `python -m torchaccel env` for the remedy.")
    return _loaded(flavour or next(name for name in FLAVOURS if import_problem(name) is None))


@cache
def _loaded(flavour: str) -> TensorRT:
    return TensorRT(flavour, importlib.import_module(flavour))


def _make_logger(api: Any) -> Any:
    levels = {
        api.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        api.ILogger.Severity.ERROR: logging.ERROR,
        api.ILogger.Severity.WARNING: logging.DEBUG,
        api.ILogger.Severity.INFO: logging.DEBUG,
        api.ILogger.Severity.VERBOSE: logging.NOTSET,
    }

    class Logger(api.ILogger):
        """Errors are kept for the exception that follows; everything goes to Python's logging."""

        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors = threading.local()

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.errors.kept = [*getattr(self.errors, "kept", []), message]
                level = logging.DEBUG
            if level > logging.NOTSET:
                logger.log(level, "%s", message)

        def take_errors(self) -> str:
            kept = getattr(self.errors, "kept", [])
            self.errors.kept = []
            return " ".join(" ".join(kept).split())

    return Logger()


def build_from_onnx(
    trt: TensorRT,
    path: str,
    profile: Sequence[tuple[str, Shape, Shape, Shape]],
    *,
    tf32: bool,
    device: torch.device | None = None,
) -> bytes:
    """Build a strongly typed engine from an ONNX file with TensorRT's own parser; returns the serialised engine.

    `profile` has, for each input, its name and its smallest, optimal and largest shape. The engine has two profiles
    where these differ, one for the optimal shapes alone: kernels for a range take 1.4 times as long (ResNet-18 at batch
    32 on TensorRT-RTX 1.4), those of a profile of one shape no longer than a static engine's.
    Raises `BuildError` naming the operators that the parser refuses. On TensorRT proper, builds for one `device` share
    what they time.
    """
    api = trt.api
    trt.log.take_errors()
    builder = api.Builder(trt.log)
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, trt.log)
    if not parser.parse_from_file(path):
        raise BuildError(f"{trt.name} cannot take the ONNX graph: {_parser_errors(parser)}.")
    config = builder.create_builder_config()
    (config.set_flag if tf32 else config.clear_flag)(api.BuilderFlag.TF32)
    if any(low != high for _, low, _, high in profile):
        at_best = [(name, best, best, best) for name, _, best, _ in profile]
        for shapes in (at_best, profile):
            config.add_optimization_profile(optimization_profile(builder, shapes))
    if device is not None:
        trt.reuse_timings(config, device)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise BuildError(f"{trt.name} could not build the engine: {trt.log.take_errors()}")
    if device is not None:
        trt.keep_timings(config, device)
    return bytes(serialised)


def optimization_profile(builder: Any, shapes: Sequence[tuple[str, Shape, Shape, Shape]]) -> Any:
    """A builder's profile with, for each input named, its smallest, optimal and largest shape."""
    profile = builder.create_optimization_profile()
    for name, low, best, high in shapes:
        profile.set_shape(name, low, best, high)
    return profile


def _parser_errors(parser: Any) -> str:
    messages = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f"{error.node_operator()} ({error.node_name()})" if error.node_operator() else "the graph"
        messages.append(f"{node}: {' '.join(error.desc().split())}")
    return "; ".join(messages) or "the parser gave no reason"


class TensorRTEngine:
    """A serialised engine on one CUDA device, with an execution context of its own.

    Calls run on the current stream and never synchronise. Activation memory comes from PyTorch's allocator.
    `another()` gives a second context on the same weights: a captured graph keeps the context that it was captured in.
    """

    def __init__(
        self,
        trt: TensorRT,
        serialised: bytes,
        device: torch.device,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> None:
        self._trt = trt
        self._shapes: tuple[torch.Size, ...] | None = None
        with torch.cuda.device(device):
            free_before = torch.cuda.mem_get_info(device)[0]
            trt.log.take_errors()
            self._engine = _runtime(trt.flavour).deserialize_cuda_engine(serialised)
            if self._engine is None:
                raise BuildError(
                    f"{trt.name} could not load the engine on {torch.cuda.get_device_name(device)}: "
                    f"{trt.log.take_errors()}"
                )
            self.weight_bytes = max(0, free_before - torch.cuda.mem_get_info(device)[0])
        self.device = device
        modes = {name: self._engine.get_tensor_mode(name) for name in self._names()}
        io = trt.api.TensorIOMode
        self.inputs = list(inputs or [name for name, mode in modes.items() if mode == io.INPUT])
        self.outputs = list(outputs or [name for name, mode in modes.items() if mode == io.OUTPUT])
        self._bound = [(index, name) for index, name in enumerate(self.inputs) if name in modes]  # unused ones are not
        self._dtypes = {name: _DTYPES[self._engine.get_tensor_dtype(name).name] for name in modes}
        self._open()

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _open(self) -> None:
        api, self._shapes = self._trt.api, None
        strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
        size = max(1, int(self._engine.device_memory_size_v2))
        with torch.cuda.device(self.device):
            if self._trt.is_rtx:
                config: Any = self._engine.create_runtime_config()  # it has more on TensorRT-RTX
                config.set_execution_context_allocation_strategy(strategy)
                # Lazily, a graph would keep the fallback kernels that run until the specialised ones are compiled.
                config.dynamic_shapes_kernel_specialization_strategy = (
                    api.DynamicShapesKernelSpecializationStrategy.EAGER
                )
                self._trt.share_kernels(config, self.device)
                self._context = self._engine.create_execution_context(config)
                self._config = config  # the context reads it again when its profile changes, without holding it
            else:
                self._context = self._engine.create_execution_context(strategy)
            if self._context is None:
                raise BuildError(f"{self._trt.name} could not create a context: {self._trt.log.take_errors()}")
            self._memory = torch.empty(size + 256, dtype=torch.uint8, device=self.device)
            self._context.set_device_memory(-(-self._memory.data_ptr() // 256) * 256, size)

    def another(self) -> "TensorRTEngine":
        """An engine with a context of its own that shares this one's weights."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.weight_bytes = 0
        twin._open()
        return twin

    def _choose_profile(self, shapes: Sequence[torch.Size]) -> None:
        """The first profile that these shapes lie in; the narrower ones come first."""
        if self._engine.num_optimization_profiles < 2:
            return
        for number in range(self._engine.num_optimization_profiles):
            if all(self._lies_in(number, name, shapes[index]) for index, name in self._bound):
                if number != self._context.active_optimization_profile:
                    stream = torch.cuda.current_stream(self.device).cuda_stream
                    self._context.set_optimization_profile_async(number, stream)
                return

    def _lies_in(self, number: int, name: str, shape: torch.Size) -> bool:
        bounds: Any = self._engine.get_tensor_profile_shape(name, number)
        low, _, high = bounds
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run on the current stream; inputs are contiguous device tensors of the engine's dtypes."""
        context = self._context
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes != self._shapes:
            self._choose_profile(shapes)
            for index, name in self._bound:
                if not context.set_input_shape(name, tuple(shapes[index])):
                    raise BuildError(f"{self._trt.name} refuses shape {tuple(shapes[index])} for input {name!r}.")
            self._shapes = shapes
        for index, name in self._bound:
            context.set_tensor_address(name, inputs[index].data_ptr())
        results = []
        for name in self.outputs:
            shape: Any = tuple(context.get_tensor_shape(name))  # type: ignore[arg-type]
            result = torch.empty(shape, dtype=self._dtypes[name], device=self.device)
            context.set_tensor_address(name, result.data_ptr())
            results.append(result)
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise BuildError(f"{self._trt.name} could not run the engine: {self._trt.log.take_errors()}")
        return tuple(results)


@cache
def _runtime(flavour: str) -> "TensorRT.api.Runtime":
    """The runtime that loads engines; it must outlive them, so there is one for each TensorRT, kept."""
    trt = load(flavour)
    return trt.api.Runtime(trt.log)
