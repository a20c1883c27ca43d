"""The detection of change: whether a module's tensors are the ones seen last."""

import itertools
import operator
import weakref
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchaccel.fingerprint import Fingerprint, fingerprint
from torchaccel.helper import helper

_watches: "weakref.WeakSet[WeightWatch]" = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    for watch in tuple(_watches):
        watch.note_step(stepped)


def why_unwatched(tensor: torch.Tensor) -> str | None:
    """Why engines cannot have such a tensor among their weights: they copy and watch it by its memory."""
    if is_lazy(tensor):
        return "has no values yet: run the module once on a batch, and compile it then."
    if tensor.is_meta:
        return "has no values yet: use to_empty() and load_state_dict(), and compile it then."
    if tensor.layout is not torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}; weights are dense (strided) tensors: use .to_dense()."
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype}): use .dequantize()."
    wraps: bool = is_traceable_wrapper_subclass(tensor)
    if wraps:
        return f"is a {type(tensor).__qualname__}, which wraps other tensors: put a plain tensor in its place."
    return None


class WeightWatch:
    """Tells, cheaply, whether a module's tensors are the ones seen last.

    `changed()` compares the identity of every submodule, parameter, buffer and hook of a submodule, each submodule's
    mode, the address, sizes, strides and version counter of every tensor, and asks whether an optimizer has stepped
    since (fused optimizers bump no version). What PyTorch does not track, only `fingerprint` sees.
    """

    _hooked = False

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._stepped = self._doubted = False
        if not WeightWatch._hooked:
            register_optimizer_step_post_hook(_after_step)
            WeightWatch._hooked = True
        _watches.add(self)
        self.accept()

    def accept(self) -> None:
        """Take the module as it is now for the state to compare with; before its tensors are read, not after.

        What is written after that is a change, also while they are read. A doubt stays.
        """
        self._stepped = False
        self._read_structure()
        self._tensor_ids = set(map(id, self._tensors))
        self._tracked = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        self._versions = list(map(_version, self._tracked))
        self._strides = list(map(torch.Tensor.stride, self._tensors))
        # Kept, so that new data never lands at the address of the old, where it would look the same.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self.shares_storage = self._any_storage_is_shared()
        self._snapshot: bytes | None = helper.module.snapshot(self._tensors) if helper.module else None

    def _read_structure(self) -> None:
        children = tuple(self._module.modules())
        self._dicts: tuple[dict[Any, Any], ...] = tuple(
            place for child in children for place in (child._modules, child._parameters, child._buffers)
        )
        # The root's own hooks run around the engine, and in its training mode no engine serves.
        self._dicts += tuple(
            place for child in children[1:] for place in (child._forward_pre_hooks, child._forward_hooks)
        )
        self._attributes = tuple(map(vars, children[1:]))
        # Those of training are no news: eval() ends them.
        self._modes = (False,) * len(self._attributes) if self._module.training else self._modes_of_now()
        self._names = [name for place in self._dicts for name in place]
        self._held = tuple(itertools.chain.from_iterable(map(dict.values, self._dicts)))
        self._tensors = tuple(item for item in self._held if isinstance(item, torch.Tensor))
        self._sizes = list(map(torch.Tensor.size, self._tensors))
        self._kinds = [(tensor.dtype, tensor.device) for tensor in self._tensors]
        first: dict[int, int] = {}
        self._sharing = [first.setdefault(id(tensor), place) for place, tensor in enumerate(self._tensors)]

    def changed(self) -> bool:
        """Whether anything that PyTorch tracks differs from what was accepted last."""
        if self._stepped or self._doubted:
            return True
        compiled = helper.module
        if compiled is None:
            return self._changed_in_python()
        if self._snapshot is None:  # the helper came after `accept`
            snapshot = compiled.snapshot(self._tensors)
            if self._changed_in_python():
                return True
            self._snapshot = snapshot
        return not compiled.same(self._dicts, self._held, self._tensors, self._snapshot, self._attributes, self._modes)

    def _changed_in_python(self) -> bool:
        """Every loop over the tensors runs in C: this is a part of each call."""
        held = itertools.chain.from_iterable(map(dict.values, self._dicts))
        return (
            sum(map(len, self._dicts)) != len(self._held)
            or not all(map(operator.is_, held, self._held))
            or list(map(_version, self._tracked)) != self._versions
            or list(map(torch.Tensor.data_ptr, self._tensors)) != self._addresses
            or list(map(torch.Tensor.size, self._tensors)) != self._sizes
            or list(map(torch.Tensor.stride, self._tensors)) != self._strides
            or self._modes_of_now() != self._modes
        )

    def _modes_of_now(self) -> tuple[bool | None, ...]:
        return tuple([attributes.get("training") for attributes in self._attributes])

    def _any_storage_is_shared(self) -> bool:
        """Whether several tensors are parts of one storage, as `vector_to_parameters` leaves them.

        A write to the vector bumps no version of theirs. Views, which share their version with the whole, do not count,
        nor do a recurrent network's own weights, which cuDNN wants in one piece.
        """
        owners: dict[int, set[int]] = {}
        for child in self._module.modules():
            is_recurrent = isinstance(child, torch.nn.RNNBase)
            for tensor in (*child._parameters.values(), *child._buffers.values()):
                if tensor is not None and tensor.numel() and not tensor._is_view():
                    owner = id(child) if is_recurrent else id(tensor)
                    owners.setdefault(tensor.untyped_storage()._cdata, set()).add(owner)
        return any(len(held) > 1 for held in owners.values())

    def structure_changed(self) -> bool:
        """Whether the change is more than new values: other modules, hooks, modes, shapes, dtypes, devices or ties."""
        fresh = WeightWatch.__new__(WeightWatch)
        fresh._module = self._module
        fresh._read_structure()
        same_places = fresh._names == self._names and fresh._sharing == self._sharing
        same_kinds = fresh._sizes == self._sizes and fresh._kinds == self._kinds
        return not (fresh._code() == self._code() and same_places and same_kinds and fresh._modes == self._modes)

    def _code(self) -> list[Any]:
        """What is held that is no tensor: submodules and hooks."""
        return [item for item in self._held if not isinstance(item, torch.Tensor)]

    def note_step(self, stepped: set[int]) -> None:
        """An optimizer that holds the parameters with these identities has stepped."""
        if not self._tensor_ids.isdisjoint(stepped):
            self._stepped = True

    def doubt(self) -> None:
        """Count the module as changed until `trust()`."""
        self._doubted = True

    def trust(self) -> None:
        """Go by what was accepted last again."""
        self._doubted = False

    def is_trainable(self) -> bool:
        """Whether any of the module's tensors requires grad."""
        return any(map(_requires_grad, self._tensors))

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of all tensors of the module, as they are when the current stream comes to it."""
        return fingerprint(self._tensors)


_requires_grad = operator.attrgetter("requires_grad")
_version = operator.attrgetter("_version")
