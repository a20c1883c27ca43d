"""Shapes: each is built once, and what is kept of them is bounded."""

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import Lambda, assert_fresh, images, in_place, on_cpu, relative_error
from tests.models import small_conv_net
from torchaccel.errors import InputError


@torch.no_grad()
def test_a_shape_that_comes_back_does_not_build_again_and_the_least_recent_runner_goes() -> None:
    model = on_cpu(small_conv_net(), max_runners=2)
    for batch in (1, 2, 1, 3):
        model(images(batch))
    report = model.report()
    assert report.builds == 3
    assert [runner.signature for runner in report.runners] == ["float32[1, 3, 8, 8]", "float32[3, 3, 8, 8]"]
    x = images(2)
    assert relative_error(model(x), model.module(x)) < 2e-6
    report = model.report()
    assert report.builds == 3
    assert [runner.signature for runner in report.runners] == ["float32[3, 3, 8, 8]", "float32[2, 3, 8, 8]"]
    assert report.calls_by_engine == 5


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1, 2, 8), (1, 1, 2), (2, 4, 8), (2, 2, 2)])
def test_a_dynamic_batch_is_one_build_for_all_sizes(sizes: tuple[int, int, int]) -> None:
    model = on_cpu(small_conv_net(), dynamic_batch=sizes)
    for batch in (sizes[0], sizes[2], sizes[1]):
        x = images(batch)
        assert relative_error(model(x), model.module(x)) < 2e-6
    (engine,) = model.report().engines
    assert engine.signature == f"float32[{sizes[0]}, 3, 8, 8], batch {sizes[0]} to {sizes[2]}"
    for batch in (sizes[0] - 1, sizes[2] + 1):
        if batch:
            with pytest.raises(InputError, match=rf"the batch is {batch}, outside dynamic_batch="):
                model(images(batch))


@torch.no_grad()
def test_a_dynamic_engine_takes_new_weights_too() -> None:
    model = on_cpu(small_conv_net(), dynamic_batch=(1, 2, 8))
    model(images(2))
    model(images(5))
    in_place(model)
    assert_fresh(model, images(5), builds=1, refreshes=1)
    assert_fresh(model, images(3), builds=1, refreshes=1)


@torch.no_grad()
def test_a_dynamic_batch_builds_anew_for_another_image_size() -> None:
    model = on_cpu(small_conv_net(), dynamic_batch=(1, 2, 8))
    model(images(2))
    model(torch.randn(2, 3, 10, 10))
    model(torch.randn(5, 3, 10, 10))
    assert model.report().builds == 2


@torch.no_grad()
def test_a_dynamic_batch_builds_anew_for_another_dtype_and_for_other_inputs_that_have_a_batch() -> None:
    model = on_cpu(Lambda(lambda _, x, y: x + y if y.dim() == 1 else x * y), dynamic_batch=(1, 2, 8))
    for y in (torch.ones(3), torch.ones(4, 3)):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(4, 3, dtype=dtype)
            result = model(x, y)
            assert relative_error(result, model.module(x, y)) < 2e-6
            assert result.dtype is dtype
    assert model.report().builds == 4


@torch.no_grad()
def test_an_input_that_has_the_batch_s_size_by_chance_is_taken_as_at_the_other_sizes() -> None:
    model = on_cpu(Lambda(lambda _, x, mask: x @ mask), dynamic_batch=(1, 8, 8))
    for batch in (2, 4, 8, 4):
        x, mask = torch.randn(batch, 4), torch.randn(4, 4)
        assert relative_error(model(x, mask), model.module(x, mask)) < 2e-6
    assert model.report().builds == 1


@torch.no_grad()
def test_a_known_plan_does_not_serve_inputs_of_which_others_have_a_batch() -> None:
    def mean(_: Any, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x * 2 if y is None else x.mean(0) + y.mean(0)

    model = on_cpu(Lambda(mean), dynamic_batch=(1, 8, 8))
    for given in ((4, 4), (4, 2), (3, 3), (4,)):
        inputs = [torch.randn(size, 3) for size in given]
        assert relative_error(model(*inputs), model.module(*inputs)) < 2e-6
    assert model.report().builds == 3


def test_an_empty_batch_goes_through_the_module() -> None:
    model = on_cpu(small_conv_net())
    with torch.no_grad():
        assert model(images(0)).shape == (0, 5)
    assert model.report().calls_by_module == 1
    assert model.report().builds == 0


@torch.no_grad()
def test_by_default_the_eight_most_recent_shapes_are_kept() -> None:
    model = on_cpu(nn.Linear(4, 2))
    for batch in range(1, 11):
        model(torch.randn(batch, 4))
    assert [runner.signature for runner in model.report().runners] == [f"float32[{batch}, 4]" for batch in range(3, 11)]
    kept = model.runner_for(torch.randn(3, 4))
    dropped = model.runner_for(torch.randn(1, 4))
    assert kept.record.calls == 1, "this one stayed"
    assert dropped.record.calls == 0, "this one is new"
    assert model.report().builds == 10


@torch.no_grad()
@pytest.mark.parametrize("dynamic_batch", [None, (1, 4, 4)])
def test_the_last_partial_batch_of_an_epoch_costs_at_most_one_build_ever(dynamic_batch: object) -> None:
    model = on_cpu(small_conv_net(), dynamic_batch=dynamic_batch)
    loader = DataLoader(TensorDataset(torch.randn(11, 3, 8, 8)), batch_size=4)
    for epoch in range(4):
        sizes = []
        for (x,) in loader:
            assert relative_error(model(x), model.module(x)) < 2e-6
            sizes.append(len(x))
        assert sizes == [4, 4, 3]
        assert model.report().builds == (2 if dynamic_batch is None else 1)
        assert model.report().refreshes == epoch
        in_place(model)


@torch.no_grad()
def test_a_shape_outside_the_range_says_what_is_allowed_and_leaves_the_engine_usable() -> None:
    model = on_cpu(small_conv_net(), dynamic_batch=(2, 3, 4))
    for batch in (1, 5):
        with pytest.raises(InputError, match=rf"the batch is {batch}, outside.*between 2 and 4"):
            model(images(batch))
    assert_fresh(model, images(4), builds=1, refreshes=0)
    with pytest.raises(InputError, match="the batch is 5"):
        model(images(5))
    assert_fresh(model, images(2), builds=1, refreshes=0)


def held() -> tuple[int, float]:
    """Blocks that Python has allocated, and the MiB of memory that the process has."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return sys.getallocatedblocks(), pages * 4096 / 2**20


@torch.no_grad()
@pytest.mark.parametrize(
    ("max_runners", "calls"), [(8, 10_000), (64, 2_000)], ids=["each call makes its runner anew", "every runner stays"]
)
def test_ten_thousand_calls_of_fifty_shapes_build_fifty_times_and_hold_no_more_after_the_first_fifty(
    max_runners: int, calls: int
) -> None:
    torch.manual_seed(0)
    model = on_cpu(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), max_runners=max_runners)
    inputs = [torch.randn(1 + index % 10, 1 + index // 10, 4) for index in range(50)]
    expected = [model.module(x) for x in inputs]

    def cycle() -> None:
        for x in inputs:
            model(x)

    cycle()
    blocks, mib = held()
    for _ in range(calls // 50 - 1):
        cycle()
    more_blocks, more_mib = held()
    assert all(torch.allclose(model(x), r) for x, r in zip(inputs, expected, strict=True))
    report = model.report()
    assert (report.builds, report.calls_by_engine, report.calls_by_module) == (50, calls + 50, 0)
    assert len(report.runners) == min(50, max_runners)
    assert more_blocks - blocks < 1_000, "fewer than one for two calls"
    assert more_mib - mib < 5, "a runner's buffers and engine take more"
