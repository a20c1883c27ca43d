"""Where an overflow begins, and what mends it: the prepared module in PyTorch, submodule by submodule.

An engine whose outputs are not finite where the module's are says nothing about where that began. The prepared copy,
which computes at the same precision, does: its values are compared with the module's own at every border of a
submodule. What is then proposed has been tried in PyTorch, against the bound of the gate.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchaccel.borders import before_cast, outermost
from torchaccel.capture import engine_input
from torchaccel.gate import compare_outputs, run_module
from torchaccel.precision import Precision
from torchaccel.prepare import prepare
from torchaccel.signature import Call, OutputSpec, flatten
from torchaccel.weights import module_tensors

MAX_TRIES = 12  # runs of the module in search of a set of submodules that mends it
_NOT_PYTORCH = (
    "PyTorch itself computes this at {} without such values, so it is the engine that does not: choose another "
    "backend, or pass fallback= with the name of one."
)


@dataclass(frozen=True)
class Fault:
    """The first place where values are no longer finite: a submodule by its name, "" for the module itself."""

    name: str
    of_inputs: bool = False

    def describe(self, module: nn.Module, precision: str) -> str:
        """The fault in a sentence."""
        if self.of_inputs:
            return f"The inputs themselves are beyond the range of {precision}."
        kind = type(module.get_submodule(self.name)).__name__
        what = f"{self.name!r} ({kind})" if self.name else f"{kind} itself, between its submodules"
        return f"The first module whose values are not finite at {precision}, while the module's own are: {what}."


@dataclass(frozen=True)
class Overflow:
    """A call for which an engine's outputs are wrong since values left the range of its precision, or may have."""

    module: nn.Module
    call: Call
    tensors: Sequence[torch.Tensor]
    leaves: Sequence[Any]  # of the module's own result
    outputs: OutputSpec
    seen: bool = True  # whether outputs are not finite; else it may hide behind a normalisation, or not be the cause

    def advice(
        self, precision: Precision, tolerance: float | None, keep_fp32: Sequence[str], wider: Precision | None
    ) -> str:
        """Where it begins, and which changes of `compile`'s arguments mend it in PyTorch; "" where nothing is to say.

        `wider` is a precision with a wider range that the backend honours here, if there is one.
        """
        finite = self._counts(_twin(self.module), self.tensors)
        fault = self._first(precision, keep_fp32, finite)
        if fault is None:
            return _NOT_PYTORCH.format(precision.name) if self.seen else ""
        proposals = []
        if names := self._mending(fault, precision, tolerance, keep_fp32, finite):
            proposals.append(f"keep_fp32={names}")
        if wider is not None and self._passes(wider, tolerance, keep_fp32):
            proposals.append(f"precision {wider.name!r}")
        text = fault.describe(self.module, precision.name)
        if proposals:
            return f"{text} Pass {' or '.join(proposals)}: in PyTorch that passes this check."
        return f"{text} Nothing that was tried mends it: compile at 'fp32' or 'tf32'." if self.seen else ""

    def _mending(
        self,
        fault: Fault,
        precision: Precision,
        tolerance: float | None,
        keep_fp32: Sequence[str],
        finite: Counter[Any],
    ) -> list[str]:
        """The submodules to keep in fp32: that with the fault, and on to those that its values are too large for."""
        kept, found = list(keep_fp32), fault
        for _ in range(MAX_TRIES):
            if found.of_inputs or not found.name or found.name in kept:
                return []
            kept = outermost([*kept, found.name])
            following = self._first(precision, kept, finite)
            if following is None:
                return kept if self._passes(precision, tolerance, kept) else []
            found = following
        return []

    def _passes(self, precision: Precision, tolerance: float | None, keep_fp32: Sequence[str]) -> bool:
        """Whether PyTorch's own result at a precision passes the gate."""
        bound = precision.bound if tolerance is None else tolerance
        prepared = prepare(self.module, precision.dtype, keep_fp32)
        result = run_module(prepared, self.call, self._cast(precision.dtype), tf32=False, autocast=False)
        leaves, _ = flatten(result)
        return compare_outputs(self.outputs.computed(leaves), self.outputs.computed(self.leaves), bound).passed

    def _first(self, precision: Precision, keep_fp32: Sequence[str], finite: Counter[Any]) -> Fault | None:
        """The first place, in the order of execution, with more non-finite values than the module itself has there."""
        counts = self._counts(prepare(self.module, precision.dtype, keep_fp32), self._cast(precision.dtype))
        for place, count in counts.items():
            if count > finite[place]:
                name, enclosing, _, is_input = place
                if not is_input:
                    return Fault(name)
                return Fault(enclosing or "", of_inputs=enclosing is None)
        return None

    def _cast(self, dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.inference_mode(False):
            return [engine_input(tensor, dtype) for tensor in self.tensors]

    def _counts(self, module: nn.Module, tensors: Sequence[torch.Tensor]) -> Counter[Any]:
        """How many values are not finite, where submodules are entered and left, in the order of execution."""
        probe = _Probe(module)
        probe.note("", tensors, is_input=True)
        probe.running.append("")
        result = run_module(module, self.call, tensors, tf32=False, autocast=False)
        probe.running.pop()
        probe.note("", result, is_input=False)
        return Counter({place: int(count) for place, count in probe.counts.items()})


class _Probe:
    """Hooks on every submodule of a copy that count what is not finite; nothing waits for the device."""

    def __init__(self, module: nn.Module) -> None:
        self.counts: dict[Any, torch.Tensor] = {}
        self.running: list[str] = []
        self._turns: Counter[Any] = Counter()
        for name, child in module.named_modules():
            if name:
                child.register_forward_pre_hook(self._entered(name), with_kwargs=True)
                child.register_forward_hook(self._left(name))

    def _entered(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.note(name, (args, kwargs), is_input=True)
            self.running.append(name)

        return hook

    def _left(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            self.running.pop()
            self.note(name, result, is_input=False)

        return hook

    def note(self, name: str, tree: Any, *, is_input: bool) -> None:
        """Count what is not finite in the inputs or outputs of a submodule."""
        enclosing = self.running[-1] if self.running else None
        self._turns[name, is_input] += 1
        place = (name, enclosing, self._turns[name, is_input], is_input)
        leaves, _ = flatten(tree)
        found = [_not_finite(before_cast(leaf)) for leaf in leaves if _has_range(leaf)]
        if found:
            self.counts[place] = torch.stack([count.to(found[0].device) for count in found]).sum()


def _not_finite(tensor: torch.Tensor) -> torch.Tensor:
    return (~torch.isfinite(tensor)).sum()


def _has_range(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _twin(module: nn.Module) -> nn.Module:
    """A copy for hooks of its own, on the module's own tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in module_tensors(module).values()}
    return copy.deepcopy(module, memo)
