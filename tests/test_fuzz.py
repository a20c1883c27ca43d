"""Signatures, shapes, dtypes, memory layouts and results at random, through `compile` on the CPU.

A case is one call of a compiled module, compared with the module: nesting and types, shapes, dtypes, values, whose
memory it is, who served it. Each example compiles one module and makes 16 calls of one signature or two.
TORCHACCEL_FUZZ=10 runs ten times the examples, drawn anew each time.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import FULL_SHAPES, Example, examples, examples_settings, times_deeper
from tests.fuzz_check import check_example
from tests.fuzz_module import OPERATIONS
from tests.helpers import on_cpu
from torchaccel.compiler import BACKENDS


def count_cases(strategy: st.SearchStrategy[Example], count: int, precision: str, backend: str) -> int:
    """Run that many examples; returns how many calls were compared."""
    cases = 0

    @examples_settings(count)
    @given(strategy)
    def run(example: Example) -> None:
        nonlocal cases
        cases += check_example(example, lambda module: on_cpu(module, precision, backend))

    run()
    return cases


@pytest.mark.parametrize(("precision", "cases"), [("fp32", 1600), ("fp16", 640), ("bf16", 640)])
def test_thousands_of_calls_on_the_eager_engine(precision: str, cases: int) -> None:
    assert count_cases(examples(), cases // 16, precision, "eager") >= times_deeper(cases)


@pytest.mark.parametrize(("precision", "cases"), [("fp32", 48), ("bf16", 32)])
def test_dozens_of_calls_on_inductor(precision: str, cases: int) -> None:
    """One signature for each module, since each costs seconds of a C++ compiler."""
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    operations = [name for name in OPERATIONS if name != "half"]  # which fused kernels need not round to
    strategy = examples(shapes=FULL_SHAPES, operations=operations, changes=("nothing",), steps=4)
    assert count_cases(strategy, cases // 16, precision, "inductor") >= times_deeper(cases)
