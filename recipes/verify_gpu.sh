#!/usr/bin/env bash
# Verify torchaccel on this machine's GPU, with whichever TensorRT is installed, and write one JSON file to send back.
#
#   recipes/verify_gpu.sh [FILE [OPTION...]]
#
# It runs the GPU tests and the ResNet-18 benchmark against the rivals. A part that fails stops none of the others; the
# file has the end of its log. FILE is replaced whole or not at all; the exit status is 0 only if everything passed.
# OPTIONs go to the benchmark: `--compile-modes reduce-overhead` spares minutes of torch.compile's search.
# PYTHON names another interpreter, PYTEST_ADDOPTS has further options for pytest, VERIFY_LIMIT_S the seconds that one
# part may take (3600).
set -euo pipefail

say() { printf '%s\n' "verify_gpu: $*" >&2; }
fail() {
  say "error: $*"
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$(command -v python || command -v python3 || true)}
[ -n "$python" ] || fail "there is no python on the path; name one in PYTHON"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader) || fail "nvidia-smi finds no NVIDIA GPU on this machine"
slug=$(head -n 1 <<<"$gpu" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' -)
output=$(realpath -m "${1:-torchaccel-$slug-$(date -u +%Y%m%dT%H%M%SZ).json}")
shift $(($# > 0))
mkdir -p "$(dirname "$output")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

part() { # NAME COMMAND...: run it, keep its log, its status and its time, and go on
  local name=$1 started=$SECONDS status
  shift
  say "$name: $*"
  set +e
  timeout --foreground --kill-after=30 "${VERIFY_LIMIT_S:-3600}" "$@" 2>&1 | tee "$work/$name.log"
  status=${PIPESTATUS[0]}
  set -e
  [ "$status" = 0 ] || say "$name failed with status $status; going on"
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - started))" >>"$work/parts"
}

describe='import json, sys
from torchaccel.environment import environment
from torchaccel.provenance import provenance
json.dump({**provenance(), "environment": environment().to_dict()}, open(sys.argv[1], "w"))'
part environment "$python" -c "$describe" "$work/environment.json"
part tests "$python" -m pytest tests/gpu -p no:cacheprovider --junitxml "$work/tests.xml"
part benchmark "$python" -m benchmarks.resnet18 --peers --json "$work/benchmark.json" "$@"

# Merge what is there; -I, because this must work where the packages here do not
"$python" -I - "$work" "$output" <<'MERGE'
import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

work, output = Path(sys.argv[1]), Path(sys.argv[2])


def read_json(name):
    try:
        return json.loads((work / name).read_text())
    except (OSError, ValueError):
        return {}


def read_tests():
    found = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "failures": [], "skips": []}
    try:
        cases = ElementTree.parse(work / "tests.xml").iter("testcase")
    except (OSError, ElementTree.ParseError):
        return found
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if outcome is None else {"failure": "failed", "error": "errors"}.get(outcome.tag, "skipped")
        found[kind] += 1
        if kind in ("failed", "errors"):
            found["failures"].append({"test": name, "message": outcome.get("message")})
        elif kind == "skipped":
            found["skips"].append({"test": name, "reason": outcome.get("message")})
    return found


parts = []
for line in (work / "parts").read_text().splitlines():
    name, status, seconds = line.split("\t")
    tail = (work / f"{name}.log").read_text(errors="replace").splitlines()[-200:]
    parts.append({"name": name, "exit_status": int(status), "duration_s": int(seconds), "log_tail": tail})
tests, benchmark = read_tests(), read_json("benchmark.json")
wrong = [f"{part['name']} ended with status {part['exit_status']}" for part in parts if part["exit_status"]]
if not tests["passed"]:
    wrong.append("no GPU test passed")
if not benchmark.get("rows"):
    wrong.append("the benchmark left no rows")
described = {key: benchmark.get(key) for key in ("environment", "commit", "tree")} | read_json("environment.json")
result = {"schema": 1, "kind": "verify_gpu", "ok": not wrong, "wrong": wrong, **described, "tests": tests}
result |= {"benchmark": benchmark, "rows": benchmark.get("rows", []), "parts": parts}

temporary = output.with_name(f".{output.name}.{os.getpid()}")
temporary.write_text(json.dumps(result, indent=1) + "\n")
os.replace(temporary, output)
counts = ", ".join(f"{tests[kind]} {kind}" for kind in ("passed", "failed", "errors", "skipped"))
print(f"verify_gpu: tests: {counts}; benchmark: {len(result['rows'])} rows", file=sys.stderr)
for line in wrong:
    print(f"verify_gpu: {line}", file=sys.stderr)
print(f"verify_gpu: {'all passed' if not wrong else 'NOT all passed'}; the result is in {output}", file=sys.stderr)
sys.exit(bool(wrong))
MERGE
