"""Between submodules that are kept in fp32 and the rest: casts, and no cast from one straight into another."""

from typing import Any

import torch
from torch import nn

from tests.helpers import Lambda, captured, on_cpu, relative_error, settled
from torchaccel.borders import before_cast, cast_tree, outermost
from torchaccel.prepare import prepare


def large(layer: nn.Linear, scale: float = 1e6) -> nn.Linear:
    """The layer with weights that make its outputs too large for fp16."""
    with torch.no_grad():
        layer.weight.mul_(scale)
    return layer


def test_cast_tree_casts_floating_tensors_only() -> None:
    tree = {"a": torch.zeros(1), "b": [torch.zeros(1, dtype=torch.int64), 3, None, torch.zeros(1, dtype=torch.bool)]}
    cast = cast_tree(tree, torch.float16)
    assert [cast["a"].dtype, cast["b"][0].dtype, cast["b"][3].dtype] == [torch.float16, torch.int64, torch.bool]
    assert cast["b"][1:3] == [3, None]


def test_names_inside_others_and_repeated_ones_go() -> None:
    assert outermost(["a.b.c", "a.b", "ab", "a.b", "d"]) == ["a.b", "ab", "d"]


def test_values_beyond_fp16_pass_from_one_kept_submodule_straight_into_another() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(large(nn.Linear(8, 8)), nn.LayerNorm(8), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    with torch.no_grad():
        expected = module(x)
        one, two = (prepare(module, torch.float16, kept)(x.half()) for kept in (["0"], ["0", "1"]))
        assert not one.isfinite().all()
        assert relative_error(two, expected) < 1e-2
        assert relative_error(on_cpu(module, "fp16", keep_fp32=["0", "1"])(x), expected) < 1e-2


def test_what_is_written_to_on_the_way_is_cast() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y.view(-1)[0] = 0
        return self.second(y.relu_())

    torch.manual_seed(0)
    module = Lambda(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert relative_error(on_cpu(module, "fp16", keep_fp32=["first", "second"])(x), module(x)) < 1e-2
    narrow = prepare(module, torch.float16, ["first"]).first(x.half())
    assert before_cast(narrow).dtype is torch.float32
    narrow.add_(1)
    assert before_cast(narrow) is narrow


def test_batch_norm_folds_into_a_convolution_that_is_kept_with_it() -> None:
    module = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    assert captured(module, x, precision="fp16", keep_fp32=["0", "1"]).folded == 1
    with torch.no_grad():
        assert relative_error(on_cpu(module, "fp16", keep_fp32=["0", "1"])(x), module(x)) < 1e-2
