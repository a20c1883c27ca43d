"""Races that are known from an earlier one: real engines on the CPU, and what makes another race of one."""

import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.cache.damage import rewrite
from tests.helpers import captured, images, on_cpu, relative_error
from tests.models import small_conv_net
from tests.test_race import Absent, Changed, Failing, slower
from torchaccel import build, compiler
from torchaccel.backends.eager import Eager
from torchaccel.cache import choices, compilers, results, store
from torchaccel.cache.canonical import key_digest
from torchaccel.cache.program_key import NoKeyError
from torchaccel.cache.results import race_key
from torchaccel.cache.store import Cache
from torchaccel.compiled import CompiledModule
from torchaccel.errors import BuildError, CacheWarning, DeviceMemoryError
from torchaccel.options import RACE_BUDGET_S, Options
from torchaccel.report import RaceEntry
from torchaccel.timing import compare

PROCESS = """
import json, sys, torch, torchaccel
from torch._dynamo.utils import counters
from tests.test_race import Changed, slower
from tests.cache.test_results import hurry
from torchaccel import compiler
hurry()
slow = Changed("slow", slower(20))
compiler.FIELD = slow, compiler.BACKENDS["inductor"]
module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
with torch.no_grad():
    model = torchaccel.compile(module, "fp32", backend="fastest", device="cpu", cache_dir=sys.argv[1])
    model(torch.randn(2, 4))
found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}
print(json.dumps({**found, "slow": slow.built, "race": model.report().to_dict()["races"][0]}))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.delenv("TORCHACCEL_CACHE_LIMIT_GIB", raising=False)
    return Cache(tmp_path / "cache", 1 << 30)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def hurry(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let races be short, where the field is a factor apart."""
    module = importlib.import_module("torchaccel.race")
    put(module, "SAMPLES", (8,))
    put(module, "compare", functools.partial(compare, warmup=1))


@pytest.fixture
def field(monkeypatch: pytest.MonkeyPatch) -> tuple[Changed, Changed]:
    """A slow one and a fast one; their `built` says how often."""
    both = Changed("slow", slower(20)), Changed("fast")
    hurry(monkeypatch.setattr)
    monkeypatch.setattr(compiler, "FIELD", (*both, Failing(), Absent()))
    return both


def raced(cache: Cache, x: Any = None, module: nn.Module | None = None, **options: Any) -> CompiledModule:
    """A model that has served, and was right."""
    module = small_conv_net() if module is None else module
    model = on_cpu(module, **{"backend": "fastest", "cache_dir": cache.folder, **options})
    x = images() if x is None else x
    assert relative_error(model(x), module(x)) < 1e-5
    assert model.report().calls_by_module == 0
    return model


def built(field: tuple[Changed, ...]) -> list[int]:
    return [backend.built for backend in field]


def test_a_known_race_builds_its_winner_alone_and_shows_the_whole_field_as_measured(cache: Cache, field: Any) -> None:
    first = raced(cache)
    assert built(field) == [1, 1]
    second = raced(cache)
    assert built(field) == [1, 2]
    (before,), (after,) = first.report().races, second.report().races
    assert (before.from_cache, after.from_cache) == (False, True)
    assert after.entries == before.entries
    assert len(after.entries) == 4
    assert after.winner.name == second.report().backend == "fast"
    assert second.report().engines[0].gates, "it was checked like any other"
    assert "from the cache" in str(after).splitlines()[0]
    assert "from the cache" not in str(before)
    assert second.report().to_dict()["races"][0]["from_cache"] is True
    (entry,) = cache.entries()
    assert (entry.kind, entry.info["what"]) == ("race", "SmallConvNet float32[2, 3, 8, 8] fp32 for latency: fast")


def test_one_capture_serves_the_whole_field_and_a_known_winner(
    cache: Cache, field: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, capture = [], build.capture
    monkeypatch.setattr(build, "capture", lambda *args, **options: captured.append(1) or capture(*args, **options))
    raced(cache)
    assert len(captured) == 1
    raced(cache)
    assert len(captured) == 2
    raced(cache, cache_dir=False)
    assert (len(captured), built(field)) == (3, [2, 3])


def test_what_one_backend_rewrites_no_other_one_sees(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rewriting(Changed):
        def lower(self, program: Any) -> None:
            for node in program.exported.graph.nodes:
                if node.target is torch.ops.aten.relu.default:
                    node.target = torch.ops.aten.neg.default
            program.exported.graph_module.recompile()

    field = Rewriting("wrong"), Changed("right")
    monkeypatch.setattr(compiler, "FIELD", field)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    model = raced(cache, torch.randn(2, 8), module)
    assert model.report().backend == "right"
    assert raced(cache, torch.randn(2, 8), module).report().races[0].from_cache


def test_weights_make_no_other_race(cache: Cache, field: Any) -> None:
    raced(cache)
    module = small_conv_net()
    for parameter in module.parameters():
        parameter.mul_(1.5)
    assert raced(cache, module=module).report().races[0].from_cache
    assert built(field) == [1, 2]


@pytest.mark.parametrize(
    "other",
    [
        {"objective": "throughput"},
        {"tolerance": 1e-3},
        {"dynamic_batch": (1, 2, 4)},
        {"x": images().to(memory_format=torch.channels_last)},
        {"module": small_conv_net(classes=7)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_race_is_run(cache: Cache, field: Any, other: dict[str, Any]) -> None:
    for given, count in (({}, 1), (other, 2), (other, 2)):
        model = {"module": small_conv_net(), "backend": "fastest", "cache_dir": cache.folder, **given}
        x = model.pop("x", images())
        on_cpu(**model)(x)
        assert field[0].built == count
    assert len(cache.entries()) == 2


def test_each_option_and_version_that_decides_a_race_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    program, tensors = captured(small_conv_net(), images()), [images()]

    def digest(**changed: Any) -> str:
        given: dict[str, Any] = {"backend": "fastest", "precision": "fp32", "tolerance": 1e-3}
        return key_digest(race_key([Eager()], program, tensors, Options(**(given | changed))))

    changes: list[dict[str, Any]] = [{"precision": "tf32"}, {"tolerance": 1e-4}, {"objective": "stream"}]
    changes += [{"partial": True}, {"cuda_graph": False}, {"race_budget_s": 7.0}]
    found = [digest(), *(digest(**change) for change in changes)]
    for newer in ("none", "triton", "nvidia-cudnn-frontend"):
        with monkeypatch.context() as patch:
            patch.setattr(choices, "distribution_version", lambda name, newer=newer: "2" if name == newer else "1")
            found.append(digest())
    assert len(set(found)) == len(found)
    assert digest(race_budget_s=RACE_BUDGET_S) == digest()
    tensors = [images().to(memory_format=torch.channels_last)]
    assert digest() not in found


@pytest.mark.parametrize("other", ["device", "library", "field", "version"])
def test_another_machine_or_field_has_a_race_of_its_own(
    cache: Cache, field: Any, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced(cache)
    match other:
        case "device":
            monkeypatch.setattr(results, "describe_device", lambda _: {"name": "another"})
        case "library":
            monkeypatch.setattr(Changed, "library", lambda self: "PyTorch of tomorrow")
        case "field":
            monkeypatch.setattr(compiler, "FIELD", (*field, Changed("third")))
        case "version":
            monkeypatch.setattr(choices, "versions", dict)
    assert not raced(cache).report().races[0].from_cache
    assert built(field) == [2, 2]


def test_a_winner_that_no_longer_serves_is_dropped_and_there_is_a_race(
    cache: Cache, field: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced(cache)
    x = images()
    with monkeypatch.context() as patch:
        patch.setattr(field[1], "load", Failing().load)
        with pytest.warns(CacheWarning, match=r"fast, a race's winner in the cache, does not serve:"):
            model = raced(cache, x)
    (again,) = model.report().races
    assert (again.winner.name, again.from_cache) == ("slow", False)
    assert raced(cache).report().races[0].winner.name == "slow", "the new race took the place of the old"
    assert len(cache.entries()) == 1


class Overflowing(Changed):
    """Fast, and wrong for large weights, as fp16 kernels are."""

    def __init__(self) -> None:
        super().__init__("fast", lambda result: torch.where(result.abs() > 100, result * 2, result))


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch, field: Any) -> tuple[Changed, Changed]:
    both = field[0], Overflowing()
    monkeypatch.setattr(compiler, "FIELD", both)
    return both


def weighing(scale: float) -> nn.Module:
    module = nn.Linear(4, 4)
    nn.init.constant_(module.weight, scale)
    nn.init.constant_(module.bias, 0.0)
    return module


def won(cache: Cache, scale: float) -> tuple[str, bool]:
    race = raced(cache, torch.ones(2, 4), weighing(scale)).report().races[0]
    assert [entry.name for entry in race.entries if entry.missed_gate] == ["fast"] * (race.winner.name == "slow")
    return race.winner.name, race.from_cache


def test_a_race_that_one_lost_by_the_gate_is_that_of_its_weights_alone(
    cache: Cache, overflowing: tuple[Changed, Changed]
) -> None:
    assert won(cache, 1000.0) == ("slow", False)
    assert won(cache, 1000.0) == ("slow", True)
    assert built(overflowing) == [2, 1]
    assert won(cache, 1.0) == ("fast", False)
    assert won(cache, 2.0) == ("fast", True), "of a race in which all passed the weights do not count"
    assert len(cache.entries()) == 2


def test_weights_with_which_a_known_winner_misses_the_gate_have_a_race_of_their_own(
    cache: Cache, overflowing: tuple[Changed, Changed]
) -> None:
    assert won(cache, 1.0) == ("fast", False)
    for count, from_cache in ((2, False), (1, True)):  # once as the known winner, and once in the race
        before = overflowing[1].built
        with pytest.warns(CacheWarning, match=r"fast, a race's winner in the cache, does not serve") as caught:
            assert won(cache, 1000.0) == ("slow", from_cache)
        assert overflowing[1].built - before == count
        assert len(caught) == 1
    assert won(cache, 1.0) == ("fast", True)


def test_a_race_that_one_lost_by_the_gate_and_weights_without_a_key_is_not_kept(
    cache: Cache, overflowing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content(tensor: torch.Tensor) -> str:
        raise NoKeyError("a tensor without plain values")

    monkeypatch.setattr(results, "content", content)
    for _ in range(2):
        assert won(cache, 1000.0) == ("slow", False)
    assert cache.entries() == []


@pytest.mark.parametrize("budget_s", [None, 7.0])
def test_a_race_is_waited_for_as_long_as_its_budget_and_longer(
    cache: Cache, field: Any, budget_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits_s, now = [], time.monotonic()
    real = store.hold
    monkeypatch.setattr(
        store, "hold", lambda path, deadline_s, **how: limits_s.append(deadline_s) or real(path, deadline_s, **how)
    )
    raced(cache, race_budget_s=budget_s)
    wanted_s = (budget_s or RACE_BUDGET_S) + store.LOCK_LIMIT_S
    assert [limit_s for limit_s in limits_s if limit_s and limit_s - now >= wanted_s]


RACE = {"signature": "s", "objective": "latency", "race_ms": 1.0, "from_cache": False}
ENTRY = RaceEntry("fast", "won", median_ms=1.0)


@pytest.mark.parametrize(
    "race",
    [
        None,
        [],
        {**RACE, "entries": []},
        {**RACE, "entries": [{"name": "fast"}]},
        {**RACE, "entries": [asdict(replace(ENTRY, name="somebody"))]},
        {**RACE, "entries": [asdict(replace(ENTRY, outcome="lost"))]},
        {**RACE, "entries": [asdict(ENTRY), asdict(ENTRY)]},
        {**RACE, "entries": [{**asdict(ENTRY), "median_ms": "1"}]},
        {**RACE, "race_ms": None, "entries": [asdict(ENTRY)]},
    ],
)
def test_an_entry_that_holds_no_race_is_moved_aside_and_there_is_a_race(cache: Cache, field: Any, race: Any) -> None:
    raced(cache)
    (entry,) = cache.entries()
    rewrite(entry.path, info={"what": "a race", "race": race})
    with pytest.warns(CacheWarning, match="in the cache is damaged"):
        assert not raced(cache).report().races[0].from_cache
    assert raced(cache).report().races[0].from_cache


def test_memory_that_runs_out_is_no_reason_to_race_again(
    cache: Cache, field: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced(cache)

    def load(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(field[1], "load", load)
        with pytest.raises(DeviceMemoryError):
            raced(cache)
    assert raced(cache).report().races[0].from_cache


def test_a_race_in_which_somebody_had_no_room_is_not_kept(
    cache: Cache, field: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(field[1], "load", load)
        (crowded,) = raced(cache).report().races
    assert crowded.winner.name == "slow"
    assert [entry.name for entry in crowded.entries if entry.out_of_memory] == ["fast"]
    assert cache.entries() == []
    assert raced(cache).report().races[0].winner.name == "fast"


def test_a_race_that_nobody_survives_is_not_kept(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "FIELD", (Failing(),))
    with pytest.raises(BuildError, match="no backend could serve"):
        raced(cache)
    assert cache.entries() == []


def test_without_a_cache_each_model_races(cache: Cache, field: Any) -> None:
    for count in (1, 2):
        raced(cache, cache_dir=False)
        assert built(field) == [count, count]
    assert not cache.folder.exists()


def test_another_process_finds_the_race_and_what_inductor_made(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := compiler.BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    for variable in compilers.FOLDERS.values():
        monkeypatch.delenv(variable, raising=False)
    command = [sys.executable, "-c", PROCESS, str(cache.folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    runs = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = runs
    assert (first["slow"], second["slow"]) == (1, 0)
    assert (first["hit"], second["miss"]) == (0, 0)
    assert min(first["miss"], second["hit"]) > 0
    assert (first["race"]["from_cache"], second["race"]["from_cache"]) == (False, True)
    assert second["race"]["entries"] == first["race"]["entries"]
