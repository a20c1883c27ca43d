"""Signatures, shapes, dtypes, memory layouts and results at random, through `compile` on the CPU.

A case is one call of a compiled module, compared with the module: nesting and types, shapes, dtypes, values, whose
memory it is, who served it. Each example compiles one module and makes 16 calls of one signature or two.
"""

import pytest

from tests.fuzz import DEPTH, FULL_SHAPES, count_cases, examples
from tests.fuzz_check import check_example
from tests.fuzz_module import OPERATIONS
from tests.helpers import on_cpu
from torchaccel.compiler import BACKENDS


@pytest.mark.parametrize(("precision", "count"), [("fp32", 100), ("fp16", 40), ("bf16", 40)])
def test_thousands_of_calls_on_the_eager_engine(precision: str, count: int) -> None:
    """180 examples, 2880 cases."""
    cases = count_cases(examples(), count, lambda example: check_example(example, lambda m: on_cpu(m, precision)))
    assert cases >= 16 * count * DEPTH


def test_dozens_of_calls_on_inductor() -> None:
    """Ten examples of 8 calls, 80 cases: one signature each, since each costs seconds of a C++ compiler."""
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    operations = [name for name in OPERATIONS if name != "half"]  # which fused kernels need not round to
    strategy = examples(shapes=FULL_SHAPES, operations=operations, changes=("nothing",), steps=4, calls=8)
    cases = count_cases(strategy, 10, lambda example: check_example(example, lambda m: on_cpu(m, "fp32", "inductor")))
    assert cases >= 80 * DEPTH
