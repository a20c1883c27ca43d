"""What a module's forward leaves behind besides its result: writes to its inputs, its tensors, its attributes; draws.

An engine leaves none of it behind, so a module that does is refused, or its caller is told.
"""

import random
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchaccel.errors import BuildError
from torchaccel.fingerprint import bits, equal
from torchaccel.signature import PLAIN
from torchaccel.weights import module_tensors

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque)


class Trace:
    """A module and a call's inputs as they are before it runs."""

    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        self._module = module
        self._inputs = inputs
        self._versions = [tensor._version for tensor in inputs]
        self._bits = [bits(tensor) for tensor in inputs]
        self._tensors = {name: tensor for name, tensor in module_tensors(module).items() if not tensor.is_inference()}
        self._tensor_versions = {name: tensor._version for name, tensor in self._tensors.items()}
        # BatchNorm in training mode bumps no version of its running statistics.
        self._buffer_bits = {name: bits(buffer) for name, buffer in module.named_buffers()}
        self._attributes = attributes(module)
        self._generators = _generators()

    def refuse_writes(self) -> None:
        """Raise `BuildError` if the module wrote to an input, a parameter or a buffer since."""
        for index, tensor in enumerate(self._inputs):
            if tensor._version != self._versions[index] or not equal(bits(tensor), self._bits[index]):
                raise BuildError(
                    f"the module writes to its input {index}, which an engine does not; make it work on a copy."
                )
        after = module_tensors(self._module)
        written = [
            name
            for name, tensor in self._tensors.items()
            if after.get(name) is not tensor or tensor._version != self._tensor_versions[name]
        ]
        written += [
            name
            for name, before in self._buffer_bits.items()
            if name in after and name not in written and not equal(bits(after[name]), before)
        ]
        if written:
            raise BuildError(
                f"the module writes to its parameters or buffers in eval mode ({', '.join(written)}); an engine would "
                f"not."
            )

    def changed_attributes(self) -> list[str]:
        """The plain Python attributes, of any submodule, that are not what they were."""
        return differing(self._attributes, attributes(self._module))

    def drawn_from(self) -> list[str]:
        """The generators of random numbers outside PyTorch that have been drawn from, by whatever thread."""
        return [name for name, state in _generators().items() if state != self._generators.get(name, state)]


def _generators() -> dict[str, Any]:
    """The states of the generators that every module shares; what torch draws, the captured program shows."""
    states: dict[str, Any] = {"random": random.getstate()}
    if numpy_random := sys.modules.get("numpy.random"):
        state = pytree.tree_leaves(numpy_random.get_state(legacy=False))
        states["numpy.random"] = [part.tobytes() if hasattr(part, "tobytes") else part for part in state]
    return states


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of the attributes that are not the same in two results of `attributes`."""
    return [
        name
        for name in dict.fromkeys((*before, *after))
        if name not in after or name not in before or not _same(before[name], after[name])
    ]


def attributes(module: nn.Module) -> dict[str, Any]:
    """Every attribute that is neither tensor, submodule nor of `nn.Module` itself; containers with their contents."""
    found = {}
    for prefix, child in module.named_modules():
        for name, value in vars(child).items():
            # A hook that runs before the forward, such as pruning's, computes it anew from the weights each time.
            is_computed = isinstance(value, torch.Tensor) and bool(child._forward_pre_hooks)
            if name not in _OF_EVERY_MODULE and not is_computed:
                contents = _contents(value) if isinstance(value, _CONTAINERS) else None
                found[f"{prefix}.{name}" if prefix else name] = (value, contents)
    return found


def _contents(value: Any) -> list[Any]:
    return [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)


def _same(before: tuple[Any, Any], after: tuple[Any, Any]) -> bool:
    (value, contents), (now, contents_now) = before, after
    if not _equal(value, now):
        return False
    if contents is None or contents_now is None:
        return contents is contents_now
    return len(contents) == len(contents_now) and all(map(_equal, contents, contents_now))


def _equal(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, PLAIN) and one == other)
