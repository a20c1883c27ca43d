"""One file of the cache: a line with the manifest's checksum, the manifest (JSON), the payloads.

The manifest has the kind, the whole key, and the size and checksum of each payload. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torchaccel.cache.canonical import SCHEMA, digest, dump, plain
from torchaccel.cache.shapes import fits

MAX_MANIFEST_BYTES = 64 << 20
_MANIFEST = {"kind": str, "files": [(str, int, str)], "info": dict, "key": dict}


@dataclass(frozen=True)
class Entry:
    """One entry. `files` are the payloads by name; a mere listing leaves them out."""

    path: Path
    kind: str
    info: dict[str, Any]
    size_bytes: int
    last_used_s: float
    files: dict[str, bytes]

    def payload(self, name: str) -> bytes:
        """One of the files; raises `DamagedError` where the entry has none of that name."""
        if name not in self.files:
            raise DamagedError(f"it has no {name!r}")
        return self.files[name]


class DamagedError(Exception):
    """A file in the cache is not what was written there; the message says why."""


def require(value: Any, shape: Any, what: str) -> None:
    """Raise `DamagedError` unless a value from a file has its shape; `what` names it."""
    if not fits(value, shape):
        raise DamagedError(f"{what} is not what it should be")


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
    with _opened(path) as file:
        state = os.fstat(file.fileno())
        manifest = _manifest(file)
        found = _canonical(manifest["key"])
        if path.name != digest(found) or (key is not None and found != key):
            raise DamagedError("it is the entry of another key")
        files = {}
        for name, size, checksum in manifest["files"]:
            files[name] = file.read(max(0, min(size, state.st_size)))
            if len(files[name]) != size or hashlib.sha256(files[name]).hexdigest() != checksum:
                raise DamagedError(f"the checksum of {name!r} is wrong")
        if file.read(1):
            raise DamagedError("there is more in it than was written")
    return Entry(path, manifest["kind"], manifest["info"], state.st_size, state.st_mtime, files)


def _opened(path: Path) -> BinaryIO:
    """A file to read; what has taken its place is damage, and may not be opened at all (a pipe waits for ever)."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DamagedError("it is no file")
    return path.open("rb")


def _manifest(file: BinaryIO) -> dict[str, Any]:
    first, second = file.readline(200), file.readline(MAX_MANIFEST_BYTES)
    if first != _magic(second[:-1]):
        raise DamagedError("the checksum of its manifest is wrong")
    manifest = parsed(second, "its manifest")
    require(manifest, _MANIFEST, "its manifest")
    return manifest


def parsed(text: bytes, what: str) -> Any:
    """What `dump` has written; raises `DamagedError` where it is no JSON. `what` names it."""
    try:
        return json.loads(text.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{what} is no JSON") from error


def _canonical(key: Any) -> bytes:
    try:
        return dump(key)
    except (ValueError, RecursionError) as error:  # a NaN, which `json` reads
        raise DamagedError("its key is none") from error


def listed(path: Path) -> Entry:
    """The entry in a file without its payloads; what is damaged has the kind `"damaged"` and says so in its info."""
    try:
        with _opened(path) as file:
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
