"""The tables of README.md, made from result files: `python -m benchmarks.readme_table --write`.

A table stands between `<!-- results: PATH -->` and `<!-- /results -->`; PATH is a result file's, from the repository's
root. Without --write, nothing is changed, and the exit status says whether the README agrees with its files.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import commits_by_tree
from benchmarks.table import number

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?<=<!-- results: )(\S+)( -->\n).*?(?=<!-- /results -->)", re.DOTALL)
HEADINGS = (
    "precision",
    "batch",
    "route",
    "call, median ms",
    "p95 ms",
    "graph replay, median ms",
    "images/s",
    "gain over fp32 (95 % interval)",
    "relative error",
)


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a result file as a Markdown table, with the reason of each row that has no figures under it.

    >>> row = {"route": "peer", "backend": "torch.compile", "precision": "fp16", "batch": 1, "median_ms": 0.304}
    >>> row |= {"p95_ms": 0.316, "replay_median_ms": None, "throughput_fps": 3286.1, "relative_error": 7.2e-4}
    >>> row |= {"gain": {"value": 3.214, "low": 3.19, "high": 3.238}, "reason": None}
    >>> print(render([row]).splitlines()[-1])
    | fp16 | 1 | peer: torch.compile | 0.304 | 0.316 | - | 3286 | 3.21 (3.19 to 3.24) | 7e-04 |
    """
    lines = [HEADINGS, ("---", *("--:" if name != "route" else "---" for name in HEADINGS[1:]))]
    lines += [_cells(row) for row in rows if not row["reason"]]
    table = [f"| {' | '.join(cells)} |" for cells in lines]
    refused = [
        f"- {row['precision']} at batch {row['batch']}, {_route(row)}: not measured: {' '.join(row['reason'].split())}"
        for row in rows
        if row["reason"]
    ]
    return "\n".join([*table, *(["", *refused] if refused else [])])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    times = (number(row[name]) for name in ("median_ms", "p95_ms", "replay_median_ms", "throughput_fps"))
    return row["precision"], str(row["batch"]), _route(row), *times, _gain(row["gain"]), f"{row['relative_error']:.0e}"


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return "-"
    interval = "" if gain["low"] is None else f" ({gain['low']:.2f} to {gain['high']:.2f})"  # one round has none
    return f"{gain['value']:.2f}{interval}"


def _route(row: Mapping[str, Any]) -> str:
    routes = {"torchaccel": row["backend"], "baseline": f"the module itself ({row['backend']})"}
    return routes.get(row["route"], f"{row['route']}: {row['backend']}")


def block(content: Mapping[str, Any], path: str, commit: str) -> str:
    """What stands between the markers: what was measured, on what and with what, at which commit, and the table."""
    environment, settings = content["environment"], content.get("settings", {})
    gpus = [gpu["name"] for gpu in environment["gpus"]]
    names = {"driver": "driver", "torch": "PyTorch", "torch_tensorrt": "", "tensorrt": "TensorRT"}
    names |= {"tensorrt_rtx": "TensorRT-RTX"}
    versions = [f"{name} {environment[key]}".strip() for key, name in names.items() if environment.get(key)]
    models = ", ".join(dict.fromkeys(row["model"] for row in content["rows"]))
    weights = f"weights: {settings['weights']}; " if "weights" in settings else ""
    where = gpus[0] if gpus else f"{environment['cpu']} (no GPU)"
    caption = f"{models} on {where}; {weights}{', '.join(versions)}; commit `{commit}`; all figures: [{path}]({path})."
    return f"\n{caption}\n\n{render(content['rows'])}\n\n"


def measured_commit(content: Mapping[str, Any], root: Path = ROOT) -> str:
    """The commit whose torchaccel/ was measured; raises ValueError where no commit has that tree."""
    commit, tree = content.get("commit"), content["tree"]
    if commit and tree_of(commit, root) == tree:
        return str(commit)
    try:
        return commits_by_tree(root)[tree]
    except KeyError:
        raise ValueError(
            f"no commit has the torchaccel/ that was measured (tree {tree}): commit it, or measure again"
        ) from None


def tree_of(commit: str, root: Path = ROOT) -> str | None:
    """Git's hash of torchaccel/ at a commit; None where there is no such commit here."""
    command = ("git", "-C", str(root), "rev-parse", "--verify", "--quiet", f"{commit}:torchaccel")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def updated(text: str, root: Path = ROOT) -> str:
    """A README with every table made anew from its result file; raises ValueError or OSError where one cannot be."""

    def anew(match: re.Match[str]) -> str:
        content = json.loads((root / match[1]).read_text(encoding="utf-8"))
        return match[1] + match[2] + block(content, match[1], measured_commit(content, root))

    return BLOCK.sub(anew, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite README.md, or tell whether it agrees with its result files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table", description="The tables of README.md.")
    parser.add_argument("--write", action="store_true", help="rewrite the tables in README.md")
    given, readme = parser.parse_args(arguments), ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    try:
        after = updated(before)
    except (OSError, ValueError) as error:
        sys.exit(f"README.md: {error}")
    if given.write and after != before:
        readme.write_text(after, encoding="utf-8")
    elif after != before:
        sys.exit("README.md does not agree with its result files: run `python -m benchmarks.readme_table --write`")


if __name__ == "__main__":
    main()
