"""TensorRT and TensorRT-RTX behind one name: which is there, what it logs, and engines built without a GPU."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from torchaccel import trt
from torchaccel.errors import BackendError, BuildError

needs_tensorrt = pytest.mark.skipif(bool(trt.unavailable()), reason=f"no TensorRT: {trt.unavailable()}")


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    """What stands in the way of each TensorRT, to be set by the test."""
    found: dict[str, str | None] = {"tensorrt": "it is not installed", "tensorrt_rtx": "it needs driver 580"}
    monkeypatch.setattr(trt, "import_problem", found.__getitem__)
    trt._loaded.cache_clear()
    yield found
    trt._loaded.cache_clear()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Logger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    def make(name: str) -> Any:
        return SimpleNamespace(__version__="9.9", ILogger=Logger, __name__=name)

    monkeypatch.setattr(trt.importlib, "import_module", make)


def test_without_either_there_is_a_reason_for_each_and_load_refuses_with_it(problems: dict[str, str | None]) -> None:
    reason = trt.unavailable()
    assert reason == "TensorRT: it is not installed; TensorRT-RTX: it needs driver 580"
    assert trt.unavailable("tensorrt_rtx") == "TensorRT-RTX: it needs driver 580"
    with pytest.raises(BackendError, match=r"it is not installed.*driver 580.*torchaccel env"):
        trt.load()
    with pytest.raises(BackendError, match="TensorRT-RTX: it needs driver 580"):
        trt.load("tensorrt_rtx")


@pytest.mark.usefixtures("fakes")
def test_tensorrt_proper_comes_before_tensorrt_rtx(problems: dict[str, str | None]) -> None:
    problems.update(tensorrt_rtx=None)
    assert trt.unavailable() is None
    assert trt.unavailable("tensorrt") == "TensorRT: it is not installed"
    assert trt.load().flavour == "tensorrt_rtx"
    assert trt.load().is_rtx
    assert trt.load() is trt.load("tensorrt_rtx")
    problems.update(tensorrt=None)
    assert trt.load().flavour == "tensorrt"
    assert not trt.load().is_rtx
    assert trt.load("tensorrt_rtx").flavour == "tensorrt_rtx"
    assert trt.load("tensorrt").name == "TensorRT 9.9"


# --- the real one, which builds without a GPU ---


def model_of(nodes: list[onnx.NodeProto], shape: tuple[Any, ...], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class Recorder:
    """TensorRT's own API, with what is asked of its builder kept."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.configs: list[Any] = []
        self.networks: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def Builder(self, log: Any) -> Any:
        builder = self._api.Builder(log)

        def keep(make: Any, kept: list[Any]) -> Any:
            return lambda *args: kept.append(make(*args)) or kept[-1]

        return SimpleNamespace(
            create_network=keep(builder.create_network, self.networks),
            create_builder_config=keep(builder.create_builder_config, self.configs),
            create_optimization_profile=builder.create_optimization_profile,
            build_serialized_network=builder.build_serialized_network,
        )


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(trt.load().api)
    monkeypatch.setitem(trt.load().__dict__, "api", recorder)
    return recorder


def build(model: onnx.ModelProto, folder: Path, shapes: tuple[Any, Any, Any], **options: Any) -> bytes:
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return trt.build_from_onnx(trt.load(), str(path), [("x", *shapes)], **{"tf32": False, **options})


RELU = helper.make_node("Relu", ["x"], ["y"], name="the_relu")


@needs_tensorrt
@pytest.mark.parametrize("tf32", [True, False])
def test_an_engine_is_strongly_typed_with_tf32_as_asked(tmp_path: Path, recorded: Recorder, tf32: bool) -> None:
    serialised = build(model_of([RELU], (2, 3)), tmp_path, ((2, 3),) * 3, tf32=tf32)
    assert isinstance(serialised, bytes)
    assert len(serialised) > 100
    api = trt.load().api
    (config,), (network,) = recorded.configs, recorded.networks
    assert config.get_flag(api.BuilderFlag.TF32) is tf32
    assert network.get_flag(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert config.num_optimization_profiles == 0


@needs_tensorrt
def test_builds_for_a_device_share_timings_where_kernels_are_timed(tmp_path: Path, recorded: Recorder) -> None:
    device, library = torch.device("cuda", 7), trt.load()
    build(model_of([RELU], (2, 3)), tmp_path, ((2, 3),) * 3, device=device)
    assert bool(library.timings(device)) is not library.is_rtx


@needs_tensorrt
def test_a_dynamic_shape_gets_a_profile(tmp_path: Path, recorded: Recorder) -> None:
    assert build(model_of([RELU], ("batch", 3)), tmp_path, ((1, 3), (4, 3), (8, 3)))
    assert recorded.configs[0].num_optimization_profiles == 2, "the optimal shape alone, and the range"


@needs_tensorrt
def test_an_operator_that_the_parser_refuses_is_named_with_its_node(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["x"], ["y"], name="the_determinant")
    with pytest.raises(BuildError, match=r"TensorRT.* [\d.]+ .*Det \(the_determinant\)") as caught:
        build(model_of([node], (2, 3, 3)), tmp_path, ((2, 3, 3),) * 3)
    assert "Relu" not in str(caught.value)


@needs_tensorrt
def test_every_refused_operator_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Det", ["x"], ["d"], name="first"),
        helper.make_node("Bernoulli", ["d"], ["y"], name="second"),
    ]
    with pytest.raises(BuildError) as caught:
        build(model_of(nodes, (2, 3, 3)), tmp_path, ((2, 3, 3),) * 3)
    assert "Det (first)" in str(caught.value)
    assert "Bernoulli (second)" in str(caught.value)


@needs_tensorrt
def test_a_file_that_is_no_model_is_a_build_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(BuildError, match="cannot take the ONNX graph"):
        trt.build_from_onnx(trt.load(), str(path), [], tf32=False)


@needs_tensorrt
def test_a_failed_build_has_tensorrt_s_own_reason(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"could not build the engine: .*\w{4}"):
        build(model_of([RELU], ("batch", 3)), tmp_path, ((1, 3), (1, 3), (1, 3)))


@needs_tensorrt
def test_a_reason_is_told_once_and_not_again_after_the_next_success(tmp_path: Path) -> None:
    model = model_of([RELU], ("batch", 3))
    trt.load().log.log(trt.load().api.ILogger.Severity.ERROR, "of an earlier build")
    with pytest.raises(BuildError) as caught:
        build(model, tmp_path, ((1, 3), (1, 3), (1, 3)))
    assert "earlier" not in str(caught.value)
    build(model, tmp_path, ((1, 3), (2, 3), (4, 3)))
    assert trt.load().log.take_errors() == ""


@needs_tensorrt
def test_errors_are_kept_for_the_thread_that_they_happened_in_and_logged_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = trt.load().log
    severity = trt.load().api.ILogger.Severity
    seen: list[str] = []

    def other() -> None:
        log.log(severity.ERROR, "of the other thread")
        seen.append(log.take_errors())

    with caplog.at_level(logging.DEBUG, "torchaccel.trt"):
        log.take_errors()
        log.log(severity.ERROR, "of this\n  thread")
        log.log(severity.INTERNAL_ERROR, "twice")
        log.log(severity.WARNING, "a warning")
        log.log(severity.VERBOSE, "chatter")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert log.take_errors() == "of this thread twice"
        assert log.take_errors() == ""
    assert seen == ["of the other thread"]
    assert [record.getMessage() for record in caplog.records] == [
        "of this\n  thread", "twice", "a warning", "of the other thread",
    ]  # fmt: skip
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
