"""Which plan serves a call: what its tensors must be, and the key that it shares with the calls of one plan."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from torchaccel.capture import batch_size, batched_inputs
from torchaccel.errors import InputError
from torchaccel.signature import Call, constants_key, why_not_dense


def on_device(call: Call, device: torch.device) -> list[torch.Tensor]:
    """A call's tensors on the engines' device; raises `InputError` for what no engine takes."""
    if not call.tensors:
        raise InputError("the call has no tensor among its arguments, so there is nothing to run an engine on.")
    for index, tensor in enumerate(call.tensors):
        if problem := why_not_dense(tensor):
            raise InputError(f"input {index} is {problem}; engines take dense (strided) tensors.")
        if tensor.device.type != "cpu" and tensor.device != device:
            raise InputError(
                f"input {index} is on {tensor.device}, and the model on {device}: move one of them with .to()."
            )
    return [tensor.detach().to(device) for tensor in call.tensors]


def plan_key(call: Call, sizes: tuple[int, int, int] | None, known: Iterable[Any]) -> Any:
    """The key of the plan for a call, of the `known` ones where it fits; `sizes` are those of a dynamic batch.

    It does not matter where the tensors are: they come to the engine's device. Raises `InputError` outside the sizes.
    """
    if sizes is None:
        return tuple((tensor.shape, tensor.dtype) for tensor in call.tensors), constants_key(call)
    size = batch_size(call.tensors)
    if not sizes[0] <= size <= sizes[2]:
        raise InputError(
            f"the batch is {size}, outside dynamic_batch={sizes}: pass between {sizes[0]} and {sizes[2]} items, or "
            f"compile with a wider range."
        )
    for key in known:  # an input that has the batch's size by chance is no part of it there
        batched = [is_batched for *_, is_batched in key[0]]
        if _may_be_batched(call.tensors, batched, size) and _dynamic_key(call, batched) == key:
            return key
    return _dynamic_key(call, batched_inputs(call.tensors))


def _may_be_batched(tensors: Sequence[torch.Tensor], batched: Sequence[bool], size: int) -> bool:
    """Whether the tensors at these places have the batch's size for their first dimension."""
    alike = [tensor.shape[:1] == (size,) for tensor in tensors]
    return len(alike) == len(batched) and all(map(operator.ge, alike, batched))


def _dynamic_key(call: Call, batched: Sequence[bool]) -> Any:
    """The key of a dynamic plan whose inputs at these places have the batch for their first dimension."""
    shapes = tuple((t.shape[1:] if b else t.shape, t.dtype, b) for t, b in zip(call.tensors, batched, strict=True))
    return shapes, constants_key(call)
