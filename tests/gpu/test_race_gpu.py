"""The race on a GPU: the winner, measured again, against everyone in the field."""

import warnings

import pytest
import torch
from torchvision.models import resnet18

import torchaccel
from torchaccel import compiler
from torchaccel.errors import MeasurementWarning


@pytest.fixture(scope="module")
def field() -> tuple[torchaccel.CompiledModule, torch.Tensor, torch.nn.Module]:
    torch.manual_seed(0)
    module, images = resnet18().cuda().eval(), torch.randn(8, 3, 224, 224, device="cuda")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(compiler, "FIELD", tuple(compiler.BACKENDS.values()))  # without the one that takes minutes
        return torchaccel.compile(module, "fp16", backend="fastest", inputs=images), images, module


def test_the_winner_measured_again_is_not_slower_than_anybody(field) -> None:
    model, images, module = field
    (race,) = model.report().races
    print(race)
    survivors = [entry.name for entry in race.entries if entry.outcome != "out"]
    assert set(survivors) == set(compiler.BACKENDS)
    with torch.inference_mode():
        runners = {"fastest": model.runner_for(images)}
        for name in survivors:
            runners[name] = torchaccel.compile(module, "fp16", backend=name).runner_for(images)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MeasurementWarning)
            again = torchaccel.compare({name: runner.replay for name, runner in runners.items()}, samples=400)
    print(again)
    for name in runners:
        # The value itself: the lower end of its interval would pass whatever is noisy enough.
        assert again.ratio("fastest", name).value <= 1.02, f"{name} is faster: {again.ratio('fastest', name)}"


def test_the_losers_memory_is_given_back(field) -> None:
    model, images, _ = field
    alone = torchaccel.compile(resnet18().cuda(), "fp16", backend=model.report().backend)
    with torch.inference_mode():
        alone(images)
        model(images)
    assert model.report().device_memory_mib <= 1.1 * alone.report().device_memory_mib + 8


def test_a_race_for_the_stream() -> None:
    torch.manual_seed(0)
    module, images = resnet18().cuda().eval(), torch.randn(8, 3, 224, 224, device="cuda")
    record = torchaccel.race(module, images, "fp16", objective="stream", race_budget_s=0.1)
    assert record.objective == "stream"
    assert record.winner.median_ms is not None
