"""What is built once and kept between processes: bytes under a key, in one folder of bounded size.

An entry is one file, named by the SHA-256 of its key; it appears whole or not at all. What is being written, and who
builds what, is marked by locks that end with their process, so that a kill at any moment leaves nothing to mend.
Files are removed in a folder alone that is marked as the cache's own, and those alone that have names of ours.
"""

import errno
import fcntl
import functools
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, overload

from torchaccel.cache import compilers
from torchaccel.cache.canonical import canonical, key_digest
from torchaccel.cache.entries import DamagedError, Entry, head, listed, problem, read
from torchaccel.cache.files import by_age, past, remove, size_of, sweep, write
from torchaccel.cache.folder import make_own_folder, own_folder
from torchaccel.errors import CacheWarning, OptionError
from torchaccel.locks import hold

DEFAULT_LIMIT_GIB = 10.0
DAMAGED_KEPT = 4  # entries that were moved aside
LOCK_LIMIT_S = 600.0  # after it a process builds for itself: whoever holds the lock may hang
ROOM_BYTES = 64 << 20  # that must be free for PyTorch's compilers, which fail on a full disk

Found = TypeVar("Found")


def cache_folder() -> Path:
    """Where what is built is kept: `$TORCHACCEL_CACHE_DIR`, or `torchaccel` in the user's cache folder."""
    if folder := os.environ.get("TORCHACCEL_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchaccel"


def limit_bytes() -> int:
    """The size that a cache may have: `$TORCHACCEL_CACHE_LIMIT_GIB`, or 10 GiB; 0 keeps nothing."""
    given = os.environ.get("TORCHACCEL_CACHE_LIMIT_GIB") or str(DEFAULT_LIMIT_GIB)
    try:
        return int(float(given) * 2**30) if float(given) >= 0 else _refuse_limit(given)
    except (ValueError, OverflowError):
        return _refuse_limit(given)


def _refuse_limit(given: str) -> int:
    raise OptionError(f"TORCHACCEL_CACHE_LIMIT_GIB={given!r}: allowed is a number of GiB, 0 for no cache.")


def open_cache(folder: str | os.PathLike[str] | None = None) -> "Cache | None":
    """The cache in `folder`, or in the default one, wherever the process goes later; None where the limit is 0."""
    limit = limit_bytes()
    return _opened((Path(folder) if folder is not None else cache_folder()).absolute(), limit) if limit else None


@functools.cache
def _opened(folder: Path, limit: int) -> "Cache":
    return Cache(folder, limit)  # one for each folder, so that each complaint is made once


class Cache:
    """Entries in `folder`, together at most `limit_bytes`; those unused for longest go first.

    Whatever the file system refuses (a full disk, a folder that is not to be written) is a warning, and a miss.

    >>> import tempfile
    >>> cache = Cache(tempfile.mkdtemp(), 1 << 20)
    >>> cache.put({"kind": "plan", "graph": "softmax"}, {"plan": b"bytes"}, {"what": "an example"})
    >>> cache.get({"kind": "plan", "graph": "softmax"}).files
    {'plan': b'bytes'}
    >>> cache.get({"kind": "plan", "graph": "relu"}) is None
    True
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self._told: set[str] = set()

    @property
    def root(self) -> Path | None:
        """The cache's own folder: `folder`, or a sub-folder beside what others have there; None where there is none."""
        return own_folder(self.folder)

    def path(self, key: Any) -> Path:
        """Where the entry of a key is, or would be."""
        return _path(self.root or self.folder, key)

    @overload
    def get(self, key: Any) -> Entry | None: ...

    @overload
    def get(self, key: Any, of: Callable[[Entry], Found]) -> Found | None: ...

    def get(self, key: Any, of: Callable[[Entry], Any] = lambda entry: entry) -> Any:
        """The entry of `key`, whole and checked, or what `of` makes of it; None where there is none.

        What is damaged, as `of` too may find by a `DamagedError`, is moved aside, with a warning.
        """
        try:
            root = self.root
            if root is None:
                return None
            path = _path(root, key)
            found = of(read(path, canonical(key)))
            with suppress(OSError):  # a folder that is only read has no order of use
                os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain("read", error)
            return None
        except DamagedError as error:
            self._move_aside(path, str(error))
            return None
        return found

    def put(self, key: Any, files: Mapping[str, bytes], info: Mapping[str, Any]) -> None:
        """Keep `files`, and the plain data of `info`, under `key`, a dict with a `"kind"`; an older entry goes."""
        first = head(key, files, info)
        size = len(first) + sum(map(len, files.values()))
        if size > self.limit_bytes:
            self._tell(
                "size",
                f"an entry of {size / 2**20:.0f} MiB is not kept in {self.folder}, whose limit is "
                f"{self.limit_bytes / 2**20:.0f} MiB: raise TORCHACCEL_CACHE_LIMIT_GIB.",
            )
            return
        try:
            root = make_own_folder(self.folder)
            for name in ("entries", "busy"):
                (root / name).mkdir(mode=0o700, exist_ok=True)
            sweep(root)
            path = _path(root, key)
            write(path, root / "busy", (first, *files.values()))
            self._bound(root, path)
        except OSError as error:
            self._complain("write", error)

    @contextmanager
    def lock(self, key: Any, longer_s: float = 0.0) -> Iterator[None]:
        """Hold the only right, among all processes and threads, to build what belongs to `key`.

        Another that lives is waited for as long as most builds take at most, and so many seconds longer.
        """
        descriptor = None
        try:
            busy = make_own_folder(self.folder) / "busy"
            busy.mkdir(mode=0o700, exist_ok=True)
            path = busy / f"{key_digest(key)}.lock"
            descriptor = hold(path, time.monotonic() + LOCK_LIMIT_S + longer_s)
        except OSError as error:  # then two may build the same
            self._complain("lock", error)
        try:
            yield
        finally:
            if descriptor is not None:
                path.unlink(missing_ok=True)
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open too
                os.close(descriptor)

    @contextmanager
    def compiling(self, device: Any) -> Iterator[bool]:
        """Have Inductor and Triton keep in this cache what is compiled meanwhile for a `torch.device`.

        Not so where the disk has next to no room: they would fail there, where we only miss. It gives whether they do.
        """
        with ExitStack() as stack:
            is_kept = False
            try:
                stack.enter_context(compilers.kept_in(self._roomy_folder, device))
                is_kept = True
            except OSError as error:
                self._complain("write", error)
            yield is_kept
        try:
            if root := self.root:
                self._bound(root)
        except OSError as error:
            self._complain("write", error)

    def _roomy_folder(self) -> Path:
        root = make_own_folder(self.folder)
        if not self.has_room():
            raise OSError(errno.ENOSPC, f"fewer than {ROOM_BYTES >> 20} MiB are free for what PyTorch compiles")
        return root

    def has_room(self) -> bool:
        """Whether the disk has room for what PyTorch's compilers write."""
        root = self.root
        return root is not None and shutil.disk_usage(root).free >= ROOM_BYTES

    def compiled(self) -> list[Entry]:
        """What Inductor and Triton have in this cache, each as one entry, where they have anything."""
        root = self.root
        if root is None:
            return []
        parts, found = compilers.parts(root), []
        for name in compilers.FOLDERS:
            path = root / name
            held = [(used, size) for used, part, size in parts if part.is_relative_to(path)]
            if held:
                last_used, size = max(held)[0] / 1e9, sum(size for _, size in held)
                found.append(Entry(path, name, {"what": f"{len(held)} of PyTorch's own"}, size, last_used, {}))
        return found

    def discard(self, key: Any) -> None:
        """Forget the entry of `key`."""
        with suppress(OSError):
            if root := self.root:
                _path(root, key).unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        """What is there, without payloads, the last used first; what is damaged has the kind `"damaged"`."""
        return [listed(path) for path in reversed(self._paths("entries"))]

    def verify(self) -> dict[Path, str]:
        """Read all of it: for each entry why it is damaged, or "" where it is whole. Nothing is changed."""
        return {path: problem(path) for path in self._paths("entries")}

    def clear(self) -> tuple[int, int]:
        """Remove all entries, what was moved aside and what was compiled; returns how many, and how many bytes."""
        root = self.root
        if root is None:
            return 0, 0
        removed = [remove(path) for path in self._paths("entries", "damaged")]
        sweep(root)
        for entry in self.compiled():
            removed.append(entry.size_bytes)
            compilers.remove(entry.path)
        return sum(size is not None for size in removed), sum(filter(None, removed))

    def _paths(self, *names: str) -> list[Path]:
        root = self.root
        return [] if root is None else [path for name in names for _, path in by_age(root / name)]

    def _move_aside(self, path: Path, why: str) -> None:
        root = path.parents[1]
        with suppress(OSError):  # where it has to stay, the new entry replaces it
            (root / "damaged").mkdir(mode=0o700, exist_ok=True)
            path.replace(root / "damaged" / f"{path.name}-{uuid.uuid4().hex[:8]}")
            self._bound(root)
        self._warn(f"{path} in the cache is damaged ({why}): it is moved to {root / 'damaged'} and built again.")

    def _bound(self, root: Path, new: Path | None = None) -> None:
        """Remove what was moved aside, then what was unused for longest, until all is within the limit; never `new`."""
        damaged, kept = (
            [(used, path, size_of(path)) for used, path in by_age(root / name)] for name in ("damaged", "entries")
        )
        compiled = [(past(used), path, size) for used, path, size in compilers.parts(root)]
        parts = damaged + sorted(kept + compiled)
        total = sum(size for _, _, size in parts)
        for number, (_, path, size) in enumerate(parts):
            if path != new and (total > self.limit_bytes or number < len(damaged) - DAMAGED_KEPT):
                compilers.remove(path)
                total -= size

    def _complain(self, verb: str, error: OSError) -> None:
        remedy = {errno.ENOSPC: "make room there", errno.EDQUOT: "make room there"}.get(error.errno or 0, "mend that")
        self._tell(
            "use",
            f"could not {verb} in the cache {self.folder} ({type(error).__name__}: {error}). Engines serve all the "
            f"same, and each process builds its own: {remedy}, choose another folder by cache_dir= or "
            f"TORCHACCEL_CACHE_DIR, or switch the cache off by cache_dir=False.",
        )

    def _tell(self, about: str, text: str) -> None:
        if about not in self._told:
            self._told.add(about)
            self._warn(text)

    def _warn(self, text: str) -> None:
        warnings.warn(text, CacheWarning, stacklevel=2)


def _path(root: Path, key: Any) -> Path:
    return root / "entries" / key_digest(key)
