"""Where a measurement comes from: the state of the GPU, and the code that ran."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from torchaccel.environment import facts
from torchaccel.probes import distribution_version, gpus, run_tool

_MACHINE = ("platform", "driver", "cuda", "cudnn", "torch", "torchvision", "torch_tensorrt", "tensorrt", "tensorrt_rtx")
_EXPORT = ("onnx", "onnxscript", "onnx-ir")


def gpu_state(index: int = 0) -> dict[str, float]:
    """Clocks in MHz, temperature in °C, power in W of one of PyTorch's GPUs; empty where there is no nvidia-smi."""
    # nvidia-smi counts in another order than PyTorch, and counts hidden GPUs too: the UUID is the same in both
    known = index < len(gpus())
    name = f"GPU-{torch.cuda.get_device_properties(index).uuid}" if known else str(index)
    query = {
        "clocks.sm": "sm_clock_mhz",
        "clocks.mem": "memory_clock_mhz",
        "temperature.gpu": "temperature_c",
        "power.draw": "power_w",
        "power.limit": "power_limit_w",
    }
    output = run_tool("nvidia-smi", f"--id={name}", f"--query-gpu={','.join(query)}", "--format=csv,noheader,nounits")
    values = [value.strip() for value in (output or "").split(",")]
    # a field that the GPU does not report reads "[N/A]"
    return {key: float(v) for key, v in zip(query.values(), values, strict=False) if re.fullmatch(r"[\d.]+", v)}


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """What of a GPU an engine may depend on."""
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "compute_capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "memory_mib": found.total_memory >> 20,
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """What of a device the time of an engine depends on."""
    if device.type == "cuda":
        return describe_gpu(device)
    return {"name": facts().cpu, "threads": torch.get_num_threads()}


def _git_object(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _tree_hash(folder: Path) -> str | None:
    """The hash that git gives to a folder's contents, uncommitted edits included, with or without git.

    Files count as not executable; hidden ones and `__pycache__` are left out. Format: git's hash-object(1), mktree(1).
    """
    entries = b""
    for path in sorted(folder.iterdir(), key=lambda path: path.name + "/" * path.is_dir()):
        if path.name.startswith((".", "__pycache__")):
            continue
        folded = path.is_dir()
        digest = _tree_hash(path) if folded else _git_object("blob", path.read_bytes())
        if digest:  # git keeps no empty folders
            entries += f"{'40000' if folded else '100644'} {path.name}\0".encode() + bytes.fromhex(digest)
    return _git_object("tree", entries) if entries else None


def code_hash() -> str | None:
    """git's hash of the folder `torchaccel` as it lies on disk: which code this is."""
    return _tree_hash(Path(__file__).parent)


@functools.cache
def versions() -> dict[str, Any]:
    """Of all that has a part in a build, our own code included."""
    known = facts().to_dict()
    return {
        **{name: known[name] for name in _MACHINE},
        **{name: distribution_version(name) for name in _EXPORT},
        "torchaccel": code_hash(),
    }


def provenance() -> dict[str, Any]:
    """What a result file says about where it comes from: `environment` (versions, GPUs), `commit`, `tree`.

    `tree` is git's hash of the folder `torchaccel` as it lies on disk; `commit` is None outside a git checkout. No
    library is imported for it.
    """
    described = {k: v for k, v in facts().to_dict().items() if k not in ("components", "problems")}
    package = Path(__file__).parent
    tracked = run_tool("git", "-C", str(package), "ls-files", Path(__file__).name)
    commit = run_tool("git", "-C", str(package), "rev-parse", "HEAD") if tracked else None
    return {"environment": described, "commit": commit, "tree": code_hash()}
