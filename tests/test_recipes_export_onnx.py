"""The ONNX recipe, run for real on small classifiers; the network and the disk fail where a test says so."""

import hashlib
import io
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from urllib.error import URLError

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torchvision.models import MNASNet0_5_Weights, mnasnet0_5, mnasnet0_75

from recipes import export_onnx
from tests.models import small_conv_net
from torchaccel.weights import WeightRule

ROOT = Path(__file__).resolve().parents[1]
MODEL, WEIGHTS = "mnasnet0_5", MNASNet0_5_Weights.DEFAULT


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """A cache of PyTorch's with nothing in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hub" / "checkpoints"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "models" / "model.onnx"


def export(*arguments):
    export_onnx.main(["--model", MODEL, *map(str, arguments)])


def refusal(*arguments):
    """What the recipe exits with."""
    with pytest.raises(SystemExit) as stopped:
        export(*arguments)
    assert isinstance(stopped.value.code, str)
    return stopped.value.code


def run_file(path, images):
    return torch.from_numpy(ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})[0])


def download(monkeypatch, content):
    """Have the network answer with `content`, or raise it; returns the addresses that are asked for."""
    asked = []

    def urlopen(request, *_, **__):
        asked.append(request.full_url)
        if isinstance(content, Exception):
            raise content
        answer = io.BytesIO(content)
        answer.info = Message
        return answer

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    return asked


# --- what is written ---


def test_the_command_writes_a_file_that_onnx_accepts(tmp_path):
    command = (sys.executable, "-m", "recipes.export_onnx", "--weights", "none")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "models" / "resnet18.onnx"
    assert [file.name for file in tmp_path.rglob("*")] == ["models", "resnet18.onnx"]
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert str(ROOT).encode() not in path.read_bytes()
    assert re.search(r"models/resnet18\.onnx: 44\.\d MiB, opset \d+\n", done.stdout)
    assert "  input images: float32 [1, 3, 224, 224]\n  output logits: float32 [1, 1000]\n" in done.stdout
    assert re.search(r"  relative error against float64 at batch 1: \d\.\de-0[67]; the module's own: \d", done.stdout)


def test_a_dynamic_batch_takes_sizes_that_were_never_tried(capsys, output):
    export("--weights", "none", "--dynamic-batch", "--output", output)
    told = capsys.readouterr().out
    assert "input images: float32 [batch, 3, 224, 224]" in told
    assert "output logits: float32 [batch, 1000]" in told
    assert "at batch 2: " in told
    assert "at batch 1: " in told
    images = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = export_onnx.load(MODEL, "none")(images)
    assert run_file(output, images).shape == (3, 1000)
    torch.testing.assert_close(run_file(output, images), expected, rtol=1e-3, atol=1e-3)


def test_weights_of_ones_own_replace_an_older_file(tmp_path, output):
    output.parent.mkdir()
    output.write_text("older")
    torch.manual_seed(7)
    module = export_onnx.look_trained(mnasnet0_5(), 224)
    torch.save(module.state_dict(), tmp_path / "mine.pt")
    export("--weights", tmp_path / "mine.pt", "--output", output)
    images = export_onnx.random_images(1, 224)
    with torch.no_grad():
        torch.testing.assert_close(run_file(output, images), module(images), rtol=1e-3, atol=1e-3)
    assert list(output.parent.iterdir()) == [output]


def test_random_weights_leave_no_layer_without_influence():
    images = export_onnx.random_images(2, 224)
    module = export_onnx.load(MODEL, "none")
    assert not module.training
    assert not any(child.training for child in module.modules())
    first, second = module(images)
    assert (first - second).norm() > 1e-3 * first.norm()
    assert all(parameter.any() for parameter in module.parameters())


def test_a_pool_of_stride_1_computes_what_pytorchs_does(tmp_path):
    class Pooled(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.max_pool2d(x, 3, stride=1, padding=1, ceil_mode=True)

    images = export_onnx.random_images(1, 8)
    export_onnx.save(export_onnx.onnx_model(Pooled(), images, dynamic_batch=False), str(tmp_path / "pool.onnx"))
    assert torch.equal(run_file(tmp_path / "pool.onnx", images), Pooled()(images))


# --- what is refused, with nothing left behind ---


def test_a_file_that_computes_something_else_is_not_kept(monkeypatch, output):
    monkeypatch.setattr(export_onnx, "load", lambda *_: small_conv_net())
    right = WeightRule.compute
    monkeypatch.setattr(WeightRule, "compute", lambda rule, tensors: right(rule, tensors) * 1.01)  # wrong weights
    message = refusal("--weights", "none", "--output", output)
    assert re.search(
        r"does not compute what the module does at batch 1: its relative error is \S+, and 1\.?\d*e-05 is", message
    )
    assert list(output.parent.iterdir()) == []


def test_a_full_disk_leaves_nothing(monkeypatch, output):
    monkeypatch.setattr(export_onnx, "load", lambda *_: small_conv_net(classes=50_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        message = refusal("--weights", "none", "--output", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"could not write {output}: ")
    assert list(output.parent.iterdir()) == []


def test_a_read_only_folder_is_noticed_before_the_work(monkeypatch):
    monkeypatch.setattr(export_onnx, "load", lambda *_: pytest.fail("the weights were loaded"))
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with without_privileges():
            message = refusal("--weights", "none", "--output", f"{folder}/model.onnx")
        assert message.startswith(f"could not write {folder}/model.onnx: [Errno 13] Permission denied")
        assert os.listdir(folder) == []


@contextmanager
def without_privileges():
    """Root may write anywhere, so be nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_an_output_that_is_no_place_for_a_file(tmp_path):
    assert f"--output {tmp_path} is a folder: name a file in it" in refusal("--weights", "none", "--output", tmp_path)
    (tmp_path / "file").touch()
    message = refusal("--weights", "none", "--output", tmp_path / "file" / "model.onnx")
    assert message.startswith(f"could not write {tmp_path}/file/model.onnx: ")


def test_a_module_that_cannot_be_captured_is_named(monkeypatch, output):
    class Undecided(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    monkeypatch.setattr(export_onnx, "load", lambda *_: Undecided())
    message = refusal("--output", output)
    assert message.startswith(f"{MODEL} could not be exported: torch.export could not capture Undecided")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "torchvision has no classifier 'resnet81'. There are: resnet18, "),
        ("fasterrcnn_resnet50_fpn", "torchvision has no classifier 'fasterrcnn_resnet50_fpn'."),
        ("?", "There are: alexnet, "),
    ],
)
def test_an_unknown_model_is_answered_with_what_there_is(name, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        export_onnx.main(["--model", name])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# --- weights ---


def test_offline_it_says_what_it_could_not_fetch_and_what_avoids_that(monkeypatch, hub, output):
    with socket.socket() as unused:  # a proxy that nobody answers for
        unused.bind(("127.0.0.1", 0))
        proxy = "http://127.0.0.1:{1}".format(*unused.getsockname())
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setattr(urllib.request, "_opener", None)
    message = refusal("--output", output)
    monkeypatch.setattr(urllib.request, "_opener", None)
    assert message.startswith(f"could not fetch {WEIGHTS.url} into {hub}: <urlopen error ")
    assert "--weights none exports random weights" in message
    assert "--weights PATH" in message
    assert list(output.parent.iterdir()) == list(hub.iterdir()) == []


@pytest.mark.parametrize("failure", [URLError("no route to host"), TimeoutError("timed out")])
def test_a_failing_network_is_no_traceback(monkeypatch, failure, output):
    download(monkeypatch, failure)
    assert f"could not fetch {WEIGHTS.url} into " in refusal("--output", output)


def test_a_corrupted_download_is_not_kept(monkeypatch, hub, output):
    download(monkeypatch, b"half of a fi")
    message = refusal("--output", output)
    assert "invalid hash value" in message
    assert list(hub.iterdir()) == list(output.parent.iterdir()) == []


def test_weights_are_fetched_once_and_verified_ever_after(monkeypatch, hub):
    torch.manual_seed(3)
    module, content = mnasnet0_5(), io.BytesIO()
    torch.save(module.state_dict(), content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    monkeypatch.setattr(WEIGHTS.value, "url", f"https://example.invalid/mnasnet-{digest[:10]}.pth")
    asked = download(monkeypatch, content.getvalue())
    for _ in range(2):
        loaded = export_onnx.load(MODEL, "default")
        assert not loaded.training
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert asked == [WEIGHTS.url]
    (cached,) = hub.iterdir()
    cached.write_bytes(cached.read_bytes()[:-1] + b"!")
    assert refusal().startswith(f"{cached} is damaged: its SHA-256 does not begin with {digest[:10]}. Delete it")
    assert asked == [WEIGHTS.url]


def test_a_state_dict_of_another_model_is_refused_with_its_keys(tmp_path):
    path = tmp_path / "weights.pt"
    state = mnasnet0_5().state_dict()
    del state["layers.0.weight"]
    state["head.weight"] = torch.zeros(1)
    torch.save(state, path)
    message = refusal("--weights", path)
    assert message.startswith(f"--weights {path} is no state_dict of {MODEL}: ")
    assert 'Missing key(s) in state_dict: "layers.0.weight"' in message
    assert 'Unexpected key(s) in state_dict: "head.weight"' in message
    torch.save(mnasnet0_75().state_dict(), path)
    message = refusal("--weights", path)
    assert "size mismatch for layers." in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": No such file or directory; allowed are default, none and the path of a state_dict"),
        (b"", " is no state_dict of mnasnet0_5: "),
        (b"plain text", " is no state_dict of mnasnet0_5: "),
        (torch.zeros(3), " is no state_dict of mnasnet0_5: Expected state_dict to be dict-like"),
        ({"state_dict": {}}, " is no state_dict of mnasnet0_5: "),
        ([1, 2], " is no state_dict of mnasnet0_5: "),
        ({"layers.0.weight": "text"}, " is no state_dict of mnasnet0_5: "),
        (ArithmeticError, " is no state_dict of mnasnet0_5: "),
    ],
)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert f"--weights {path}{message}" in refusal("--weights", path)
