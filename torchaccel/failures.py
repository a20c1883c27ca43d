"""What fails of a backend or a kernel, whatever it raises: Triton's errors, and pybind's, are no RuntimeErrors.

Neither want of memory, which has a way of its own (memory.py), nor a warning that the caller has made an error is taken
for such a failure.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from torchaccel.errors import BuildError, TorchAccelError
from torchaccel.memory import is_out_of_memory


@contextmanager
def as_build_error(backend: str, done: str) -> Iterator[None]:
    """Raise what is no error of torchaccel's as a `BuildError` that comes from it: the engine could not be `done`."""
    try:
        yield
    except (TorchAccelError, MemoryError, Warning):
        raise
    except Exception as error:
        raise BuildError(f"the {backend} engine could not be {done} ({type(error).__name__}): {error}") from error


class contained:
    """End the block where it fails, and `tell` of that: what comes behind it goes on without."""

    def __init__(self, tell: Callable[[Exception], object] = lambda error: None) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, Exception) or isinstance(error, Warning) or is_out_of_memory(error):
            return False
        self._tell(error)
        return True
