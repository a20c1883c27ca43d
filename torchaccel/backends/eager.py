"""PyTorch's own kernels on the prepared program; behind the runner's CUDA graph where there is a GPU."""

import torch

from torchaccel.backends.base import Engine, NativeBackend, NativeEngine, Plan
from torchaccel.program import Program


class Eager(NativeBackend):
    """The program, operator by operator."""

    name = "eager"

    def unavailable(self) -> str | None:
        """Never."""
        return None

    def load(self, plan: Plan, device: torch.device) -> Engine:
        """The program as a module on the store's weights."""
        program: Program = plan.payload
        return NativeEngine(program.exported.module(check_guards=False), plan.precision, program)
