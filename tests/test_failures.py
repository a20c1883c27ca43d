"""What counts as a failure of a backend or a kernel, and what does not."""

import pytest
import torch

from torchaccel.errors import AccuracyError, BackendWarning, BuildError
from torchaccel.failures import as_build_error, contained


class Odd(Exception):
    """What Triton's errors are: children of Exception alone."""


FAILURES = (Odd("shared memory"), ValueError("a bug"), OSError(28, "No space left on device"), RecursionError("deep"))


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_whatever_fails_is_a_build_error_with_its_cause(error: Exception) -> None:
    said = f"the swift engine could not be built \\({type(error).__name__}\\): "
    with pytest.raises(BuildError, match=said) as caught, as_build_error("swift", "built"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [AccuracyError("off"), MemoryError(), BackendWarning("limits"), KeyboardInterrupt()], ids=repr
)
def test_what_has_a_way_of_its_own_comes_through_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, as_build_error("swift", "built"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [*FAILURES, BuildError("no")], ids=repr)
def test_a_failure_ends_its_block_alone_and_is_told_of(error: Exception) -> None:
    told: list[Exception] = []
    with contained(told.append):
        raise error
    assert told == [error]
    with contained():
        raise error


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), UserWarning("deprecated"), KeyboardInterrupt()],
    ids=repr,
)
def test_want_of_memory_and_what_is_no_failure_are_not_contained(error: BaseException) -> None:
    with pytest.raises(type(error)), contained():
        raise error
