"""The suite's result file: what it has already, and how it grows cell by cell, by several processes at once."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import results_file
from benchmarks.suite_table import conclusion
from torchaccel.locks import hold
from torchaccel.probes import distribution_version
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
    """The cells that were measured on this device with these versions; others are not mixed with them.

    Each cell has the commit and the tree of torchaccel that it was measured of: a suite takes hours, and the code goes
    on. `backend` is the one of torchaccel that the file is of. Several processes may add to one file. Raises ValueError
    for a file that is damaged, and leaves it as it is.
    """

    def __init__(self, path: Path, backend: str = "fastest") -> None:
        self.path = path
        self._origin = {**provenance(), "libraries": libraries(), "backend": backend}
        self.reload()

    def reload(self) -> None:
        """Take the file as it is now: other processes may have added to it."""
        self.rows: list[Row] = []
        self.records: list[dict[str, Any]] = []
        self.foreign = ""
        content = _read(self.path)
        if content is None:
            return
        here, there = identity(self._origin), identity(content)
        if differing := [name for name in here if here[name] != there.get(name)]:
            self.foreign = ", ".join(f"{name} {there.get(name)} (now {here[name]})" for name in differing)
        else:
            self.rows, self.records = content["rows"], content["cells"]

    def has(
        self, cell: Cell, peers: Collection[str] = (), but: Collection[Any] = (), of_this_code: bool = True
    ) -> bool:
        """Whether a cell was measured, did not fail, had at least these peers beside it, and is no record of `but`."""
        records = [one for one in self.records if cell.has(one) and one not in but and not _failed(one)]
        if of_this_code:
            records = [record for record in records if record["tree"] == self._origin["tree"]]
        return any(set(peers) <= set(record.get("peers", ())) for record in records)

    def failed(self) -> list[dict[str, Any]]:
        """The records of the cells that failed."""
        return [record for record in self.records if _failed(record)]

    def tried(self, cell: Cell, but: Collection[Any] = ()) -> bool:
        """Whether a cell was begun and failed, and is none of the records `but`."""
        return any(cell.has(record) for record in self.failed() if record not in but)

    def conclusion(self) -> list[str]:
        """What the figures say, and of which code they are."""
        commits = Counter(f"{record['commit'] or 'unknown'} (tree {record['tree'][:12]})" for record in self.records)
        listed = ", ".join(f"{count} at {commit}" for commit, count in commits.most_common())
        return [*conclusion(self.rows), f"Cells, by the commit of torchaccel: {listed}."]

    def add(self, cell: Cell, rows: list[Row], record: dict[str, Any]) -> None:
        """Put a cell in the place of an earlier one of its name, and write the file, whole or not at all."""
        with alone(self.path.with_name(f".{self.path.name}.lock")):
            self.reload()
            self.rows = [row for row in self.rows if not cell.has(row)] + rows
            self.records = [other for other in self.records if not cell.has(other)] + [
                asdict(cell) | {name: self._origin[name] for name in ("commit", "tree")} | record
            ]
            for ordered in (self.rows, self.records):  # else in that in which the processes came to their ends
                ordered.sort(key=lambda one: (one["model"], one["precision"], one["batch"]))
            if self.foreign:
                self.path.replace(_free_name(self.path))
                self.foreign = ""
            measured = self._origin | {"cells": self.records, "conclusion": self.conclusion()}
            results_file.write(self.path, results_file.document("suite", self.rows, **measured))

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Whether the cell is this process's to measure; it is not while another one measures it.

        The file is read again, since another process may just have added it.
        """
        name = f".{self.path.name}.{cell.model}-{cell.precision}-{cell.batch}.lock"
        with ExitStack() as held:
            try:
                held.enter_context(alone(self.path.with_name(name), deadline_s=0.0))
            except TimeoutError:
                free = False
            else:
                free = True
                self.reload()
            yield free


@contextmanager
def alone(path: Path, deadline_s: float | None = None) -> Iterator[None]:
    """No other process holds `path` meanwhile; raises `TimeoutError` past the deadline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = hold(path, deadline_s)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def libraries() -> dict[str, str | None]:
    """The versions that a result file's environment lacks."""
    return {name: distribution_version(name) for name in ("transformers", "nvidia-cudnn-frontend")}


def identity(content: dict[str, Any]) -> dict[str, Any]:
    """What two runs must have in common for their figures to stand in one file: backend, device, versions."""
    environment = content["environment"]
    gpus = [gpu["name"] for gpu in environment["gpus"]]
    aside = ("gpus", "cpu", "platform", "torchaccel")  # another host with the same GPU and versions will do
    versions = {name: value for name, value in environment.items() if name not in aside}
    device = gpus[0] if gpus else environment["cpu"]
    backend = content.get("backend", "fastest")
    return {"backend": backend, "device": device, **versions, **content["libraries"]}


def _failed(record: dict[str, Any]) -> bool:
    return bool(record.get("failed"))


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a suite's file, checked; None where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = results_file.problems(content) if isinstance(content, dict) else ["it is no JSON object"]
        found = found or list(_own_problems(content))
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


def _own_problems(content: dict[str, Any]) -> Iterator[str]:
    """What of a suite's file is not as `SuiteFile` reads it, beyond what every result file has."""
    environment, cells = content["environment"], content.get("cells")
    gpus = environment.get("gpus")
    if not isinstance(gpus, list) or not all(isinstance(gpu, dict) and "name" in gpu for gpu in gpus):
        yield "environment.gpus is no list of named GPUs"
    elif not gpus and "cpu" not in environment:
        yield "environment names no device"
    if not isinstance(content.get("libraries"), dict):
        yield "libraries is missing"
    if not isinstance(cells, list):
        yield "cells is missing"
    else:
        needed = {"model", "precision", "batch", "commit", "tree"}
        whole = [isinstance(cell, dict) and needed <= set(cell) for cell in cells]
        yield from (f"cell {number} is incomplete" for number, is_whole in enumerate(whole) if not is_whole)


def _free_name(path: Path) -> Path:
    """Beside `path`, a name that no file has: suite.old-1.json."""
    number = 1
    while (free := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    return free
