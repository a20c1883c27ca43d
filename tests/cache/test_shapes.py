"""Which values have which shape."""

from typing import Any

import pytest

from torchaccel.cache.shapes import fits


@pytest.mark.parametrize(
    ("value", "shape", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (True, float, False),
        ("a", str | None, True),
        (None, str | None, True),
        (1, str | None, False),
        ([], [int], True),
        ([1, "a"], [int], False),
        ("ab", [str], False),
        ([1, "a"], (int, str), True),
        ([1], (int, str), False),
        ([1, "a", 2], (int, str), False),
        ({"a": 1}, {"a": int}, True),
        ({"a": 1, "b": 2}, {"a": int}, True),
        ({"b": 1}, {"a": int}, False),
        ({}, {str: int}, True),
        ({"a": 1, "b": "2"}, {str: int}, False),
        ([], {str: int}, False),
        ({"a": []}, {"a": {str: [int]}}, False),
        ({"a": {"b": [1]}}, {"a": {str: [int]}}, True),
        ({}, dict, True),
        ([], dict | list, True),
    ],
)
def test_a_value_fits_a_shape(value: Any, shape: Any, expected: bool) -> None:
    assert fits(value, shape) is expected
