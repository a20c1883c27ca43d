"""PyTorch's own kernels on the prepared program; behind the runner's CUDA graph where there is a GPU."""

import torch

from torchaccel.backends.base import Engine, NativeBackend, NativeEngine, Plan
from torchaccel.errors import BuildError
from torchaccel.program import Program


class Eager(NativeBackend):
    """The program, operator by operator; in channels-last where it has 2-D convolutions, unless `contiguous`."""

    name = "eager"

    def __init__(self, contiguous: bool = False) -> None:
        if contiguous:
            self.name, self.channels_last = "eager-contiguous", False

    def unavailable(self) -> str | None:
        """Never."""
        return None

    def lower(self, program: Program) -> None:
        """Raise `BuildError` where the layout makes no difference; else make it mean the same in channels-last."""
        if not self.channels_last and not program.convolutional:
            raise BuildError("it is what eager is: the program has no 2-D convolutions, whose layout would differ")
        super().lower(program)

    def load(self, plan: Plan, device: torch.device) -> Engine:
        """The program as a module on the store's weights."""
        program: Program = plan.payload
        return NativeEngine(program.exported.module(check_guards=False), plan.precision, program)
