"""What is installed on this machine and what its GPUs are; importing this file probes nothing, each function does.

What can make an import fail is asked for by trying it, once in a process, and what it prints is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# CUDA's major version → driver: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}


class Library(NamedTuple):
    """A library by the name that people know, the distributions that provide it, and what to ask pip for."""

    label: str
    distributions: tuple[str, ...]
    requirement: str


LIBRARIES = {
    "torch_tensorrt": Library("Torch-TensorRT", ("torch-tensorrt-rtx", "torch-tensorrt"), "torch-tensorrt"),
    "tensorrt": Library("TensorRT", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt>=10.13"),
    "tensorrt_rtx": Library("TensorRT-RTX", ("tensorrt-rtx", "tensorrt-rtx-cu13"), "tensorrt-rtx>=1.4,<1.7"),
    "triton": Library("Triton", ("triton",), "triton"),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch sees."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_mib: int


@dataclass(frozen=True)
class Problem:
    """A combination that is known not to work, and what mends it."""

    name: str
    reason: str
    remedy: str


def version_numbers(version: str | None) -> tuple[int, ...]:
    """The numbers in front of a version: "2.11.0+cu130" gives (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def dotted(numbers: tuple[int, ...]) -> str:
    """Numbers as a version is written: (2, 11) gives "2.11"."""
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


def provider(module: str) -> tuple[str, str]:
    """The distribution that provides a module, and its version; two empty strings if there is none."""
    found = ((name, distribution_version(name)) for name in LIBRARIES[module].distributions)
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
        return (), f"PyTorch {torch.__version__} is built without CUDA", pip_torch() if driver_version() else no_driver
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
        return tuple(Gpu(i, p.name, (p.major, p.minor), p.total_memory >> 20) for i, p in enumerate(found)), "", ""
    if driver_version() is None:
        return (), "there is no NVIDIA driver", no_driver
    if problem := old_driver():
        return (), problem.reason, problem.remedy
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return (), f"CUDA_VISIBLE_DEVICES={visible} leaves PyTorch no GPU", "unset CUDA_VISIBLE_DEVICES"
    return (), str(caught[0].message).partition("\n")[0] if caught else "PyTorch sees no GPU", "nvidia-smi"


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that PyTorch sees, in its order. The first call initialises CUDA where there is a GPU."""
    return _cuda()[0]


def no_gpu() -> tuple[str, str]:
    """Why PyTorch sees no GPU, and what mends that; two empty strings where it sees one."""
    return _cuda()[1:]


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
        return f"torch_tensorrt imports only where there is a GPU: {no_gpu()[0]}"
    return _import_failure(module)


def tensorrt_of_torch_tensorrt() -> str | None:
    """The module that Torch-TensorRT runs on, by the distribution of it that is installed; None if none is."""
    return {"torch-tensorrt-rtx": "tensorrt_rtx", "torch-tensorrt": "tensorrt"}.get(provider("torch_tensorrt")[0])


# ---- what mends it ----


def pip_command(module: str) -> str:
    """The command that installs a library: of Torch-TensorRT, the version and the CUDA that fit this PyTorch."""
    if module != "torch_tensorrt":
        return f'pip install "{LIBRARIES[module].requirement}"'
    major, minor = version_numbers(torch.__version__)[:2]
    wheels = "https://download.pytorch.org/whl/cu" + (torch.version.cuda or "13.0").replace(".", "")
    return f'pip install "torch-tensorrt=={major}.{minor}.*" --extra-index-url {wheels}'


def pip_torch() -> str:
    """The command that replaces PyTorch by the same version, built for a CUDA that the driver can run."""
    wheels = "https://download.pytorch.org/whl/" + ("cu130" if version_numbers(driver_version()) >= (580,) else "cu126")
    version = torch.__version__.partition("+")[0]
    return f'pip install --force-reinstall "torch=={version}" torchvision --index-url {wheels}'


def old_driver() -> Problem | None:
    """The driver, where it is older than this PyTorch's CUDA needs; None where it is not."""
    needed = _MINIMUM_DRIVER.get(int((torch.version.cuda or "0").partition(".")[0]), 0)
    if not driver_version() or version_numbers(driver_version()) >= (needed,):
        return None
    reason = f"CUDA {torch.version.cuda}, of this PyTorch, needs driver {needed}; here is {driver_version()}"
    return Problem("NVIDIA driver too old for this PyTorch", reason, f"update the driver, or {pip_torch()}")
