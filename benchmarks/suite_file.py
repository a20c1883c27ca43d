"""The suite's result file: what it has already, and how it grows cell by cell."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import results_file
from benchmarks.suite_table import conclusion
from torchaccel.environment import distribution_version
from torchaccel.provenance import provenance

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is measured at one go: every candidate for one model, precision and batch."""

    model: str
    precision: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, batch {self.batch}"

    def has(self, row: Row) -> bool:
        """Whether a row, or the record of a cell, is of this one."""
        return (row["model"], row["precision"], row["batch"]) == (self.model, self.precision, self.batch)


class SuiteFile:
    """The cells that were measured by this code on this device with these versions; others are not mixed with them.

    Raises ValueError for a file that is damaged, and leaves it as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.records: list[dict[str, Any]] = []
        self.foreign = ""
        content = _read(path)
        if content is None:
            return
        here, there = identity({**provenance(), "libraries": libraries()}), identity(content)
        if differing := [name for name in here if here[name] != there[name]]:
            self.foreign = ", ".join(f"{name} {there[name]} (now {here[name]})" for name in differing)
        else:
            self.rows, self.records = content["rows"], content["cells"]

    def __contains__(self, cell: Cell) -> bool:
        return any(map(cell.has, self.records))

    def add(self, cell: Cell, rows: list[Row], record: dict[str, Any]) -> None:
        """Put a cell in the place of an earlier one of its name, and write the file, whole or not at all."""
        self.rows = [row for row in self.rows if not cell.has(row)] + rows
        self.records = [other for other in self.records if not cell.has(other)] + [asdict(cell) | record]
        if self.foreign:
            self.path.replace(_free_name(self.path))
            self.foreign = ""
        measured = {"libraries": libraries(), "cells": self.records, "conclusion": conclusion(self.rows)}
        results_file.write(self.path, results_file.document("suite", self.rows, **measured))


def libraries() -> dict[str, str | None]:
    """The versions that a result file's environment lacks."""
    return {"transformers": distribution_version("transformers")}


def identity(content: dict[str, Any]) -> dict[str, Any]:
    """What two runs must have in common for their figures to stand in one file: code, device, versions."""
    environment = content["environment"]
    gpus = [gpu["name"] for gpu in environment["gpus"]]
    aside = ("gpus", "cpu", "platform", "torchaccel")  # another host with the same GPU and versions will do
    versions = {name: value for name, value in environment.items() if name not in aside}
    device = gpus[0] if gpus else environment["cpu"]
    return {"tree": content["tree"], "device": device, **versions, **content["libraries"]}


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a suite's file, checked; None where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = results_file.problems(content) if isinstance(content, dict) else ["it is no JSON object"]
        found = found or [f"{name} is missing" for name in ("cells", "libraries") if name not in content]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # what json and the decoder raise are ValueErrors
        found = [str(error)]
    if found:
        raise ValueError(
            f"{path} cannot be resumed from: {'; '.join(found[:3])}. It is left as it is: restore it "
            f"(git checkout -- {path.name}), move it away to begin anew, or name another file with --json."
        )
    return dict(content)


def _free_name(path: Path) -> Path:
    """Beside `path`, a name that no file has: suite.old-1.json."""
    number = 1
    while (free := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    return free
