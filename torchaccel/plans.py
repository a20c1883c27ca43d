"""Plans that outlive their process: what one depends on, and the way into the cache and back."""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from torchaccel.backends.base import Backend, Plan
from torchaccel.cache import Cache
from torchaccel.capture import Program
from torchaccel.entries import Entry
from torchaccel.environment import distribution_version, facts
from torchaccel.interrupts import uninterrupted
from torchaccel.options import Options
from torchaccel.precision import PRECISIONS
from torchaccel.program_key import NoKeyError, program_key
from torchaccel.provenance import code_hash
from torchaccel.report import Coverage

_MACHINE = ("platform", "driver", "cuda", "cudnn", "torch", "torchvision", "torch_tensorrt", "tensorrt", "tensorrt_rtx")
_EXPORT = ("onnx", "onnxscript", "onnx-ir")


@dataclass
class Found:
    """A plan, whether it was in the cache, and why it is not kept there if it is not."""

    plan: Plan
    from_cache: bool = False
    why_not_kept: str = ""
    cache: Cache | None = None
    key: Any = None

    def discard(self) -> None:
        """Forget the plan in the cache: it does not serve."""
        if self.cache is not None:
            self.cache.discard(self.key)


def plan_for(
    backend: Backend,
    program: Program,
    options: Options,
    device: torch.device,
    *,
    cache: Cache | None,
    what: str,
    gpu: dict[str, Any] | None = None,
) -> Found:
    """The plan of a program that has its weights: the cache's, or one that is built now and kept there.

    Plans of one serialised engine are kept; a program in several parts is not. `what` is for people, in listings; `gpu`
    describes the device, which is asked where it is None. Of several processes that want one plan, one builds it.
    """
    precision = PRECISIONS[options.precision]

    def build() -> Plan:
        with uninterrupted():
            return backend.build(program, precision, device, partial=options.partial)

    if cache is None or backend.native:
        return Found(build())
    try:
        key = plan_key(backend, program, options, gpu or describe_gpu(device))
    except NoKeyError as error:
        return Found(build(), why_not_kept=f"it has {error}")
    entry = cache.get(key)
    if entry is None:
        with cache.lock(key):
            entry = cache.get(key)  # whoever held the lock has built it
            if entry is None:
                plan = build()
                if plan.manifest.get("program") or not isinstance(plan.payload, bytes):
                    return Found(plan, why_not_kept="parts of it run outside engines")
                cache.put(key, {"engine": plan.payload}, {"what": f"{what} {options.precision}", **_plain(plan)})
                return Found(plan, cache=cache, key=key)
    return Found(_restored(entry, backend, options), from_cache=True, cache=cache, key=key)


def plan_key(backend: Backend, program: Program, options: Options, gpu: dict[str, Any]) -> dict[str, Any]:
    """Everything that a plan depends on, in plain values; raises `NoKeyError` where that cannot be said."""
    precision = PRECISIONS[options.precision]
    return {
        "kind": "plan",
        "backend": backend.name,
        "library": backend.library(),
        "precision": [precision.name, str(precision.dtype), precision.tf32],
        "partial": options.partial,
        "gpu": gpu,
        "versions": _versions(),
        "program": program_key(program),
    }


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """What of a GPU an engine may depend on."""
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "compute_capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "memory_mib": found.total_memory >> 20,
    }


@functools.cache
def _versions() -> dict[str, Any]:
    """Of all that has a part in a build, our own code included."""
    known = facts().to_dict()
    return {
        **{name: known[name] for name in _MACHINE},
        **{name: distribution_version(name) for name in _EXPORT},
        "torchaccel": code_hash(),
    }


def _plain(plan: Plan) -> dict[str, Any]:
    coverage = plan.coverage or Coverage()
    return {
        "library": plan.library,
        "manifest": plan.manifest,
        "coverage": [dict(coverage.inside), dict(coverage.outside), coverage.engines],
    }


def _restored(entry: Entry, backend: Backend, options: Options) -> Plan:
    info = entry.info
    manifest = {**info["manifest"], "inputs": [tuple(pair) for pair in info["manifest"]["inputs"]]}
    inside, outside, engines = info["coverage"]
    coverage = Coverage(Counter(inside), Counter(outside), engines)
    precision = PRECISIONS[options.precision]
    return Plan(backend.name, precision, entry.files["engine"], manifest, coverage, info["library"])
