"""New weights on the GPU: taken at the next call, bit for bit, by every backend."""

import copy

import pytest
import torch

import torchaccel
from tests.gpu.helpers import ALL, need, relative_error, served_by_engine
from tests.gpu.test_threads_gpu import no_synchronisation
from tests.models import ZOO, small_conv_net


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


@pytest.mark.parametrize("backend", ALL)
def test_the_next_call_uses_the_new_weights_without_another_build(backend: str) -> None:
    need(backend)
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend)
    x = images()
    with torch.no_grad():
        before = model(x)
        module.fc.weight.mul_(-2)
        after = model(x)
        assert relative_error(after, module(x)) < 1e-2
        assert relative_error(before, after) > 0.5
    report = model.report()
    assert (report.builds, report.refreshes) == (1, 1)
    assert report.engines[0].refresh_ms > 0
    assert report.to_dict()["graph"] is True
    assert served_by_engine(model)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dynamic_batch", [None, (1, 4, 8)], ids=["static", "dynamic"])
def test_a_change_that_fp16_hides_from_the_gate_is_bit_for_bit_that_of_a_fresh_engine(
    backend: str, dynamic_batch: tuple[int, int, int] | None
) -> None:
    need(backend)
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend, dynamic_batch=dynamic_batch)
    x = images()
    with torch.no_grad():
        before = model(x)
        for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
            tensor.mul_(1 + 2**-11)
        refreshed = [model(x), model(x * 3), model(-x)]
        fresh_model = torchaccel.compile(module, "fp16", backend=backend, dynamic_batch=dynamic_batch)
        fresh = [fresh_model(x), fresh_model(x * 3), fresh_model(-x)]
    assert all(map(torch.equal, refreshed, fresh))
    assert not torch.equal(refreshed[0], before)
    assert model.report().builds == 1
    assert served_by_engine(model)


@pytest.mark.parametrize("backend", ["onnx_tensorrt", "eager"])
def test_fused_adamw_and_batch_norm_statistics_count(backend: str) -> None:
    need(backend)
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    x = images()
    with torch.no_grad():
        model(x)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert relative_error(model(x), module(x)) < 1e-2
    assert model.report().calls_by_module == 1


@pytest.mark.parametrize("backend", ["onnx_tensorrt", "eager"])
def test_a_write_that_pytorch_does_not_track_is_found_without_waiting(backend: str) -> None:
    need(backend)
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend, check_weights_every=5)
    x = images()
    with torch.inference_mode():
        before = model(x)
        for _ in range(6):  # past the first check, whose buffers are new
            model(x)
        torch.cuda.synchronize()
        module.fc.weight.data.mul_(-2)
        with no_synchronisation():
            torch.cuda._sleep(500_000_000)  # the result of the check comes after these calls
            for _ in range(6):
                model(x)
        torch.cuda.synchronize()
        after = model(x)
        assert relative_error(after, -2 * before + 3 * module.fc.bias) < 1e-2
    report = model.report()
    assert report.refreshes == 1
    assert any("does not track" in event for event in report.events)


@pytest.mark.parametrize("backend", ["eager", "onnx_tensorrt"])
def test_a_write_that_is_still_on_its_way_on_another_stream_that_calls_is_waited_for(backend: str) -> None:
    need(backend)
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend)
    x, writer, reader = images(), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad():
        for stream in (writer, reader):
            with torch.cuda.stream(stream):
                before = model(x)
        with torch.cuda.stream(writer):
            torch.cuda._sleep(200_000_000)  # some 0.1 s
            module.fc.weight.mul_(-2)
        with torch.cuda.stream(reader):
            model(x)  # sees the change, and takes the new weights
        with torch.cuda.stream(writer):
            after = model(x)
        torch.cuda.synchronize()
        assert relative_error(after, module(x)) < 1e-2
        assert relative_error(before, after) > 0.5
    assert model.report().refreshes == 1


def test_weights_live_once_for_all_signatures() -> None:
    need("eager")
    module = ZOO["resnet18"].module().cuda()
    weights_mib = sum(p.numel() for p in module.parameters()) * 2 / 2**20
    model = torchaccel.compile(module, "fp16", backend="eager", cuda_graph=False)
    with torch.inference_mode():  # the libraries' workspaces, which stay
        copy.deepcopy(module).half()(torch.randn(1, 3, 64, 64, device="cuda", dtype=torch.half))
        module(torch.randn(1, 3, 64, 64, device="cuda"))
    held = [torch.cuda.memory_allocated() / 2**20]
    with torch.inference_mode():
        for batch in (1, 2, 3):
            model(torch.randn(batch, 3, 64, 64, device="cuda"))
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated() / 2**20)
    assert weights_mib - 1 < held[1] - held[0] < weights_mib + 4
    assert held[3] - held[1] < 1
