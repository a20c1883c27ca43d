"""What a fork leaves a compiled module in the child: locks of its own, and on a GPU a clear error.

Nothing is looked at during a call: Python calls `after_fork` of what is followed, in the child, right after the fork.
"""

import os
import weakref
from typing import Protocol

import torch

from torchaccel.errors import BackendError


class Forks(Protocol):
    """What has something to mend in a forked child."""

    def after_fork(self) -> None:
        """Mend it: only the thread that forked is there, and whatever the others were about is left as it was."""


_followed: "weakref.WeakValueDictionary[int, Forks]" = weakref.WeakValueDictionary()


def follow(thing: Forks) -> None:
    """Call `thing.after_fork()` in every process that is forked while it exists."""
    _followed[id(thing)] = thing


def forked_error() -> BackendError:
    """The error of whatever needs the GPU in a child that was forked from a process that used it."""
    return BackendError(
        "this process was forked from one that had initialised CUDA, and CUDA does not survive a fork: neither engines "
        "nor weights on the GPU can be used here. Start the process by 'spawn' (torch.multiprocessing.get_context("
        "'spawn'), or multiprocessing_context='spawn' of a DataLoader) and compile in it, or fork before anything uses "
        "the GPU."
    )


def refuse_forked_cuda() -> None:
    """Raise `BackendError` in a child that was forked after CUDA was initialised."""
    # PyTorch also calls a fork bad where the parent has merely counted GPUs, of which there may be none.
    if torch.cuda._is_in_bad_fork() and torch.cuda.device_count() > 0:
        raise forked_error()


def _in_child() -> None:
    for thing in list(_followed.values()):
        thing.after_fork()


os.register_at_fork(after_in_child=_in_child)
