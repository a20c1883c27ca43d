"""The cache on disk: kills, races, damage, bounds, and folders that cannot be used."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cache.damage import put, rewrite
from tests.cache.processes import KEY, LIMIT, payload
from torchaccel.cache import store as module
from torchaccel.cache.canonical import canonical
from torchaccel.cache.entries import head
from torchaccel.cache.folder import MARKER, TEXT
from torchaccel.cache.store import Cache, cache_folder, limit_bytes, open_cache
from torchaccel.errors import CacheWarning, OptionError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", LIMIT)


def key(number: int) -> dict[str, Any]:
    return {"kind": "plan", "number": number}


def files_in(cache: Cache, name: str) -> list[Path]:
    return list((cache.folder / name).glob("*"))


# --- what is kept ---


def test_what_is_put_is_there_for_the_same_key_alone(cache: Cache) -> None:
    assert cache.get(KEY) is None
    assert not cache.folder.exists(), "a look leaves nothing behind"
    cache.put(KEY, {"plan": b"\n" * 100, "empty": b""}, {"what": "a plan", "list": [1, 2.5, None]})
    entry = cache.get(dict(reversed(KEY.items())))
    assert entry is not None
    assert entry.files == {"plan": b"\n" * 100, "empty": b""}
    assert (entry.kind, entry.info) == ("plan", {"what": "a plan", "list": [1, 2.5, None]})
    assert cache.get({**KEY, "more": 1}) is None
    cache.put(KEY, {"plan": b"another"}, {})
    entry = cache.get(KEY)
    assert entry is not None
    assert entry.files == {"plan": b"another"}
    assert len(files_in(cache, "entries")) == 1
    cache.discard(KEY)
    cache.discard(KEY)
    assert cache.get(KEY) is None


def test_a_key_of_any_plain_values_is_found_again(cache: Cache) -> None:
    for number, value in enumerate([(1, (2.0,)), float("nan"), -0.0, b"\x00", "\ud800", {3: {"$tuple": 1}}, 2**80]):
        wanted = {"kind": "plan", "value": value}
        cache.put(wanted, {"plan": b"%d" % number}, {})
        entry = cache.get(wanted)
        assert entry is not None
        assert entry.files == {"plan": b"%d" % number}


def test_only_its_owner_may_read_what_is_kept(cache: Cache) -> None:
    cache.put(KEY, payload(1), {})
    flip(-1)(cache.path(KEY))
    with pytest.warns(CacheWarning):
        assert cache.get(KEY) is None
    with Cache(cache.folder / "busy" / "locked first", LIMIT).lock(KEY):
        pass
    found = list(cache.folder.rglob("*"))
    assert {path.name for path in found if path.is_dir()} == {"entries", "damaged", "busy", "locked first"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in found)


def test_nothing_in_it_is_unpickled() -> None:
    names = (*(f"cache/{name}" for name in ("store", "canonical", "entries", "files", "folder", "shapes")), "locks")
    text = "".join((ROOT / "torchaccel" / f"{name}.py").read_text() for name in names)
    assert not [line for line in text.splitlines() if "import" in line and ("pickle" in line or "torch " in line)]
    assert "torch.load" not in text


# --- processes ---


@pytest.fixture
def in_memory() -> Iterator[Cache]:
    """A cache where fsync costs nothing, if there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Cache(Path(folder) / "cache", LIMIT)


def in_a_process(*arguments: object) -> None:
    command = [sys.executable, "-m", "tests.cache.processes", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("work", ["put", "get", "lock"])
def test_a_process_killed_at_any_moment_leaves_a_usable_cache(in_memory: Cache, work: str) -> None:
    in_a_process("kill_at_every_moment", in_memory.folder, work)


def test_a_process_killed_while_it_writes_leaves_a_usable_cache(in_memory: Cache) -> None:
    in_a_process("kill_while_writing", in_memory.folder)


@pytest.mark.parametrize(("processes", "victims"), [(2, 0), (8, 0), (8, 2)])
def test_of_processes_that_race_for_one_key_one_builds(cache: Cache, processes: int, victims: int) -> None:
    in_a_process("race", cache.folder, processes, victims)


def test_processes_that_begin_a_cache_at_once_and_are_killed_share_it(in_memory: Cache) -> None:
    in_a_process("begin", in_memory.folder)


def test_one_process_at_a_time_holds_a_lock_whose_file_comes_and_goes(cache: Cache) -> None:
    in_a_process("exclude", cache.folder)


def test_of_threads_that_race_for_one_key_one_builds(cache: Cache) -> None:
    builds = []

    def want() -> None:
        with cache.lock(KEY):
            if cache.get(KEY) is None:
                time.sleep(0.05)
                builds.append(1)
                cache.put(KEY, payload(1), {})

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == [1]


def test_other_keys_are_not_waited_for(cache: Cache) -> None:
    with cache.lock(key(1)), cache.lock(key(2)):
        assert len(files_in(cache, "busy")) == 2
    assert files_in(cache, "busy") == []


def test_a_lock_is_given_back_where_the_build_fails(cache: Cache) -> None:
    with pytest.raises(ZeroDivisionError), cache.lock(KEY):
        _ = 1 / 0
    with cache.lock(KEY):
        pass


def test_a_lock_that_a_forked_child_has_open_too_is_given_back(cache: Cache) -> None:
    waiter = threading.Thread(target=lambda: cache.lock(KEY).__enter__(), daemon=True)
    with cache.lock(KEY), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside other threads
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        waiter.start()
        time.sleep(0.2)  # by now it waits for the very file that the child has open
    try:
        waiter.join(timeout=20)
        assert not waiter.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_one_is_writing_another_does_not_sweep_away(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    real, others = os.fsync, iter([key(2)])

    def fsync(descriptor: int) -> None:
        for other in others:
            Cache(cache.folder, LIMIT).put(other, payload(2), {})
        real(descriptor)

    monkeypatch.setattr(module.os, "fsync", fsync)
    cache.put(KEY, payload(1), {})
    assert cache.get(KEY) is not None
    assert cache.get(key(2)) is not None


def test_a_lock_that_is_held_for_ever_is_waited_for_until_a_limit(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_LIMIT_S", 0.1)
    with cache.lock(KEY), pytest.warns(CacheWarning, match="another process holds"), cache.lock(KEY):
        cache.put(KEY, payload(1), {})
    assert cache.get(KEY) is not None


# --- damage ---


def flip(position: int) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: path.write_bytes(b""),
    "altered at its end": flip(-1),
    "altered in its checksum": flip(30),
    "altered in its manifest": flip(200),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another version's": lambda path: path.write_bytes(path.read_bytes().replace(b"cache 1", b"cache 2", 1)),
    "no entry": lambda path: path.write_bytes(os.urandom(5000)),
    "of another key": lambda path: path.write_bytes(head(key(2), {"plan": b"x"}, {}) + b"x"),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "file").write_text("in it")),
    "an empty folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "of another shape": lambda path: put(path, b"{}"),
    "a list": lambda path: put(path, b"[1]"),
    "without files": lambda path: rewrite(path, files=...),
    "with no files": lambda path: rewrite(path, files=None),
    "with files without checksums": lambda path: rewrite(path, files=[["plan", 3]]),
    "with files of negative size": lambda path: rewrite(path, files=[["plan", -1, ""]]),
    "with files of any size": lambda path: rewrite(path, files=[["plan", 1 << 62, ""]]),
    "without what it says": lambda path: rewrite(path, info=...),
    "with nothing that it says": lambda path: rewrite(path, info=None),
    "with a kind that is none": lambda path: rewrite(path, kind=7),
    "with a key that is none": lambda path: rewrite(path, key=[]),
    "with a key that JSON has no words for": lambda path: put(
        path, b'{"kind":"plan","files":[],"info":{},"key":{"kind":NaN}}'
    ),
    "no JSON": lambda path: put(path, b"{"),
    "no text": lambda path: put(path, b"\xff"),
    "deep": lambda path: put(path, b"[" * 200_000),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_damaged_is_moved_aside_with_one_warning(cache: Cache, damage: Callable[[Path], object]) -> None:
    cache.put(KEY, payload(1), {})
    damage(cache.path(KEY))
    (problem,) = cache.verify().values()
    assert problem
    assert len(cache.entries()) == 1
    with pytest.warns(CacheWarning, match="damaged.*built again") as caught:
        assert cache.get(KEY) is None
    assert len(caught) == 1
    assert cache.get(KEY) is None, "without a second warning"
    assert len(files_in(cache, "damaged")) == 1
    cache.put(KEY, payload(2), {})
    entry = cache.get(KEY)
    assert entry is not None
    assert entry.files == payload(2)
    assert list(cache.verify().values()) == [""]


def test_what_its_reader_finds_damaged_is_moved_aside_too(cache: Cache) -> None:
    cache.put(KEY, payload(1), {})
    assert cache.get(KEY, lambda entry: len(entry.payload("plan"))) == 1 << 16
    with pytest.warns(CacheWarning, match="damaged .it has no 'engine'"):
        assert cache.get(KEY, lambda entry: entry.payload("engine")) is None
    assert len(files_in(cache, "damaged")) == 1


def test_of_two_damaged_entries_of_one_key_both_are_kept(cache: Cache) -> None:
    for number in range(2):
        cache.put(KEY, payload(number), {})
        flip(-1)(cache.path(KEY))
        with pytest.warns(CacheWarning):
            assert cache.get(KEY) is None
    assert len(files_in(cache, "damaged")) == 2


def test_every_single_byte_counts(cache: Cache) -> None:
    cache.put(KEY, {"plan": b"payload"}, {"what": "a plan"})
    path = cache.path(KEY)
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(position)(path)
        assert set(cache.verify().values()) != {""}, position
        path.write_bytes(whole)
        os.truncate(path, position)
        assert set(cache.verify().values()) != {""}, position
        path.write_bytes(whole)
    assert set(cache.verify().values()) == {""}


def test_an_entry_under_the_name_of_another_is_noticed(cache: Cache) -> None:
    cache.put(key(1), payload(1), {})
    cache.path(key(1)).replace(cache.path(KEY))
    assert list(cache.verify().values()) == ["it is the entry of another key"]
    with pytest.warns(CacheWarning, match="another key"):
        assert cache.get(KEY) is None


def test_a_hash_that_is_the_same_is_not_enough(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchaccel.cache.store.key_digest", "torchaccel.cache.entries.digest"):
        monkeypatch.setattr(name, lambda _: "0" * 64)
    cache.put(key(1), payload(1), {})
    with pytest.warns(CacheWarning, match="another key"):
        assert cache.get(key(2)) is None
    assert canonical(key(1)) != canonical(key(2))


def test_what_is_moved_aside_is_bounded(cache: Cache) -> None:
    for number in range(10):
        cache.put(key(number), payload(number), {})
        flip(-1)(cache.path(key(number)))
        with pytest.warns(CacheWarning):
            assert cache.get(key(number)) is None
    assert len(files_in(cache, "damaged")) == module.DAMAGED_KEPT
    cache.put(KEY, payload(1), {})
    for path in files_in(cache, "damaged"):
        os.utime(path, (time.time() + 60,) * 2)
    small = Cache(cache.folder, 200_000)
    small.put(key(1), payload(2), {})
    assert small.get(KEY) is not None, "what is damaged goes before what is whole"
    assert len(files_in(cache, "damaged")) == 1


# --- bounds ---


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * 67_000)
    for number in range(3):
        cache.put(key(number), payload(number), {})
        time.sleep(0.01)
    assert cache.get(key(0)) is not None
    time.sleep(0.01)
    cache.put(key(3), payload(3), {})
    assert [cache.get(key(number)) is not None for number in range(4)] == [True, False, True, True]
    assert sum(entry.size_bytes for entry in cache.entries()) <= cache.limit_bytes


def test_after_the_clock_went_back_what_is_kept_is_what_is_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * 67_000)
    kernel = tmp_path / "triton/KERNEL/kernel.cubin"
    cache.put(key(0), payload(0), {})
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(bytes(67_000))
    for path in (cache.path(key(0)), kernel):
        os.utime(path, (time.time() + 86400 * 365,) * 2)
    for number in (1, 2, 3):
        cache.put(key(number), payload(number), {})
        assert cache.get(key(number)) is not None
        time.sleep(0.01)
    assert not kernel.exists()
    assert [cache.get(key(number)) is not None for number in range(4)] == [False, True, True, True]


def test_what_is_dated_in_the_future_and_used_is_dated_anew(cache: Cache) -> None:
    for number in range(2):
        cache.put(key(number), payload(number), {})
        os.utime(cache.path(key(number)), (time.time() + 86400,) * 2)
    assert cache.get(key(0)) is not None
    Cache(cache.folder, 2 * 67_000).put(key(2), payload(2), {})
    assert [cache.get(key(number)) is not None for number in range(3)] == [True, False, True]


def test_what_has_just_been_written_never_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 2 * 67_000)
    for number in range(2):
        cache.put(key(number), payload(number), {})
        os.utime(cache.path(key(number)), (time.time() + 30,) * 2)  # as another machine's clock may be ahead
    cache.put(key(2), payload(2), {})
    assert [cache.get(key(number)) is not None for number in range(3)] == [False, True, True]


def test_what_is_larger_than_all_of_it_is_not_kept_and_costs_nothing_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100_000)
    cache.put(key(1), payload(1), {})
    with pytest.warns(CacheWarning, match="TORCHACCEL_CACHE_LIMIT_GIB"):
        cache.put(key(2), payload(2, 200_000), {})
    assert cache.get(key(1)) is not None
    assert cache.get(key(2)) is None


@pytest.mark.parametrize(("given", "gib"), [(None, 10), ("", 10), ("0.5", 0.5), ("0", 0), ("3", 3)])
def test_the_limit_is_ten_gib_or_the_environments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None, gib: float
) -> None:
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TORCHACCEL_CACHE_LIMIT_GIB", raising=False)
    if given is not None:
        monkeypatch.setenv("TORCHACCEL_CACHE_LIMIT_GIB", given)
    assert limit_bytes() == gib * 2**30
    opened = open_cache()
    assert (opened is None) == (gib == 0)
    if opened is not None:
        assert (opened.folder, opened.limit_bytes) == (cache_folder(), gib * 2**30)
        assert open_cache() is opened
        assert open_cache(tmp_path / "other") is not opened


@pytest.mark.parametrize("given", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TORCHACCEL_CACHE_LIMIT_GIB", given)
    with pytest.raises(OptionError, match="number of GiB"):
        limit_bytes()


# --- folders that cannot be used ---


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write anywhere, so be nobody."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def used(cache: Cache) -> list[str]:
    """The warnings of a whole use of the cache, twice; the build serves all the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with cache.lock(KEY):
                assert cache.get(KEY) is None
                cache.put(KEY, payload(1), {})
    assert {one.category for one in caught} <= {CacheWarning}
    return [str(one.message) for one in caught]


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that everyone may enter; pytest's own are closed to others than their owner."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_folder_that_cannot_be_written_is_named_once_with_the_remedy(open_to_all: Path) -> None:
    open_to_all.chmod(0o555)
    with without_privileges():
        (message,) = used(Cache(open_to_all / "cache", LIMIT))
    assert str(open_to_all / "cache") in message
    assert "Permission" in message
    assert "TORCHACCEL_CACHE_DIR" in message


def test_a_folder_that_may_only_be_read_serves(open_to_all: Path) -> None:
    cache = Cache(open_to_all / "cache", LIMIT)
    cache.put(KEY, payload(1), {})
    cache.path(KEY).chmod(0o444)
    for folder in (cache.folder, *cache.folder.iterdir()):
        folder.chmod(0o555)
    with without_privileges():
        entry = cache.get(KEY)
        assert entry is not None
        assert entry.files == payload(1)
        assert not os.access(cache.folder, os.W_OK, effective_ids=True)


def test_an_entry_that_may_not_be_read_is_named(open_to_all: Path) -> None:
    cache = Cache(open_to_all / "cache", LIMIT)
    cache.put(KEY, payload(1), {})
    for folder in (cache.folder, *cache.folder.iterdir()):
        folder.chmod(0o755)
    with without_privileges(), pytest.warns(CacheWarning, match="could not read in the cache.*Permission"):
        assert cache.get(KEY) is None


@pytest.mark.parametrize(
    ("error", "remedy"),
    [(errno.ENOSPC, "make room there"), (errno.EDQUOT, "make room there"), (errno.EROFS, "mend that")],
)
def test_the_remedy_is_that_of_what_the_file_system_says(
    cache: Cache, error: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(module.os, "fsync", fsync)
    with pytest.warns(CacheWarning, match=f"could not write.*builds its own: {remedy}"):
        cache.put(KEY, payload(1), {})
    assert files_in(cache, "busy") == files_in(cache, "entries") == []


def test_what_another_process_removes_meanwhile_is_not_listed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        cache.put(key(number), payload(number), {})
    real, (gone, *others) = Path.lstat, files_in(cache, "entries")

    def lstat(path: Path) -> os.stat_result:
        if path == gone:
            gone.unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    assert {entry.path for entry in cache.entries()} == set(others)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    assert len(used(Cache(tmp_path / "cache", LIMIT))) == 1
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_full_disk_leaves_a_warning_and_no_file(cache: Cache) -> None:
    cache.put(key(1), payload(1, 100), {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        messages = used(cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(messages) == 1, messages
    assert "could not write" in messages[0]
    assert str(cache.folder) in messages[0]
    assert files_in(cache, "busy") == []
    assert len(files_in(cache, "entries")) == 1
    assert cache.get(key(1)) is not None
    assert used_after(cache)


def used_after(cache: Cache) -> bool:
    cache.put(KEY, payload(1), {})
    return cache.get(KEY) is not None


# --- what is shown ---


def test_what_is_there_is_listed_the_last_used_first(cache: Cache) -> None:
    assert cache.entries() == []
    for number in range(3):
        cache.put(key(number), payload(number), {"what": f"number {number}"})
        time.sleep(0.01)
    assert cache.get(key(0)) is not None
    assert [entry.info["what"] for entry in cache.entries()] == ["number 0", "number 2", "number 1"]
    assert all(entry.size_bytes > 65536 and not entry.files for entry in cache.entries())
    os.truncate(cache.path(key(1)), 100)
    assert sorted(entry.kind for entry in cache.entries()) == ["damaged", "plan", "plan"]


def test_clear_removes_everything_but_what_is_not_the_caches(cache: Cache) -> None:
    for number in range(3):
        cache.put(key(number), payload(number), {})
    (cache.folder / "watch-helper.so").write_text("kept")
    flip(-1)(cache.path(key(0)))
    with pytest.warns(CacheWarning):
        cache.get(key(0))
    (cache.folder / "busy" / f"{'a' * 32}.new").write_bytes(b"left")
    with cache.lock(KEY):
        files, size = cache.clear()
        assert len(files_in(cache, "busy")) == 1, "what is in use stays"
    assert files == 3
    assert size > 3 * 65536
    assert {path.name for path in cache.folder.rglob("*") if path.is_file()} == {"watch-helper.so", "CACHEDIR.TAG"}
    assert cache.clear() == (0, 0)


# --- what is not the cache's ---


FOREIGN = ("entries/table.csv", "busy/notes.txt", "busy/empty", "damaged/car.jpg", "triton/.git/HEAD", "inductor/a.py")


def foreign_files(folder: Path) -> list[Path]:
    for number, name in enumerate(FOREIGN):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine" if number != 2 else "")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_in_a_folder_with_other_files_a_cache_has_a_folder_of_its_own(tmp_path: Path) -> None:
    mine = foreign_files(tmp_path)
    cache = Cache(tmp_path, 100_000)
    assert (cache.root, cache.entries(), cache.compiled(), cache.clear()) == (None, [], [], (0, 0))
    for number in range(3):
        cache.put(key(number), payload(number), {})
        flip(-1)(cache.path(key(number)))
        with cache.lock(KEY), pytest.warns(CacheWarning, match="damaged"):
            assert cache.get(key(number)) is None
    cache.put(KEY, payload(1), {})
    assert cache.root == tmp_path / "torchaccel-cache"
    assert cache.clear()[0] == 1
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([*mine, cache.root / MARKER])
    assert len(os.listdir(tmp_path)) == 6
    for path in mine:
        path.unlink()
    assert cache.root == tmp_path / "torchaccel-cache"


def test_what_somebody_put_into_a_cache_stays(cache: Cache) -> None:
    cache.put(key(0), payload(0), {})
    mine = foreign_files(cache.folder)[1:]
    mine = [path for path in mine if path.is_relative_to(cache.folder / "busy") or "csv" in path.name]
    entries = cache.path(key(0)).parent
    (entries / "folder").mkdir()
    (entries / "outside").symlink_to(cache.folder.parent)
    assert [entry.kind for entry in cache.entries()] == ["plan"]
    assert list(cache.verify().values()) == [""]
    Cache(cache.folder, 70_000).put(key(1), payload(1), {})
    assert cache.get(key(0)) is None
    assert cache.clear()[0] > 0
    assert len(mine) == 3
    assert all(path.exists() for path in mine)
    assert {path.name for path in entries.iterdir()} == {"folder", "outside", "table.csv"}


def test_a_marker_is_that_of_the_specification(cache: Cache) -> None:
    cache.put(KEY, payload(1), {})
    lines = (cache.folder / "CACHEDIR.TAG").read_text().splitlines()
    assert lines[0] == "Signature: 8a477f597d28d172789f06886806bc55"
    assert "torchaccel" in lines[1]


@pytest.mark.parametrize("written", [0, 10, len(TEXT)])
def test_a_marker_that_was_begun_is_ended(tmp_path: Path, written: int) -> None:
    (tmp_path / MARKER).write_bytes(TEXT[:written])
    cache = Cache(tmp_path, LIMIT)
    cache.put(KEY, payload(1), {})
    assert cache.root == tmp_path
    assert (tmp_path / MARKER).read_bytes() == TEXT


def test_another_tool_s_cache_is_not_ours(tmp_path: Path) -> None:
    theirs = TEXT.splitlines()[0] + b"\n# This file is a cache directory tag created by cargo.\n"
    (tmp_path / MARKER).write_bytes(theirs)
    cache = Cache(tmp_path, LIMIT)
    cache.put(KEY, payload(1), {})
    assert cache.root == tmp_path / "torchaccel-cache"
    assert (tmp_path / MARKER).read_bytes() == theirs


def test_a_cache_without_a_marker_is_neither_read_nor_changed(cache: Cache) -> None:
    cache.put(KEY, payload(1), {})
    flip(-1)(cache.path(KEY))
    (cache.folder / MARKER).unlink()
    path = cache.path(KEY)
    assert cache.get(KEY) is None
    cache.discard(KEY)
    assert path.exists()


def test_where_both_folders_are_anothers_nothing_is_kept(tmp_path: Path) -> None:
    mine = [*foreign_files(tmp_path / "torchaccel-cache"), *foreign_files(tmp_path)]
    (message,) = used(Cache(tmp_path, LIMIT))
    assert "not empty, and no cache of torchaccel's" in message
    assert f"{tmp_path}/torchaccel-cache" in message
    assert set(mine) == {path for path in tmp_path.rglob("*") if path.is_file()}


def test_a_folder_that_is_removed_meanwhile_is_marked_again(cache: Cache) -> None:
    for _ in range(2):
        cache.put(KEY, payload(1), {})
        assert cache.get(KEY) is not None
        shutil.rmtree(cache.folder)
        assert cache.get(KEY) is None


def test_a_relative_folder_is_that_of_when_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHACCEL_CACHE_LIMIT_GIB", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    cache = open_cache("mine")
    assert cache is not None
    monkeypatch.chdir(tmp_path / "elsewhere")
    cache.put(KEY, {}, {})
    other = open_cache("mine")
    assert other is not None
    assert other.get(KEY) is None
    assert [path.name for path in tmp_path.iterdir() if path.name != "elsewhere"] == ["mine"]
