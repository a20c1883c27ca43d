"""The borders of submodules that are kept in fp32 while the rest of a module computes in another dtype.

Values are cast on the way in and on the way out. From one such submodule straight into another they pass as they are:
what the first returns may lie outside the range of the dtype between them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from torchaccel.signature import flatten

# For what left such a submodule: the value before its cast, and the version of the cast one.
_wide: Any = WeakTensorKeyDictionary()


def outermost(names: Iterable[str]) -> list[str]:
    """The names, each once, of which none is inside another.

    >>> outermost(["block.fc", "block", "head", "head"])
    ['block', 'head']
    """
    names = list(dict.fromkeys(names))
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def cast_tree(tree: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor of a pytree in `dtype`; the rest as it is."""
    return _mapped(lambda leaf: leaf.to(dtype) if _floats(leaf) and leaf.dtype != dtype else leaf, tree)


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Like pytree.tree_map, into dataclasses too."""
    leaves, spec = flatten(tree)
    return pytree.tree_unflatten(list(map(function, leaves)), spec)


def set_border(module: nn.Module, inside: torch.dtype, outside: torch.dtype) -> None:
    """Cast what enters `module` to `inside`, and what leaves it to `outside`."""

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return cast_tree(_mapped(_before_cast, (args, kwargs)), inside)

    def leave(_: nn.Module, __: Any, result: Any) -> Any:
        return _mapped(lambda leaf: _narrow(leaf, outside), result)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


def before_cast(tensor: torch.Tensor) -> torch.Tensor:
    """What such a submodule returned, before its cast; the tensor itself where it is something else."""
    wide, version = _wide.get(tensor, (tensor, None))
    return wide if version == tensor._version else tensor  # written to since: the cast is what counts


def _before_cast(leaf: Any) -> Any:
    return before_cast(leaf) if _floats(leaf) else leaf


def _narrow(leaf: Any, dtype: torch.dtype) -> Any:
    if not _floats(leaf) or leaf.dtype == dtype:
        return leaf
    narrow = leaf.to(dtype)
    _wide[narrow] = leaf, narrow._version
    return narrow


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
