"""What TensorRT finds out on a GPU, kept between processes: RTX's specialised kernels, TensorRT proper's timings.

TensorRT-RTX specialises kernels when an engine first runs; TensorRT proper chooses among its own by timing in a build.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchaccel import trt
from torchaccel.cache.store import Cache
from torchaccel.errors import CacheWarning
from torchaccel.probes import driver_version
from torchaccel.provenance import describe_gpu

MAX_BYTES = 256 << 20  # nothing leaves a store of kernels or timings, so beyond it one is begun anew


def restore(flavour: str | None, device: torch.device, cache: Cache | None) -> None:
    """Before the first engine of a process on a device: let it begin with the kernels that earlier ones had."""
    library = _specialising(flavour)
    if cache is None or library is None or library.has_kernels(device):
        return
    if found := _found(cache, "kernels", library, device):
        library.begin_with_kernels(device, found)


def keep(flavour: str | None, device: torch.device, cache: Cache | None) -> None:
    """After an engine has run: keep the kernels of this process, if there are new ones. The last process wins."""
    library = _specialising(flavour)
    if cache is None or library is None or (kernels := library.new_kernels(device)) is None:
        return
    _put(cache, "kernels", library, device, kernels)


@contextmanager
def timings_kept(library: trt.TensorRT | None, device: torch.device, cache: Cache | None) -> Iterator[None]:
    """Have a build begin with the timings that earlier ones made for a device, and keep its own. The last one wins."""
    if cache is None or library is None or library.is_rtx:
        yield
        return
    if not library.timings(device) and (found := _found(cache, "timings", library, device)):
        library.begin_with_timings(device, found)
    before = library.timings(device)
    yield
    if refusal := library.take_refusal(device):
        warnings.warn(f"{library.name} refuses the timings in the cache ({refusal}): it times anew.", CacheWarning, 2)
    after = library.timings(device)
    if after != before:
        _put(cache, "timings", library, device, after)


def _specialising(flavour: str | None) -> trt.TensorRT | None:
    """The TensorRT of a plan, if it specialises kernels on the GPU; a plan of PyTorch's own names none."""
    library = None if flavour is None else trt.load(flavour)
    return library if library is not None and library.is_rtx else None


def _found(cache: Cache, kind: str, library: trt.TensorRT, device: torch.device) -> bytes | None:
    found = cache.get(_key(kind, library, device), lambda entry: entry.payload(kind))
    return found if found is not None and len(found) <= MAX_BYTES else None


def _put(cache: Cache, kind: str, library: trt.TensorRT, device: torch.device, found: bytes) -> None:
    what = f"{library.name} on {describe_gpu(device)['name']}"
    cache.put(_key(kind, library, device), {kind: found}, {"what": what})


def _key(kind: str, library: trt.TensorRT, device: torch.device) -> dict[str, Any]:
    return {
        "kind": kind,
        "library": library.name,
        "gpu": describe_gpu(device),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }
