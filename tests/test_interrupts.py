"""Ctrl-C during a step that may not be left half done: it is held until that is done."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from torchaccel import interrupts
from torchaccel.interrupts import uninterrupted


@pytest.fixture(autouse=True)
def _of_ctrl_c() -> Iterator[None]:
    """Python's own handler, also where the tests are a background job, for which a shell has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_held_back_and_then_raised() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the block")
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("two at once are one")
        monkeypatch.setattr(interrupts, "IMPATIENT_AFTER_S", 0)
        time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)
        done.append("not reached")
    assert done == ["two at once are one"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_caller_s_own_handler_gets_the_signal_and_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        handler = signal.getsignal(signal.SIGINT)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert not seen
        assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
        with uninterrupted():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_nothing_to_hold_back() -> None:
    done: list[bool] = []

    def work() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
