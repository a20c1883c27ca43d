"""Choices of the fused backend through the cache: real engines on the CPU, as if a GPU's clock had times for them."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cache.damage import rewrite
from tests.helpers import captured, images, on_cpu, relative_error
from tests.models import small_conv_net
from torchaccel.__main__ import main
from torchaccel.backends import fused
from torchaccel.backends.fused import Fused
from torchaccel.cache import choices
from torchaccel.cache.canonical import canonical, dump
from torchaccel.cache.program_key import NoKeyError
from torchaccel.cache.store import Cache
from torchaccel.compiled import CompiledModule
from torchaccel.errors import AccuracyError, CacheWarning, DeviceMemoryError
from torchaccel.fused import choice
from torchaccel.precision import PRECISIONS


class Machine:
    """One process after another on a GPU, for which "b" is the faster route, and "triton" its faster kernel."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = Cache(folder / "cache", 1 << 30)
        self.timed: list[str] = []
        self.locked: list[bool] = []
        self.wrong = self.broken = ""
        monkeypatch.delenv("TORCHACCEL_CACHE_LIMIT_GIB", raising=False)
        monkeypatch.setattr(Fused, "chooses", lambda backend, device: True)
        monkeypatch.setattr(fused, "_tried", lambda routes, program, device: ("a", "b"))
        monkeypatch.setattr(fused, "_time_ms", lambda engine, inputs, device: self._time(engine._run.__name__))
        monkeypatch.setitem(fused._ROUTES, "a", self._a)
        monkeypatch.setitem(fused._ROUTES, "b", self._b)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(choice, "graph_ms", lambda run, device: self._time(run.__name__))
        for memory, empty in (("_chosen", {}), ("_times_ms", {}), ("_failures", Counter())):
            monkeypatch.setattr(choice, memory, empty)

    def process(self, module: torch.nn.Module | None = None, batch: int = 2, **options: Any) -> CompiledModule:
        """A model that a new process compiles, and which has served and was right."""
        choice._chosen.clear()
        self.timed.clear()
        self.locked.clear()
        module = module or small_conv_net()
        model = on_cpu(module, **{"backend": "fused", "cache_dir": self.cache.folder, **options})
        with torch.no_grad():
            x = images(batch)
            assert relative_error(model(x), module(x)) < 1e-2
        assert model.report().calls_by_module == 0
        return model

    def _time(self, name: str) -> float:
        self.timed.append(name)
        self.locked.append(any(self.cache.folder.glob("busy/*.lock")))
        return {"a": 2.0, "b": 1.0, "aten": 2.0, "triton": 1.0}[name]

    def _a(self, program: Any) -> Any:
        return self._named("a", fused._plain(program))

    def _b(self, program: Any) -> Any:
        plain = fused._plain(program)

        def run(*inputs: torch.Tensor) -> Any:
            kernels = {name: self._kernel(name, inputs[0]) for name in ("aten", "triton")}
            name = choice.choose(("layer", tuple(inputs[0].shape), inputs[0].dtype), kernels)
            factor = kernels[name]().flatten()[0] / inputs[0].flatten()[0]
            return tuple(result * factor for result in plain(*inputs))

        return self._named("b", run)

    def _kernel(self, name: str, x: torch.Tensor) -> Any:
        return self._named(name, lambda: x * 2 if name == self.wrong else x)

    def _named(self, name: str, function: Any) -> Any:
        def run(*inputs: torch.Tensor) -> Any:
            if name == self.broken:
                raise RuntimeError(f"{name} does not run")
            return function(*inputs)

        run.__name__ = name
        return run


SEARCH = ["a", "aten", "triton", "b"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def story(model: CompiledModule) -> str:
    return model.report().engines[-1].library


def test_a_later_process_searches_nothing_whatever_the_weights(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    first = machine.process()
    assert machine.timed == SEARCH
    assert all(machine.locked), "of several processes one searches"
    assert "(b route; a 2.000 ms; b 1.000 ms)" in story(first)
    module = small_conv_net()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    second = machine.process(module)
    assert machine.timed == []
    assert "(b route; chosen by an earlier process; a 2.000 ms; b 1.000 ms)" in story(second)
    assert second.report().engines[0].gates, "it was checked like any other"
    (entry,) = machine.cache.entries()
    assert (entry.kind, entry.info["what"]) == ("choices", "SmallConvNet float32[2, 3, 8, 8] fp32: 2 problems")
    assert set(machine.cache.verify().values()) == {""}
    main(["cache", "list", "--dir", str(machine.cache.folder)])
    assert "choices" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["batch", "precision", "module", "device", "triton", "versions"])
def test_another_problem_or_machine_is_searched(other: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.process()
    given: dict[str, Any] = {}
    match other:
        case "batch":
            given = {"batch": 3}
        case "precision":
            given = {"precision": "bf16"}
        case "module":
            given = {"module": small_conv_net(classes=7)}
        case "device":
            monkeypatch.setattr(choices, "describe_device", lambda device: {"name": "another"})
        case "triton":
            monkeypatch.setattr(choices, "distribution_version", lambda name: "another")
        case "versions":
            monkeypatch.setattr(choices, "versions", dict)
    machine.process(**given)
    assert machine.timed == SEARCH
    machine.process(**given)
    assert machine.timed == []
    assert len(machine.cache.entries()) == 2


def test_choices_are_of_one_precision_and_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    program, cpu = captured(small_conv_net(), images()), torch.device("cpu")
    keys = [choices._key(Fused(), program, PRECISIONS[name], cpu) for name in ("fp32", "tf32")]
    monkeypatch.setattr(Fused, "library", lambda backend: "PyTorch of tomorrow")
    keys.append(choices._key(Fused(), program, PRECISIONS["fp32"], cpu))
    assert len({canonical(key) for key in keys}) == 3


def test_without_a_cache_or_a_key_every_process_searches(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_key(program: Any, values: bool) -> Any:
        raise NoKeyError("an operator of yours")

    for _ in range(2):
        machine.process(cache_dir=False)
        assert machine.timed == SEARCH
    with monkeypatch.context() as patch:
        patch.setenv("TORCHACCEL_CACHE_LIMIT_GIB", "0")
        machine.process()
        assert machine.timed == SEARCH
    monkeypatch.setattr(choices, "program_key", no_key)
    machine.process()
    assert machine.timed == SEARCH
    assert machine.cache.entries() == []


def test_a_damaged_entry_is_searched_anew(machine: Machine) -> None:
    machine.process()
    (entry,) = machine.cache.entries()
    entry.path.write_bytes(entry.path.read_bytes()[:-3])
    with pytest.warns(CacheWarning, match="damaged"):
        machine.process()
    assert machine.timed == SEARCH


@pytest.mark.parametrize(
    "chosen",
    [
        None,
        b"[",
        b"[1]",
        b'{"[\\"layer\\",1]": ["triton"]}',
        b'{"[\\"layer\\",1]": 3}',
        b'{"[\\"route\\",[\\"a\\",\\"b\\"]]": "b"}',
        b'{"[\\"route\\",[\\"a\\",\\"b\\"]]": {"route": "b", "routes_ms": null, "routes_failed": {}}}',
        b'{"[[1,2],true]": "plan"}',
        b'{"[[1,2],true]": ["name", 1]}',
    ],
)
def test_an_entry_that_holds_no_choices_is_searched_anew(machine: Machine, chosen: bytes | None) -> None:
    machine.process()
    (entry,) = machine.cache.entries()
    checked = {} if chosen is None else {"choices": chosen}
    files = [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in checked.items()]
    rewrite(entry.path, files=files)
    entry.path.write_bytes(b"".join(entry.path.read_bytes().splitlines(keepends=True)[:2]) + (chosen or b""))
    with pytest.warns(CacheWarning, match="damaged"):
        machine.process()
    assert machine.timed == SEARCH
    machine.process()
    assert machine.timed == []


def test_choices_of_every_kind_are_read_again(tmp_path: Path) -> None:
    route = {"route": "plain", "routes_ms": {"plain": 1}, "routes_failed": {"inductor": "RuntimeError"}}
    made = {'["route",["plain","inductor"]]': route, '["conv",64]': "aten", "[[1,2],true]": [3, "eng0"]}
    cache, key = Cache(tmp_path, 1 << 30), {"kind": "choices"}
    cache.put(key, {"choices": dump(made)}, {})
    assert choices._known(cache, key) == made


@pytest.mark.parametrize(("broken", "timed", "route"), [("triton", ["aten"], "b"), ("b", ["a"], "a")])
def test_what_no_longer_runs_is_replaced_by_what_does(
    broken: str, timed: list[str], route: str, machine: Machine
) -> None:
    machine.process()
    machine.broken = broken
    assert f"({route} route" in story(machine.process())
    assert machine.timed == timed
    machine.process()
    assert machine.timed == [], "the entry is replaced"
    assert len(machine.cache.entries()) == 1


def test_a_choice_that_fails_the_gate_is_dropped_and_searched_anew(machine: Machine) -> None:
    machine.process()
    machine.wrong = "triton"
    with pytest.warns(CacheWarning, match=r"with choices from the cache does not serve, and is built again: the fused"):
        machine.process()
    assert machine.timed == ["a", "aten", "b"]
    assert machine.cache.entries() == []
    machine.process()
    assert len(machine.cache.entries()) == 1


def test_a_build_that_fails_keeps_no_choices(machine: Machine) -> None:
    with pytest.raises(AccuracyError):
        machine.process(tolerance=1e-12, precision="bf16")
    assert machine.cache.entries() == []


def test_memory_that_runs_out_is_no_reason_to_search_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.process()

    def first_run(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(DeviceMemoryError):
        patch.setattr(fused, "_first_run", first_run)
        machine.process()
    machine.process()
    assert machine.timed == []


def test_on_a_cpu_there_is_nothing_to_choose_or_to_keep(tmp_path: Path) -> None:
    model = on_cpu(small_conv_net(), backend="fused", cache_dir=tmp_path)
    with torch.no_grad():
        model(images())
    assert "plain route" in story(model)
    assert Cache(tmp_path, 1 << 30).entries() == []
