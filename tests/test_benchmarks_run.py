"""The course of a benchmark, in this process: what is built, checked and timed, and the rows that come of it."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import candidates, peers, results_file, run
from benchmarks.candidates import Candidate, check, ours, refusal, relative_error, row
from benchmarks.run import Plan
from tests.models import small_conv_net
from torchaccel import compiler
from torchaccel.backends.eager import Eager
from torchaccel.figures import Comparison, Timing
from torchaccel.precision import tf32_state

CPU = torch.device("cpu")


def plan(**others):
    given = {"model": "small", "shape": (3, 8, 8), "weights": "none", "device": CPU, "precisions": ("fp32", "bf16")}
    return Plan(**(given | {"batches": (1, 2), "runs": 3, "backend": "eager"} | others))


def silent():
    return Console(file=io.StringIO())


@pytest.mark.parametrize("alike", [False, True])
def test_every_candidate_is_built_checked_and_timed_without_a_cache(monkeypatch, tmp_path, alike):
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "FIELD", (Eager(),))
    module = small_conv_net()
    content = run.run(plan(backend="fastest", peers=("eager",), alike=alike), module, silent())
    assert results_file.problems(content) == []
    assert list(tmp_path.iterdir()) == []  # a build that was read from a cache would be no build
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    rows = content["rows"]
    assert [(one["route"], one["precision"], one["batch"], one["samples"]) for one in rows] == [
        (route, precision, batch, 3)
        for route in ("torchaccel", "peer")
        for precision in ("fp32", "bf16")
        for batch in (1, 2)
    ]
    own = {(one["precision"], one["batch"]): one for one in rows[:4]}
    assert [own["bf16", 1]["input_dtype"], rows[6]["input_dtype"]] == ["bfloat16" if alike else "float32", "bfloat16"]
    for one in rows:
        low, high = (0, 1e-5) if one["precision"] == "fp32" else (1e-5, 5e-2)
        assert low <= one["relative_error"] < high
    for one in own.values():
        assert one["variant"] == "eager"
        assert one["build_ms"] == one["race"]["race_ms"] > 0
    assert (content["settings"]["rounds"], content["settings"]["seed"]) == (3, 0)


def test_the_inputs_are_the_same_at_every_run():
    (_, one), (_, two) = run._inputs(plan())
    assert torch.equal(one, next(x for _, x in run._inputs(plan())))
    assert (one.shape, two.shape) == ((1, 3, 8, 8), (2, 3, 8, 8))
    ids = dict(run._inputs(plan(shape=(64,), vocabulary=5)))[2]
    assert ids.dtype is torch.int64
    assert set(ids.flatten().tolist()) == set(range(5))


def test_strict_pytorch_stands_in_for_an_fp32_engine_alone(monkeypatch):
    module, x = small_conv_net(), torch.randn(1, 3, 8, 8)
    compiled = SimpleNamespace(call=lambda: None, route="torchaccel")
    monkeypatch.setattr(run, "ours", lambda *_: compiled)
    assert run._own(plan(), module, "fp32", None, x) == [compiled]
    monkeypatch.setattr(run, "refusal", lambda *_: ("torch_tensorrt", "it has TF32 alone"))
    refused, strict = run._own(plan(), module, "fp32", None, x)
    assert (refused.backend, refused.reason, refused.call) == ("torch_tensorrt", "it has TF32 alone", None)
    assert (strict.route, strict.backend, strict.batch) == ("baseline", "eager", 1)
    (refused,) = run._own(plan(), module, "bf16", None, x)
    assert refused.reason == "it has TF32 alone"


def test_strict_means_without_tf32():
    seen = []
    with tf32_state(True):
        candidates.strict(lambda x: seen.append(torch.backends.cuda.matmul.allow_tf32), torch.ones(1))()
    assert seen == [False]


def test_what_refuses_is_the_backend_that_would_serve(monkeypatch):
    class Without(Eager):
        name, missing = "without", None

        def unavailable(self):
            return self.missing

        def honours(self, precision, device):
            return "it has none" if precision.name == "fp32" else None

    monkeypatch.setattr(candidates, "BACKENDS", {"without": Without(), "eager": Eager()})
    monkeypatch.setattr(candidates, "AUTO", ("without", "eager"))
    assert refusal("auto", "fp32", CPU) == refusal("without", "fp32", CPU) == ("without", "it has none")
    assert refusal("auto", "bf16", CPU) is None
    assert refusal("fastest", "fp32", CPU) is None
    assert refusal("eager", "fp32", CPU) is None
    monkeypatch.setattr(Without, "missing", "not installed")
    assert refusal("auto", "fp32", CPU) is None
    assert refusal("without", "fp32", CPU) is None  # compile's own error says why


# --- a candidate ---


def made_model(graph):
    """A compiled module that returns how long it takes: half the time on channels-last inputs."""
    record = {"graph": graph, "build_ms": 7.0, "engines": [{"library": "lib"}], "races": [], "backend": "eager"}

    class Model:
        def __call__(self, x):
            return 2.0 if x.is_contiguous() else 1.0

        def runner_for(self, x):
            return SimpleNamespace(replay=lambda: "replayed")

        def report(self):
            return SimpleNamespace(to_dict=lambda: record)

    return Model


@pytest.mark.parametrize("graph", [True, "no GPU"])
def test_a_row_is_of_the_layout_that_is_quickest_and_has_a_replay_where_there_is_a_graph(monkeypatch, graph):
    monkeypatch.setattr(candidates, "quick_ms", lambda call, device: call())
    x = torch.randn(2, 3, 4, 4)
    found = ours(made_model(graph), "auto", "fp32", x, x.to(memory_format=torch.channels_last))
    assert (found.call(), found.layout, found.backend, found.build_ms) == (1.0, "channels_last", "eager", 7.0)
    assert found.replay() == "replayed" if graph is True else found.replay is None
    assert ours(made_model(graph), "auto", "fp32", x).layout == "contiguous"


@pytest.mark.parametrize("where", ["compile", "build", "call"])
def test_a_fault_of_ours_is_the_reason_of_our_row(where):
    class OutOfResources(Exception):
        """Triton's, which is no RuntimeError."""

    def reach(step):
        if step == where:
            raise OutOfResources("shared memory\nand more")

    class Model(made_model(True)):
        def __init__(self):
            reach("compile")

        def __call__(self, x):
            reach("call")

        def runner_for(self, x):
            reach("build")

    x = torch.randn(2, 3, 4, 4)
    found = ours(Model, "auto", "fp32", x, x.to(memory_format=torch.channels_last))
    assert (found.reason, found.call, found.replay) == ("OutOfResources: shared memory", None, None)


def test_what_fails_or_is_not_finite_is_not_measured():
    def fail():
        raise ValueError("no more\nof it")

    replay, wanted = (lambda: None), torch.ones(2)
    found = {}
    for name, call in (("nan", lambda: wanted * math.nan), ("inf", lambda: wanted * math.inf), ("fails", fail)):
        found[name] = Candidate("peer", name, "fp16", 1, call=call, replay=replay)
    check(found.values(), {1: wanted})
    assert {name: one.reason for name, one in found.items()} == {
        "nan": "its outputs are not finite",
        "inf": "its outputs are not finite",
        "fails": "its first call failed: ValueError: no more",
    }
    assert all(one.call is one.replay is one.relative_error is None for one in found.values())


def test_an_output_that_is_not_finite_counts_wherever_it_stands():
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    for outputs in ((good * 1.1, bad), (bad, good * 1.1)):
        assert math.isnan(relative_error(outputs, (good, good)))
    with pytest.raises(ValueError, match="zip"):
        relative_error((good, good), (good,))


def test_a_row_has_the_throughput_of_the_mean_and_the_replay_beside_the_call():
    one = Candidate("torchaccel", "eager", "fp16", 4, call=lambda: None, replay=lambda: None)
    times = {one.name: (1.0, 1.0, 4.0), f"{one.name} replay": (0.5, 0.25, 0.75)}
    timed = Comparison({name: Timing(samples) for name, samples in times.items()}, times)
    found = row(one, timed, model="m")
    assert (found["median_ms"], found["replay_median_ms"], found["throughput_fps"]) == (1.0, 0.5, 2000.0)


# --- timing, and what is said of it ---


def test_a_call_and_its_replay_are_timed_each_as_itself(monkeypatch):
    ran = []
    monkeypatch.setattr(run, "compare", lambda calls, **options: ran.append((calls, options)))
    one = Candidate("torchaccel", "a", "fp16", 1, call=lambda: "call", replay=lambda: "replay", first_ms=1.0)
    none = Candidate("torchaccel", "b", "fp16", 1, reason="no")
    run._timed(plan(device=torch.device("cuda"), runs=9), [one, none], 1.0)
    ((calls, options),) = ran
    assert {name: call() for name, call in calls.items()} == {one.name: "call", f"{one.name} replay": "replay"}
    assert options == {"samples": 9, "device": torch.device("cuda")}
    assert run._timed(plan(), [none], 1.0) is None


def test_the_conclusion_says_how_many_calls_and_what_a_replay_takes():
    rows = [
        {"backend": "eager", "precision": "fp32", "batch": 1, "samples": 3, "median_ms": 2.0, "replay_median_ms": None},
        {"backend": "fused", "precision": "fp16", "batch": 1, "samples": 3, "median_ms": 1.0, "replay_median_ms": 0.5},
    ]
    content = {"rows": rows, "environment": {"cpu": "a CPU"}}
    said = list(run._measured(plan(), content))
    assert said == [
        "No GPU was found: this measured the CPU (a CPU) through eager, fused.",
        "Nothing here is a GPU figure.",
        "Timed calls per row: 3.",
        "fp16 at batch 1 (fused): replaying its graph alone takes 0.500 ms, a whole call 1 ms.",
    ]
    rows[1]["samples"] = 2
    assert list(run._measured(plan(), content))[2] == (
        "Timed calls, of 3 as far as the time allows: fp32 at batch 1 (eager) 3, fp16 at batch 1 (fused) 2."
    )


def test_only_a_precision_that_the_dtype_does_not_settle_has_a_tf32_state():
    assert [peers._is_half(name) for name in ("fp32", "tf32", "fp16", "bf16")] == [False, False, True, True]
