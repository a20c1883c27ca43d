"""The JSON files under benchmarks/results: where they go, what they hold, how they are written and checked."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from torchaccel.provenance import provenance

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
# What every row has; its times are milliseconds, and None where its `reason` says why nothing was measured.
FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "route": (str,),
    "backend": (str,),
    "precision": (str,),
    "batch": (int,),
    "input_dtype": (str,),
    "layout": (str,),
    "graph": (bool, str),
    "reason": (str, type(None)),
}
FIGURES = ("median_ms", "p95_ms", "p99_ms", "samples", "cv", "relative_error")
ROUTES = ("torchaccel", "baseline", "peer")


def slug(name: str) -> str:
    """A folder name for a device.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def default_path(benchmark: str) -> Path:
    """benchmarks/results/<gpu>/<benchmark>.json; the folder is `cpu` where there is no GPU."""
    folder = slug(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
    return RESULTS / folder / f"{benchmark}.json"


def document(benchmark: str, rows: list[dict[str, Any]], **measured: Any) -> dict[str, Any]:
    """A result file: `rows`, what else was `measured` (settings, clocks, warnings), and where it all comes from."""
    return {"schema": SCHEMA, "benchmark": benchmark, **provenance(), **measured, "rows": rows}


def problems(content: Mapping[str, Any]) -> list[str]:
    """What is wrong with the content of a result file, one line each; empty if nothing is."""
    found = [] if content.get("schema") == SCHEMA else [f"schema is {content.get('schema')!r}, not {SCHEMA}"]
    if not isinstance(content.get("environment"), Mapping):
        found.append("environment is missing")
    if not re.fullmatch(r"[0-9a-f]{40}", str(content.get("tree"))):
        found.append(f"tree is {content.get('tree')!r}, not a git tree hash")
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows:
        return [*found, "rows is missing or empty"]
    return [*found, *(f"row {index}: {line}" for index, row in enumerate(rows) for line in _row_problems(row))]


def _row_problems(row: Any) -> Iterable[str]:
    if not isinstance(row, Mapping):
        yield f"it is {row!r}"
        return
    for field in (*FIELDS, *FIGURES):
        if field not in row:
            yield f"{field} is missing"
    for field, types in FIELDS.items():
        if field in row and not isinstance(row[field], types):
            yield f"{field} is {row[field]!r}"
    if row.get("route") not in ROUTES:
        yield f"route is {row.get('route')!r}, none of {', '.join(ROUTES)}"
    if row.get("reason"):
        yield from (f"{field} is set beside a reason" for field in FIGURES if row.get(field) is not None)
        return
    for field in ("median_ms", "samples", "cv", "relative_error"):
        if not isinstance(row.get(field), int | float) or not math.isfinite(row[field]) or row[field] < 0:
            yield f"{field} is {row.get(field)!r}"
    for field, needed in (("p95_ms", 20), ("p99_ms", 100)):
        if row.get(field) is not None and (row.get("samples") or 0) < needed:
            yield f"{field} stands on {row.get('samples')} samples, which is under {needed}"


def require_writable(path: Path) -> None:
    """Make the folder of a result file to come; raises ValueError where the file cannot be written there."""
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder: name a file in it, such as {path / 'resnet18.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write in {path.parent} ({error.strerror}): name another file with --json") from error


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file whole or not at all: a temporary file beside it takes its place.

    Raises ValueError where `problems` finds any; the file is then left as it was.
    """
    if found := problems(content):
        raise ValueError(f"{path.name} would not be a result file: " + "; ".join(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def commits_by_tree(root: Path) -> dict[str, str]:
    """The commits that changed torchaccel/, by the tree hash they gave it: tree → commit; empty outside git."""

    def git(*command: str) -> str:
        done = subprocess.run(("git", "-C", str(root), *command), capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""

    commits = git("log", "--format=%H", "--", "torchaccel").split()
    trees = git("rev-parse", *(f"{commit}:torchaccel" for commit in commits)).split() if commits else []
    return dict(zip(trees, commits, strict=False))
