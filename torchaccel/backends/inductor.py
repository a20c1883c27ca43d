"""torch.compile's Inductor on the prepared program; not frozen, so new weights reach it in place."""

import torch

from torchaccel.backends.base import Engine, NativeBackend, NativeEngine, Plan
from torchaccel.errors import BuildError
from torchaccel.probes import c_compiler, cxx_compiler, gpus, import_problem
from torchaccel.program import Program
from torchaccel.quiet import quiet


class Inductor(NativeBackend):
    """Inductor, without CUDA graphs of its own: the runner captures its kernels.

    `autotune` has it try its own templates for matrix products and convolutions, which takes minutes.
    """

    compiles = True

    def __init__(self, autotune: bool = False) -> None:
        self._mode = "max-autotune-no-cudagraphs" if autotune else None
        self.name = "inductor-autotuned" if autotune else "inductor"

    def unavailable(self) -> str | None:
        """Inductor compiles its kernels with a C++ compiler on the CPU, and through Triton on a GPU."""
        if gpus():
            if problem := import_problem("triton"):
                return f"Inductor needs Triton on a GPU: {problem}"
            return None if c_compiler() else "Triton needs a C compiler: install gcc, or set CC"
        return None if cxx_compiler() else "Inductor needs a C++ compiler: install g++, or set CXX"

    def load(self, plan: Plan, device: torch.device) -> Engine:
        """Generate and compile the kernels, by a first run on the program's own examples."""
        program: Program = plan.payload
        graph_module = program.exported.module(check_guards=False)
        compiled = torch.compile(graph_module, fullgraph=True, dynamic=program.batch is not None, mode=self._mode)
        engine = NativeEngine(compiled, plan.precision, program)
        try:
            with quiet("torch.utils.cpp_extension"):  # which misses CUDA where there is no GPU
                engine(*[engine.input_buffer(index, tensor) for index, tensor in enumerate(program.inputs)])
        except Exception as error:
            raise BuildError(f"Inductor could not compile the program ({type(error).__name__}): {error}") from error
        return engine
