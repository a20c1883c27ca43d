"""The contract of a backend: available, honours, build → Plan, load → Engine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from torchaccel import trt
from torchaccel.combinations import device_problem
from torchaccel.interrupts import uninterrupted
from torchaccel.layouts import settle_layouts
from torchaccel.lowering import decompose_hardswish, space_to_depth, widen_depthwise
from torchaccel.precision import Precision, tf32_state
from torchaccel.program import Program
from torchaccel.report import Coverage


@dataclass
class Plan:
    """What a backend builds from a program: it can be loaded on any device of the kind that it was built for.

    `payload` is the serialised engine of a TensorRT backend, or the program, without weights of its own, of a
    PyTorch-native one. `manifest` is plain data that says how to load it. `source` is what `rebuild` starts from: it
    is in host memory, has no weights, and does not travel with the plan: one from the cache has none.
    """

    backend: str
    precision: Precision
    payload: Any
    manifest: dict[str, Any] = field(default_factory=dict)
    coverage: Coverage | None = None
    library: str = ""
    source: Any = None

    def size_mib(self) -> float:
        """The size of the serialised engine."""
        return len(self.payload) / 2**20 if isinstance(self.payload, bytes) else 0.0


class Engine(ABC):
    """A plan loaded on a device: callable on device tensors, ordered on the current stream.

    It takes contiguous tensors (channels-last where `channels_last` says so) of the program's dtypes and returns a
    tuple of tensors. It never synchronises the device, so a CUDA graph can capture it.
    """

    channels_last = False
    shares_store = False  # whether its weights are the store's own tensors, and so fresh after `WeightStore.refresh`
    overlaps = False  # whether its kernels overlap that must not, unless a CUDA graph keeps them apart
    graph_only = False  # whether they do so often enough that it must not run without one

    @abstractmethod
    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it."""

    def input_buffer(self, index: int, example: torch.Tensor) -> torch.Tensor:
        """A copy of an example of its input `index`, laid out as it reads it fastest: a runner's static buffer."""
        return example.detach().clone(memory_format=self.layout(example))

    def layout(self, tensor: torch.Tensor) -> torch.memory_format:
        """The memory format in which it takes a tensor of that many dimensions."""
        return torch.channels_last if self.channels_last and tensor.dim() == 4 else torch.contiguous_format

    def another(self) -> "Engine":
        """An engine for one more runner, on the same weights; itself, where runners do not disturb each other."""
        return self

    def device_bytes(self) -> int:
        """Device memory that the engine holds outside PyTorch's allocator and the store of weights."""
        return 0

    def outside_time_shares(self, *inputs: torch.Tensor) -> dict[str, float]:
        """The share of a run's time that each operator outside TensorRT engines takes; measured, and waited for."""
        return {}


class Backend(ABC):
    """One way to make engines. Backends never import each other.

    What a step raises is a failed build, whatever it is (see `failures.as_build_error`): only what says more than the
    error itself need be a `BuildError` already.
    """

    name: str
    native = False  # whether PyTorch itself runs its engines, on the store's weights
    channels_last = False  # whether it wants a program with 2-D convolutions, and its weights, in channels-last
    compiles = False  # whether loading a plan goes through Inductor or Triton, which have caches of their own

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why it cannot be used on this machine, with the remedy; None where it can."""

    @abstractmethod
    def honours(self, precision: Precision, device: torch.device) -> str | None:
        """Why it cannot compute in that precision on that device; None where it can."""

    def lower(self, program: Program) -> None:  # noqa: B027 - most have nothing to rewrite
        """Rewrite a captured program, before it has its weights, so that this backend can take it."""

    def chooses(self, device: torch.device) -> bool:
        """Whether loading a plan there times what computes the same: the choice then is worth keeping."""
        return False

    def tensorrt(self) -> trt.TensorRT | None:
        """The TensorRT that builds its plans; None for one of PyTorch's own."""
        return None

    def library(self) -> str:
        """What builds its plans, with the version."""
        return f"PyTorch {torch.__version__}"

    @abstractmethod
    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        """Build a plan; raises `BuildError` with the operators at fault."""

    def rebuild(self, plan: Plan, program: Program, device: torch.device, *, partial: bool = False) -> Plan:
        """What `build` would make of the weights that the program has now; `plan` may have what spares a part of it."""
        return self.build(program, plan.precision, device, partial=partial)

    @abstractmethod
    def load(self, plan: Plan, device: torch.device) -> Engine:
        """Load a plan on a device; raises `BuildError` where the device refuses it."""


class NativeBackend(Backend):
    """What the PyTorch-native backends share: a plan that is the program, in whatever PyTorch's kernels honour."""

    native = True
    channels_last = True

    def honours(self, precision: Precision, device: torch.device) -> str | None:
        """Whatever PyTorch's kernels honour."""
        return native_honours(precision, device)

    def lower(self, program: Program) -> None:
        """Make it mean the same in channels-last."""
        settle_layouts(program.exported)

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        """The plan is the program; what there is to generate is generated where it is loaded."""
        return Plan(self.name, precision, program, library=self.library())


class NativeEngine(Engine):
    """An engine that PyTorch itself runs, on the store's weights."""

    shares_store = True

    def __init__(self, run: Any, precision: Precision, program: Program | None = None) -> None:
        self._run = run
        self._tf32 = precision.tf32
        # Without the program it is not known whether anything in it computes in float32.
        self._matters = program is None or precision.dtype is torch.float32 or bool(program.in_fp32)
        self.channels_last = program is not None and program.channels_last

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it with TF32 as the precision has it, outside inference mode, without autograd or autocast."""
        tf32 = tf32_state(self._tf32) if self._matters else nullcontext()
        off = torch.autocast(inputs_kind(inputs), enabled=False)
        with uninterrupted(), torch.inference_mode(False), torch.no_grad(), off, tf32:
            return tuple(self._run(*inputs))


def inputs_kind(tensors: Sequence[torch.Tensor]) -> str:
    """The device type of an engine's inputs; the CPU's where there is none."""
    return tensors[0].device.type if tensors else "cpu"


def native_honours(precision: Precision, device: torch.device) -> str | None:
    """What PyTorch's own kernels honour: fp32, fp16 and bf16 anywhere they exist, TF32 from Ampere on."""
    if device.type == "cpu":
        return "TF32 is a format of NVIDIA GPUs (Ampere and later); a CPU has none" if precision.tf32 else None
    return gpu_honours(precision, device)


def gpu_honours(precision: Precision, device: torch.device) -> str | None:
    """What the GPU itself has: Turing and older have neither TF32 nor bfloat16."""
    if not precision.tf32 and precision.dtype is not torch.bfloat16:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} (compute capability {capability[0]}.{capability[1]}) has no {precision.name}; Ampere and later have"


def tensorrt_honours(flavour: str, precision: Precision, device: torch.device) -> str | None:
    """What TensorRT honours: nothing on a CPU, and on a GPU what this TensorRT and the GPU have."""
    if device.type != "cuda":
        return f"{trt.FLAVOURS[flavour]} needs an NVIDIA GPU, which {device} is not"
    if problem := device_problem(flavour, device.index or 0):
        return problem
    return flavour_honours(flavour, precision) or gpu_honours(precision, device)


# What TensorRT-RTX computes in TF32 where a program has it in float32.
_PRODUCTS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
}


def has_fp32_products(program: Program) -> bool:
    """Whether a program has convolutions or matrix products in float32, whatever the precision of the rest."""
    return not _PRODUCTS.isdisjoint(program.in_fp32)


def keep_apart(engine: Engine, flavour: str, fp32_products: bool, device: torch.device) -> Engine:
    """The engine, marked if its kernels need a graph to keep them apart.

    TensorRT-RTX's overlap on Hopper GPUs (measured on an H200, with 1.4), those that it computes in TF32 often.
    """
    engine.overlaps = flavour == "tensorrt_rtx" and torch.cuda.get_device_capability(device) >= (9, 0)
    engine.graph_only = engine.overlaps and fp32_products
    return engine


def flavour_honours(flavour: str, precision: Precision) -> str | None:
    """What this TensorRT honours on whatever GPU: TensorRT-RTX has no IEEE fp32."""
    if flavour == "tensorrt_rtx" and precision.name == "fp32":
        name = trt.FLAVOURS[flavour]
        return f"{name} computes fp32 in TF32 even where TF32 is switched off (measured); ask for 'tf32'"
    return None


def engine_manifest(
    flavour: str, inputs: Sequence[tuple[int, str]], outputs: Sequence[str], *, fp32_products: bool
) -> dict[str, Any]:
    """What `TensorRTBacked.load` needs to know of a serialised engine.

    `inputs` are the place and the name of each that it takes; `fp32_products` is `has_fp32_products` of its program.
    """
    return {"flavour": flavour, "inputs": list(inputs), "outputs": list(outputs), "fp32_products": fp32_products}


class TensorRTBacked(Backend):
    """What the TensorRT backends share: what they rewrite, a plan that is one serialised engine, how it is loaded."""

    @abstractmethod
    def tensorrt(self) -> trt.TensorRT:
        """The TensorRT that builds its plans."""

    def lower(self, program: Program) -> None:
        """Write out what TensorRT, or TensorRT-RTX, cannot take or takes slowly."""
        decompose_hardswish(program.exported)
        if self.tensorrt().is_rtx:
            widen_depthwise(program.exported, program.rules)
            space_to_depth(program.exported)

    def load(self, plan: Plan, device: torch.device) -> Engine:
        """The engine on `device`, with a context of its own."""
        manifest = plan.manifest
        engine = trt.TensorRTEngine(
            trt.load(manifest["flavour"]),
            plan.payload,
            device,
            [name for _, name in manifest["inputs"]],
            manifest["outputs"],
        )
        loaded = _TensorRTEngine(engine, [position for position, _ in manifest["inputs"]])
        return keep_apart(loaded, manifest["flavour"], manifest["fp32_products"], device)


class _TensorRTEngine(Engine):
    def __init__(self, engine: trt.TensorRTEngine, positions: list[int]) -> None:
        self._engine = engine
        self._positions = positions

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._engine(*(inputs[position] for position in self._positions))

    def another(self) -> Engine:
        other = _TensorRTEngine(self._engine.another(), self._positions)
        other.overlaps, other.graph_only = self.overlaps, self.graph_only
        return other

    def device_bytes(self) -> int:
        return self._engine.weight_bytes
