"""The recipe that runs engine files, as far as it gets without a GPU: what it refuses, on engines built for real."""

import dataclasses
import json

import pytest
import torch

from recipes import engine_manifest, run_engine
from recipes.engine_manifest import Tensor
from tests.test_recipes_build_engine import build, pytestmark, scaled  # noqa: F401 - the marks are this file's too
from torchaccel.figures import Timing
from torchaccel.probes import Gpu, gpus
from torchaccel.report import RunnerRecord


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    build(scaled(folder / "model.onnx"), folder / "small", "tf32", "--batch", 2, 4, 6)
    return folder / "small_tf32.trt"


@pytest.fixture
def engine(built, tmp_path):
    """A copy that a test may change."""
    for path in (built, built.with_suffix(".json")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / built.name


def refusal(*arguments):
    with pytest.raises(SystemExit) as stopped:
        run_engine.main([*map(str, arguments)])
    assert isinstance(stopped.value.code, str)
    return stopped.value.code


def changed(engine, **values):
    """The engine's manifest, with some of it changed."""
    path = engine.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.skipif(bool(gpus()), reason="there is a GPU")
def test_without_a_gpu_it_says_that_running_needs_one(engine):
    for batch in ((), (2,), (6,)):
        assert refusal(engine, *batch).startswith(f"{engine.name} needs an NVIDIA GPU to run: ")


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_a_batch_outside_the_range_is_answered_with_the_range(engine, batch):
    assert refusal(engine, batch).startswith(f"batch {batch}: {engine.name} takes 2 to 6.")


def test_the_best_batch_is_the_default_and_an_engine_of_one_has_its_own(engine):
    manifest = engine_manifest.read(engine)
    assert run_engine.chosen_batch(manifest, None) == 4
    static = dataclasses.replace(manifest, inputs=[Tensor("x", "float32", [5, 3], [5, 3], [5, 3], [5, 3])])
    assert run_engine.chosen_batch(static, None) == 5
    with pytest.raises(SystemExit, match="takes 5 alone"):
        run_engine.chosen_batch(static, 4)


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:-1] + b"!"])
def test_a_damaged_engine_is_known_by_its_sha256(engine, damage):
    engine.write_bytes(damage(engine.read_bytes()))
    message = refusal(engine)
    assert f"{engine} is not the file that {engine.with_suffix('.json')} describes: its SHA-256 is " in message
    assert "python -m recipes.build_engine" in message


def test_missing_files_are_named(engine, tmp_path):
    assert refusal(tmp_path / "none.trt") == f"could not read {tmp_path}/none.trt: No such file or directory"
    engine.with_suffix(".json").unlink()
    assert refusal(engine).startswith(f"{engine} has no manifest: {engine.with_suffix('.json')}: No such file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"[1, 2", "Expecting"),
        (b"\xff\xfe", "can't decode"),
        (b"[]", "it holds no object"),
        (b"{}", "its schema is None, and 1 is the one known here"),
        (b'{"schema": 1, "engine": "a"}', "it lacks engine_sha256, onnx, "),
    ],
)
def test_what_is_no_manifest_is_named(engine, content, message):
    path = engine.with_suffix(".json")
    path.write_bytes(content)
    told = refusal(engine)
    assert told.startswith(f"{path} is no manifest of an engine: ")
    assert message in told
    assert "recipes.build_engine" in told


@pytest.mark.parametrize(
    "values",
    [
        {"inputs": []},
        {"inputs": 3},
        {"inputs": ["x"]},
        {"inputs": [{"name": "x"}]},
        {"inputs": [{"name": "x", "dtype": "complex64", "shape": [1], "min": [1], "best": [1], "max": [1]}]},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": [1], "min": [1], "best": [1], "max": ["a"]}]},
        {"outputs": None},
        {"engine_sha256": 7},
        {"library_version": None},
    ],
)
def test_a_manifest_of_other_things_is_refused(engine, values):
    changed(engine, **values)
    assert "is no manifest of an engine: " in refusal(engine)


def test_an_engine_of_another_version_is_refused(engine):
    changed(engine, library_version="1.0.0.1")
    message = refusal(engine)
    assert " 1.0.0.1, and here is TensorRT" in message
    assert message.endswith("Build it again from model.onnx.")
    changed(engine, flavour="tensorflow")
    assert refusal(engine).startswith(f"{engine.name} is of tensorflow in tf32")


@pytest.mark.parametrize(
    ("made_for", "gpu", "message"),
    [
        ([9, 0], ((8, 9), None), "was built on NVIDIA A, compute capability 9.0, and here is NVIDIA B, 8.9"),
        (None, ((7, 5), None), "is for Ampere and later GPUs, compute capability 8.0; NVIDIA B has 7.5"),
        (None, ((9, 0), "its tf32 results do not repeat"), "cannot run here: its tf32 results do not repeat"),
        ([9, 0], ((9, 0), None), None),
        (None, ((8, 0), None), None),
    ],
)
def test_an_engine_for_another_gpu_is_refused(monkeypatch, engine, made_for, gpu, message):
    here, refused = gpu
    monkeypatch.setattr(run_engine, "gpus", lambda: (Gpu(0, "NVIDIA B", here, 1000),))
    monkeypatch.setattr(run_engine, "tensorrt_honours", lambda *_: refused)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    manifest = dataclasses.replace(engine_manifest.read(engine), gpu="NVIDIA A", compute_capability=made_for)
    if message is None:
        assert run_engine.usable_gpu(manifest) == torch.device("cuda", 0)
    else:
        with pytest.raises(SystemExit, match=message):
            run_engine.usable_gpu(manifest)


def test_inputs_are_noise_or_zeros_in_the_dtypes_of_the_manifest(engine):
    free = [Tensor(name, name, ["n", 3], [1, 3], [2, 3], [4, 3]) for name in engine_manifest.DTYPES]
    fixed = Tensor("fixed", "float32", [], [], [], [])
    manifest = dataclasses.replace(engine_manifest.read(engine), inputs=[*free, fixed])
    *made, scalar = run_engine.random_inputs(manifest, 3, torch.device("cpu"))
    assert [str(tensor.dtype) for tensor in made] == [f"torch.{name}" for name in engine_manifest.DTYPES]
    assert {tuple(tensor.shape) for tensor in made} == {(3, 3)}
    assert scalar.shape == ()
    assert [bool(tensor.any()) for tensor in made] == [tensor.dtype.is_floating_point for tensor in made]


def test_outputs_that_are_not_finite_are_named():
    class Runner:
        pool = type("Pool", (), {"device": torch.device("cpu")})
        record = RunnerRecord("float32[1]", graph=False, why_no_graph="it is a test")

        def __call__(self, tensors):
            return [tensors[0], tensors[0] / 0]

        def replay(self):
            pass

    timed = run_engine.time_runner(Runner(), [torch.ones(3)])
    assert timed.not_finite == ("output 1",)
    assert timed.call.count == timed.replay.count == 100


def test_the_figures_agree_with_each_other():
    timed = run_engine.Timed(Timing((2.0,) * 100), Timing((1.0,) * 100), None, (), ("the clocks wandered",))
    told = run_engine.summary(timed, 8)
    assert "batch 8, 100 calls, in a CUDA graph\n" in told
    assert "latency of a call: median 2 ms, mean 2, p95 2, p99 2\n" in told
    assert "the engine alone: median 1 ms" in told
    assert "throughput: 4000 items/s" in told
    assert told.endswith("note: the clocks wandered")
