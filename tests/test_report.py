"""The records and the report: a table for people, plain data for machines."""

import json
from collections import Counter
from typing import Any

import pytest
import torch

from tests.helpers import on_cpu
from tests.models import small_conv_net
from torchaccel.report import Coverage, EngineRecord, GateRecord, OutputError, Report, RunnerRecord


def output(error: float = 1e-4, bound: float = 1e-2, not_finite: str = "") -> OutputError:
    return OutputError("output 0", (2, 5), error, 3e-4, not_finite, bound)


def full_report() -> Report:
    coverage = Coverage(
        Counter({"aten.conv2d.default": 20, "aten.relu.default": 17}), Counter({"aten.sort.default": 2}), 3
    )
    engine = EngineRecord(
        "float32[8, 3, 224, 224]", "torch_tensorrt", "fp16", "TensorRT 10.13", 1000.0, 2000.0, 30.0, 40.0, 3100.0,
        350.0, 20, (GateRecord((output(1e-4), output(2e-3))), GateRecord((output(5e-4),), batch=8)), coverage, 22.5,
        "onnx_tensorrt failed: Det (node[0]): not supported",
    )  # fmt: skip
    return Report(
        "ResNet", "fp16", "cuda:0 (NVIDIA H100)", "auto", "torch_tensorrt", "", 12, 3, 1, 2, 4.5, 100.0, [engine],
        [RunnerRecord("float32[8, 3, 224, 224]", True, "", 12.0, 12), RunnerRecord("x", False, "cuda_graph=False")],
        ["refreshed after [something] in brackets"],
    )  # fmt: skip


def test_a_report_is_json_with_the_figures_of_the_newest_engine_on_top() -> None:
    plain = json.loads(json.dumps(full_report().to_dict(), allow_nan=False))
    assert plain["build_ms"] == 3030.0
    assert plain["first_call_ms"] == 3100.0
    assert plain["relative_error"] == 2e-3
    assert plain["graph"] == "cuda_graph=False"
    assert plain["builds"] == 1
    assert plain["calls_by_engine"] == 12
    (engine,) = plain["engines"]
    assert engine["gates"][1]["batch"] == 8
    assert engine["gates"][0]["outputs"][1]["relative_error"] == 2e-3
    assert engine["coverage"]["inside"] == {"aten.conv2d.default": 20, "aten.relu.default": 17}
    assert engine["coverage"]["outside"] == {"aten.sort.default": 2}
    assert engine["coverage"]["outside_time_share"] is None
    assert plain["runners"][0]["graph"] is True


def test_an_empty_report_is_json_too() -> None:
    plain = json.loads(json.dumps(Report("M", "fp16", "cpu", "auto").to_dict(), allow_nan=False))
    assert plain["build_ms"] is plain["relative_error"] is plain["graph"] is plain["first_call_ms"] is None


def test_a_report_prints_what_ran_and_why() -> None:
    text = str(full_report())
    for piece in (
        "ResNet", "fp16", "H100", "torch_tensorrt (asked: auto)", "12 by an engine, 3 by the module itself",
        "2, the last in 4.5 ms", "100.0 MiB", "float32[8, 3, 224, 224]", "in use", "no: cuda_graph=False",
        "refreshed after [something] in brackets", "onnx_tensorrt failed: Det (node[0]): not supported",
    ):  # fmt: skip
        assert piece in text, piece
    flat = "".join(text.split())
    assert "aten.sort.default×2" in "".join(character for character in flat if character not in "│┃")
    assert "0.002" in text
    assert "0.01" in text


def test_an_empty_report_says_that_nothing_is_built_yet() -> None:
    text = str(Report("M", "fp16", "cpu", "auto"))
    assert "built at the first call" in text
    assert "engines" not in text
    assert "runners" not in text


def test_coverage_names_what_is_outside_and_counts_the_rest() -> None:
    everything = Coverage(Counter({"a": 3}), engines=1)
    assert str(everything) == "3 of 3 operators in 1 engine(s)"
    timed = Coverage(Counter({"a": 3}), Counter({"b": 2, "c": 1}), 2, 0.25, {"b": 0.2, "c": 0.05})
    assert str(timed) == "3 of 6 operators in 2 engine(s); outside: b ×2 (20.0%), c ×1 (5.0%); 25.0% of the time"
    some = Coverage(Counter({"a": 3}), Counter({"b": 2}), 2)
    assert str(some) == "3 of 5 operators in 2 engine(s); outside: b ×2"
    many = Coverage(Counter(), Counter({f"op{i}": 20 - i for i in range(15)}), 0)
    assert str(many).endswith("op11 ×9 and 3 more")


@pytest.mark.parametrize(
    ("figures", "passed"),
    [
        (output(1e-2, 1e-2), True),
        (output(1.01e-2, 1e-2), False),
        (output(0.0, 1e-2, "1 of 10 elements are finite in only one"), False),
        (output(float("nan"), 1e-2), False),
    ],
)
def test_an_output_passes_within_its_bound_and_where_it_is_finite(figures: OutputError, passed: bool) -> None:
    assert figures.passed is passed
    assert GateRecord((output(0.0), figures)).passed is passed
    assert ("finite in only one" in str(figures)) == bool(figures.not_finite)


def test_a_gate_without_outputs_passes_with_no_error() -> None:
    assert GateRecord(()).passed
    assert GateRecord(()).relative_error == 0


@torch.no_grad()
def test_the_report_of_a_model_is_a_copy_that_later_calls_do_not_change() -> None:
    model: Any = on_cpu(small_conv_net())
    x = torch.randn(2, 3, 8, 8)
    before = model.report()
    assert before.backend == "eager"
    assert before.runners == []
    model(x)
    first = model.report()
    model(x)
    assert (before.calls_by_engine, first.calls_by_engine, model.report().calls_by_engine) == (0, 1, 2)
    assert first.runners[0].calls == 1
    plain = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert plain["module"] == "SmallConvNet"
    assert plain["device"] == "cpu"
    assert plain["precision"] == "fp32"
    assert 0 < plain["relative_error"] < 1e-5
    assert plain["build_ms"] > 0
    assert plain["first_call_ms"] >= plain["build_ms"]
    assert "GPU" in plain["graph"]
    engine = first.engines[0]
    assert engine.signature == "float32[2, 3, 8, 8]"
    assert engine.library == f"PyTorch {torch.__version__}"
    assert engine.folded_batch_norms == 2
    assert min(engine.export_ms, engine.build_ms, engine.load_ms, engine.gate_ms) >= 0
    assert "float32[2, 3, 8, 8]" in str(first)
