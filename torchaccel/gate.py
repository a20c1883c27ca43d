"""The gate: an engine's outputs against the module's own, all of them, before it serves."""

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchaccel.computed import compute_weights
from torchaccel.errors import AccuracyError, BackendWarning, BuildError
from torchaccel.precision import PRECISIONS, tf32_state
from torchaccel.purity import Trace
from torchaccel.report import GateRecord, OutputError
from torchaccel.signature import PLAIN, Call, OutputSpec, fill, flatten, why_not_dense

# Below this root mean square an output counts as zero: fp16 has nothing but subnormal numbers there.
FLOOR_RMS = 1e-6
# The relative error between two runs of one module that still counts as the same result: atomic additions on a GPU.
REPRODUCED = 1e-4
# Up to so many elements an output is compared on the host: a GPU would load a kernel for each step, at its first use.
SMALL_OUTPUT = 1 << 18


@dataclass(frozen=True)
class Reference:
    """What the module itself returned: every leaf of the result, its nesting, and the clones that it was run on."""

    leaves: tuple[Any, ...]
    spec: Any
    inputs: tuple[torch.Tensor, ...]

    def output_spec(self, program: OutputSpec) -> OutputSpec:
        """How a program's outputs become the module's result, values and handed-back inputs included.

        Raises `BuildError` where the program, at its precision, nests its result in another way.
        """
        if self.spec != program.spec:
            raise BuildError(f"the module returns {self.spec}, but what was captured at this precision {program.spec}.")
        sources = []
        for (kind, what), leaf in zip(program.sources, self.leaves, strict=True):
            if kind == "value":
                sources.append(("value", leaf))
            elif kind == "input" and leaf is not self.inputs[what]:  # the module casts where the program need not
                sources.append(("cast", (what, leaf.dtype)))
            else:
                sources.append((kind, what))
        return OutputSpec(self.spec, tuple(sources))


def reference(module: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> Reference:
    """The module's own outputs for a call, in its own dtype with TF32 and autocast off, on cloned inputs.

    Raises `BuildError` for a module that writes to its inputs or, in eval mode, to its own buffers, for one whose
    result depends on attributes that it changes itself, or on random numbers of Python's or NumPy's, and for one that
    returns sparse, nested or quantized tensors: an engine would do none of this. Where it changes attributes without
    such an effect, a warning says so.
    """
    found, changed, drawn = _observe(module, call, tensors)
    if not changed and not drawn:
        return found
    # What is set once, at the first run, is a cache; and another thread may have drawn.
    again, changed, drawn = _observe(module, call, tensors)
    atomics = 0.0 if all(tensor.is_cpu for tensor in tensors) else REPRODUCED
    if drawn and not _same(found, again, atomics):
        raise BuildError(
            f"{type(module).__name__} draws random numbers in eval mode ({', '.join(drawn)}) and its result depends on "
            f"them, but an engine would keep the first ones for ever. Draw them outside and pass them as an input, or "
            f"switch them off in eval mode (if self.training)."
        )
    names = ", ".join(changed)
    if changed and not _same(found, again, REPRODUCED):
        raise BuildError(
            f"the module's result depends on Python attributes that its forward changes ({names}), and an engine keeps "
            f"the values of now; make them inputs or outputs."
        )
    if changed:
        warnings.warn(
            f"{type(module).__name__} changes Python attributes in its forward ({names}): engines run no Python, and "
            f"leave them as they are.",
            BackendWarning,
            stacklevel=2,
        )
    return again


def _same(one: Reference, other: Reference, bound: float) -> bool:
    return one.spec == other.spec and reproduced(one.leaves, other.leaves, bound)


def _observe(module: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> tuple[Reference, list[str], list[str]]:
    """One run of the module, the names of the attributes that it changed, and what random numbers were drawn from."""
    with torch.inference_mode(False):
        clones = tuple(tensor.detach().clone() for tensor in tensors)
    trace = Trace(module, clones)
    args, kwargs = call.arguments(clones)
    leaves, spec = flatten(_run(module, args, kwargs, tf32=False, autocast=False))
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and (problem := why_not_dense(leaf)):
            raise BuildError(f"the module's output {index} is {problem} in the module; engines return dense tensors.")
    drawn = trace.drawn_from()
    trace.refuse_writes()
    _warn_of_containers(module, call, clones, args, kwargs)
    return Reference(tuple(leaves), spec, clones), trace.changed_attributes(), drawn


def _warn_of_containers(module: nn.Module, call: Call, tensors: Sequence[torch.Tensor], args: Any, kwargs: Any) -> None:
    """Say so where the module has put something else into the dicts, lists or dataclasses among its arguments."""
    leaves, spec = flatten((args, kwargs))
    if spec == call.spec and all(map(operator.is_, leaves, fill(call.template, tensors))):
        return
    warnings.warn(
        f"{type(module).__name__} writes to a dict, list or dataclass among its arguments: engines run no Python, and "
        f"leave the caller's as it is. What the module returns is complete.",
        BackendWarning,
        stacklevel=2,
    )


def reproduced(one: Sequence[object], other: Sequence[object], bound: float = REPRODUCED) -> bool:
    """Whether two runs of a module returned the same, but for the order in which a device adds up."""
    return all(_is_reproduced(a, b, bound) for a, b in zip(one, other, strict=True))


def _is_reproduced(one: object, other: object, bound: float) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return output_error("", one, other, bound).passed
    return not isinstance(one, PLAIN) or repr(one) == repr(other)


def run_module(module: nn.Module, call: Call, tensors: Sequence[torch.Tensor], *, tf32: bool, autocast: bool) -> Any:
    """The module's forward without autograd; of its root's hooks, the caller's business, those that compute weights."""
    return _run(module, *call.arguments(tensors), tf32=tf32, autocast=autocast)


def _run(module: nn.Module, args: Any, kwargs: Any, *, tf32: bool, autocast: bool) -> Any:
    with torch.inference_mode(False), torch.no_grad(), tf32_state(tf32):
        compute_weights(module)
        if autocast:
            return module.forward(*args, **kwargs)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return module.forward(*args, **kwargs)


def compare_outputs(
    outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], bound: float, batch: int | None = None
) -> GateRecord:
    """Compare every output; shapes and counts that differ are an error of their own."""
    if len(outputs) != len(expected):
        raise AccuracyError(f"the engine has {len(outputs)} outputs and the module {len(expected)}.")
    pairs = enumerate(zip(outputs, expected, strict=True))
    return GateRecord(tuple(output_error(f"output {index}", y, r, bound) for index, (y, r) in pairs), batch)


def output_error(name: str, y: torch.Tensor, r: torch.Tensor, bound: float) -> OutputError:
    """The figures of one output `y` against the reference `r`.

    Floating: ‖y−r‖/max(‖r‖, floor) over what is finite in both, in float64. Others: the fraction that differs.
    """
    shape = tuple(r.shape)
    if y.shape != r.shape:
        return OutputError(name, shape, float("inf"), float("inf"), f"the engine's shape is {list(y.shape)}", bound)
    if r.numel() == 0:
        return OutputError(name, shape, 0.0, 0.0, "", bound)
    if r.numel() <= SMALL_OUTPUT:
        y, r = y.cpu(), r.cpu()
    if not (r.is_floating_point() or r.is_complex()):
        differs = y != r
        largest = (y.double() - r.double()).abs().max().item()
        return OutputError(name, shape, differs.double().mean().item(), largest, "", bound)
    wide = torch.complex128 if r.is_complex() else torch.float64
    y, r = y.to(wide), r.to(wide)
    agree = torch.isfinite(y) & torch.isfinite(r)
    same = agree | (y == r) | (y.isnan() & r.isnan())
    difference = torch.where(agree, y - r, 0)
    norm = torch.where(agree, r, 0).norm().item()
    floor = FLOOR_RMS * r.numel() ** 0.5
    relative = difference.norm().item() / max(norm, floor)
    where = _where_not_finite(y, r, same)
    is_zero = norm <= floor and bool(agree.all())
    return OutputError(name, shape, relative, difference.abs().max().item(), where, bound, is_zero=is_zero)


def _where_not_finite(y: torch.Tensor, r: torch.Tensor, same: torch.Tensor) -> str:
    wrong = ~same
    count = int(wrong.sum())
    if not count:
        return ""
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{count} of {r.numel()} elements are finite in only one of the two, or infinite otherwise; "
        f"the first at {list(first)}: {y[first].item():g}, the module has {r[first].item():g}"
    )


def require(record: GateRecord, backend: str, precision: str, advice: str = "") -> None:
    """Raise `AccuracyError` with the figures of each output, and what to do, unless the record passed."""
    if record.passed:
        return
    at = f" at batch {record.batch}" if record.batch is not None else ""
    figures = "\n".join(f"  {'ok  ' if output.passed else 'FAIL'} {output}" for output in record.outputs)
    wider = "bf16, which has fp32's range, or " if record.not_finite else ""
    finer = f"{wider}keep_fp32=[…] for the submodules that need it"
    if PRECISIONS[precision].dtype is torch.float32:
        finer = "another backend"  # there is nothing to keep in fp32
    advice = advice or f"Try {finer}, or pass tolerance= if the error is acceptable."
    raise AccuracyError(
        f"the {backend} engine at {precision}{at} does not compute what the module does:\n{figures}\n{advice}"
    )
