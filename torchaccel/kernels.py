"""The kernels that TensorRT-RTX specialises on a GPU, kept between processes."""

from typing import Any

import torch

from torchaccel import trt
from torchaccel.cache import Cache
from torchaccel.environment import driver_version
from torchaccel.provenance import describe_gpu

MAX_BYTES = 256 << 20  # nothing leaves a store of kernels, so beyond it one is begun anew


def restore(flavour: str | None, device: torch.device, cache: Cache | None) -> None:
    """Before the first engine of a process on a device: let it begin with the kernels that earlier ones had."""
    library = _specialising(flavour)
    if cache is None or library is None or library.has_kernels(device):
        return
    entry = cache.get(_key(library, device))
    if entry is not None and len(entry.files["kernels"]) <= MAX_BYTES:
        library.begin_with_kernels(device, entry.files["kernels"])


def keep(flavour: str | None, device: torch.device, cache: Cache | None) -> None:
    """After an engine has run: keep the kernels of this process, if there are new ones. The last process wins."""
    library = _specialising(flavour)
    if cache is None or library is None or (kernels := library.new_kernels(device)) is None:
        return
    what = f"{library.name} on {describe_gpu(device)['name']}"
    cache.put(_key(library, device), {"kernels": kernels}, {"what": what})


def _specialising(flavour: str | None) -> trt.TensorRT | None:
    """The TensorRT of a plan, if it specialises kernels on the GPU; a plan of PyTorch's own names none."""
    library = None if flavour is None else trt.load(flavour)
    return library if library is not None and library.is_rtx else None


def _key(library: trt.TensorRT, device: torch.device) -> dict[str, Any]:
    return {
        "kind": "kernels",
        "library": library.name,
        "gpu": describe_gpu(device),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }
