"""Plans that outlive their process: what one depends on, the way into the cache and back, and what does not serve."""

import functools
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from torchaccel.backends.base import Backend, Plan
from torchaccel.cache import choices, kernels
from torchaccel.cache.entries import DamagedError, Entry, require
from torchaccel.cache.program_key import NoKeyError, program_key
from torchaccel.cache.store import Cache
from torchaccel.errors import AccuracyError, BuildError, CacheWarning
from torchaccel.failures import as_build_error
from torchaccel.fused.notes import Notes
from torchaccel.interrupts import interruption_point
from torchaccel.memory import is_out_of_memory
from torchaccel.options import Options
from torchaccel.precision import PRECISIONS, Precision
from torchaccel.program import Program
from torchaccel.provenance import describe_gpu, versions
from torchaccel.report import Coverage, EngineRecord

Served = TypeVar("Served")
_COUNTS = {str: int}
_MANIFEST = {"flavour": str | None, "inputs": [(int, str)], "outputs": [str], "fp32_products": bool}
_INFO = {"library": str, "coverage": (_COUNTS, _COUNTS, int), "manifest": _MANIFEST}


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


def serve(
    backend: Backend,
    program: Program,
    options: Options,
    device: torch.device,
    *,
    cache: Cache | None,
    what: str,
    record: EngineRecord,
    load: Callable[[Plan], Served],
) -> Served:
    """What `load` makes of the plan of a program, and of the kernels and choices that the cache has for it.

    What does not serve is not left in the cache; where it came from there, the engine is built again, with a warning.
    """
    precision = PRECISIONS[options.precision]
    plans_of: Cache | None = cache
    while True:
        started = time.perf_counter()
        found = plan_for(backend, program, options, device, cache=plans_of, what=what)
        record.build_ms = (time.perf_counter() - started) * 1e3
        interruption_point()
        plan = found.plan
        record.coverage, record.library, record.plan_mib = plan.coverage, plan.library, plan.size_mib()
        record.from_cache, record.not_cached_because = found.from_cache, found.why_not_kept
        flavour, notes = plan.manifest.get("flavour"), Notes()
        try:
            kernels.restore(flavour, device, cache)
            with choices.kept(backend, program, precision, device, plans_of, what) as notes:
                served = _loaded(load, plan, device, cache if backend.compiles else None, record)
        except (BuildError, AccuracyError) as error:
            if is_out_of_memory(error):
                raise
            found.discard()
            if not found.from_cache and not notes.recalled:
                raise
            reason = str(error)
        else:
            kernels.keep(flavour, device, cache)
            return served
        whose = "the engine from the cache" if found.from_cache else "the engine with choices from the cache"
        warnings.warn(f"{whose} does not serve, and is built again: {reason}", CacheWarning, 2)
        record.gates, plans_of = (), None


def _loaded(
    load: Callable[[Plan], Served], plan: Plan, device: torch.device, cache: Cache | None, record: EngineRecord
) -> Served:
    """What `load` makes of a plan; what it compiles is kept in the cache, or elsewhere once the disk there is full."""
    if cache is None:
        return load(plan)
    try:
        with cache.compiling(device) as is_kept:
            return load(plan)
    except BuildError as error:
        if not is_kept or cache.has_room() or is_out_of_memory(error):
            raise
        reason = str(error)
    warnings.warn(
        f"the disk of the cache {cache.folder} is full, and compiling there failed: it is done again, and kept where "
        f"PyTorch keeps it by itself. {reason}",
        CacheWarning,
        stacklevel=2,
    )
    record.gates = ()
    return load(plan)


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
        with as_build_error(backend.name, "built"), kernels.timings_kept(backend.tensorrt(), device, cache):
            return backend.build(program, precision, device, partial=options.partial)

    if cache is None or backend.native:
        return Found(build())
    try:
        key = plan_key(backend, program, options, gpu or describe_gpu(device))
    except NoKeyError as error:
        return Found(build(), why_not_kept=f"it has {error}")
    restored = functools.partial(_restored, backend, precision)
    known = cache.get(key, restored)
    if known is None:
        with cache.lock(key):
            known = cache.get(key, restored)  # whoever held the lock has built it
            if known is None:
                plan = build()
                if plan.manifest.get("program") or not isinstance(plan.payload, bytes):
                    return Found(plan, why_not_kept="parts of it run outside engines")
                cache.put(key, {"engine": plan.payload}, {"what": f"{what} {options.precision}", **_plain(plan)})
                return Found(plan, cache=cache, key=key)
    return Found(known, from_cache=True, cache=cache, key=key)


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
        "versions": versions(),
        "program": program_key(program),
    }


def _plain(plan: Plan) -> dict[str, Any]:
    coverage = plan.coverage or Coverage()
    return {
        "library": plan.library,
        "manifest": plan.manifest,
        "coverage": [dict(coverage.inside), dict(coverage.outside), coverage.engines],
    }


def _restored(backend: Backend, precision: Precision, entry: Entry) -> Plan:
    info = entry.info
    require(info, _INFO, "what it says of the engine")
    library = backend.tensorrt()
    if info["manifest"]["flavour"] != (library and library.flavour):
        raise DamagedError("it is the engine of another TensorRT")
    manifest = {**info["manifest"], "inputs": [tuple(pair) for pair in info["manifest"]["inputs"]]}
    inside, outside, engines = info["coverage"]
    coverage = Coverage(Counter(inside), Counter(outside), engines)
    return Plan(backend.name, precision, entry.payload("engine"), manifest, coverage, info["library"])
