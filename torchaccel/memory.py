"""Out of memory: recognised however deep an error hides it, and raised as an error that keeps nothing alive."""

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from torchaccel.errors import DeviceMemoryError

Result = TypeVar("Result")

# What the CPU's allocator, CUDA's libraries and TensorRT say, who raise no type of their own.
_SAYINGS = ("out of memory", "outofmemory", "allocate memory", "not enough memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is for lack of memory."""
    return _cause(error) is not None


def release_on_exhaustion(work: Callable[[], Result], what: str, device: torch.device, max_runners: int) -> Result:
    """The result of `work`; where memory runs out, everything that it had made is released before the error is raised.

    Raises `DeviceMemoryError`, which says that `what` did not fit on `device`.
    """
    try:
        return work()
    except DeviceMemoryError as error:  # from within: its frames hold what was begun
        said = str(error)
    except (RuntimeError, MemoryError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        del cause
        said = (
            f"out of memory on {device} while an engine for {what} was made ready: {reason}\n"
            f"What was begun is released, and the module is as it was: call again after freeing memory, with a smaller "
            f"batch, or with a smaller max_runners (it is {max_runners}), the number of signatures whose buffers are "
            f"kept."
        )
    # Only here is the error gone, and with it the frames that hold the tensors of what was begun.
    release(device)
    raise DeviceMemoryError(said)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more: captured programs have cycles, and the allocator keeps its blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _cause(error: BaseException) -> BaseException | None:
    for link in _chain(error):
        said = str(link).lower()
        if isinstance(link, torch.OutOfMemoryError | MemoryError) or any(saying in said for saying in _SAYINGS):
            found = link
            break
    else:
        return None
    for link in _chain(found):  # the one that the others quote
        if isinstance(link, torch.OutOfMemoryError | MemoryError):
            return link
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
