"""Which edges of a graph are made full, on graphs of numbers; tests/gpu has those of real engines."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from torchaccel.edges import Edge, plan


def ended(edges: list[Edge], early: list[Edge], node: int) -> set[int]:
    """The kernels that are sure to have ended when one begins, if no kernel waits by itself."""
    found: set[int] = set()
    for source, target in edges:
        if target == node and (source, target) not in early:
            found |= {source} | ended(edges, early, source)
        elif target == node:
            found |= ended(edges, early, source)
    return found


def check(edges: list[Edge], early: list[Edge]) -> None:
    """When a kernel begins, at most its direct predecessor is under way."""
    full, added = plan(edges, early)
    assert set(full) <= set(early)
    assert not set(added) & set(edges)
    left = [edge for edge in early if edge not in full]
    everything = [*edges, *added]
    for node in {node for edge in edges for node in edge}:
        ahead = {source for source, target in edges if target == node}
        before = set().union(*({other} | ended(edges, [], other) for other in ahead))
        assert before - ended(everything, left, node) <= {source for source, target in left if target == node}
        assert not any(target in ahead for _, target in left if (target, node) in left)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_of_a_row_no_two_begin_early(kinds: list[bool]) -> None:
    edges = list(pairwise(range(len(kinds) + 1)))
    check(edges, [edge for edge, early in zip(edges, kinds, strict=True) if early])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.booleans()), max_size=12))
def test_what_branches_is_full(drawn: list[tuple[int, int, bool]]) -> None:
    kinds = {(source, source + step): early for source, step, early in drawn}
    check(list(kinds), [edge for edge, early in kinds.items() if early])


def test_half_of_a_row_stays_early() -> None:
    row = list(pairwise(range(7)))
    assert plan(row, row) == ([(1, 2), (3, 4), (5, 6)], [(0, 2), (2, 4), (4, 6)])
    assert plan(row, row[::-1]) == plan(row, row)
    assert plan(row, []) == ([], [])
