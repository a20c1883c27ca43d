"""Keys as JSON in which no two that differ are the same."""

import hashlib
import json
from typing import Any

SCHEMA = 1  # of what a cache holds: another one finds nothing of this one's


def canonical(key: Any) -> bytes:
    """A key, made of plain values, as JSON in which any two that differ differ: in a type, an order, a sign of zero.

    >>> canonical({"b": (1, True), "a": -0.0})
    b'{"a":-0.0,"b":{"$tuple":[1,true]}}'

    Raises `TypeError` for anything but None, bool, int, float, str, bytes, and lists, tuples and dicts of them.
    """
    return dump(plain(key))


def dump(value: Any) -> bytes:
    """JSON of one form for each value; what UTF-8 has no bytes for (lone surrogates, as in file names) included."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def plain(value: Any) -> Any:
    """What JSON has no words for, under names that no dict's key has."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if -float("inf") < value < float("inf") else {"$float": repr(value)}
    if kind is bytes:
        return {"$bytes": value.hex()}
    if kind in (list, tuple):
        items = [plain(item) for item in value]
        return items if kind is list else {"$tuple": items}
    if kind is dict:
        if all(type(name) is str and not name.startswith("$") for name in value):
            return {name: plain(item) for name, item in value.items()}
        return {"$dict": sorted(([plain(name), plain(item)] for name, item in value.items()), key=dump)}
    raise TypeError(f"a key of the cache is made of plain values, and holds a {kind.__qualname__}: {value!r}")


def key_digest(key: Any) -> str:
    """The name of a key's entry: the SHA-256 of the key, in hexadecimal."""
    return digest(canonical(key))


def digest(text: bytes) -> str:
    """The same for a key that is in canonical form already."""
    return hashlib.sha256(b"%d" % SCHEMA + text).hexdigest()
