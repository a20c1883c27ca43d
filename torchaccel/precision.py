"""The precisions: one row each, and the TF32 state of the process, which two of them depend on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


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


@contextmanager
def tf32_state(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in PyTorch's matrix products and convolutions, and restore what was there before.

    The state belongs to the process: a lock keeps two builds, or two engines without a graph, from mixing theirs.
    PyTorch's own code (torch.export among it) reads the older flags, so those are set; where the caller has set the
    newer ones, operator by operator, the older cannot be read, and the newer are restored one by one.
    """
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    with _state_lock:
        try:
            before = cuda.allow_tf32, cudnn.allow_tf32
        except RuntimeError:
            before = None
        exact = cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        cuda.allow_tf32 = cudnn.allow_tf32 = allowed
        try:
            yield
        finally:
            if before is not None:
                cuda.allow_tf32, cudnn.allow_tf32 = before
            else:
                cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = exact
