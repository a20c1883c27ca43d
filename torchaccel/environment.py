"""Probes of this machine: versions, GPUs, what is usable, and the combinations that are known not to work.

Importing this file probes nothing: each fact is read by a function, when asked for. Backends ask it; it knows none.

Two packages can be TensorRT, and they are not the same library:

- Torch-TensorRT uses TensorRT-RTX if the distribution `torch-tensorrt-rtx` is installed, and TensorRT proper if
  `torch-tensorrt` is. Once imported, Torch-TensorRT-RTX also answers to `import tensorrt`.
- The ONNX route uses TensorRT proper where its module imports, else TensorRT-RTX.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from rich.console import RenderableType

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# CUDA's major version → driver: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}


class _Library(NamedTuple):
    label: str
    distributions: tuple[str, ...]
    requirement: str


_LIBRARIES = {
    "torch_tensorrt": _Library("Torch-TensorRT", ("torch-tensorrt-rtx", "torch-tensorrt"), "torch-tensorrt"),
    "tensorrt": _Library("TensorRT", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt>=10.13"),
    "tensorrt_rtx": _Library("TensorRT-RTX", ("tensorrt-rtx", "tensorrt-rtx-cu13"), "tensorrt-rtx>=1.4,<1.7"),
    "triton": _Library("Triton", ("triton",), "triton"),
}


class _CapabilityRule(NamedTuple):
    """From version `since` on, a library refuses some compute capabilities."""

    module: str
    since: tuple[int, ...]
    refuses: Callable[[tuple[int, int]], bool]
    reason: str
    remedy: str


_OTHER_BACKEND = 'use backend="inductor" or "eager" on this GPU'
_CAPABILITY_RULES = (
    _CapabilityRule("tensorrt", (10, 5), lambda c: c < (7, 5), "TensorRT 10.5 and later need 7.5", _OTHER_BACKEND),
    _CapabilityRule("tensorrt_rtx", (1,), lambda c: c < (7, 5), "TensorRT-RTX needs 7.5", _OTHER_BACKEND),
    _CapabilityRule(
        "tensorrt_rtx",
        (1, 7),
        lambda c: c == (9, 0),
        "TensorRT-RTX 1.7 and later refuse 9.0",
        'pip install "tensorrt-rtx<1.7"',
    ),
    _CapabilityRule("triton", (2,), lambda c: c < (7, 0), "Triton needs 7.0", 'use backend="eager" on this GPU'),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch sees."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_mib: int


@dataclass(frozen=True)
class Component:
    """A library or tool that torchaccel can use: whether it works here and, if not, why and what mends it."""

    name: str
    version: str | None
    usable: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Problem:
    """A combination that is known not to work, and what mends it."""

    name: str
    reason: str
    remedy: str


# ---- small probes ----


def _release(version: str | None) -> tuple[int, ...]:
    """The numbers in front of a version: "2.11.0+cu130" gives (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def run_tool(*command: str) -> str | None:
    """What a command prints; None if it is missing, fails or takes more than 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def distribution_version(name: str) -> str | None:
    """The installed version of a distribution, under any spelling of its name; None if it is not installed.

    >>> distribution_version("Torch") == distribution_version("torch") is not None
    True
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _provider(module: str) -> tuple[str, str]:
    """The distribution that provides a module, and its version; two empty strings if there is none."""
    found = ((name, distribution_version(name)) for name in _LIBRARIES[module].distributions)
    return next(((name, version) for name, version in found if version), ("", ""))


@functools.cache
def driver_version() -> str | None:
    """The version of the NVIDIA driver, read without CUDA; None if there is none."""
    with contextlib.suppress(OSError):
        if match := re.search(r"NVRM version:.*?\s(\d+\.\d+(\.\d+)?)\s", _DRIVER_FILE.read_text()):
            return match[1]
    printed = run_tool("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    return printed.partition("\n")[0] or None


@functools.cache
def _cuda() -> tuple[tuple[Gpu, ...], str, str]:
    """The GPUs that PyTorch sees or, if it sees none, the reason and the remedy."""
    no_driver = "install the NVIDIA driver, or start the container with --gpus all"
    if torch.version.cuda is None:
        return (), f"PyTorch {torch.__version__} is built without CUDA", _pip_torch() if driver_version() else no_driver
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
        return tuple(Gpu(i, p.name, (p.major, p.minor), p.total_memory >> 20) for i, p in enumerate(found)), "", ""
    if driver_version() is None:
        return (), "there is no NVIDIA driver", no_driver
    if problem := _old_driver():
        return (), problem.reason, problem.remedy
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return (), f"CUDA_VISIBLE_DEVICES={visible} leaves PyTorch no GPU", "unset CUDA_VISIBLE_DEVICES"
    return (), str(caught[0].message).partition("\n")[0] if caught else "PyTorch sees no GPU", "nvidia-smi"


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that PyTorch sees, in its order. The first call initialises CUDA where there is a GPU."""
    return _cuda()[0]


@functools.cache
def cxx_compiler() -> str | None:
    """The path of the C++ compiler that Inductor calls on Linux: `$CXX`, else g++; None if it is missing."""
    return shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0])


@functools.cache
def c_compiler() -> str | None:
    """The path of the C compiler that Triton calls: `$CC`, else gcc, else clang; None if it is missing."""
    chosen = shlex.split(os.environ.get("CC", ""))
    return shutil.which(chosen[0]) if chosen else shutil.which("gcc") or shutil.which("clang")


def triton_problem() -> str | None:
    """Why Triton cannot compile kernels for the GPU here; None where it can, or where there is no GPU."""
    if not gpus():
        return None
    if problem := import_problem("triton"):
        return problem
    return None if c_compiler() else "Triton needs a C compiler: install gcc, or set CC"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what Python, logging and native code print meanwhile."""
    logging_was, saved = logging.root.manager.disable, {}
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # closed, as in a daemon
                saved[descriptor] = os.dup(descriptor)
                os.dup2(null.fileno(), descriptor)
        logging.disable(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(logging_was)
            for descriptor, copy in saved.items():
                os.dup2(copy, descriptor)
                os.close(copy)


@functools.cache
def _import_failure(module: str) -> str | None:
    try:
        with _silence():
            importlib.import_module(module)
    # What a native library raises while it is imported is up to that library: all of it means "not usable, because".
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return None


def import_problem(module: str) -> str | None:
    """Why a top-level module cannot be imported, in one line; None if it can.

    The import is attempted, once in a process, and what it prints is dropped.

    >>> import_problem("json") is None
    True
    >>> import_problem("no_such_module")
    'no_such_module is not installed'
    """
    if (loaded := sys.modules.get(module)) is not None:
        name = getattr(loaded, "__name__", module)
        return None if name == module else f"`import {module}` gives {name}: Torch-TensorRT-RTX has put it there"
    if not any(finder.find_spec(module, None) for finder in sys.meta_path):
        return f"{module} is not installed"
    if module == "torch_tensorrt" and not gpus():  # it asks for its device while it is imported, and raises
        return f"torch_tensorrt imports only where there is a GPU: {_cuda()[1]}"
    return _import_failure(module)


def tensorrt_of_torch_tensorrt() -> str | None:
    """The module that Torch-TensorRT runs on, by the distribution of it that is installed; None if none is."""
    return {"torch-tensorrt-rtx": "tensorrt_rtx", "torch-tensorrt": "tensorrt"}.get(_provider("torch_tensorrt")[0])


def _refusal(module: str, gpu: Gpu) -> Problem | None:
    version = _provider(module)[1]
    for rule in _CAPABILITY_RULES:
        if rule.module == module and _release(version) >= rule.since and rule.refuses(gpu.compute_capability):
            reason = f"{rule.reason}: the compute capability of {gpu.name} is {_dotted(gpu.compute_capability)}"
            return Problem(f"{_LIBRARIES[module].label} {version} on {gpu.name}", reason, rule.remedy)
    return None


def _device_check(module: str, index: int = 0) -> tuple[str, str]:
    """The reason and the remedy of `device_problem`; two empty strings if there is no problem."""
    if index >= len(gpus()):
        return (_cuda()[1], _cuda()[2]) if not gpus() else (f"PyTorch sees {len(gpus())} GPUs, and no {index}", "")
    beneath = tensorrt_of_torch_tensorrt() if module == "torch_tensorrt" else module
    problem = beneath and _refusal(beneath, gpus()[index])
    return (problem.reason, problem.remedy) if problem else ("", "")


def device_problem(module: str, index: int = 0) -> str | None:
    """Why a GPU cannot run what the installed version of a library builds; None if nothing is known against it.

    `module` is "tensorrt", "tensorrt_rtx", "torch_tensorrt" (answered for the TensorRT beneath it) or "triton"; `index`
    is PyTorch's.
    """
    return _device_check(module, index)[0] or None


# ---- combinations that are known not to work: a generator each, listed in _CHECKS ----


def _pip(module: str) -> str:
    """The command that installs a library: of Torch-TensorRT, the version and the CUDA that fit this PyTorch."""
    if module != "torch_tensorrt":
        return f'pip install "{_LIBRARIES[module].requirement}"'
    major, minor = _release(torch.__version__)[:2]
    wheels = "https://download.pytorch.org/whl/cu" + (torch.version.cuda or "13.0").replace(".", "")
    return f'pip install "torch-tensorrt=={major}.{minor}.*" --extra-index-url {wheels}'


def _pip_torch() -> str:
    """The command that replaces PyTorch by the same version, built for a CUDA that the driver can run."""
    wheels = "https://download.pytorch.org/whl/" + ("cu130" if _release(driver_version()) >= (580,) else "cu126")
    version = torch.__version__.partition("+")[0]
    return f'pip install --force-reinstall "torch=={version}" torchvision --index-url {wheels}'


def _old_driver() -> Problem | None:
    needed = _MINIMUM_DRIVER.get(int((torch.version.cuda or "0").partition(".")[0]), 0)
    if not driver_version() or _release(driver_version()) >= (needed,):
        return None
    reason = f"CUDA {torch.version.cuda}, of this PyTorch, needs driver {needed}; here is {driver_version()}"
    return Problem("NVIDIA driver too old for this PyTorch", reason, f"update the driver, or {_pip_torch()}")


def _torch_and_driver() -> Iterator[Problem]:
    if torch.version.cuda is None and driver_version():
        reason = f"there is the NVIDIA driver {driver_version()}, but PyTorch {torch.__version__} has no CUDA"
        yield Problem("CPU-only PyTorch beside an NVIDIA GPU", reason, _pip_torch())
    # where PyTorch sees a GPU, the driver will do: a forward-compatibility package can make up for its age
    elif (problem := _old_driver()) and not gpus():
        yield problem


def _torch_and_torch_tensorrt() -> Iterator[Problem]:
    for name in _LIBRARIES["torch_tensorrt"].distributions:
        version, rtx = distribution_version(name), name == "torch-tensorrt-rtx"
        title = f"{name} {version} beside PyTorch {torch.__version__}"
        remedy = 'pip install "torchaccel[rtx]"' if rtx else _pip("torch_tensorrt")
        if version and _release(version) < (1,):
            yield Problem(title, f"{name} {version} is an empty placeholder", remedy)
        elif version and _release(version)[:2] != _release(torch.__version__)[:2]:
            yield Problem(title, "their minor versions must be equal", remedy)
        elif rtx and _release(version) == (2, 11, 0):
            package = PathFinder.find_spec("tensorrt_rtx")  # finds it without importing it
            if package and PathFinder.find_spec("plugin", package.submodule_search_locations):
                title = f"{name} {version} beside tensorrt-rtx {_provider('tensorrt_rtx')[1]}"
                yield Problem(title, "it imports only where there is no package tensorrt_rtx.plugin", remedy)


def _two_of_one_kind() -> Iterator[Problem]:
    if all(distribution_version(name) for name in _LIBRARIES["torch_tensorrt"].distributions):
        remedy = f"pip uninstall -y torch-tensorrt torch-tensorrt-rtx && {_pip('torch_tensorrt')}"
        yield Problem("torch-tensorrt and torch-tensorrt-rtx", "each overwrites the other's files", remedy)
    if _provider("tensorrt")[0] and _provider("tensorrt_rtx")[0]:
        unused = "tensorrt" if tensorrt_of_torch_tensorrt() == "tensorrt_rtx" else "tensorrt_rtx"
        installed = filter(distribution_version, _LIBRARIES[unused].distributions)
        reason = "two libraries, one interface: Torch-TensorRT uses the one that its distribution is named after"
        yield Problem("TensorRT and TensorRT-RTX", reason, f"pip uninstall -y {' '.join(installed)}")


def _refused_gpus() -> Iterator[Problem]:
    for gpu in gpus():
        yield from filter(None, (_refusal(module, gpu) for module in _LIBRARIES))


def _failed_imports() -> Iterator[Problem]:
    for module, library in _LIBRARIES.items():
        if module == "torch_tensorrt" and (not gpus() or any(_torch_and_torch_tensorrt())):
            continue  # its reason is known already
        if (installed := _provider(module)[0]) and (reason := import_problem(module)):
            remedy = f"pip uninstall -y {installed} && {_pip(module)}"
            yield Problem(f"{library.label} does not import", reason, remedy)


_CHECKS = (_torch_and_driver, _torch_and_torch_tensorrt, _two_of_one_kind, _refused_gpus, _failed_imports)


def bad_combinations() -> tuple[Problem, ...]:
    """What is known not to work among the things installed here, each with what mends it."""
    return tuple(problem for check in _CHECKS for problem in check())


# ---- the whole picture ----


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

        found = [(str(g.index), g.name, _dotted(g.compute_capability), f"{g.memory_mib}") for g in self.gpus]
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
        torch_tensorrt=" ".join(_provider("torch_tensorrt")).strip() or None,
        tensorrt=_provider("tensorrt")[1] or None,
        tensorrt_rtx=_provider("tensorrt_rtx")[1] or None,
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
    yield _component("PyTorch CUDA", torch.version.cuda, _cuda()[1:])
    for module in ("torch_tensorrt", "tensorrt", "tensorrt_rtx"):
        checks = (_device_check(module), (import_problem(module), _pip(module)))
        order = checks if _provider(module)[0] else checks[::-1]  # first what is missing, then what refuses it
        yield _component(_LIBRARIES[module].label, _provider(module)[1] or None, *order)
    onnx = [(import_problem(module), f'pip install "{module}"') for module in ("onnx", "onnxscript")]
    yield _component("ONNX export", distribution_version("onnx"), *onnx)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    no_headers = ("" if headers else "Python.h is missing", "apt-get install python3-dev")
    no_cxx = ("" if cxx_compiler() else "there is no C++ compiler: neither $CXX nor g++", "apt-get install g++")
    no_cc = ("" if c_compiler() else "there is no C compiler: neither $CC, gcc nor clang", "apt-get install gcc")
    yield _component("Inductor on CPU", torch.__version__, no_cxx, no_headers)
    no_triton = (import_problem("triton"), _pip("triton"))
    yield _component("Triton", distribution_version("triton"), no_triton, _device_check("triton"), no_cc, no_headers)


def environment() -> Environment:
    """What this machine has and what of it is usable, found by trying: it imports every library that is installed.

    >>> environment().torch == torch.__version__
    True
    """
    return replace(facts(), components=tuple(_components()), problems=bad_combinations())
