"""The cache between processes on a GPU: the second one serves within a second, from the first one's engine or race."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchaccel
from tests.gpu.helpers import TENSORRT, need, relative_error
from tests.models import small_conv_net
from torchaccel.cache.entries import Entry
from torchaccel.cache.store import Cache
from torchaccel.errors import CacheWarning

ROOT = Path(__file__).parents[2]
LIMIT_GIB = "1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _no_cache: None) -> Cache:
    monkeypatch.setenv("TORCHACCEL_CACHE_LIMIT_GIB", LIMIT_GIB)
    return Cache(tmp_path / "cache", 1 << 30)


def start(backend: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.first_result_process", backend, str(folder)]
    environment = {**os.environ, "TORCHACCEL_CACHE_LIMIT_GIB": LIMIT_GIB}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(process: "subprocess.Popen[str]") -> dict[str, Any]:
    printed, said = process.communicate(timeout=580)
    assert process.returncode == 0, said
    found = json.loads(printed.splitlines()[-1])
    times = {name: round(found[name]) for name in ("export_ms", "build_ms", "load_ms", "gate_ms", "first_call_ms")}
    took = f"{found['seconds']:.2f} s after {found['imports_s']:.1f} s of imports"
    print(f"{took}, from the cache: {found['from_cache']}, {times}")
    return found


@pytest.mark.parametrize("backend", TENSORRT)
def test_a_second_process_serves_its_first_result_within_a_second(backend: str, cache: Cache) -> None:
    need(backend)
    first = ended(start(backend, cache.folder))
    second = ended(start(backend, cache.folder))
    assert [run["from_cache"] for run in (first, second)] == [False, True]
    assert second["gates"]
    assert second["sum"] == pytest.approx(first["sum"], rel=1e-2)
    assert {entry.kind for entry in cache.entries()} in ({"plan"}, {"plan", "kernels"}, {"plan", "timings"})
    assert second["seconds"] <= 1.0 or ended(start(backend, cache.folder))["seconds"] <= 1.0
    assert set(cache.verify().values()) == {""}


def test_a_second_process_goes_straight_to_the_winner_of_a_known_race(cache: Cache) -> None:
    first = ended(start("fastest", cache.folder))
    second = ended(start("fastest", cache.folder))
    (before,), (after,) = first["races"], second["races"]
    print(f"the race: {before['race_ms'] / 1e3:.1f} s; the winner: {second['backend']}")
    assert (before["from_cache"], after["from_cache"]) == (False, True)
    assert after["entries"] == before["entries"]
    (winner,) = [entry["name"] for entry in before["entries"] if entry["outcome"] == "won"]
    assert first["backend"] == second["backend"] == winner
    assert second["gates"]
    assert second["sum"] == pytest.approx(first["sum"], rel=1e-2)
    assert second["seconds"] < first["seconds"] / 3
    assert {"race", "plan"} <= {entry.kind for entry in cache.entries()}
    assert set(cache.verify().values()) == {""}


def test_a_second_process_of_the_fused_backend_searches_nothing(cache: Cache) -> None:
    need("fused")
    first = ended(start("fused", cache.folder))
    second = ended(start("fused", cache.folder))
    for run in (first, second):
        print(f"problems timed: {run['timed']}, plans searched: {run['plan_searches']}; {run['library']}")
    assert first["timed"] > 0
    assert (second["timed"], second["plan_searches"]) == (0, 0)
    assert second["library"].replace("chosen by an earlier process; ", "") == first["library"]
    assert second["gates"]
    assert second["sum"] == pytest.approx(first["sum"], rel=1e-2)
    assert second["seconds"] < first["seconds"] / 2
    assert "choices" in {entry.kind for entry in cache.entries()}
    assert set(cache.verify().values()) == {""}


def test_of_two_processes_at_once_one_builds(cache: Cache) -> None:
    need("onnx_tensorrt")
    runs = [ended(process) for process in [start("onnx_tensorrt", cache.folder) for _ in range(2)]]
    assert sorted(run["from_cache"] for run in runs) == [False, True]


@pytest.mark.parametrize("dynamic_batch", [None, (1, 2, 4)])
@pytest.mark.parametrize("backend", TENSORRT)
def test_an_engine_from_the_cache_follows_new_weights(backend: str, dynamic_batch: Any, cache: Cache) -> None:
    need(backend)
    x = torch.randn(2, 3, 16, 16, device="cuda")
    for hit in (False, True):
        module = small_conv_net().cuda()
        model = torchaccel.compile(module, "fp16", backend=backend, dynamic_batch=dynamic_batch, cache_dir=cache.folder)
        with torch.no_grad():
            assert relative_error(model(x), module(x)) < 1e-2
            assert model.report().engines[0].from_cache is hit
            for _ in range(2):
                for parameter in module.parameters():
                    parameter.mul_(1.25)
                assert relative_error(model(x), module(x)) < 1e-2
        assert model.report().builds == 1


def test_an_engine_that_the_gpu_refuses_is_built_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    need("onnx_tensorrt")
    x = torch.randn(2, 3, 16, 16, device="cuda")
    module = small_conv_net().cuda()
    payload = Entry.payload

    def cut(entry: Entry, name: str) -> bytes:
        return payload(entry, name)[:1000] if name == "engine" else payload(entry, name)

    with torch.no_grad():
        torchaccel.compile(module, "fp16", backend="onnx_tensorrt", cache_dir=cache.folder)(x)
        monkeypatch.setattr(Entry, "payload", cut)
        model = torchaccel.compile(module, "fp16", backend="onnx_tensorrt", cache_dir=cache.folder)
        with pytest.warns(CacheWarning, match="does not serve"):
            assert relative_error(model(x), module(x)) < 1e-2
    assert model.report().engines[0].from_cache is False
