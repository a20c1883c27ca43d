"""One file of the cache: a line with the manifest's checksum, the manifest (JSON), the payloads.

The manifest has the kind, the whole key, and the size and checksum of each payload. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torchaccel.cache.canonical import SCHEMA, digest, dump, plain

MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """One entry. `files` are the payloads by name; a mere listing leaves them out."""

    path: Path
    kind: str
    info: dict[str, Any]
    size_bytes: int
    last_used_s: float
    files: dict[str, bytes]


class DamagedError(Exception):
    """A file in the cache is not what was written there; the message says why."""


def head(key: Any, files: Mapping[str, bytes], info: Mapping[str, Any]) -> bytes:
    """The checksum's line and the manifest's."""
    manifest = {
        "schema": SCHEMA,
        "kind": key["kind"],
        "created_s": time.time(),
        "files": [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()],
        "info": dict(info),
        "key": plain(key),
    }
    line = dump(manifest)
    return _magic(line) + line + b"\n"


def _magic(manifest: bytes) -> bytes:
    return b"torchaccel cache %d %s\n" % (SCHEMA, hashlib.sha256(manifest).hexdigest().encode())


def read(path: Path, key: bytes | None = None) -> Entry:
    """The entry in a file, checked; raises `DamagedError` where it is not whole, or not of `key` in canonical form."""
    with path.open("rb") as file:
        manifest = _manifest(file)
        found = dump(manifest["key"])
        if path.name != digest(found) or (key is not None and found != key):
            raise DamagedError("it is the entry of another key")
        files = {}
        for name, size, checksum in manifest["files"]:
            files[name] = file.read(size)
            if hashlib.sha256(files[name]).hexdigest() != checksum:
                raise DamagedError(f"the checksum of {name!r} is wrong")
        if file.read(1):
            raise DamagedError("there is more in it than was written")
        state = os.fstat(file.fileno())
    return Entry(path, manifest["kind"], manifest["info"], state.st_size, state.st_mtime, files)


def _manifest(file: BinaryIO) -> dict[str, Any]:
    first, second = file.readline(200), file.readline(MAX_MANIFEST_BYTES)
    if first != _magic(second[:-1]):
        raise DamagedError("the checksum of its manifest is wrong")
    return json.loads(second.decode("utf-8", "surrogatepass"))


def listed(path: Path) -> Entry:
    """The entry in a file without its payloads; what is damaged has the kind `"damaged"` and says so in its info."""
    try:
        with path.open("rb") as file:
            manifest, state = _manifest(file), os.fstat(file.fileno())
        return Entry(path, manifest["kind"], manifest["info"], state.st_size, state.st_mtime, {})
    except (DamagedError, OSError) as error:
        return Entry(path, "damaged", {"what": str(error)}, 0, 0.0, {})


def problem(path: Path) -> str:
    """Why an entry is damaged, or "" where it is whole."""
    try:
        read(path)
    except (DamagedError, OSError) as error:
        return str(error)
    return ""
