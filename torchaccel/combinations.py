"""The combinations of libraries, drivers and GPUs that are known not to work, each with what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from typing import NamedTuple

import torch

from torchaccel.probes import (
    LIBRARIES,
    Gpu,
    Problem,
    distribution_version,
    dotted,
    driver_version,
    gpus,
    import_problem,
    no_gpu,
    old_driver,
    pip_command,
    pip_torch,
    provider,
    tensorrt_of_torch_tensorrt,
    version_numbers,
)


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


def _refusal(module: str, gpu: Gpu) -> Problem | None:
    version = provider(module)[1]
    for rule in _CAPABILITY_RULES:
        if rule.module == module and version_numbers(version) >= rule.since and rule.refuses(gpu.compute_capability):
            reason = f"{rule.reason}: the compute capability of {gpu.name} is {dotted(gpu.compute_capability)}"
            return Problem(f"{LIBRARIES[module].label} {version} on {gpu.name}", reason, rule.remedy)
    return None


def device_check(module: str, index: int = 0) -> tuple[str, str]:
    """The reason and the remedy of `device_problem`; two empty strings if there is no problem."""
    if not gpus():
        return no_gpu()
    if index >= len(gpus()):
        return f"PyTorch sees {len(gpus())} GPUs, and no {index}", ""
    beneath = tensorrt_of_torch_tensorrt() if module == "torch_tensorrt" else module
    problem = beneath and _refusal(beneath, gpus()[index])
    return (problem.reason, problem.remedy) if problem else ("", "")


def device_problem(module: str, index: int = 0) -> str | None:
    """Why a GPU cannot run what the installed version of a library builds; None if nothing is known against it.

    `module` is "tensorrt", "tensorrt_rtx", "torch_tensorrt" (answered for the TensorRT beneath it) or "triton"; `index`
    is PyTorch's.
    """
    return device_check(module, index)[0] or None


# ---- a generator each, listed in _CHECKS ----


def _torch_and_driver() -> Iterator[Problem]:
    if torch.version.cuda is None and driver_version():
        reason = f"there is the NVIDIA driver {driver_version()}, but PyTorch {torch.__version__} has no CUDA"
        yield Problem("CPU-only PyTorch beside an NVIDIA GPU", reason, pip_torch())
    # where PyTorch sees a GPU, the driver will do: a forward-compatibility package can make up for its age
    elif (problem := old_driver()) and not gpus():
        yield problem


def _torch_and_torch_tensorrt() -> Iterator[Problem]:
    for name in LIBRARIES["torch_tensorrt"].distributions:
        version, rtx = distribution_version(name), name == "torch-tensorrt-rtx"
        title = f"{name} {version} beside PyTorch {torch.__version__}"
        remedy = 'pip install "torchaccel[rtx]"' if rtx else pip_command("torch_tensorrt")
        if version and version_numbers(version) < (1,):
            yield Problem(title, f"{name} {version} is an empty placeholder", remedy)
        elif version and version_numbers(version)[:2] != version_numbers(torch.__version__)[:2]:
            yield Problem(title, "their minor versions must be equal", remedy)
        elif rtx and version_numbers(version) == (2, 11, 0):
            package = PathFinder.find_spec("tensorrt_rtx")  # finds it without importing it
            if package and PathFinder.find_spec("plugin", package.submodule_search_locations):
                title = f"{name} {version} beside tensorrt-rtx {provider('tensorrt_rtx')[1]}"
                yield Problem(title, "it imports only where there is no package tensorrt_rtx.plugin", remedy)


def _two_of_one_kind() -> Iterator[Problem]:
    if all(distribution_version(name) for name in LIBRARIES["torch_tensorrt"].distributions):
        remedy = f"pip uninstall -y torch-tensorrt torch-tensorrt-rtx && {pip_command('torch_tensorrt')}"
        yield Problem("torch-tensorrt and torch-tensorrt-rtx", "each overwrites the other's files", remedy)
    if provider("tensorrt")[0] and provider("tensorrt_rtx")[0]:
        unused = "tensorrt" if tensorrt_of_torch_tensorrt() == "tensorrt_rtx" else "tensorrt_rtx"
        installed = filter(distribution_version, LIBRARIES[unused].distributions)
        reason = "two libraries, one interface: Torch-TensorRT uses the one that its distribution is named after"
        yield Problem("TensorRT and TensorRT-RTX", reason, f"pip uninstall -y {' '.join(installed)}")


def _refused_gpus() -> Iterator[Problem]:
    for gpu in gpus():
        yield from filter(None, (_refusal(module, gpu) for module in LIBRARIES))


def _failed_imports() -> Iterator[Problem]:
    for module, library in LIBRARIES.items():
        if module == "torch_tensorrt" and (not gpus() or any(_torch_and_torch_tensorrt())):
            continue  # its reason is known already
        if (installed := provider(module)[0]) and (reason := import_problem(module)):
            remedy = f"pip uninstall -y {installed} && {pip_command(module)}"
            yield Problem(f"{library.label} does not import", reason, remedy)


_CHECKS = (_torch_and_driver, _torch_and_torch_tensorrt, _two_of_one_kind, _refused_gpus, _failed_imports)


def bad_combinations() -> tuple[Problem, ...]:
    """What is known not to work among the things installed here, each with what mends it."""
    return tuple(problem for check in _CHECKS for problem in check())
