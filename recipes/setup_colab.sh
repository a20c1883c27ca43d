#!/usr/bin/env bash
# Prepare a Google Colab runtime: check the GPU, install torchaccel and the TensorRT that fits the PyTorch already there.
#
#   !bash torchaccel/recipes/setup_colab.sh             in a cell, after cloning the repository
#   !bash torchaccel/recipes/setup_colab.sh --dry-run   print the commands that would change something, and run none
#
# PyTorch itself is never replaced. A second run installs nothing anew. PYTHON names another interpreter.
# What it has to say goes to stderr, so that the output of --dry-run is the commands alone.
set -euo pipefail

say() { printf '%s\n' "setup_colab: $*" >&2; }
fail() {
  say "error: $*"
  exit 1
}
run() {
  if [ "$dry_run" = yes ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    say "running: $*"
    "$@"
  fi
}

dry_run=no
case "${1:-}" in
  "") ;;
  --dry-run) dry_run=yes ;;
  *) fail "unknown argument $1; the only one is --dry-run" ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$(command -v python || command -v python3 || true)}
[ -n "$python" ] || fail "there is no python on the path; name one in PYTHON"

# The GPU and its driver
smi=$(nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader) ||
  fail "this runtime has no NVIDIA GPU: choose Runtime > Change runtime type > T4 GPU (or better), then run this again"
IFS=, read -r gpu capability driver <<<"$smi"
capability=${capability// /} driver=${driver// /}
say "GPU: $gpu, compute capability $capability, driver $driver"

# PyTorch and what is installed beside it, one fact a line; from /, so that no folder here passes for a package
facts=$(cd / && "$python" - "$root" <<'PROBE'
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if not installed("torch"):
    sys.exit("setup_colab: this Python has no PyTorch")
import torch

ours = find_spec("torchaccel")
here = Path(sys.argv[1], "torchaccel", "__init__.py").resolve()
tensorrt = next(filter(None, map(installed, ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"))), "")
print(installed("torch"), installed("torchvision"), torch.version.cuda or "", torch.cuda.is_available(), sep="\n")
print("yes" if ours and ours.origin and Path(ours.origin).resolve() == here else "no")
print(installed("torch-tensorrt"), tensorrt, "end", sep="\n")
PROBE
) || fail "could not ask $python about PyTorch; its message is above"
mapfile -t fact <<<"$facts"
torch=${fact[0]} torchvision=${fact[1]} cuda=${fact[2]} usable=${fact[3]}
have_torchaccel=${fact[4]} torch_tensorrt=${fact[5]} tensorrt=${fact[6]}
minor=$(cut -d. -f1,2 <<<"$torch")
say "PyTorch $torch, CUDA ${cuda:-none}"

needed=$(sed -n 's/^ *torch>=\([0-9.]*\)$/\1/p' "$root/setup.cfg")
[ "$(printf '%s\n' "$needed" "$minor" | sort -V | head -n 1)" = "$needed" ] ||
  fail "torchaccel needs PyTorch $needed or newer, and this runtime has $torch: choose a newer runtime version"
[ -n "$cuda" ] || fail "this PyTorch is built without CUDA: choose a GPU runtime, whose PyTorch has it"
[ "$usable" = True ] || fail "PyTorch (CUDA $cuda) cannot use the GPU with driver $driver: restart the runtime, or update"

# pip is told the versions that are there, so that it keeps them
keep=("torch==$torch")
[ -z "$torchvision" ] || keep+=("torchvision==$torchvision")
# wheels for this CUDA: those on PyPI are for the newest one only
wheels=(--extra-index-url "https://download.pytorch.org/whl/cu${cuda//./}")
# compat puts the checkout itself on Python's path; otherwise a notebook that runs beside a clone called torchaccel
# would import that folder, as an empty namespace package
editable=(--config-settings editable_mode=compat -e)
installed_something=no

install() {
  run "$python" -m pip install "$@" || return 1
  installed_something=yes
}

missing=() extra=""
if [ "$(printf '%s\n' 7.5 "$capability" | sort -V | head -n 1)" != 7.5 ]; then
  say "TensorRT needs compute capability 7.5, and this GPU has $capability: PyTorch's own backends remain"
else
  extra="[tensorrt]"
  if [[ $torch_tensorrt == "$minor".* ]]; then
    say "torch-tensorrt $torch_tensorrt, which fits PyTorch $torch, is installed already"
  else
    missing+=("torch-tensorrt==$minor.*")
  fi
fi
if [ "$have_torchaccel" = yes ]; then
  say "torchaccel is installed from $root already"
else
  missing+=("${editable[@]}" "$root$extra")
fi

if [ ${#missing[@]} -gt 0 ] && ! install "${missing[@]}" "${keep[@]}" "${wheels[@]}"; then
  [ -n "$extra" ] || fail "pip could not install torchaccel; its message is above"
  say "pip found no torch-tensorrt $minor for CUDA $cuda and this Python: only the ONNX route to TensorRT remains"
  [ "$have_torchaccel" = yes ] || install "${editable[@]}" "$root" "${keep[@]}" ||
    fail "pip could not install torchaccel; its message is above"
  if [ -n "$tensorrt" ]; then
    say "TensorRT $tensorrt is installed already"
  else
    install "tensorrt-cu${cuda%%.*}>=10.13" ||
      say "pip found no TensorRT for CUDA ${cuda%%.*} and this Python either: PyTorch's own backends remain"
  fi
fi

if [ "$installed_something" = yes ] && [ "$dry_run" = no ]; then
  say "installed; restart the session (Runtime > Restart session) before importing torchaccel in the notebook"
fi
run "$python" -m torchaccel env
