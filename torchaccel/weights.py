"""The weight map and the store of an engine's weights.

A rule says how one weight of an engine follows from the module's tensors. It prepares the weight the first time and
refreshes it ever after, so a refreshed engine holds, bit for bit, what an engine built afresh would hold.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightRule:
    """One engine weight: `function` of the module's tensors named by `sources`, rounded once to `dtype`.

    `dtype` is None where the tensor keeps its own (integers, modules kept in fp32). A source may be None where the
    function has a default for it: a convolution without bias, a BatchNorm without affine parameters.
    `channels_last` lays out four-dimensional weights so, `channels_innermost` puts the first dimension innermost in
    memory, for depthwise kernels, and `input_channels` pads a convolution's weight with zeros to so many. `parts` are
    the rules whose values the function "sum" adds up, or "rows" puts one below the other.
    """

    sources: tuple[str | None, ...]
    function: str = "cast"
    dtype: torch.dtype | None = None
    epsilon: float = 0.0
    channels_last: bool = False
    input_channels: int = 0
    channels_innermost: bool = False
    parts: tuple["WeightRule", ...] = ()

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight, a new tensor on the module's device."""
        value = self._padded(tensors)
        if self.channels_innermost:
            innermost = value.movedim(0, -1).to(self.dtype or value.dtype, copy=True)
            return innermost.contiguous().movedim(-1, 0)
        layout = torch.channels_last if self.channels_last and value.dim() == 4 else torch.contiguous_format
        return value.to(self.dtype or value.dtype, memory_format=layout, copy=True)

    def refresh(self, held: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write what `compute` gives into a tensor that it gave before."""
        held.copy_(self._padded(tensors))

    def _padded(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        value = self._value(tensors)
        if missing := max(0, self.input_channels - value.shape[1]) if self.input_channels else 0:
            value = torch.nn.functional.pad(value, (0, 0) * (value.dim() - 2) + (0, missing))
        return value

    def _value(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the function gives, before it is rounded and laid out."""
        if self.function == "sum":
            return torch.stack([part._value(tensors).double() for part in self.parts]).sum(0)
        if self.function == "rows":
            return torch.cat([part._value(tensors) for part in self.parts])
        given = [None if name is None else tensors[name].detach() for name in self.sources]
        return _FUNCTIONS[self.function](*given, epsilon=self.epsilon)


def _cast(tensor: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    return tensor


def _scale(gamma: torch.Tensor | None, variance: torch.Tensor, epsilon: float) -> torch.Tensor:
    """γ/√(σ²+ε) in float64, to which products and sums with it take the other operand, exactly."""
    scale = (variance.double() + epsilon).rsqrt()
    return scale if gamma is None else scale * gamma


def _folded_weight(
    weight: torch.Tensor, gamma: torch.Tensor | None, variance: torch.Tensor, *, epsilon: float
) -> torch.Tensor:
    """W·γ/√(σ²+ε) for each output channel, in float64, so that only the final rounding is lost."""
    scale = _scale(gamma, variance, epsilon).reshape(-1, *[1] * (weight.dim() - 1))
    return (weight * scale).to(weight.dtype if weight.dtype == torch.float64 else torch.float32)


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
    centred = -mean if bias is None else bias.double() - mean
    folded = centred * _scale(gamma, variance, epsilon)
    if beta is not None:
        folded = folded + beta
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
            rule.refresh(held, tensors)

    def rules(self) -> frozenset[WeightRule]:
        """The rules whose weights are held."""
        return frozenset(self._held)

    def keep(self, rules: Iterable[WeightRule]) -> None:
        """Forget all weights but those of `rules`."""
        self._held = {rule: self._held[rule] for rule in rules if rule in self._held}

    def clear(self) -> None:
        """Forget all weights; engines that hold them keep their own references."""
        self._held.clear()

    def size_bytes(self) -> int:
        """The memory that the held weights take; another thread may build meanwhile."""
        return sum(held.numel() * held.element_size() for held in tuple(self._held.values()))
