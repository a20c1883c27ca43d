"""Engine files on the GPU: exported, built, loaded, right, timed, and refused where they are another's."""

import json
import re
from pathlib import Path

import pytest
import torch

from recipes import build_engine, engine_manifest, export_onnx, run_engine
from tests.gpu.helpers import need, relative_error
from torchaccel.precision import PRECISIONS

MODEL = "resnet18"


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / f"{MODEL}.onnx"
    export_onnx.main(["--model", MODEL, "--weights", "none", "--dynamic-batch", "--output", str(path)])
    return path


def engine_of(onnx_file: Path, precision: str) -> Path:
    """The engine file in a precision, built once."""
    need("onnx_tensorrt", precision)
    if precision == "fp16":
        pytest.importorskip("onnxconverter_common", reason="fp16 needs onnxconverter-common")
    prefix = onnx_file.with_suffix("")
    engine = prefix.with_name(prefix.name + build_engine.ENDINGS[precision])
    if not engine.exists():
        build_engine.main([str(onnx_file), str(prefix), precision, "--batch", "1", "4", "8"])
    return engine


@pytest.mark.parametrize("batch", [4, 7])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_an_engine_file_computes_what_the_module_does(onnx_file: Path, precision: str, batch: int) -> None:
    engine = engine_of(onnx_file, precision)
    manifest = engine_manifest.read(engine)
    device = run_engine.usable_gpu(manifest)
    tensors = run_engine.random_inputs(manifest, batch, device)
    runner = run_engine.load_runner(engine, manifest, tensors)
    assert runner.record.graph, runner.record.why_no_graph
    module = export_onnx.load(MODEL, "none").double().to(device)
    with torch.inference_mode():
        (logits,) = runner(tensors)
        assert relative_error(logits, module(tensors[0].double()).float()) < PRECISIONS[precision].bound
        other = tensors[0].flip(0) * 2
        (logits,) = runner([other])
        assert relative_error(logits, module(other.double()).float()) < PRECISIONS[precision].bound


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_the_command_prints_latency_and_throughput(
    onnx_file: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = engine_of(onnx_file, precision)
    for batch in (1, 8):
        run_engine.main([str(engine), str(batch)])
        told = capsys.readouterr().out
        assert f"{engine}: {precision}, TensorRT" in told
        assert f"batch {batch}, 100 calls, in a CUDA graph\n" in told
        call = re.search(r"latency of a call: median (\S+) ms, mean (\S+), p95 \S+, p99 \S+\n", told)
        replay = re.search(r"the engine alone: median (\S+) ms", told)
        throughput = re.search(r"throughput: (\S+) items/s", told)
        assert call
        assert replay
        assert throughput
        assert 0 < float(replay[1]) <= 1.2 * float(call[1])
        assert float(throughput[1]) == pytest.approx(1000 * batch / float(call[2]), rel=1e-2)


def test_an_engine_of_another_version_or_gpu_is_refused(onnx_file: Path, tmp_path: Path) -> None:
    original = engine_of(onnx_file, "fp16")
    engine = tmp_path / original.name
    engine.write_bytes(original.read_bytes())
    manifest = json.loads(original.with_suffix(".json").read_text())

    def refusal(**changes: object) -> str:
        engine.with_suffix(".json").write_text(json.dumps(manifest | changes))
        with pytest.raises(SystemExit) as stopped:
            run_engine.main([str(engine)])
        return str(stopped.value.code)

    assert " 1.0.0.1, and here is TensorRT" in refusal(library_version="1.0.0.1")
    assert "was built on NVIDIA A, compute capability 5.0" in refusal(gpu="NVIDIA A", compute_capability=[5, 0])
    content = engine.read_bytes()[:-1000]  # truncated, and the manifest with it: TensorRT itself refuses it
    engine.write_bytes(content)
    assert "is not the file that" in refusal()
    assert "could not be run" in refusal(engine_sha256=engine_manifest.sha256(engine))


def test_outputs_that_are_not_finite_end_with_an_error(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(onnx_file, "fp16")
    noise = run_engine.random_inputs
    monkeypatch.setattr(run_engine, "random_inputs", lambda *given: [tensor * torch.inf for tensor in noise(*given)])
    with pytest.raises(SystemExit) as stopped:
        run_engine.main([str(engine), "2"])
    assert str(stopped.value.code).startswith("not finite, on random inputs: output 0.")
