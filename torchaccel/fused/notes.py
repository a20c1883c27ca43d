"""What a build chooses, noted in plain values, so that a later process can choose the same without a search.

Notes are those of the thread that builds: two models may be built at once. Outside a build nothing is noted.
"""

from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from torchaccel.cache.canonical import canonical


class Notes:
    """The choices of one build: those `known` from earlier ones, and those `made`, known or not, by problem.

    >>> notes = Notes({'["conv",64]': "plan"})
    >>> chosen = {}
    >>> with taking(notes):
    ...     chosen["conv", 64] = recall(("conv", 64), chosen)
    ...     note(("conv", 64), chosen["conv", 64])
    ...     note(("conv", 128), "triton")
    >>> notes.new()
    {'["conv",128]': 'triton'}
    >>> notes.forget()
    >>> chosen
    {}
    """

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        self.known = dict(known or {})
        self.made: dict[str, Any] = {}
        self.recalled: list[tuple[MutableMapping[Any, Any], Hashable]] = []

    def new(self) -> dict[str, Any]:
        """What was made and is not known, or is known otherwise."""
        return {text: choice for text, choice in self.made.items() if self.known.get(text) != choice}

    def forget(self) -> None:
        """Let this process remember nothing of what was recalled."""
        for memory, problem in self.recalled:
            memory.pop(problem, None)


_current: ContextVar[Notes | None] = ContextVar("notes", default=None)


@contextmanager
def taking(notes: Notes) -> Iterator[None]:
    """Have this thread look up and note its choices there."""
    token = _current.set(notes)
    try:
        yield
    finally:
        _current.reset(token)


def begun() -> bool:
    """Whether an earlier build has left choices to this one."""
    notes = _current.get()
    return notes is not None and bool(notes.known)


def recall(problem: Hashable, memory: MutableMapping[Any, Any] | None = None) -> Any:
    """What an earlier build chose for a problem; None where that is not known.

    `memory` is where the caller will keep it for the process.
    """
    notes = _current.get()
    choice = None if notes is None else notes.known.get(_text(problem))
    if notes is not None and choice is not None:
        notes.recalled.append(({} if memory is None else memory, problem))
    return choice


def note(problem: Hashable, choice: Any) -> None:
    """Note the choice, a plain value, for a problem, wherever it comes from."""
    notes = _current.get()
    if notes is not None:
        notes.made[_text(problem)] = choice


def _text(problem: Hashable) -> str:
    return canonical(_plain(problem)).decode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """A problem in plain values: a device by its type alone, since notes are kept for one kind of GPU."""
    if is_dataclass(value):
        return [_plain(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, torch.device):
        return value.type
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
