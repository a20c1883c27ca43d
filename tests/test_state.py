"""What a compiled module holds besides the module: its lock, the weights that its engines have, the scheduled look."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import assert_fresh, images, in_place, on_cpu, relative_error
from tests.models import small_conv_net
from torchaccel import AccuracyError, DeviceMemoryError, state
from torchaccel.backends.base import Engine, Plan
from torchaccel.backends.eager import Eager
from torchaccel.build import Builder
from torchaccel.compiled import CompiledModule
from torchaccel.compiler import BACKENDS
from torchaccel.fingerprint import Fingerprint, PendingCheck
from torchaccel.runner import Runner
from torchaccel.weights import WeightStore


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def elsewhere(work: Callable[[], Any]) -> Any:
    """What `work` returns in another thread; it fails where that does not end."""
    results: list[Any] = []

    def guarded() -> None:
        with torch.no_grad():
            results.append(work())

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(20)
    assert results, "the other thread waits, or has failed"
    return results[0]


@contextmanager
def locked_by_another(model: CompiledModule) -> Iterator[None]:
    """Another thread holds the lock of builds and refreshes meanwhile."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with model._state._lock:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_scheduled_look_leaves_the_lock_to_others() -> None:
    model = on_cpu(small_conv_net(), check_weights_every=1)
    model(images())
    model(images())
    elsewhere(model.refresh)
    assert model.report().refreshes == 1


def test_no_call_waits_for_a_scheduled_look_while_another_thread_builds_or_refreshes() -> None:
    model = on_cpu(small_conv_net(), check_weights_every=1)
    x = images()
    model(x)
    with locked_by_another(model):
        assert elsewhere(lambda: model(x)).shape == (2, 5)
    model.module.fc.weight.data.mul_(-2)
    assert_fresh(model, x, builds=1, refreshes=1)


class Late(PendingCheck):
    """A comparison as on a GPU, whose result is there a few looks later."""

    looks = 0

    def start(self, now: Fingerprint, then: Fingerprint) -> None:
        super().start(now, then)
        self.looks = 3

    def take(self) -> bool | None:
        self.looks -= 1
        return None if self.looks > 0 else super().take()


@pytest.mark.parametrize(("every", "calls"), [(1, 3), (2, 4), (100, 102)])
def test_a_result_that_comes_late_is_taken_at_the_next_call_and_no_look_begins_before(every: int, calls: int) -> None:
    model = on_cpu(small_conv_net(), check_weights_every=every)
    model._state._check = Late()
    x = images()
    model(x)
    model.module.fc.weight.data.mul_(-2)
    for _ in range(calls - 1):
        model(x)
        assert model.report().refreshes == 0
    assert_fresh(model, x, builds=1, refreshes=1)


def test_what_a_look_from_before_a_refresh_finds_is_no_news() -> None:
    model = on_cpu(small_conv_net(), check_weights_every=2)
    model._state._check = Late()
    x = images()
    model(x)
    model.module.fc.weight.data.mul_(-2)
    model(x)
    model(x)
    assert model._state._check.is_under_way
    model.refresh()
    model(x)
    assert_fresh(model, x, builds=1, refreshes=1)


def test_the_weights_are_looked_at_once_in_so_many_calls() -> None:
    model = on_cpu(small_conv_net(), check_weights_every=3)
    model(images())
    looks: list[int] = []
    look = model._state.watch.fingerprint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model._state.watch, "fingerprint", lambda: (looks.append(1), look())[1])
        for _ in range(9):
            model(images())
    assert len(looks) == 3


def test_threads_that_see_a_change_at_once_refresh_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_cpu(small_conv_net())
    x, both, seen = images(), threading.Barrier(2), threading.local()
    model(x)
    in_place(model)
    changed = model._state.watch.changed

    def together() -> bool:
        """Each thread has seen the change before one of them takes it."""
        found = changed()
        if not hasattr(seen, "once"):
            seen.once = both.wait(20)
        return found

    monkeypatch.setattr(model._state.watch, "changed", together)
    other = threading.Thread(target=torch.no_grad()(model), args=(x,))
    other.start()
    model(x)
    other.join()
    assert_fresh(model, x, builds=1, refreshes=1)


def test_a_refresh_waits_for_a_build_of_another_thread() -> None:
    model = on_cpu(small_conv_net())
    model(images())
    refresh = threading.Thread(target=model.refresh)
    with locked_by_another(model):
        refresh.start()
        refresh.join(0.2)
        assert refresh.is_alive()
    refresh.join(20)
    assert model.report().refreshes == 1


def test_two_threads_that_miss_at_once_get_one_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_cpu(nn.Linear(4, 2))
    x, both = torch.ones(1, 4), threading.Barrier(2)
    describe = state.describe

    def together(tensors: Any) -> str:
        """Each miss says what it is about before it takes the lock."""
        both.wait(20)
        return describe(tensors)

    monkeypatch.setattr(state, "describe", together)
    found: list[Runner] = []
    threads = [threading.Thread(target=lambda: found.append(model.runner_for(x))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]
    assert model.report().builds == 1


def test_another_structure_frees_the_engines_and_weights_of_the_one_before() -> None:
    model = on_cpu(small_conv_net())
    model(images())
    store = model._state.build.store
    dropped = (*store._held.values(), *model._state.runners.values(), *model._state.built.values())
    held = [weakref.ref(thing) for thing in dropped]
    del dropped
    model.module.fc = nn.Linear(8, 5)
    model.refresh()
    gc.collect()
    assert [thing() for thing in held] == [None] * len(held)
    assert store.rules() == frozenset()
    assert_fresh(model, images(), builds=2, refreshes=1)


def test_what_changed_before_the_first_call_is_not_taken_for_news_later() -> None:
    model = on_cpu(small_conv_net())
    in_place(model)
    for _ in range(2):
        assert_fresh(model, images(), builds=1, refreshes=0)


def test_a_build_finds_a_change_that_no_value_shows_and_the_engines_that_are_there_take_it_too() -> None:
    model = on_cpu(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), on_weight_change="ignore")
    one, two = torch.randn(1, 4), torch.randn(2, 4)
    model(one)
    model.module[0].register_forward_hook(lambda _, __, result: result + 1)
    for x in (two, one):
        assert relative_error(model(x), model.module(x)) < 2e-6


def test_a_first_build_that_ends_for_want_of_memory_leaves_no_weights_and_no_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = on_cpu(small_conv_net())
    x = images()

    def fails() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model._state.watch, "fingerprint", fails)
        with pytest.raises(DeviceMemoryError):
            model(x)
    model.module.fc.weight.data.mul_(-2)
    assert_fresh(model, x, builds=1, refreshes=0)
    model.module.fc.weight.data.mul_(-2)
    model.eval()
    assert_fresh(model, x, builds=1, refreshes=1)


def test_a_write_that_nothing_tracks_is_seen_when_it_is_taken_back_too() -> None:
    model = on_cpu(small_conv_net())
    x = images()
    model(x)
    weight = model.module.fc.weight
    first = weight.detach().clone()
    for refreshes, values in enumerate((first * -2, first), 1):
        weight.data.copy_(values)
        for _ in range(2):  # the second time there is nothing new
            model.eval()
            assert_fresh(model, x, builds=1, refreshes=refreshes)


def written_meanwhile(model: CompiledModule, monkeypatch: pytest.MonkeyPatch, write: Callable[[], Any]) -> None:
    """Have another thread write at the next refresh, when the weights have just been read."""
    store = model._state.build.store
    refresh = store.refresh

    def read_then_written(module: nn.Module) -> None:
        refresh(module)
        monkeypatch.setattr(store, "refresh", refresh)
        elsewhere(write)

    monkeypatch.setattr(store, "refresh", read_then_written)


def fused_step(model: CompiledModule) -> None:
    weight = model.module.fc.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1.0, fused=True).step()


@pytest.mark.parametrize("write", [in_place, fused_step])
def test_what_another_thread_writes_during_a_refresh_is_taken_at_the_next_call(
    write: Callable[[CompiledModule], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = on_cpu(small_conv_net()), images()
    model(x)
    written_meanwhile(model, monkeypatch, lambda: write(model))
    model.refresh()
    assert_fresh(model, x, builds=1, refreshes=2)


def test_what_nothing_tracks_and_another_thread_writes_during_a_refresh_is_found_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = on_cpu(small_conv_net()), images()
    model(x)
    written_meanwhile(model, monkeypatch, lambda: model.module.fc.weight.data.mul_(-2))
    model.refresh()
    model.eval()
    assert_fresh(model, x, builds=1, refreshes=2)


def test_what_nothing_tracks_and_another_thread_writes_during_the_first_build_is_found_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = on_cpu(small_conv_net()), images()
    build = Builder.__call__

    def built_then_written(*given: Any) -> Any:
        made = build(*given)
        model.module.fc.weight.data.mul_(-2)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Builder, "__call__", built_then_written)
        model(x)
    model.eval()
    assert_fresh(model, x, builds=1, refreshes=1)


def test_an_attribute_that_another_thread_sets_during_a_refresh_is_looked_at_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * super().forward(x)

    model, x = on_cpu(Scaled(4, 3)), torch.randn(2, 4)
    model(x)
    written_meanwhile(model, monkeypatch, lambda: setattr(model, "scale", 3.0))
    model.refresh()
    assert_fresh(model, x, builds=2, refreshes=2)


def test_while_a_refresh_is_under_way_the_calls_of_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = on_cpu(small_conv_net()), images()
    model(x)
    seen: list[bool] = []
    written_meanwhile(model, monkeypatch, lambda: seen.append(model._state.watch.changed()))
    in_place(model)
    model(x)
    assert seen == [True]
    assert_fresh(model, x, builds=1, refreshes=1)


@pytest.mark.parametrize("mode", ["refresh", "ignore"])
def test_a_refresh_that_fails_half_way_is_made_up_for_at_the_next_call(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = on_cpu(small_conv_net(), on_weight_change=mode), images()
    model(x)
    module, rules = model.module, list(model._state.build.store._held)
    for weight in module.parameters():
        weight.mul_(2)

    def fails(rule: Any, held: torch.Tensor, tensors: Any) -> None:
        if rule is rules[len(rules) // 2]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        refresh(rule, held, tensors)

    with monkeypatch.context() as patch:
        refresh = type(rules[0]).refresh
        patch.setattr(type(rules[0]), "refresh", fails)
        with pytest.raises(torch.OutOfMemoryError):
            model.refresh()
    for _ in range(2):
        assert_fresh(model, x, builds=1, refreshes=1)


class Saturates(Eager):
    """As a TensorRT backend, which has weights of its own, and whose engine is wrong for large ones."""

    name = "onnx_tensorrt"
    native = False

    def load(self, plan: Plan, device: torch.device) -> Engine:
        engine: Any = super().load(plan, device)
        engine.shares_store = False
        run = engine._run
        engine._run = lambda *inputs: tuple(result.clamp(-100, 100) for result in run(*inputs))
        return engine


def test_new_weights_that_an_engine_cannot_take_are_served_by_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "onnx_tensorrt", Saturates())
    x = torch.randn(3, 4)
    options: dict[str, Any] = {"backend": "onnx_tensorrt", "cache_dir": False}
    model, alone = (on_cpu(nn.Linear(4, 2), fallback=name, **options) for name in ("eager", None))
    for one in (model, alone):
        one(x)
        one.module.weight.mul_(1000)
    assert_fresh(model, x, builds=2, refreshes=1)
    report = model.report()
    assert report.backend == "eager"
    assert any("onnx_tensorrt does not serve the new weights" in event for event in report.events)
    assert "onnx_tensorrt failed" in report.engines[-1].fell_back_because
    for _ in range(2):
        with pytest.raises(AccuracyError, match="onnx_tensorrt"):
            alone(x)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_an_engine_that_another_thread_s_training_made_differ_is_built_once_more(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = on_cpu(small_conv_net()), images()
    store, left = model._state.build.store, iter(range(times))
    get = store.get

    def written_before(*given: Any) -> list[torch.Tensor]:  # after the module has run for comparison
        if next(left, None) is not None:
            elsewhere(lambda: in_place(model))
        return get(*given)

    monkeypatch.setattr(store, "get", written_before)
    if times == 3:
        with pytest.raises(AccuracyError):
            model(x)
    assert_fresh(model, x, builds=1, refreshes=0)


def test_an_engine_that_is_wrong_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tries = on_cpu(small_conv_net(), tolerance=1e-30), []
    get = model._state.build.store.get
    monkeypatch.setattr(model._state.build.store, "get", lambda *given: tries.append(1) or get(*given))
    with pytest.raises(AccuracyError):
        model(images())
    assert tries == [1]


def test_training_while_an_engine_is_built_again_is_no_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "onnx_tensorrt", Saturates())
    model, x = on_cpu(nn.Linear(4, 2), backend="onnx_tensorrt", fallback="eager", cache_dir=False), torch.randn(3, 4)
    model(x)
    model.module.weight.mul_(2)
    get, left = WeightStore.get, iter([1])

    def written_before(*given: Any) -> list[torch.Tensor]:
        if next(left, None):
            elsewhere(lambda: model.module.weight.mul_(-2))
        return get(*given)

    monkeypatch.setattr(WeightStore, "get", written_before)
    for _ in range(2):
        assert_fresh(model, x, builds=1, refreshes=2)
    assert model.report().backend == "onnx_tensorrt"


def test_an_attribute_that_is_set_before_the_first_call_is_no_news_afterwards() -> None:
    model = on_cpu(small_conv_net())
    model.some = 3
    for _ in range(2):
        assert_fresh(model, images(), builds=1, refreshes=0)


def test_a_submodule_of_another_name_is_found_by_a_look_and_so_are_writes_beside_it() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model, x = on_cpu(module), torch.randn(2, 4)
    model(x)
    first, relu = module._modules.pop("0"), module._modules.pop("1")
    module._modules.update(one=first, other=relu)
    first.weight.data.mul_(-2)  # type: ignore[union-attr]
    model.eval()
    assert_fresh(model, x, builds=2, refreshes=1)


def test_a_report_is_of_its_moment() -> None:
    model = on_cpu(small_conv_net())
    model(images())
    before = model.report()
    model(images())
    after = model.report()
    assert (before.calls_by_engine, after.calls_by_engine) == (1, 2)
