"""Keys: what differs in any way has another digest, and what does not has the same, in every process."""

import copy
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchaccel.cache.canonical import canonical, key_digest

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=()))  # lone surrogates too
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.sampled_from(["$tuple", "$dict", "$float"]), inner, max_size=3)
        | st.dictionaries(st.integers() | st.booleans() | st.text(max_size=1), inner, max_size=2)
    ),
    max_leaves=6,
)


def exact(value: Any) -> Any:
    """What a key is, said once more in other words: with its types, and the sign of zero."""
    if isinstance(value, float):
        return "float", "nan" if math.isnan(value) else value.hex()
    if isinstance(value, dict):
        return "dict", frozenset((exact(name), exact(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(exact(item) for item in value)
    return type(value).__name__, value


@given(PLAIN, PLAIN)
def test_keys_have_the_same_digest_exactly_if_they_are_the_same(one: Any, other: Any) -> None:
    assert (key_digest(one) == key_digest(other)) == (exact(one) == exact(other))
    assert key_digest(one) == key_digest(copy.deepcopy(one))


LOOKALIKES: list[Any] = [
    *(1, 1.0, True, "1", b"1", [1], (1,), {"1": 1}, {1: 1}, {True: 1}, {1.0: 1}),
    *(0, 0.0, -0.0, False, None, "", b"", [], (), {}, "None", "null"),
    *(math.nan, math.inf, -math.inf, "nan", "NaN", {"$float": "nan"}),
    *({"$tuple": [1]}, {"$bytes": "31"}, {"$dict": [[1, 1]]}, [[1, 1]], [1, [1]], [[], 1]),
    *("\ud800\udc00", "\U00010000", "\\ud800", "é", "e\u0301", 2**64, float(2**64), 1e-320, 0.1, 0.1 + 2**-56),
]


def test_what_looks_alike_is_not_the_same() -> None:
    digests = [key_digest(value) for value in LOOKALIKES]
    assert len(set(digests)) == len(LOOKALIKES)
    assert len({key_digest({"kind": "plan", "of": value}) for value in LOOKALIKES}) == len(LOOKALIKES)


def test_the_order_of_a_dict_is_no_difference_and_that_of_a_list_is() -> None:
    assert key_digest({"a": 1, "b": 2}) == key_digest({"b": 2, "a": 1})
    assert key_digest({1: "a", "b": 2}) == key_digest({"b": 2, 1: "a"})
    assert key_digest([1, 2]) != key_digest([2, 1])


@pytest.mark.parametrize("value", [torch.float16, {1, 2}, 1j, object(), torch.Size([1]), [torch.ones(1)]])
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="plain values"):
        canonical(value)


def test_another_process_finds_the_same_digest() -> None:
    code = (
        "from torchaccel.cache.canonical import key_digest; "
        "print(key_digest({'b': (1.5, b'x'), 'a': [None, {3: True}]}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == key_digest({"a": [None, {3: True}], "b": (1.5, b"x")})
