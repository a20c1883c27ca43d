"""PyTorch's own kernels on the prepared program; behind the runner's CUDA graph where there is a GPU."""

import torch

from torchaccel.backends.base import Backend, Engine, NativeEngine, Plan, native_honours
from torchaccel.capture import Program
from torchaccel.precision import Precision


class Eager(Backend):
    """The program, operator by operator."""

    name = "eager"
    native = True

    def unavailable(self) -> str | None:
        """Never."""
        return None

    def honours(self, precision: Precision, device: torch.device) -> str | None:
        """Whatever PyTorch's kernels honour."""
        return native_honours(precision, device)

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        """Nothing to build: the plan is the program."""
        return Plan(self.name, precision, program, library=f"PyTorch {torch.__version__}")

    def load(self, plan: Plan, device: torch.device) -> Engine:
        """The program as a module on the store's weights."""
        program: Program = plan.payload
        return NativeEngine(program.exported.module(check_guards=False), plan.precision, program.channels_last)
