"""compile() returns at once, chooses a backend without a silent fallback, and builds at once for `inputs`."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchaccel
from tests.helpers import Lambda, on_cpu, relative_error, same_values, state_of, without_compiler
from tests.models import small_conv_net
from torchaccel.compiler import AUTO, BACKENDS, _move, choose
from torchaccel.errors import BackendError, BackendWarning, BuildError, DeviceMemoryError, OptionError
from torchaccel.options import Options

CPU = torch.device("cpu")


def test_it_returns_at_once_in_eval_mode_and_leaves_the_weights_alone() -> None:
    module = small_conv_net().train()
    state = state_of(module)
    model = on_cpu(module)
    assert not model.training
    assert not module.training
    assert not any(child.training for child in module.modules())
    assert model.report().builds == 0
    assert same_values(module, state)
    assert model.module is module
    assert isinstance(model, torchaccel.CompiledModule)
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3),),
        [torch.ones(2, 3)],
        {"x": torch.ones(2, 3)},
        np.ones((2, 3), dtype=np.float32),
        (torch.ones(2, 3), 2.0),
        {"x": torch.ones(2, 3), "scale": 2.0},
    ],
    ids=["tensor", "tuple", "list", "dict", "array", "with a number", "keywords"],
)
def test_given_inputs_the_engine_is_built_now(inputs: Any) -> None:
    model = on_cpu(Lambda(lambda self, x, scale=1.0: x * scale), inputs=inputs)
    assert model.report().builds == 1
    assert model.report().calls_by_engine == 0


@torch.no_grad()
def test_the_engine_built_for_inputs_serves_the_first_call() -> None:
    model = on_cpu(small_conv_net(), inputs=torch.randn(2, 3, 8, 8))
    model(torch.randn(2, 3, 8, 8))
    assert model.report().builds == 1


def test_a_build_error_comes_from_compile_where_inputs_are_given() -> None:
    with pytest.raises(BuildError):
        on_cpu(Lambda(lambda self, x: x.add_(1)), inputs=torch.ones(2))


# --- the backend ---


def test_without_a_gpu_auto_is_inductor_with_one_warning_that_says_why() -> None:
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = torchaccel.compile(small_conv_net(), "fp32", device="cpu")
    (warning,) = caught
    assert warning.category is BackendWarning
    assert warning.filename == __file__, "the warning points at the caller"
    message = str(warning.message)
    assert "inductor" in message
    assert "torch_tensorrt" in message
    why = BACKENDS["torch_tensorrt"].unavailable() or "GPU"
    assert why in message
    report = model.report()
    assert (report.backend_asked, report.backend) == ("auto", "inductor")
    assert why in report.backend_reason


def test_auto_without_a_compiler_is_eager_and_says_why_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKENDS["inductor"]), "unavailable", lambda self: "there is no compiler")
    with pytest.warns(
        BackendWarning, match=r"serves through eager.*torch_tensorrt: .*; inductor: there is no compiler"
    ):
        model = torchaccel.compile(small_conv_net(), "fp32", device="cpu")
    assert model.report().backend == "eager"


def test_auto_is_torch_tensorrt_where_it_is_usable_and_then_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKENDS["torch_tensorrt"]), "unavailable", lambda self: None)
    monkeypatch.setattr(type(BACKENDS["torch_tensorrt"]), "honours", lambda self, precision, device: None)
    backend, reason = choose(Options("fp16"), CPU)
    assert (backend.name, reason) == ("torch_tensorrt", "")


def test_auto_moves_on_where_the_precision_is_not_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKENDS["torch_tensorrt"]), "unavailable", lambda self: None)
    monkeypatch.setattr(type(BACKENDS["torch_tensorrt"]), "honours", lambda *_: "it computes fp32 in TF32")
    monkeypatch.setattr(type(BACKENDS["inductor"]), "unavailable", lambda self: None)
    with pytest.warns(BackendWarning, match="it computes fp32 in TF32"):
        backend, _ = choose(Options("fp32"), CPU)
    assert backend.name == "inductor"


def test_auto_never_takes_the_onnx_route() -> None:
    assert AUTO == ("torch_tensorrt", "inductor", "eager")


def test_a_precision_that_nothing_honours_here_is_an_error_with_every_reason() -> None:
    with pytest.raises(BackendError, match=r"no backend can compute tf32 on cpu") as caught:
        torchaccel.compile(small_conv_net(), "tf32", device="cpu")
    assert all(f"{name}: " in str(caught.value) for name in AUTO)


@pytest.mark.parametrize("name", ["torch_tensorrt", "onnx_tensorrt"])
def test_a_named_tensorrt_backend_is_refused_on_a_cpu_with_the_reason(name: str) -> None:
    with pytest.raises(BackendError, match=f"backend='{name}' cannot run precision='fp16' on cpu: ") as caught:
        torchaccel.compile(small_conv_net(), "fp16", backend=name, device="cpu")
    assert (BACKENDS[name].unavailable() or "GPU") in str(caught.value)
    assert "torchaccel env" in str(caught.value)


@pytest.mark.parametrize("name", ["inductor", "eager"])
def test_a_named_backend_is_refused_where_it_does_not_honour_the_precision(name: str) -> None:
    if reason := BACKENDS[name].unavailable():
        pytest.skip(reason)
    with pytest.raises(BackendError, match="TF32"):
        on_cpu(small_conv_net(), "tf32", name)


def test_a_fallback_that_is_not_usable_is_refused_at_once() -> None:
    with pytest.raises(BackendError, match="onnx_tensorrt"):
        on_cpu(small_conv_net(), fallback="onnx_tensorrt")


def test_partial_is_refused_where_auto_cannot_mean_torch_tensorrt() -> None:
    with pytest.raises(OptionError, match=r"partial=True.*torch_tensorrt"):
        torchaccel.compile(small_conv_net(), "fp32", device="cpu", partial=True)
    with pytest.raises(OptionError, match=r"partial=True.*torch_tensorrt"):
        torchaccel.compile(small_conv_net(), "fp32", device="cpu", backend="fastest", partial=True)


def test_a_fallback_that_is_not_usable_is_named_as_such() -> None:
    with pytest.raises(BackendError, match=r"^fallback='onnx_tensorrt' cannot run"):
        torchaccel.compile(small_conv_net(), "fp32", device="cpu", backend="eager", fallback="onnx_tensorrt")


def test_a_module_that_does_not_fit_stays_where_it_was() -> None:
    asked: list[str] = []

    class TooLarge(nn.Linear):
        def to(self, device: torch.device) -> "TooLarge":  # type: ignore[override]
            asked.append(str(device))
            if device.type == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
            return super().to(device)

    with pytest.raises(DeviceMemoryError, match=r"TooLarge does not fit on cuda:0 \(CUDA out of memory.* is on cpu as"):
        _move(TooLarge(2, 2), torch.device("cuda", 0))
    assert asked == ["cuda:0", "cpu"]


def test_what_hides_a_module_s_own_attributes_is_said() -> None:
    class Own(nn.Linear):
        _run_module = "mine"

    with pytest.warns(BackendWarning, match=r"has attributes that the compiled module has too \(_run_module\)"):
        on_cpu(Own(2, 2))


def test_a_refused_backend_leaves_the_module_as_it_was() -> None:
    module = small_conv_net().train()
    with pytest.raises(BackendError):
        on_cpu(module, "tf32")
    assert module.training


@torch.no_grad()
def test_a_fallback_is_tried_after_a_real_fault_and_the_report_says_so() -> None:
    module, x = small_conv_net(classes=7), torch.randn(2, 3, 9, 9)
    with without_compiler():
        with pytest.raises(BuildError, match="Inductor could not compile"):
            on_cpu(module, backend="inductor")(x)
        model = on_cpu(module, backend="inductor", fallback="eager", inputs=x)
    assert relative_error(model(x), module(x)) < 1e-6
    report = model.report()
    assert report.backend == "eager"
    assert report.backend_asked == "inductor"
    assert "inductor failed: Inductor could not compile" in report.engines[0].fell_back_because
    assert "inductor failed" in str(report)


@torch.no_grad()
def test_a_fallback_that_is_not_needed_is_not_used() -> None:
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    model = on_cpu(small_conv_net(), fallback="inductor")
    model(torch.randn(2, 3, 8, 8))
    assert model.report().engines[0].backend == "eager"
    assert model.report().engines[0].fell_back_because == ""


def test_a_fallback_that_auto_chose_already_is_not_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKENDS["inductor"]), "unavailable", lambda self: "there is no compiler")
    runs = []
    monkeypatch.setattr(type(BACKENDS["eager"]), "load", lambda *_: runs.append(1) or raise_build_error())
    with pytest.warns(BackendWarning, match="serves through eager"), pytest.raises(BuildError, match="no engine"):
        torchaccel.compile(small_conv_net(), "fp32", device="cpu", fallback="eager", inputs=torch.randn(2, 3, 8, 8))
    assert len(runs) == 1


def raise_build_error() -> None:
    raise BuildError("there is no engine")


# --- the device ---


def test_without_a_gpu_the_cpu_is_the_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert torchaccel.compile(small_conv_net(), "fp32", backend="eager").report().device == "cpu"


@torch.no_grad()
def wrapping() -> torch.Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(2), torch.ones(2))


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (nn.UninitializedBuffer, r"'child.held' of Sequential .* run the module once"),
        (lambda: torch.eye(2).to_sparse(), r"is sparse_coo; .*to_dense"),
        (lambda: torch.eye(2).to_sparse_csr(), r"is sparse_csr; .*to_dense"),
        (quantized, r"is quantized \(torch.quint8\)"),
        (wrapping, r"is a TwoTensor, which wraps other tensors"),
    ],
    ids=["lazy", "sparse", "csr", "quantized", "wrapper"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_a_weight_that_cannot_be_watched_is_refused_with_its_name(make: Any, said: str) -> None:
    module = nn.Sequential()
    module.add_module("child", Lambda(lambda self, x: x))
    module.child.register_buffer("held", make())
    with pytest.raises(OptionError, match=said):
        on_cpu(module)


def test_a_module_without_tensors_can_be_compiled() -> None:
    model = on_cpu(Lambda(lambda self, x: x.relu() * 2))
    assert model(torch.tensor([-1.0, 3.0])).tolist() == [0.0, 6.0]
    model.refresh()
    assert model(torch.tensor([-1.0, 4.0])).tolist() == [0.0, 8.0]


def test_the_table_of_backends_has_them_all() -> None:
    rows = torchaccel.backends()
    assert [row.name for row in rows] == list(BACKENDS)
    assert all(row.available == (row.reason == "") for row in rows)
    assert {row.name for row in rows if row.available} >= {"eager"}
