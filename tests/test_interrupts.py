"""Ctrl-C at many moments of a build or a refresh: nothing is left half done, and the next call works."""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import captured, on_cpu, relative_error, same_values, state_of
from tests.models import small_conv_net
from torchaccel import interrupts
from torchaccel.compiled import CompiledModule
from torchaccel.compiler import BACKENDS
from torchaccel.interrupts import interruption_point, uninterrupted
from torchaccel.precision import tf32_state

MOMENTS = 10

# Where an interrupt meets a weakref's callback, Python says that it was ignored, and goes on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _clock() -> Iterator[None]:
    """A clock of the processor's time that sends this process a SIGINT, as Ctrl-C does, to Python's own handler.

    (Where the tests are a background job, a shell has SIGINT ignored.)
    """
    clock = signal.signal(signal.SIGVTALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, clock)
    signal.signal(signal.SIGINT, handler)


def interrupted(work: Callable[[], Any], after_s: float) -> bool:
    """Whether `work`, interrupted after that time, raised a KeyboardInterrupt before it was done."""
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, after_s)
        work()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return False
    except KeyboardInterrupt:
        return True


def process_state() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return (
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(),
        backends.fp32_precision, backends.cudnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision,
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        torch.compiler.is_exporting(), torch.utils._python_dispatch._get_current_dispatch_mode(),
    )  # fmt: skip


def in_another_thread(work: Callable[[], Any]) -> Any:
    """The result of `work` from a thread of its own, which a lock that was left held would stop."""
    results: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert results, "it waits for a lock"
    return results[0]


def is_consistent(model: CompiledModule) -> bool:
    report, state = model.report(), model._state
    return (
        report.builds == len(report.engines) == len(state.built)
        and len(report.runners) == len(state.runners)
        and {runner.plan_key for runner in state.runners.values()} <= set(state.built)
        and (not state.built or state._print is not None)
        and bool(state.built) == bool(state.build.store.size_bytes())
    )


def moments(work: Callable[[], Any], count: int) -> list[float]:
    """Times that are spread over how long `work` takes of the processor."""
    started = time.process_time()
    work()
    return [(time.process_time() - started) * (index + 0.5) / count for index in range(count)]


@pytest.mark.parametrize("mode", ["first engine", "one more engine"])
def test_a_build_that_is_interrupted_at_any_moment_leaves_nothing_behind(mode: str) -> None:
    first, x = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 8, 8)
    module, stopped = small_conv_net(), 0
    state, hooks = state_of(module), [len(child._forward_hooks) for child in module.modules()]
    with torch.no_grad():
        expected = module(x)
        on_cpu(module)(first)  # what a process does once
        before = process_state()
        for moment in moments(lambda: on_cpu(module)(x), MOMENTS):
            model = on_cpu(module)
            if mode == "one more engine":
                model(first)
            held = model._state.build.store.size_bytes()
            if not interrupted(lambda model=model: model(x), moment):  # type: ignore[misc]
                continue
            stopped += 1
            assert process_state() == before
            assert is_consistent(model)
            if not model.report().engines:
                assert model._state.build.store.size_bytes() == held
            assert not module.training
            assert same_values(module, state)
            assert [len(child._forward_hooks) for child in module.modules()] == hooks
            again = in_another_thread(lambda model=model: model(x))  # type: ignore[misc]
            assert relative_error(again, expected) < 1e-5
            assert relative_error(model(x), expected) < 1e-5
            assert is_consistent(model)
    assert stopped > MOMENTS / 3


def test_an_interrupted_refresh_is_made_up_for_at_the_next_call() -> None:
    module = nn.Sequential(*[nn.Linear(256, 256) for _ in range(250)])
    model, x, stopped = on_cpu(module), torch.randn(2, 256), 0
    with torch.no_grad():
        model(x)
        for moment in moments(model.refresh, MOMENTS):  # some of them shorter than the clock's tick
            for parameter in module.parameters():
                parameter.data.copy_(torch.randn_like(parameter) / 16)  # which nothing tracks
            stopped += interrupted(model.refresh, moment)
            in_another_thread(lambda: model(x))
            assert relative_error(model(x), module(x)) < 1e-5
            assert model.report().builds == 1
    assert stopped > 1


@pytest.mark.timeout(600)
def test_inductor_builds_after_it_was_interrupted() -> None:
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    x, stopped = torch.randn(2, 6), 0
    with torch.no_grad():
        before = process_state()
        for moment in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4):
            module = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
            model = on_cpu(module, backend="inductor")
            stopped += interrupted(lambda model=model: model(x), moment)  # type: ignore[misc]
            assert process_state() == before
            assert relative_error(model(x), module(x)) < 1e-5
            assert is_consistent(model)
    assert stopped > 1


def test_tf32_is_restored_whenever_the_interrupt_comes() -> None:
    before, stopped = process_state(), 0

    def work() -> None:
        for _ in range(2000):
            with tf32_state(True), tf32_state(False):
                pass

    for moment in moments(work, 30):
        stopped += interrupted(work, moment)
        assert process_state() == before
    assert stopped > 10
    captured(small_conv_net(), torch.randn(1, 3, 8, 8))


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
    def work() -> bool:
        with uninterrupted():
            return True

    assert in_another_thread(work)
    assert list(itertools.islice((in_another_thread(work) for _ in range(3)), 3)) == [True] * 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_calls_that_are_interrupted_leave_no_lock_and_no_setting(precision: str) -> None:
    model, x, stopped = on_cpu(small_conv_net(), precision), torch.randn(1, 3, 8, 8), 0
    with torch.no_grad():
        expected = model(x)
        before = process_state()

        def work() -> None:
            for _ in range(300):
                model(x)

        for moment in moments(work, 12):
            stopped += interrupted(work, moment)
            assert process_state() == before
            assert torch.equal(in_another_thread(lambda: model(x)), expected)
    assert stopped > 6


def test_an_interrupt_is_raised_between_two_steps_as_any_error() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        done.append("the inner block holds nothing of its own")
        interruption_point()
        done.append("not reached")
    assert len(done) == 1
    interruption_point()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
