"""Where a convolution's window goes: all but its tensors and what follows it."""

from collections.abc import Sequence
from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation over height and width, and the number of groups.

    >>> Geometry((2, 2), (1, 1), (1, 1)).output((8, 64, 56, 56), (128, 64, 3, 3))
    (8, 128, 28, 28)
    """

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> "Geometry":
        """That of an operator's arguments, lists of two."""
        return cls(pair(stride), pair(padding), pair(dilation), groups)

    def output(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, int, int, int]:
        """The output's shape for the shapes of input and weight."""
        batch, _, *size = x
        channels, _, *window = weight
        height, width = (
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (window[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        )
        return batch, channels, height, width


def pair(numbers: Sequence[int]) -> Pair:
    """Two numbers, of height and width."""
    height, width = numbers
    return height, width
