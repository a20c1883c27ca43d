"""The choices of kernels, plans and routes that take a search, kept between processes: one entry for each program.

They are remembered by problem, so an entry has the choices of one build; weights count by dtype and layout alone.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from torchaccel.backends.base import Backend
from torchaccel.cache.canonical import dump
from torchaccel.cache.entries import Entry, parsed, require
from torchaccel.cache.program_key import NoKeyError, program_key
from torchaccel.cache.store import Cache
from torchaccel.errors import AccuracyError, BuildError
from torchaccel.fused.notes import Notes, taking
from torchaccel.memory import is_out_of_memory
from torchaccel.precision import Precision
from torchaccel.probes import distribution_version
from torchaccel.program import Program
from torchaccel.provenance import describe_device, versions

_CHOOSERS = ("triton", "nvidia-cudnn-frontend")  # what is chosen from, besides PyTorch
_ROUTE = {"route": str, "routes_ms": {str: float}, "routes_failed": {str: str}}


@contextmanager
def kept(  # noqa: PLR0917
    backend: Backend, program: Program, precision: Precision, device: torch.device, cache: Cache | None, what: str
) -> Iterator[Notes]:
    """Have a build begin with what earlier ones chose, and keep what it chooses; `what` is for people, in listings.

    Choices with which a build fails are forgotten. Of several processes that would search, one does: two at once would
    disturb each other's times.
    """
    key = _key(backend, program, precision, device) if cache is not None and backend.chooses(device) else None
    if cache is None or key is None:
        yield Notes()
        return
    with ExitStack() as stack:
        known = _known(cache, key)
        if not known:
            stack.enter_context(cache.lock(key))
            known = _known(cache, key)
        notes = Notes(known)
        stack.enter_context(taking(notes))
        try:
            yield notes
        except (BuildError, AccuracyError) as error:
            if notes.recalled and not is_out_of_memory(error):
                notes.forget()
                cache.discard(key)
            raise
        if notes.new():
            choices = {**known, **notes.made}
            cache.put(key, {"choices": dump(choices)}, {"what": f"{what} {precision.name}: {len(choices)} problems"})


def _known(cache: Cache, key: dict[str, Any]) -> dict[str, Any]:
    return cache.get(key, _choices) or {}


def _choices(entry: Entry) -> dict[str, Any]:
    found = parsed(entry.payload("choices"), "what was chosen")
    require(found, dict, "what was chosen")
    for problem, choice in found.items():
        require(choice, _shape(problem), f"what was chosen for {problem}")
    return found


def _shape(problem: str) -> Any:
    """What is chosen for a problem: a route, a kernel by its name or, where no name begins it, a plan of cuDNN's."""
    if problem.startswith('["route",'):
        return _ROUTE
    return str if problem.startswith('["') else (int, str)


def deciding_versions() -> dict[str, Any]:
    """The versions of all that has a part in a build, and of what is chosen from by timing."""
    return {**versions(), **{name: distribution_version(name) for name in _CHOOSERS}}


def _key(backend: Backend, program: Program, precision: Precision, device: torch.device) -> dict[str, Any] | None:
    """Everything that choices depend on, besides their problems; None where that cannot be said."""
    try:
        program_ = program_key(program, values=False)
    except NoKeyError:  # then each process has choices of its own
        return None
    return {
        "kind": "choices",
        "backend": backend.name,
        "library": backend.library(),
        "precision": [precision.name, str(precision.dtype), precision.tf32],
        "device": describe_device(device),
        "versions": deciding_versions(),
        "program": program_,
    }
