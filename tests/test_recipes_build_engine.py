"""The recipe that builds engine files: real engines of tiny networks, without a GPU on TensorRT-RTX."""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from recipes import build_engine, engine_manifest, onnx_to_fp16
from recipes.onnx_model import read_model
from torchaccel import trt
from torchaccel.probes import gpus

ROOT = Path(__file__).resolve().parents[1]
FLOAT = TensorProto.FLOAT
pytestmark = [
    pytest.mark.skipif(bool(trt.unavailable()), reason=f"no TensorRT: {trt.unavailable()}"),
    pytest.mark.skipif(not trt.unavailable() and not trt.load().is_rtx and not gpus(), reason="TensorRT needs a GPU"),
]
needs_converter = pytest.mark.skipif(
    bool(trt.import_problem("onnxconverter_common")), reason="fp16 needs onnxconverter-common"
)


def value(name, *shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def weights(name, values, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def write(path, nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def scaled(path, scale=(1.0, 2.0, 3.0), batch="batch", dtype=np.float32):
    """A file that computes relu(x * scale), its nodes without names."""
    nodes = [helper.make_node("Mul", ["x", "scale"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ends = value("x", batch, 3, kind=kind), value("y", batch, 3, kind=kind)
    return write(path, nodes, [ends[0]], [ends[1]], [weights("scale", scale, dtype)])


@pytest.fixture
def model(tmp_path):
    return scaled(tmp_path / "model.onnx")


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "engines" / "small.v2"


def build(*arguments):
    build_engine.main([*map(str, arguments)])


def refusal(*arguments):
    """What the recipe exits with."""
    with pytest.raises(SystemExit) as stopped:
        build(*arguments)
    assert isinstance(stopped.value.code, str)
    return stopped.value.code


def misuse(capsys, *arguments):
    """What the command line is answered with."""
    with pytest.raises(SystemExit) as stopped:
        build(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def nothing_in(prefix):
    return not prefix.parent.exists() or not list(prefix.parent.iterdir())


# --- what is written ---


def test_the_command_writes_an_engine_and_its_manifest(tmp_path, model, prefix):
    command = (sys.executable, "-m", "recipes.build_engine", model, prefix, "tf32", "--batch", "1", "2", "4")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    engine = prefix.with_name("small.v2_tf32.trt")
    assert sorted(prefix.parent.iterdir()) == [engine.with_suffix(".json"), engine]
    written = json.loads(engine.with_suffix(".json").read_text())
    here = trt.load()
    expected = {
        "schema": 1,
        "engine": engine.name,
        "engine_sha256": digest(engine),
        "onnx": "model.onnx",
        "onnx_sha256": digest(model),
        "external_data_sha256": {},
        "precision": "tf32",
        "flavour": here.flavour,
        "library_version": here.api.__version__,
    }
    assert {key: written[key] for key in expected} == expected
    shapes = {"shape": ["batch", 3], "min": [1, 3], "best": [2, 3], "max": [4, 3]}
    assert written["inputs"] == [{"name": "x", "dtype": "float32"} | shapes]
    assert (written["outputs"][0]["name"], written["outputs"][0]["shape"]) == ("y", ["batch", 3])
    assert written["versions"]["onnx"] == onnx.__version__
    assert written["build_ms"] > 0
    if here.is_rtx:
        assert written["gpu"] is written["compute_capability"] is None
    assert re.search(r"small\.v2_tf32\.trt: \d+\.\d MiB, tf32, built in \d+\.\d s\n", done.stdout)
    assert f"to run it: python -m recipes.run_engine {engine}" in done.stdout


@needs_converter
def test_both_precisions_come_from_the_same_file_which_stays_as_it_was(model, prefix):
    before = digest(model)
    for precision in ("fp16", "tf32"):
        build(model, prefix, precision)
    assert {path.name for path in prefix.parent.iterdir()} == {
        f"small.v2_{precision}.{ending}" for precision in ("fp16", "tf32") for ending in ("trt", "json")
    }
    written = json.loads(prefix.with_name("small.v2_fp16.json").read_text())
    assert written["onnx_sha256"] == before == digest(model)
    assert written["inputs"][0]["best"] == [8, 3]
    assert written["inputs"][0]["dtype"] == "float32"
    assert "onnxconverter-common" in written["versions"]


def test_a_static_file_has_one_shape(tmp_path, prefix):
    model = scaled(tmp_path / "model.onnx", batch=5)
    build(model, prefix, "tf32")
    (given,) = json.loads(prefix.with_name("small.v2_tf32.json").read_text())["inputs"]
    assert given["shape"] == given["min"] == given["best"] == given["max"] == [5, 3]
    assert "--batch is for files whose first dimension is free" in refusal(model, prefix, "tf32", "--batch", 1, 2, 3)


@needs_converter
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_weights_in_a_file_of_their_own_are_taken_and_hashed(tmp_path, model, prefix, precision):
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="model.data", size_threshold=0)
    build(model, prefix, precision)
    written = json.loads(prefix.with_name(f"small.v2_{precision}.json").read_text())
    assert written["external_data_sha256"] == {"model.data": digest(tmp_path / "model.data")}
    (tmp_path / "model.data").unlink()
    assert "model.onnx is no valid ONNX file: " in refusal(model, prefix, precision)


# --- fp16 ---


@needs_converter
@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["x"], ["b"])],  # both read the input
        [helper.make_node("Max", ["x", "m"], ["a"]), helper.make_node("Neg", ["x"], ["b"])],  # kept in fp32
        [helper.make_node("Cast", ["n"], ["a"], to=FLOAT), helper.make_node("Relu", ["x"], ["b"])],
    ],
    ids=["without names", "an operator that stays in fp32", "a cast to float32"],
)
def test_what_fp16_computes_is_what_the_file_does(tmp_path, nodes):
    nodes = [*nodes, helper.make_node("Sub", ["a", "b"], ["y"])]
    inputs = [value("x", 2, 3), value("n", 2, 3, kind=TensorProto.INT64)]
    path = write(tmp_path / "m.onnx", nodes, inputs, [value("y", 2, 3)], [weights("m", [0.5, -0.5, 0.25])])
    read, _ = read_model(path)
    converted = onnx_to_fp16.write_fp16(read, path, tmp_path / "fp16.onnx")
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3), np.float32), "n": np.full((2, 3), 2)}
    (expected,), (got,) = (ReferenceEvaluator(str(file)).run(None, feeds) for file in (path, converted))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)
    assert not np.array_equal(got, expected), "it was not computed in fp16"


@needs_converter
def test_a_weight_beyond_fp16_is_never_clamped(tmp_path, prefix):
    message = refusal(scaled(tmp_path / "m.onnx", scale=(1, 2, -70000)), prefix, "fp16")
    assert message == "fp16 ends at 65504, and the model has values beyond: scale (7e+04). Build it in tf32."
    assert nothing_in(prefix)
    build(scaled(tmp_path / "m.onnx", scale=(1, 20000, 65504)), prefix, "fp16")


@needs_converter
def test_what_fp16_changes_is_said(tmp_path, prefix, capsys):
    lowest = float(np.finfo(np.float32).min)
    build(scaled(tmp_path / "m.onnx", scale=(lowest, 1e-9, float("inf"))), prefix, "fp16")
    told = capsys.readouterr().out
    assert "fp16: 1 values of ±3.4e+38 become ±65504\n" in told
    assert "fp16: 1 values nearer to 0 than 6e-08 become ±6e-08\n" in told


def test_without_the_converter_there_is_the_command_that_installs_it(monkeypatch, model, prefix):
    monkeypatch.setitem(sys.modules, "onnxconverter_common", None)
    assert refusal(model, prefix, "fp16").endswith("pip install onnxconverter-common")
    assert nothing_in(prefix)
    build(model, prefix, "tf32")


# --- what is refused, with nothing left behind ---


@pytest.mark.skipif(bool(trt.unavailable("tensorrt_rtx")), reason="no TensorRT-RTX")
def test_fp32_on_tensorrt_rtx_offers_tf32_before_anything_is_built(monkeypatch, model, prefix):
    monkeypatch.setattr(trt, "build_from_onnx", lambda *_, **__: pytest.fail("it was built"))
    if trt.load().is_rtx:
        message = refusal(model, prefix, "fp32")
        assert message.startswith("fp32 cannot be had here: TensorRT-RTX computes fp32 in TF32")
        assert message.endswith("ask for 'tf32'")
        assert nothing_in(prefix)


@pytest.mark.skipif(bool(gpus()), reason="there is a GPU")
def test_tensorrt_proper_says_that_it_needs_the_gpu(monkeypatch, model, prefix):
    monkeypatch.setattr(trt.TensorRT, "is_rtx", False)
    assert refusal(model, prefix, "fp16").endswith("TensorRT builds on the GPU that will run the engine, and PyTorch "
                                                   "sees none here")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bf16",), "torchaccel.compile(module, 'bf16', backend='onnx_tensorrt') has it"),
        (("int8",), "'int8' is no precision of this recipe: there are fp32, tf32 and fp16"),
        (("tf32", "--batch", 2, 1, 4), "--batch 2 1 4: allowed is 1 <= MIN <= BEST <= MAX, with MIN < MAX"),
        (("tf32", "--batch", 4, 4, 4), "with MIN < MAX"),
        (("tf32", "--batch", 0, 1, 4), "1 <= MIN"),
    ],
)
def test_a_misuse_is_answered_with_what_is_allowed(capsys, model, prefix, arguments, message):
    assert message in misuse(capsys, model, prefix, *arguments)
    assert "engines/resnet18 would be one" in misuse(capsys, model, f"{prefix}/", "tf32")


def test_a_file_that_is_none_or_no_onnx_is_named(tmp_path, prefix):
    assert refusal(tmp_path / "none.onnx", prefix, "tf32").endswith("none.onnx: No such file or directory")
    for content in (b"", b"\xff" * 64):
        (tmp_path / "bad.onnx").write_bytes(content)
        assert f"{tmp_path}/bad.onnx is no valid ONNX file: " in refusal(tmp_path / "bad.onnx", prefix, "tf32")
    assert nothing_in(prefix)


def test_only_the_first_dimension_may_be_free(tmp_path, prefix):
    ends = value("pixels", "batch", 3, "height"), value("y", "batch", 3, "height")
    path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["pixels"], ["y"])], [ends[0]], [ends[1]])
    assert "dimension 2 (height) of input 'pixels' is free" in refusal(path, prefix, "tf32")
    nodes = [helper.make_node("Concat", ["a", "b"], ["y"], axis=0)]
    path = write(tmp_path / "m.onnx", nodes, [value("a", "n", 3), value("b", "m", 3)], [value("y", "k", 3)])
    assert "first dimensions are different ones (m, n)" in refusal(path, prefix, "tf32")
    assert nothing_in(prefix)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_a_file_that_is_not_fp32_is_refused(tmp_path, prefix, precision):
    path = scaled(tmp_path / "m.onnx", dtype=np.float16)
    assert f"{path} is no fp32 model: scale is float16. Every engine is built" in refusal(path, prefix, precision)
    nodes = [helper.make_node("Cast", ["x"], ["y"], name="down", to=TensorProto.BFLOAT16)]
    path = write(tmp_path / "m.onnx", nodes, [value("x", 2)], [value("y", 2, kind=TensorProto.BFLOAT16)])
    assert "it casts to half precision (down)" in refusal(path, prefix, precision)


def test_an_operator_that_tensorrt_refuses_leaves_nothing(tmp_path, prefix):
    node = helper.make_node("Det", ["x"], ["y"], name="the_determinant")
    path = write(tmp_path / "m.onnx", [node], [value("x", 2, 3, 3)], [value("y", 2)])
    assert re.match(r"no engine was built: .*Det \(the_determinant\)", refusal(path, prefix, "tf32"))
    assert nothing_in(prefix)


def test_a_full_disk_leaves_what_was_there(model, prefix):
    build(model, prefix, "tf32")
    before = {path: digest(path) for path in prefix.parent.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
    try:
        message = refusal(model, prefix, "tf32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"could not write {prefix}_tf32.trt: ")
    assert {path: digest(path) for path in prefix.parent.iterdir()} == before


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("ending", [".trt", ".json"])
def test_a_file_that_cannot_be_put_in_its_place_leaves_what_was_there(tmp_path, model, prefix, ending, earlier):
    if earlier:
        build(model, prefix, "tf32")
    taken = prefix.with_name(f"small.v2_tf32{ending}")
    taken.unlink(missing_ok=True)
    taken.mkdir(parents=True)  # nothing takes the place of a folder
    before = {path: digest(path) for path in prefix.parent.iterdir() if path.is_file()}
    message = refusal(scaled(tmp_path / "other.onnx", scale=(7, 8, 9)), prefix, "tf32")
    assert message.startswith(f"could not write {prefix}_tf32.trt: ")
    assert {path: digest(path) for path in prefix.parent.iterdir() if path.is_file()} == before
    assert len(before) == int(earlier)


def test_ended_between_its_two_files_it_leaves_no_pair_that_passes(monkeypatch, tmp_path, model, prefix):
    build(model, prefix, "tf32")
    replace, kills = os.replace, []

    def ended(source, target):
        kills.extend([True] if Path(target).suffix == ".trt" else [])
        if kills:  # nothing is undone after a kill
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", ended)
    with pytest.raises(KeyboardInterrupt):
        build(scaled(tmp_path / "other.onnx", scale=(7, 8, 9)), prefix, "tf32")
    engine = prefix.with_name("small.v2_tf32.trt")
    with pytest.raises(engine_manifest.ManifestError, match="or one of the two is of another build"):
        engine_manifest.read(engine)
    assert sorted(prefix.parent.iterdir()) == [engine.with_suffix(".json"), engine]
