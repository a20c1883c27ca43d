"""The precisions: one row each, and the TF32 state of the process, which two of them depend on."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchaccel.interrupts import uninterrupted


@dataclass(frozen=True)
class Precision:
    """One row: what an engine computes in, and how far its outputs may be from the module's.

    `bound` is the largest relative error ‖y−r‖/‖r‖ of an output; `spread` says what was measured that justifies it.
    """

    name: str
    dtype: torch.dtype
    tf32: bool
    bound: float
    spread: str


PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision("fp32", torch.float32, False, 1e-5, "IEEE single: 4e-7 against float64 on ResNet-18"),
        Precision("tf32", torch.float32, True, 2e-3, "10-bit mantissas: 4e-4 against float64 on ResNet-18"),
        Precision("fp16", torch.float16, False, 1e-2, "4e-4 to 1e-3 on the torchvision models"),
        Precision("bf16", torch.bfloat16, False, 5e-2, "8-bit mantissas: 4e-3 on ResNet-18, more on deep models"),
    )
}

_state_lock = threading.RLock()
# A fork waits for its turn, so that no child begins with the settings of a thread that it does not have.
os.register_at_fork(before=_state_lock.acquire, after_in_parent=_state_lock.release, after_in_child=_state_lock.release)


@contextmanager
def tf32_state(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in PyTorch's matrix products and convolutions, and restore exactly what was there before.

    The state belongs to the process: a lock keeps two builds, or two engines without a graph, from mixing theirs. An
    interrupt waits until it is restored.
    """
    with uninterrupted(), _state_lock:
        before = _take_state()
        try:
            torch.backends.cuda.matmul.allow_tf32 = allowed  # torch.export and others read these older flags
            torch.backends.cudnn.allow_tf32 = allowed
            yield
        finally:
            _restore_state(before)


# Of matrix products, convolutions, recurrent networks and the CPU's matrix products.
_AGREEING = (("ieee", "ieee", "ieee", "ieee"), ("tf32", "tf32", "tf32", "tf32"), ("tf32", "tf32", "tf32", "bf16"))


def _take_state() -> tuple[Any, ...]:
    """The older flags and the newer settings; what the newer inherit is set to nothing.

    PyTorch has two sets of settings that write to each other. The older cannot be read while they disagree, and the
    newer read as inherited from the general ones wherever those are set.
    """
    backends: Any = torch.backends
    general = backends.fp32_precision, backends.cudnn.fp32_precision
    backends.fp32_precision = backends.cudnn.fp32_precision = "none"
    places = _places()
    own = [place.fp32_precision for place in places]
    older: list[Any] = [None, None]
    for values in (own, *_AGREEING):  # the older flags are readable beside newer settings that agree with them
        for place, value in zip(places, values, strict=True):
            place.fp32_precision = value
        reads = (torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32)
        older = [_readable(read) if was is None else was for was, read in zip(older, reads, strict=True)]
        if None not in older:
            break
    return older, general, own


def _restore_state(before: tuple[Any, ...]) -> None:
    (matmul, cudnn), (general, cudnn_general), own = before
    backends: Any = torch.backends
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if cudnn is not None:
        backends.cudnn.allow_tf32 = cudnn
    for place, value in zip(_places(), own, strict=True):
        place.fp32_precision = value
    backends.fp32_precision = general
    if cudnn_general != general:
        backends.cudnn.fp32_precision = cudnn_general


def _places() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None
