"""Choosing by time, on times that are given: what is timed, what is remembered, and what an earlier process knows."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from torchaccel.fused import choice
from torchaccel.fused.choice import choose
from torchaccel.fused.notes import Notes, begun, taking

PROBLEM = ("conv", ((2, 64), (64, 1), torch.float16, torch.device("cuda", 1)), (True, False), None)
TEXT = '["conv",[[2,64],[64,1],"torch.float16","cuda"],[true,false],null]'
MS = {"aten": 3.0, "cudnn": 1.0, "triton": 2.0}


@pytest.fixture(autouse=True)
def _given_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has chosen nothing yet, in which the candidates of `candidates` take `MS`."""
    for memory in ("_chosen", "_times_ms"):
        monkeypatch.setattr(choice, memory, {})
    monkeypatch.setattr(choice, "_failures", Counter())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choice, "graph_ms", lambda run, device: MS[run.__name__])
    yield


class OutOfResources(Exception):
    """Triton's, which is no RuntimeError."""


def candidates(fails: str = "", wrong: str = "", ran: list[str] | None = None) -> dict[str, Callable[[], torch.Tensor]]:
    def make(name: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            if ran is not None:
                ran.append(name)
            if name == fails:
                raise RuntimeError(f"no kernel of {name}\nand a trace")
            return torch.ones(4) * (2 if name == wrong else 1)

        run.__name__ = name
        return run

    return {name: make(name) for name in MS}


def test_the_fastest_that_works_and_is_right_is_chosen_once() -> None:
    assert choose(PROBLEM, candidates()) == "cudnn"
    assert choice.times_ms() == {PROBLEM: MS}
    ran: list[str] = []
    assert choose(PROBLEM, candidates(ran=ran)) == "cudnn"
    assert ran == []
    assert choose("fails", candidates(fails="cudnn")) == "triton"
    assert choose("wrong", candidates(wrong="cudnn")) == "triton"
    assert choice.failures() == {("cudnn", "no kernel of cudnn"): 1}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("error", [OutOfResources("shared memory"), ValueError("no such tile"), AssertionError()])
def test_a_candidate_is_out_whatever_it_raises(error: Exception, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> torch.Tensor:
        raise error

    with taking(Notes({TEXT: "cudnn"} if known else None)):
        assert choose(PROBLEM, {**candidates(), "cudnn": fails}) == "triton"
    assert set(choice.failures()) == {("cudnn", str(error))}
    with monkeypatch.context() as patch:
        patch.setattr(choice, "is_compiling", lambda: True)
        assert choose("another", {**candidates(), "triton": fails}) == "aten"


@pytest.mark.parametrize("known", [False, True])
def test_a_candidate_that_has_no_memory_is_not_out(known: bool) -> None:
    def exhausted() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with taking(Notes({TEXT: "cudnn"} if known else None)), pytest.raises(torch.OutOfMemoryError):
        choose(PROBLEM, {**candidates(), "cudnn": exhausted})
    assert choose(PROBLEM, candidates()) == "cudnn", "another time there may be more"


def test_while_a_graph_is_captured_nothing_is_chosen_or_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes({TEXT: "triton"})
    with monkeypatch.context() as patch, taking(notes):
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose(PROBLEM, candidates()) == "aten"
    assert (notes.made, choice.times_ms()) == ({}, {})


def test_while_kernels_are_compiled_those_of_triton_are_run_for_that_and_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes, ran = Notes(), []
    with monkeypatch.context() as patch, taking(notes):
        patch.setattr(choice, "is_compiling", lambda: True)
        assert choose(PROBLEM, candidates(ran=ran)) == "aten"
        assert choose("fails", candidates(fails="triton")) == "aten"
    assert (ran, notes.made, choice.times_ms(), choice.failures()) == (["triton"], {}, {}, {})
    assert choose(PROBLEM, candidates()) == "cudnn"
    with monkeypatch.context() as patch:
        patch.setattr(choice, "is_compiling", lambda: True)
        assert choose(PROBLEM, candidates(ran=ran)) == "aten"
    assert ran == ["triton"], "it was compiled"


def test_what_an_earlier_process_chose_is_run_once_and_nothing_is_timed() -> None:
    first = Notes()
    with taking(first):
        choose(PROBLEM, candidates())
    assert first.new() == {TEXT: "cudnn"}
    choice._chosen.clear()
    choice._times_ms.clear()
    second, ran = Notes(first.made), []
    with taking(second):
        assert choose(PROBLEM, candidates(ran=ran)) == "cudnn"
        assert choose(PROBLEM, candidates(ran=ran)) == "cudnn"
    assert (ran, choice.times_ms(), second.new()) == (["cudnn"], {}, {})
    second.forget()
    assert choose(PROBLEM, candidates()) == "cudnn"
    assert choice.times_ms(), "outside of the build's notes it is timed"


def test_what_this_process_has_chosen_for_another_build_is_noted_too() -> None:
    choose(PROBLEM, candidates())
    notes = Notes()
    with taking(notes):
        choose(PROBLEM, candidates())
    assert notes.new() == {TEXT: "cudnn"}
    notes.forget()
    assert PROBLEM in choice._chosen, "it was not recalled"


def test_a_build_knows_whether_an_earlier_one_has_left_it_choices() -> None:
    assert not begun()
    with taking(Notes()):
        assert not begun()
    with taking(Notes({TEXT: "cudnn"})):
        assert begun()


@pytest.mark.parametrize("other", [(), (0,), (1.0,), "conv", (True, False, None)], ids=str)
def test_a_problem_that_differs_is_not_known(other: object) -> None:
    with taking(Notes({TEXT: "triton"})):
        assert choose((*PROBLEM, other), candidates()) == "cudnn"


def test_a_remembered_name_that_no_candidate_has_is_chosen_anew() -> None:
    notes = Notes({TEXT: "a kernel of yore"})
    with taking(notes):
        assert choose(PROBLEM, candidates()) == "cudnn"
    assert notes.new() == {TEXT: "cudnn"}


def test_a_remembered_candidate_that_raises_is_out_and_the_rest_are_timed() -> None:
    notes = Notes({TEXT: "cudnn"})
    with taking(notes):
        assert choose(PROBLEM, candidates(fails="cudnn")) == "triton"
    assert choice.times_ms() == {PROBLEM: {"aten": 3.0, "triton": 2.0}}
    assert notes.new() == {TEXT: "triton"}
