"""compile(): options are validated, a backend is chosen, and the module comes back as a drop-in."""

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from torchaccel.backends.base import Backend
from torchaccel.backends.eager import Eager
from torchaccel.backends.fused import Fused
from torchaccel.backends.inductor import Inductor
from torchaccel.backends.onnx_tensorrt import OnnxTensorRT
from torchaccel.backends.torch_tensorrt import TorchTensorRT
from torchaccel.build import Builder
from torchaccel.cache.store import open_cache
from torchaccel.compiled import HIDES, CompiledModule
from torchaccel.errors import BackendError, BackendWarning, DeviceMemoryError, OptionError
from torchaccel.forking import refuse_forked_cuda
from torchaccel.memory import is_out_of_memory, release
from torchaccel.options import CHECK_WEIGHTS_EVERY, Options, check_module_names, make_options
from torchaccel.pool import Pool
from torchaccel.precision import PRECISIONS
from torchaccel.race import Racer
from torchaccel.report import RaceRecord, Report
from torchaccel.state import State, describe_device, module_device
from torchaccel.streaming import read_batch
from torchaccel.watch import why_unwatched
from torchaccel.weights import WeightStore, module_tensors

_ALL: tuple[Backend, ...] = (TorchTensorRT(), OnnxTensorRT(), Fused(), Inductor(), Eager())
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}
AUTO = ("torch_tensorrt", "inductor", "eager")  # what "auto" means, best first
FIELD = (*BACKENDS.values(), Eager(contiguous=True), Inductor(autotune=True))  # of a race, the slowest to build last


def compile(
    module: nn.Module,
    precision: str = "fp16",
    *,
    inputs: Any = None,
    backend: str = "auto",
    fallback: str | None = None,
    dynamic_batch: tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
    keep_fp32: Iterable[str] = (),
    partial: bool = False,
    cuda_graph: bool = True,
    max_runners: int = 8,
    on_weight_change: str = "refresh",
    check_weights_every: int | None = CHECK_WEIGHTS_EVERY,
    objective: str = "latency",
    race_budget_s: float | None = None,
    cache_dir: str | PathLike[str] | Literal[False] | None = None,
    **unknown: Any,
) -> CompiledModule:
    """Make `module` run fast: a drop-in that computes what the module does, through a checked engine.

    It returns at once, in eval mode, the module in eval mode too; a module on the CPU is moved to the GPU where there
    is one, in place. The engine is built at the first call, or now for `inputs`.

    Args:
        module: the trained module; it goes on owning the weights.
        precision: what engines compute in: "fp32" (IEEE), "tf32", "fp16" or "bf16".
        inputs: a batch to build for at once: a tensor, a tuple of arguments or a dict of keyword arguments.
        backend: "auto" (Torch-TensorRT where it is usable, else the best PyTorch-native one, with a warning),
            "torch_tensorrt", "onnx_tensorrt", "fused", "inductor" or "eager"; a named one runs or raises. "fastest"
            builds and checks them all, times the survivors side by side for each signature, and keeps the fastest.
        fallback: the backend to try after a failed build or gate; None raises.
        dynamic_batch: (min, opt, max): one engine for all batch sizes in that range, at its best at opt.
        device: where to run; None takes the module's GPU, else the current one, else the CPU.
        tolerance: the relative error ‖y−r‖/‖r‖ that each output may have; None takes the precision's own bound.
        keep_fp32: names of submodules that go on computing in fp32 in an "fp16" or "bf16" engine. TensorRT-RTX, which
            has no IEEE fp32, computes them in TF32.
        partial: allow operators outside TensorRT engines, run by PyTorch (torch_tensorrt only).
        cuda_graph: replay engines as captured CUDA graphs.
        max_runners: signatures whose buffers and graphs are kept; the least recently used go first.
        on_weight_change: "refresh" engines at the next call, "raise", or "ignore" changes until `refresh()` or the next
            build, for another signature: all engines then have the weights that it takes.
        check_weights_every: calls between two looks for writes that PyTorch does not track, which the host does not
            wait for: the calls after one act on it. None looks only at `eval()` and `refresh()`.
        objective: what backend="fastest" decides by: the time of a call on the device ("latency", and "throughput",
            which is the same at a given batch) or of batches from the host through `stream()` ("stream").
        race_budget_s: after how many seconds a race builds no further candidate; None is 600.
        cache_dir: where engines, races and compiled kernels are kept between processes, all in one folder of bounded
            size (`torchaccel-cache` in it, if it has other files); None takes `$TORCHACCEL_CACHE_DIR` or the user's
            cache folder, False keeps none.
        unknown: nothing; any other name is answered with the ones that come close.

    Raises:
        OptionError: an argument is wrong; the message lists what is allowed.
        BackendError: the named backend is not usable here or does not honour the precision on this device.
        BuildError, AccuracyError: at the first call of a signature (or here, given `inputs`); `DeviceMemoryError`, a
            BuildError, where memory runs out.
        InputError: at a call whose inputs no engine can take.
        StaleWeightsError: at a call after the weights changed, with on_weight_change="raise".

    >>> import torch, torchaccel
    >>> module = torch.nn.Linear(4, 2)
    >>> model = torchaccel.compile(module, "fp32", backend="eager", device="cpu")
    >>> with torch.no_grad():
    ...     model(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    >>> model.report().calls_by_engine
    1
    """
    arguments: dict[str, Any] = {
        "precision": precision,
        "backend": backend,
        "fallback": fallback,
        "dynamic_batch": dynamic_batch,
        "device": device,
        "tolerance": tolerance,
        "keep_fp32": keep_fp32,
        "partial": partial,
        "cuda_graph": cuda_graph,
        "max_runners": max_runners,
        "on_weight_change": on_weight_change,
        "check_weights_every": check_weights_every,
        "objective": objective,
        "race_budget_s": race_budget_s,
        "cache_dir": cache_dir,
        **unknown,
    }
    if str(device) != "cpu":
        refuse_forked_cuda()
    options = make_options(**arguments)
    _check_module(module, options)
    target = _device(module, options)
    model = _compiled(module, options, target)
    try:
        module.eval()
    except NotImplementedError as error:  # what torch.export gives has neither mode
        raise OptionError(f"module refuses eval() ({error}): give the module that it was exported from.") from error
    if module_device(module) not in (None, target):
        _move(module, target)
    if inputs is not None:
        args, kwargs = read_batch(inputs)
        model.runner_for(*args, **kwargs)
    return model


def _compiled(module: nn.Module, options: Options, target: torch.device) -> CompiledModule:
    """The module in its mode and on its device, compiled for `target`."""
    report = Report(type(module).__name__, options.precision, describe_device(target), options.backend)
    cache = None if options.cache_dir is False else open_cache(options.cache_dir)
    if options.backend == "fastest":
        able, out = _field(options, target)
        builder: Builder = Racer(module, options, able, WeightStore(), cache, out, report.races)
    else:
        chosen, report.backend_reason = choose(options, target)
        report.backend = chosen.name
        backends: tuple[Backend, ...] = (chosen,)
        fallback = options.fallback
        if fallback is not None and fallback != chosen.name:  # which "auto" may have chosen
            backends += (require_usable(BACKENDS[fallback], options, target, "fallback"),)
        builder = Builder(module, options, backends, WeightStore(), cache)
    remake = functools.partial(_remade, options)
    return CompiledModule(State(module, options, target, builder, report, Pool(target), remake))


def _field(options: Options, target: torch.device) -> tuple[tuple[Backend, ...], dict[str, str]]:
    """The backends that can serve the options on a device, and why the others cannot."""
    problems = {backend.name: unusable(backend, options, target) for backend in FIELD}
    if options.partial and problems["torch_tensorrt"] is not None:
        raise _partial_refused(f"torch_tensorrt: {problems['torch_tensorrt']}")
    able = tuple(backend for backend in FIELD if problems[backend.name] is None)
    out = {name: problem for name, problem in problems.items() if problem is not None}
    if not able:
        said = "; ".join(f"{name}: {problem}" for name, problem in out.items())
        raise BackendError(f"no backend can compute {options.precision} on {target}. {said}")
    return able, out


def race(module: nn.Module, inputs: Any, precision: str = "fp16", **options: Any) -> RaceRecord:
    """Race every backend on a module and a batch, and return the field without keeping an engine.

    `inputs` and `options` are those of `compile`, whose errors are raised. As `compile` does, it puts the module into
    eval mode and, where there is a GPU, moves it there.

    >>> field = race(torch.nn.Linear(4, 2), torch.ones(3, 4), "fp32", device="cpu", race_budget_s=1e-3)
    >>> field.winner.outcome, field.winner.ratio
    ('won', 1.0)
    """
    for name in ("backend", "inputs"):
        if name in options:
            raise OptionError(f"race() has no argument {name!r} among its options: every backend races, on `inputs`.")
    if inputs is None:
        raise OptionError("inputs=None: a race needs a batch: a tensor, a tuple of arguments or a dict of keywords.")
    model = compile(module, precision, inputs=inputs, backend="fastest", **options)
    return model.report().races[-1]


def _remade(options: Options, module: nn.Module) -> CompiledModule:
    """A copy, or what a pickle held, compiled anew: in the mode that it has, for the device that its tensors are on."""
    return _compiled(module, options, module_device(module) or _device(module, options))


def choose(options: Options, device: torch.device) -> tuple[Backend, str]:
    """The backend that serves the options on a device, and why if it is not the first choice; warns then.

    Raises `BackendError` for a named backend that cannot.
    """
    if options.backend != "auto":
        return require_usable(BACKENDS[options.backend], options, device), ""
    reasons = []
    for name in AUTO:
        problem = unusable(BACKENDS[name], options, device)
        if problem is None:
            break
        reasons.append(f"{name}: {problem}")
    else:
        raise BackendError(f"no backend can compute {options.precision} on {device}. " + "; ".join(reasons))
    if not reasons:
        return BACKENDS[name], ""
    if options.partial:
        raise _partial_refused("; ".join(reasons))
    because = f"because {'; '.join(reasons)}"
    warnings.warn(f"backend='auto' serves through {name}, {because}", BackendWarning, stacklevel=4)
    return BACKENDS[name], because


def _partial_refused(reasons: str) -> OptionError:
    return OptionError(f"partial=True belongs to torch_tensorrt, which is not usable here. {reasons}")


def unusable(backend: Backend, options: Options, device: torch.device) -> str | None:
    """Why a backend cannot serve the options on a device; None where it can."""
    return backend.unavailable() or backend.honours(PRECISIONS[options.precision], device)


def require_usable(backend: Backend, options: Options, device: torch.device, argument: str = "backend") -> Backend:
    """The backend that an argument names, or `BackendError` with the reason."""
    problem = unusable(backend, options, device)
    if problem:
        raise BackendError(
            f"{argument}={backend.name!r} cannot run precision={options.precision!r} on {device}: {problem}. "
            f"`python -m torchaccel env` shows what is usable here; backend='auto' takes the best of it."
        )
    return backend


def _check_module(module: nn.Module, options: Options) -> None:
    if isinstance(module, CompiledModule):
        raise OptionError("module is compiled already; compile its `.module` to change options.")
    if not isinstance(module, nn.Module):
        raise OptionError(f"module is a {type(module).__qualname__}; allowed is a torch.nn.Module.")
    for name, child in module.named_modules():
        if isinstance(child, CompiledModule):
            raise OptionError(f"its submodule {name!r} is compiled already: put its `.module` there, and compile all.")
        if isinstance(child, torch.jit.ScriptModule):
            what = f"its submodule {name!r}" if name else "module"
            raise OptionError(f"{what} is TorchScript, which cannot be captured: give the module that it is from.")
    for name, tensor in module_tensors(module).items():
        if problem := why_unwatched(tensor):
            raise OptionError(f"{name!r} of {type(module).__name__} {problem}")
    hidden = [name for name in HIDES if hasattr(module, name)]
    if hidden:
        warnings.warn(
            f"{type(module).__name__} has attributes that the compiled module has too ({', '.join(hidden)}): "
            f"the module's are under `.module`, such as `model.module.{hidden[0]}`.",
            BackendWarning,
            stacklevel=3,
        )
    check_module_names(module, options.keep_fp32)


def _move(module: nn.Module, target: torch.device) -> None:
    """Move a module in place; where there is no room for all of it, all of it stays where it was."""
    before = module_device(module)
    try:
        module.to(target)
    except (RuntimeError, MemoryError) as error:
        module.to(before)
        release(target)
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(
            f"{type(module).__name__} does not fit on {target} ({str(error).partition(chr(10))[0]}); it is on {before} "
            f"as before. Free memory there, or pass device='cpu'."
        ) from None


def _device(module: nn.Module, options: Options) -> torch.device:
    """The device asked for, else the module's GPU, else the current GPU, else the CPU."""
    if options.device is not None:
        return options.device
    held = module_device(module)
    return held if held is not None and held.type == "cuda" else _best_device()


def _best_device() -> torch.device:
    """The current GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass(frozen=True)
class BackendRow:
    """A backend as `backends()` shows it: whether it is available, and the reason if not."""

    name: str
    available: bool
    reason: str


def backends() -> tuple[BackendRow, ...]:
    """The table of backends, each available on this machine or with the reason that it is not.

    One is available where it honours a precision on the current GPU or, where there is none, on the CPU.

    >>> [row.name for row in backends()]
    ['torch_tensorrt', 'onnx_tensorrt', 'fused', 'inductor', 'eager']
    """
    device = _best_device()
    problems = {name: backend.unavailable() or _refusal(backend, device) for name, backend in BACKENDS.items()}
    return tuple(BackendRow(name, problem is None, problem or "") for name, problem in problems.items())


def _refusal(backend: Backend, device: torch.device) -> str | None:
    """Why a backend honours no precision on a device; None where it honours one."""
    refusals = [backend.honours(precision, device) for precision in PRECISIONS.values()]
    return None if None in refusals else refusals[0]
