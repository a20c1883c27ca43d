"""When things go wrong on the GPU: memory that runs out, at a build and at a capture; a fork."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchaccel
from tests.gpu.helpers import ALL, need, relative_error
from tests.helpers import same_values, state_of
from tests.models import small_conv_net

MIB = 1 << 20
STEPS_MIB = (0, 2, 8, 24, 64, 160, 400, 1000)


def allocated() -> int:
    """Device memory that tensors hold; without the libraries' workspaces, one for each stream, which stay."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def limit(extra_mib: int) -> None:
    """Let PyTorch take so much more than it holds now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra_mib * MIB) / total)


@pytest.fixture
def _no_limit() -> Any:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("_no_limit")
@pytest.mark.parametrize("backend", ALL)
def test_a_build_that_runs_out_of_memory_releases_everything_and_a_later_call_builds(backend: str) -> None:
    need(backend)
    module, warm = small_conv_net().cuda(), small_conv_net().cuda()
    with torch.inference_mode():
        x = torch.randn(64, 3, 128, 128, device="cuda")
        torchaccel.compile(warm, "fp16", backend=backend)(x)  # what a process takes once, whatever it builds
    del warm
    state, model, failures = state_of(module), torchaccel.compile(module, "fp16", backend=backend), 0
    with torch.inference_mode():
        for extra in STEPS_MIB:  # memory runs out at another step of the build each time
            before = allocated()
            limit(extra)
            try:
                model(x)
            except torchaccel.DeviceMemoryError as error:
                assert "out of memory on cuda" in str(error)
                assert error.__context__ is None
                assert allocated() <= before  # while the error is held
                assert model.report().builds == 0
                failures += 1
            else:
                break
        assert failures
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert relative_error(model(x), module(x)) < 1e-2
    assert model.report().builds == 1
    assert same_values(module, state)


class Hungry(nn.Module):
    """It takes more memory than there is, while a graph is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return hungry(self.fc(x))


APPETITE = {"bytes": 0}


@torch.library.custom_op("torchaccel_tests::hungry", mutates_args=())
def hungry(x: torch.Tensor) -> torch.Tensor:
    """A copy of x; where a graph is being captured it takes APPETITE besides."""
    if torch.cuda.is_current_stream_capturing():
        torch.empty(APPETITE["bytes"], dtype=torch.uint8, device=x.device)
    return x.clone()


@hungry.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_a_capture_that_runs_out_of_memory_releases_everything_and_a_later_call_captures() -> None:
    module = Hungry().cuda()
    model = torchaccel.compile(module, "fp16", backend="eager")
    other = torchaccel.compile(Hungry().cuda(), "fp16", backend="eager")
    x = torch.randn(32, 64, device="cuda")
    with torch.inference_mode():
        other(x)
        APPETITE["bytes"] = 1 << 45
        for _ in range(3):
            before = allocated()
            with pytest.raises(torchaccel.DeviceMemoryError, match="out of memory on cuda") as caught:
                model(x)
            assert allocated() <= before
            assert caught.value.__context__ is None
            assert model.report().builds == 0
            assert relative_error(other(x), other.module(x)) < 1e-2
            torch.randn(8, device="cuda")  # a generator left in capture mode would refuse
        APPETITE["bytes"] = 0
        assert relative_error(model(x), module(x)) < 1e-2
    assert model.report().to_dict()["graph"] is True


@pytest.mark.usefixtures("_no_limit")
@pytest.mark.parametrize("backend", ["torch_tensorrt", "eager"])
def test_one_more_signature_that_does_not_fit_leaves_those_that_do(backend: str) -> None:
    need(backend)
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend)
    small, large = (torch.randn(batch, 3, 128, 128, device="cuda") for batch in (2, 256))
    with torch.inference_mode():
        model(small)
        expected = module(small)
        before = allocated()
        limit(8)
        with pytest.raises(torchaccel.DeviceMemoryError):
            model(large)
        assert allocated() <= before
        assert relative_error(model(small), expected) < 1e-2
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert relative_error(model(large), module(large)) < 1e-2


FORK = """
import faulthandler, os, signal, sys
import torch
import torchaccel
from tests.models import small_conv_net

torch.set_grad_enabled(False)
backend = sys.argv[1]
model = torchaccel.compile(small_conv_net(), "fp16", backend=backend)
x = torch.randn(2, 3, 32, 32, device="cuda")
expected = model(x)
torch.cuda.synchronize()
child = os.fork()
if child == 0:
    faulthandler.register(signal.SIGALRM, chain=True)  # where it hangs, if it does
    signal.alarm(60)
    refused = 0
    for use in (
        lambda: model(x),
        lambda: model(torch.zeros(2, 3, 32, 32)),
        lambda: model.refresh(),
        lambda: list(model.stream([torch.zeros(2, 3, 32, 32)])),
        lambda: torchaccel.compile(small_conv_net(), "fp16", backend=backend),
    ):
        try:
            use()
        except torchaccel.BackendError as error:
            refused += "spawn" in str(error) and "forked" in str(error)
    os._exit(refused)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 5, status
assert torch.equal(model(x), expected)
print("done")
"""


@pytest.mark.parametrize("backend", ["onnx_tensorrt", "eager"])
def test_a_fork_after_cuda_was_initialised_is_a_clear_error_in_the_child(backend: str) -> None:
    need(backend)
    root = Path(torchaccel.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, backend],
        cwd=root, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("done")
