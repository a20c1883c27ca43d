"""Whether plain values from a file have the shape of what is written there: anyone may have put the file there."""

from types import UnionType
from typing import Any, get_args


def fits(value: Any, shape: Any) -> bool:
    """Whether a value has a shape: a type (an int is a float too) or types, or a list, tuple or dict of shapes.

    `[shape]` is a list of any length, `(shape, shape)` a list of that length, `{"name": shape}` a dict that has these
    names among others, and `{str: shape}` one of any names.

    >>> fits({"ms": 3, "names": ["a"], "more": None}, {"ms": float, "names": [str]})
    True
    >>> fits([1, "a"], (int, str)), fits([1], (int, str)), fits(True, int), fits(None, float | None)
    (True, False, False, True)
    """
    match shape:
        case UnionType():
            return any(fits(value, one) for one in get_args(shape))
        case list():
            return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
        case tuple():
            return isinstance(value, list) and len(value) == len(shape) and all(map(fits, value, shape))
        case dict():
            return isinstance(value, dict) and _has(value, shape)
    return type(value) in ((int, float) if shape is float else (shape,))


def _has(value: dict[str, Any], shape: dict[Any, Any]) -> bool:
    if str in shape:
        return all(fits(item, shape[str]) for item in value.values())
    return all(name in value and fits(value[name], one) for name, one in shape.items())
