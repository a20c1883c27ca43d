"""Networks at random, in place and out of it, with branches and shared tensors: rewritten they compute the same."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.helpers import captured, relative_error, settled
from torchaccel.backends.fused import Fused
from torchaccel.fused import cudnn_plans
from torchaccel.fused.passes import rewrite
from torchaccel.precision import PRECISIONS
from torchaccel.weights import WeightStore

CPU, FP32 = torch.device("cpu"), PRECISIONS["fp32"]

LAYERS: dict[str, Callable[[random.Random], nn.Module]] = {
    "conv": lambda draw: nn.Conv2d(8, 8, 3, padding=1, bias=draw.random() < 0.7, groups=draw.choice([1, 1, 2])),
    "pointwise": lambda draw: nn.Conv2d(8, 8, 1),
    "depthwise": lambda draw: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "norm": lambda draw: nn.BatchNorm2d(8),
}
STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "relu": lambda x, other: functional.relu(x),
    "relu_": lambda x, other: functional.relu(x, inplace=True),
    "silu_": lambda x, other: functional.silu(x, inplace=True),
    "relu6": lambda x, other: functional.relu6(x),
    "hardswish": lambda x, other: functional.hardswish(x),
    "add": lambda x, other: x + other,
    "add to": lambda x, other: other + x,
    "add_": lambda x, other: x.add_(other),
    "mul": lambda x, other: x * other.tanh(),
    "shuffle": lambda x, other: x.reshape(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "detach": lambda x, other: x.detach() + 1,
    "cat": lambda x, other: torch.cat([x[:, :4], other[:, 4:]], 1),
    "pool": lambda x, other: functional.max_pool2d(x, 3, 1, 1),
}


class Drawn(nn.Module):
    """A stem and up to nine steps, each of which may read one of the last four results besides."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, draw.choice([1, 3]), padding="same", bias=draw.random() < 0.5)
        kinds = [draw.choice([*LAYERS, *LAYERS, *STEPS]) for _ in range(draw.randint(2, 9))]
        self.steps = [(kind, draw.randint(1, 4)) for kind in kinds]
        self.layers = nn.ModuleList(LAYERS[kind](draw) if kind in LAYERS else nn.Identity() for kind in kinds)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        results = [self.stem(x)]
        for (kind, back), layer in zip(self.steps, self.layers, strict=True):
            last, other = results[-1], results[-min(back, len(results))]
            results.append(layer(last) if kind in LAYERS else STEPS[kind](last, other))
        return results[-1].mean((2, 3)), results[-1]


@pytest.mark.parametrize("by_plans", [False, True], ids=["", "cudnn's plans"])
@torch.no_grad()
def test_networks_at_random_compute_the_same(by_plans: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_plans, "possible", lambda x: by_plans)
    found: Counter[str] = Counter()
    for seed in range(60):
        module, x = settled(Drawn(seed)), torch.randn(2, 3, 9, 7)
        expected = module(x)
        program = captured(module, x)
        found.update(rewrite(program))
        program.take_weights(WeightStore(), module, channels_last=True)
        backend = Fused(passes=())
        engine = backend.load(backend.build(program, FP32, CPU), CPU)
        for result, wanted in zip(engine(engine.input_buffer(0, x)), expected, strict=True):
            assert relative_error(result, wanted) < 1e-5, (seed, module.steps)
    assert min(found[name] for name in ("write_out_of_place", "fuse_convolutions", "pad_first_channels")) > 20
