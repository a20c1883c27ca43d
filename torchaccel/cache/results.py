"""Races that outlive their process: what a race's result depends on, the way into the cache and back."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, get_type_hints

import torch

from torchaccel.backends.base import Backend
from torchaccel.cache.choices import deciding_versions
from torchaccel.cache.entries import DamagedError, Entry, require
from torchaccel.cache.program_key import NoKeyError, content, program_key
from torchaccel.cache.store import Cache
from torchaccel.options import RACE_BUDGET_S, Options
from torchaccel.program import Program
from torchaccel.provenance import describe_device
from torchaccel.report import RaceEntry, RaceRecord
from torchaccel.weights import module_tensors

_ENTRY: dict[str, Any] = get_type_hints(RaceEntry)
_RACE: dict[str, Any] = {**get_type_hints(RaceRecord), "entries": [_ENTRY]}


def race_key(
    backends: Sequence[Backend], program: Program, tensors: Sequence[torch.Tensor], options: Options
) -> dict[str, Any]:
    """Everything that a race's result depends on, in plain values; raises `NoKeyError` where that cannot be said.

    The program is as captured, before any backend rewrites it. Weights count by dtype and layout: their values change
    no time, and the winner is checked with those of now; where one of the field is thrown out by that check, `remember`
    has them count by content. `tensors` are the call's, on the device of the race.
    """
    return {
        "kind": "race",
        "field": [[backend.name, backend.library()] for backend in backends],
        "objective": options.objective,
        "precision": options.precision,
        "bound": options.bound,
        "partial": options.partial,
        "cuda_graph": options.cuda_graph,
        "budget_s": float(options.race_budget_s or RACE_BUDGET_S),
        "device": describe_device(tensors[0].device),
        "versions": deciding_versions(),
        "inputs": [[str(tensor.dtype), list(tensor.shape), list(tensor.stride())] for tensor in tensors],
        "program": program_key(program, values=False),
    }


def remembered(
    cache: Cache, key: dict[str, Any], module: torch.nn.Module
) -> Iterator[tuple[dict[str, Any], RaceRecord]]:
    """The races that the cache has under a key, marked as such, with what they are kept under, in turn.

    First the one of any weights, then the one with the module's weights of now.
    """
    of = functools.partial(_race, [name for name, _ in key["field"]])
    if race := cache.get(key, of):
        yield key, race
    with suppress(NoKeyError):
        key = _with_weights(key, module)
        if race := cache.get(key, of):
            yield key, race


def remember(cache: Cache, key: dict[str, Any], race: RaceRecord, module: torch.nn.Module, what: str) -> None:
    """Keep a race, unless somebody is out for want of memory; `what` is for people, in listings.

    One that somebody is out of by the gate is kept for the module's weights of now alone: others may pass.
    """
    if any(entry.out_of_memory for entry in race.entries):
        return  # who had no room now may win where there is
    if any(entry.missed_gate for entry in race.entries):
        try:
            key = _with_weights(key, module)
        except NoKeyError:
            return
    cache.put(key, {}, {"what": f"{what} for {race.objective}: {race.winner.name}", "race": race.to_dict()})


def _with_weights(key: dict[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    return {**key, "weights": {name: content(tensor) for name, tensor in module_tensors(module).items()}}


def _race(field: Sequence[str], entry: Entry) -> RaceRecord:
    """The race in an entry, whose winner is one of the field."""
    race: Any = entry.info.get("race")
    require(race, _RACE, "the race")
    entries = tuple(RaceEntry(**{name: one[name] for name in _ENTRY}) for one in race["entries"])
    if [one.name in field for one in entries if one.outcome == "won"] != [True]:
        raise DamagedError("the race has no winner of the field")
    return RaceRecord(**{**{name: race[name] for name in _RACE}, "entries": entries, "from_cache": True})
