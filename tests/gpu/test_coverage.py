"""Full TensorRT coverage is the default; what is outside an engine is named."""

import pytest
import torch

import torchaccel
from tests.gpu.helpers import need, relative_error, served_by_engine

# What runs partly outside engines is not always to be captured in a CUDA graph.
MAY_OVERLAP = pytest.mark.filterwarnings("ignore:TensorRT-RTX's kernels overlap:torchaccel.BackendWarning")


class Bessel(torch.nn.Module):
    """An operator that no TensorRT has, between two that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.last = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = torch.special.bessel_j0(x.float()).to(x.dtype)
        return self.last(x.mean((2, 3)))


def model_and_input() -> tuple[Bessel, torch.Tensor]:
    torch.manual_seed(0)
    return Bessel().eval().cuda(), torch.randn(2, 3, 16, 16, device="cuda")


@pytest.mark.parametrize(
    ("backend", "named"), [("torch_tensorrt", "special_bessel_j0"), ("onnx_tensorrt", "bessel_j0")]
)
def test_an_operator_outside_an_engine_is_an_error_that_names_it(backend: str, named: str) -> None:
    need(backend)
    module, x = model_and_input()
    model = torchaccel.compile(module, "fp16", backend=backend)
    with torch.inference_mode(), pytest.raises(torchaccel.BuildError, match=named):
        model(x)


@MAY_OVERLAP
def test_partial_runs_it_in_pytorch_and_the_report_names_it() -> None:
    need("torch_tensorrt")
    module, x = model_and_input()
    model = torchaccel.compile(module, "fp16", backend="torch_tensorrt", partial=True)
    with torch.inference_mode():
        for scale in (1, 2):
            assert relative_error(model(x * scale), module(x * scale)) < 1e-2
    coverage = model.report().engines[0].coverage
    assert coverage is not None
    assert [name for name in coverage.outside if "bessel" in name]
    assert coverage.engines >= 1
    assert coverage.inside
    assert coverage.outside_time_share is not None
    assert 0 < coverage.outside_time_share < 1
    assert sum(coverage.outside_time_shares.values()) == pytest.approx(coverage.outside_time_share)
    assert [name for name in coverage.outside_time_shares if "bessel" in name]
    assert not [name for name in coverage.outside_time_shares if "tensorrt" in name]
    assert "of the time" in str(coverage)
    plain = model.report().to_dict()["engines"][0]["coverage"]
    assert plain["outside_time_share"] == coverage.outside_time_share
    assert served_by_engine(model)


@MAY_OVERLAP
def test_the_share_of_time_outside_grows_with_the_work_there() -> None:
    need("torch_tensorrt")

    class Heavy(Bessel):
        """Many times as much work outside engines as `Bessel` has."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            for _ in range(20):
                x = torch.special.bessel_j0(x.float()).to(x.dtype)
            return self.last(x.mean((2, 3)))

    shares = []
    for kind in (Bessel, Heavy):
        torch.manual_seed(0)
        model = torchaccel.compile(kind().eval().cuda(), "fp16", backend="torch_tensorrt", partial=True)
        with torch.inference_mode():
            model(torch.randn(8, 3, 256, 256, device="cuda"))
        coverage = model.report().engines[0].coverage
        assert coverage is not None
        assert coverage.outside_time_share is not None
        shares.append(coverage.outside_time_share)
    assert shares[0] < shares[1]


def test_fallback_is_tried_only_when_given_and_the_report_says_why() -> None:
    need("torch_tensorrt")
    module, x = model_and_input()
    model = torchaccel.compile(module, "fp16", backend="torch_tensorrt", fallback="inductor")
    with torch.inference_mode():
        assert relative_error(model(x), module(x)) < 1e-2
    record = model.report().engines[0]
    assert record.backend == "inductor"
    assert "bessel" in record.fell_back_because
    assert model.report().backend == "inductor"


def test_full_coverage_is_reported() -> None:
    need("torch_tensorrt")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).cuda()
    model = torchaccel.compile(module, "fp16", backend="torch_tensorrt")
    with torch.inference_mode():
        model(torch.randn(1, 3, 8, 8, device="cuda"))
    coverage = model.report().engines[0].coverage
    assert coverage is not None
    assert not coverage.outside
    assert coverage.outside_time_share is None
    assert sum(coverage.inside.values()) == 2
