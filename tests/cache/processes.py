"""What the tests of the cache run in other processes. They fork from one without PyTorch, which makes forks slow."""

import functools
import os
import random
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the cache needs nothing but Python
    package = types.ModuleType("torchaccel")
    package.__path__ = [str(Path(__file__).parents[2] / "torchaccel")]
    sys.modules["torchaccel"] = package

from torchaccel.cache.store import Cache

KEY = {"kind": "plan", "graph": "of the test"}
LIMIT = 1 << 30


def payload(number: int, size: int = 1 << 16) -> dict[str, bytes]:
    """Bytes that say which they are."""
    return {"plan": random.Random(number).randbytes(size), "number": b"%d" % number}


def forked(work: Callable[[], Any]) -> int:
    """The pid of a child that does `work` and ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside threads, which native libraries have
        pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - it is the parent's to judge
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    """The exit status of a child, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(moment: int) -> None:
    """Be killed as the so-manieth function from now on, Python's own or C's, is called."""
    seen = 0

    def count(_: Any, event: str, __: Any) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")
        if seen >= moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def kill_at_every_moment(folder: str, work: str) -> None:
    """Kill a process at each moment of a put, of a get of what is damaged, or of a build under the lock, in turn."""
    cache = Cache(folder, LIMIT)
    actions: dict[str, Callable[[], Any]] = {
        "put": lambda: cache.put(KEY, payload(2), {}),
        "get": lambda: cache.get(KEY),
        "lock": lambda: _build(cache, 0.0),
    }
    for moment in range(1, 5000, 3 if work == "lock" else 1):
        cache.put(KEY, payload(1), {})
        if work == "get":
            _truncate(cache.path(KEY))
        elif work == "lock":
            cache.discard(KEY)

        def act(moment: int = moment) -> None:
            warnings.simplefilter("ignore")
            die_at(moment)
            actions[work]()
            sys.setprofile(None)

        status = ended(forked(act))
        _check_what_is_left(cache, work)
        if status == 0:
            assert moment > 50, moment
            return
        assert status == -signal.SIGKILL, status
    raise AssertionError("it never came to its end")


def _check_what_is_left(cache: Cache, work: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entry = cache.get(KEY)
    assert len(caught) <= (work == "get"), [str(one.message) for one in caught]
    if work == "put":
        assert entry is not None
    if entry is not None:
        assert entry.files in (payload(1), payload(2))
    started = time.monotonic()
    with cache.lock(KEY):
        cache.put(KEY, payload(3), {})
    assert time.monotonic() - started < 1, "a dead process's lock was waited for"
    found = cache.get(KEY)
    assert found is not None
    assert found.files == payload(3)
    assert os.listdir(cache.folder / "busy") == []


def begin(folder: str) -> None:
    """Kill a process at each moment of beginning a cache, in turn, each time beside others that begin it too."""
    for moment in range(1, 5000, 5):
        cache = Cache(f"{folder}/{moment}", LIMIT)

        def act(moment: int = moment, cache: Cache = cache) -> None:
            die_at(moment)
            cache.put(KEY, payload(1), {})
            sys.setprofile(None)

        others = [forked(functools.partial(cache.put, KEY, payload(1), {})) for _ in range(2)]
        status = ended(forked(act))
        assert [ended(pid) for pid in others] == [0, 0]
        assert cache.root == cache.folder, f"one that began at moment {moment} took it for another's folder"
        assert cache.get(KEY) is not None
        assert set(os.listdir(cache.folder)) == {"CACHEDIR.TAG", "busy", "entries"}
        if status == 0:
            assert moment > 50, moment
            return
        assert status == -signal.SIGKILL, status
    raise AssertionError("it never came to its end")


def kill_while_writing(folder: str) -> None:
    """Kill a process at random moments of writing a large entry again and again."""
    cache, drawn = Cache(folder, LIMIT), random.Random(0)
    for _ in range(25):
        pid = forked(lambda: [cache.put(KEY, payload(n, 1 << 23), {}) for n in range(1000)])
        time.sleep(drawn.uniform(0.0, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            entry = cache.get(KEY)
        if entry is not None:
            assert entry.files == payload(int(entry.files["number"]), 1 << 23)
    cache.put(KEY, payload(1), {})
    assert os.listdir(cache.folder / "busy") == []
    assert len(os.listdir(cache.folder / "entries")) == 1


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _build(cache: Cache, seconds: float) -> None:
    """What a process that wants an entry does."""
    if cache.get(KEY) is None:
        with cache.lock(KEY):
            if cache.get(KEY) is None:
                with open(_log(cache), "ab") as file:
                    file.write(b"%d\n" % os.getpid())
                time.sleep(seconds)
                cache.put(KEY, payload(1), {})
    entry = cache.get(KEY)
    assert entry is not None
    assert entry.files == payload(1)


def race(folder: str, processes: int, victims: int) -> None:
    """Let processes race for one key, and kill the first so many builders; those left build once."""
    cache = Cache(folder, LIMIT)
    for _ in range(3):
        cache.discard(KEY)
        _log(cache).write_bytes(b"")
        pids = [forked(lambda: _build(cache, 0.1)) for _ in range(processes)]
        killed: list[int] = []
        while len(killed) < victims:
            built = _builders(cache)
            if len(built) > len(killed):
                os.kill(built[-1], signal.SIGKILL)
                killed.append(built[-1])
        statuses = {pid: ended(pid) for pid in pids}
        assert statuses == {pid: -signal.SIGKILL if pid in killed else 0 for pid in pids}
        assert len(_builders(cache)) == 1 + victims
        assert os.listdir(cache.folder / "busy") == []


def exclude(folder: str) -> None:
    """Let processes take the same lock again and again, where each removes the lock's file as it goes."""
    cache = Cache(folder, LIMIT)
    cache.folder.mkdir()

    def work() -> None:
        for _ in range(40):
            with cache.lock(KEY):
                os.close(os.open(cache.folder / "inside", os.O_CREAT | os.O_EXCL))
                time.sleep(0.002)
                os.unlink(cache.folder / "inside")

    assert [ended(pid) for pid in [forked(work) for _ in range(6)]] == [0] * 6


def _builders(cache: Cache) -> list[int]:
    return [int(line) for line in _log(cache).read_text().splitlines(keepends=True) if "\n" in line]


def _log(cache: Cache) -> Path:
    return cache.folder.with_name("builds")


if __name__ == "__main__":
    globals()[sys.argv[1]](*(int(word) if word.isdigit() else word for word in sys.argv[2:]))
