"""Command-line values of the benchmarks: lists, counts and names, each refused with what is allowed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection


def listed(parse: Callable[[str], object]) -> Callable[[str], list[object]]:
    """Values separated by commas."""

    def parts(text: str) -> list[object]:
        return [parse(part.strip()) for part in text.split(",")]

    return parts


def choices(allowed: Collection[str]) -> Callable[[str], str]:
    """One of these."""

    def choice(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(allowed)}")
        return text

    return choice


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
