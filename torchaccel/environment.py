"""The whole picture of this machine: versions, GPUs, what is usable, and the combinations that are known not to work.

Importing this file probes nothing: each fact is read by a function, when asked for.

Two packages can be TensorRT, and they are not the same library:

- Torch-TensorRT uses TensorRT-RTX if the distribution `torch-tensorrt-rtx` is installed, and TensorRT proper if
  `torch-tensorrt` is. Once imported, Torch-TensorRT-RTX also answers to `import tensorrt`.
- The ONNX route uses TensorRT proper where its module imports, else TensorRT-RTX.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchaccel.combinations import bad_combinations, device_check
from torchaccel.probes import (
    LIBRARIES,
    Gpu,
    Problem,
    c_compiler,
    cxx_compiler,
    distribution_version,
    dotted,
    driver_version,
    gpus,
    import_problem,
    no_gpu,
    pip_command,
    provider,
)

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Component:
    """A library or tool that torchaccel can use: whether it works here and, if not, why and what mends it."""

    name: str
    version: str | None
    usable: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Environment:
    """What this machine has, what of it torchaccel can use, and what is known not to work together."""

    python: str
    platform: str
    cpu: str
    gpus: tuple[Gpu, ...]
    driver: str | None
    cuda: str | None
    cudnn: str | None
    torch: str
    torchvision: str | None
    torch_tensorrt: str | None
    tensorrt: str | None
    tensorrt_rtx: str | None
    triton: str | None
    onnx: str | None
    onnxscript: str | None
    torchaccel: str | None
    components: tuple[Component, ...] = ()
    problems: tuple[Problem, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists, strings and numbers, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        def table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
            result = Table(*header, title=title, title_justify="left")
            for row in rows:  # Text, because Console would read "[rtx]" in a string as markup
                result.add_row(*(Text(cell, overflow="fold") for cell in row))
            return result

        found = [(str(g.index), g.name, dotted(g.compute_capability), f"{g.memory_mib}") for g in self.gpus]
        versions = {k: v for k, v in vars(self).items() if k not in ("gpus", "components", "problems")}
        usable = [(c.name, c.version or "-", "yes" if c.usable else "no", c.reason) for c in self.components]
        bad = [(p.name, p.reason) for p in self.problems]
        items: list[Problem | Component] = [*self.problems, *self.components]
        mends = [f"  {item.name}: {item.remedy}" for item in items if item.remedy]
        parts: list[RenderableType] = [
            table("GPUs", ("index", "name", "compute capability", "memory MiB"), found or [("-", "none", "-", "-")]),
            table("Versions", ("of", "version"), [(k.replace("_", "-"), v or "-") for k, v in versions.items()]),
            table("Usable here", ("component", "version", "usable", "why not"), usable),
        ]
        if bad:
            parts.append(table("Known not to work together", ("combination", "why"), bad))
        if mends:  # outside the tables, so that a command can be copied whole
            parts.append(Text("\n".join(["What mends it", *mends])))
        return Group(*parts)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return match[1]
    return platform.processor() or platform.machine()


def _platform() -> str:
    name = platform.system()
    with contextlib.suppress(OSError):
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    return f"{name}, {platform.machine()}, {' '.join(platform.libc_ver())}"


def facts() -> Environment:
    """What is here, without importing any of it."""
    cudnn = torch.backends.cudnn.version()
    return Environment(
        python=platform.python_version(),
        platform=_platform(),
        cpu=_cpu_name(),
        gpus=gpus(),
        driver=driver_version(),
        cuda=torch.version.cuda,
        cudnn=str(cudnn) if cudnn else None,
        torch=str(torch.__version__),
        torchvision=distribution_version("torchvision"),
        torch_tensorrt=" ".join(provider("torch_tensorrt")).strip() or None,
        tensorrt=provider("tensorrt")[1] or None,
        tensorrt_rtx=provider("tensorrt_rtx")[1] or None,
        triton=distribution_version("triton"),
        onnx=distribution_version("onnx"),
        onnxscript=distribution_version("onnxscript"),
        torchaccel=distribution_version("torchaccel"),
    )


def _component(name: str, version: str | None, *checks: tuple[str | None, str]) -> Component:
    """A component that is usable unless one of the checks, each a reason and a remedy, has a reason."""
    reason, remedy = next(((reason, remedy) for reason, remedy in checks if reason), ("", ""))
    return Component(name, version, not reason, reason, remedy)


def _components() -> Iterator[Component]:
    yield _component("PyTorch CUDA", torch.version.cuda, no_gpu())
    for module in ("torch_tensorrt", "tensorrt", "tensorrt_rtx"):
        checks = (device_check(module), (import_problem(module), pip_command(module)))
        order = checks if provider(module)[0] else checks[::-1]  # first what is missing, then what refuses it
        component = _component(LIBRARIES[module].label, provider(module)[1] or None, *order)
        if module == "tensorrt_rtx" and component.reason == no_gpu()[0] and not import_problem(module):
            component = replace(component, reason=f"{component.reason}; it builds engine files, but runs none")
        yield component
    onnx = [(import_problem(module), f'pip install "{module}"') for module in ("onnx", "onnxscript")]
    yield _component("ONNX export", distribution_version("onnx"), *onnx)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    no_headers = ("" if headers else "Python.h is missing", "apt-get install python3-dev")
    no_cxx = ("" if cxx_compiler() else "there is no C++ compiler: neither $CXX nor g++", "apt-get install g++")
    no_cc = ("" if c_compiler() else "there is no C compiler: neither $CC, gcc nor clang", "apt-get install gcc")
    yield _component("Inductor on CPU", torch.__version__, no_cxx, no_headers)
    no_triton = (import_problem("triton"), pip_command("triton"))
    yield _component("Triton", distribution_version("triton"), no_triton, device_check("triton"), no_cc, no_headers)


def environment() -> Environment:
    """What this machine has and what of it is usable, found by trying: it imports every library that is installed.

    >>> environment().torch == torch.__version__
    True
    """
    return replace(facts(), components=tuple(_components()), problems=bad_combinations())
