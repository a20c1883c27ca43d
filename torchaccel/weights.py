"""The weight map, the store of an engine's weights, and the detection of change.

A rule says how one weight of an engine follows from the module's tensors. It prepares the weight the first time and
refreshes it ever after, so a refreshed engine holds, bit for bit, what an engine built afresh would hold.
"""

import itertools
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass(frozen=True)
class WeightRule:
    """One engine weight: `function` of the module's tensors named by `sources`, rounded once to `dtype`.

    `dtype` is None where the tensor keeps its own (integers, modules kept in fp32). A source may be None where the
    function has a default for it: a convolution without bias, a BatchNorm without affine parameters.
    `channels_last` lays out four-dimensional weights so.
    """

    sources: tuple[str | None, ...]
    function: str = "cast"
    dtype: torch.dtype | None = None
    epsilon: float = 0.0
    channels_last: bool = False

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight, a new tensor on the module's device."""
        given = [None if name is None else tensors[name].detach() for name in self.sources]
        value = _FUNCTIONS[self.function](*given, epsilon=self.epsilon)
        layout = torch.channels_last if self.channels_last and value.dim() == 4 else torch.contiguous_format
        return value.to(self.dtype or value.dtype, memory_format=layout, copy=True)


def _cast(tensor: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    return tensor


def _scale(gamma: torch.Tensor | None, variance: torch.Tensor, epsilon: float) -> torch.Tensor:
    scale = (variance.double() + epsilon).rsqrt()
    return scale if gamma is None else scale * gamma.double()


def _folded_weight(
    weight: torch.Tensor, gamma: torch.Tensor | None, variance: torch.Tensor, *, epsilon: float
) -> torch.Tensor:
    """W·γ/√(σ²+ε) for each output channel, in float64, so that only the final rounding is lost."""
    scale = _scale(gamma, variance, epsilon).reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.double() * scale).to(weight.dtype if weight.dtype == torch.float64 else torch.float32)


def _folded_bias(
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    epsilon: float,
) -> torch.Tensor:
    """(b−μ)·γ/√(σ²+ε) + β for each output channel."""
    centred = (0.0 if bias is None else bias.double()) - mean.double()
    folded = centred * _scale(gamma, variance, epsilon)
    if beta is not None:
        folded = folded + beta.double()
    return folded.to(torch.float64 if mean.dtype == torch.float64 else torch.float32)


_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "cast": _cast,
    "folded_weight": _folded_weight,
    "folded_bias": _folded_bias,
}


def module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its full name; a shared one under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


class WeightStore:
    """The weights of the engines of one compiled module, once for all its signatures, found by their rule."""

    def __init__(self) -> None:
        self._held: dict[WeightRule, torch.Tensor] = {}

    @torch.no_grad()
    def get(self, rules: Iterable[WeightRule], module: torch.nn.Module) -> list[torch.Tensor]:
        """The tensor of each rule, computed where it is not held yet."""
        tensors = module_tensors(module)
        with torch.inference_mode(False):  # so that they can be refreshed outside it
            for rule in rules:
                if rule not in self._held:
                    self._held[rule] = rule.compute(tensors)
        return [self._held[rule] for rule in rules]

    @torch.no_grad()
    def refresh(self, module: torch.nn.Module) -> None:
        """Bring every held weight up to date, in place: whoever holds the tensor has the new values."""
        tensors = module_tensors(module)
        for rule, held in self._held.items():
            held.copy_(rule.compute(tensors))

    def clear(self) -> None:
        """Forget all weights; engines that hold them keep their own references."""
        self._held.clear()

    def size_bytes(self) -> int:
        """The memory that the held weights take."""
        return sum(held.numel() * held.element_size() for held in self._held.values())


# 2⁶⁴ over the golden ratio, as a signed number: consecutive places get weights that look unrelated (Knuth, volume 3).
SPREAD = 0x9E3779B97F4A7C15 - 2**64


@torch.no_grad()
def fingerprint(tensors: Iterable[torch.Tensor]) -> list[int]:
    """A position-weighted sum of each tensor's raw bits, modulo 2⁶⁴: it sees what no version counter records.

    Equal bits give equal numbers; a changed bit, or two values exchanged, gives another number.
    One transfer from the device brings all of them.
    """
    sums = []
    for tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        padding = -raw.numel() % 8
        words = torch.nn.functional.pad(raw, (0, padding)).view(torch.int64)
        place = torch.arange(1, words.numel() + 1, device=words.device, dtype=torch.int64)
        sums.append((words * (place * SPREAD | 1)).sum())
    return torch.stack([part.to(sums[0].device) for part in sums]).tolist() if sums else []


_watches: "weakref.WeakSet[WeightWatch]" = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    for watch in tuple(_watches):
        watch.note_step(stepped)


class WeightWatch:
    """Tells, cheaply, whether a module's tensors are the ones seen last.

    `changed()` compares the identity of every submodule, parameter and buffer, the address and version counter of
    every tensor, and asks whether an optimizer has stepped since (fused optimizers bump no version). What PyTorch does
    not track, only `fingerprint` sees.
    """

    _hooked = False

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._stepped = False
        if not WeightWatch._hooked:
            register_optimizer_step_post_hook(_after_step)
            WeightWatch._hooked = True
        _watches.add(self)
        self.accept()

    def accept(self) -> None:
        """Take the module as it is now for the state to compare with."""
        self._stepped = False
        self._dicts: list[dict[str, Any]] = [
            place for child in self._module.modules() for place in (child._modules, child._parameters, child._buffers)
        ]
        self._names = [name for place in self._dicts for name in place]
        self._held = list(itertools.chain.from_iterable(map(dict.values, self._dicts)))
        self._tensors = [item for item in self._held if isinstance(item, torch.Tensor)]
        self._tensor_ids = set(map(id, self._tensors))
        self._tracked = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        self._versions = list(map(_version, self._tracked))
        self._shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self._tensors]

    def changed(self) -> bool:
        """Whether anything that PyTorch tracks differs from what was accepted last.

        Every loop over the tensors runs in C: this is a part of each call.
        """
        held = itertools.chain.from_iterable(map(dict.values, self._dicts))
        return (
            self._stepped
            or sum(map(len, self._dicts)) != len(self._held)
            or not all(map(operator.is_, held, self._held))
            or list(map(_version, self._tracked)) != self._versions
            or list(map(torch.Tensor.data_ptr, self._tensors)) != self._addresses
        )

    def structure_changed(self) -> bool:
        """Whether the change is more than new values: another set of modules, names, shapes, dtypes or devices."""
        fresh = WeightWatch.__new__(WeightWatch)
        fresh._module = self._module
        fresh.accept()
        same_modules = [m for m in self._held if isinstance(m, torch.nn.Module)] == [
            m for m in fresh._held if isinstance(m, torch.nn.Module)
        ]
        return not same_modules or fresh._names != self._names or fresh._shapes != self._shapes

    def note_step(self, stepped: set[int]) -> None:
        """An optimizer that holds the parameters with these identities has stepped."""
        if not self._tensor_ids.isdisjoint(stepped):
            self._stepped = True

    def is_trainable(self) -> bool:
        """Whether any of the module's tensors requires grad."""
        return any(map(_requires_grad, self._tensors))

    def fingerprint(self) -> list[int]:
        """The fingerprint of every tensor of the module."""
        return fingerprint(self._tensors)


_requires_grad = operator.attrgetter("requires_grad")
_version = operator.attrgetter("_version")
