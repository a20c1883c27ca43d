"""Entries that are whole, and hold something else than what we write."""

import json
from pathlib import Path
from typing import Any

from torchaccel.cache import entries
from torchaccel.cache.canonical import dump


def rewrite(path: Path, **changes: Any) -> None:
    """Change the manifest of an entry, with the checksum that fits it; what is changed to `...` is left out."""
    _, line, payloads = path.read_bytes().split(b"\n", 2)
    manifest = {**json.loads(line), **changes}
    put(path, dump({name: value for name, value in manifest.items() if value is not ...}), payloads)


def put(path: Path, manifest: bytes, payloads: bytes = b"") -> None:
    """Write an entry with any manifest at all."""
    path.write_bytes(entries._magic(manifest) + manifest + b"\n" + payloads)
