"""Weight rules and the store."""

import pytest
import torch
from torch import nn

from tests.helpers import captured
from tests.models import small_conv_net
from torchaccel.weights import WeightRule, WeightStore, module_tensors

# --- rules ---


def test_a_cast_is_rounded_once_and_is_a_tensor_of_its_own() -> None:
    source = torch.randn(4, 3, 2, 2)
    cast = WeightRule(("w",), dtype=torch.float16).compute({"w": source})
    assert torch.equal(cast, source.half())
    kept = WeightRule(("w",), dtype=torch.float32).compute({"w": source})
    assert torch.equal(kept, source)
    assert kept.data_ptr() != source.data_ptr()
    whole = WeightRule(("n",)).compute({"n": torch.tensor([3])})
    assert whole.dtype is torch.int64


def test_channels_last_lays_out_four_dimensional_weights_only() -> None:
    rule = WeightRule(("w",), channels_last=True)
    assert rule.compute({"w": torch.randn(4, 3, 2, 2)}).is_contiguous(memory_format=torch.channels_last)
    assert rule.compute({"w": torch.randn(4, 3, 2).transpose(0, 1)}).is_contiguous()
    assert WeightRule(("w",)).compute({"w": torch.randn(4, 3, 2)}.copy()).is_contiguous()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_folding_is_the_formula_rounded_once(has_bias: bool, has_affine: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "w": torch.randn(4, 3, 2, 2), "b": torch.randn(4), "gamma": torch.randn(4), "beta": torch.randn(4),
        "mean": torch.randn(4), "variance": torch.rand(4) * 3,
    }  # fmt: skip
    bias = "b" if has_bias else None
    gamma, beta = ("gamma", "beta") if has_affine else (None, None)
    weight = WeightRule(("w", gamma, "variance"), "folded_weight", dtype, 1e-3).compute(tensors)
    folded = WeightRule((bias, gamma, beta, "mean", "variance"), "folded_bias", dtype, 1e-3).compute(tensors)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    scale = (exact["gamma"] if has_affine else 1.0) / (exact["variance"] + 1e-3).sqrt()
    expected_bias = ((exact["b"] if has_bias else 0.0) - exact["mean"]) * scale + (exact["beta"] if has_affine else 0.0)
    expected_weight = exact["w"] * scale.reshape(-1, 1, 1, 1)
    for got, wanted in ((weight, expected_weight), (folded, expected_bias)):
        assert got.dtype is dtype
        one_rounding = torch.finfo(dtype).eps / 2 * wanted.abs() + 1e-7 * (dtype is torch.float16)
        assert ((got.double() - wanted).abs() <= 1.01 * one_rounding).all()


def test_folding_in_double_stays_in_double() -> None:
    tensors = {"w": torch.randn(2, 1, 1, 1).double(), "m": torch.randn(2).double(), "v": torch.rand(2).double() + 1}
    weight = WeightRule(("w", None, "v"), "folded_weight").compute(tensors)
    bias = WeightRule((None, None, None, "m", "v"), "folded_bias").compute(tensors)
    assert torch.equal(weight.reshape(-1), tensors["w"].reshape(-1) * tensors["v"].rsqrt())
    assert torch.equal(bias, -tensors["m"] * tensors["v"].rsqrt())


# --- the store ---


def perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module_tensors(module).values():
            if tensor.is_floating_point():
                tensor.mul_(1.7).abs_()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_refreshed_store_holds_bit_for_bit_what_a_fresh_one_holds(precision: str, channels_last: bool) -> None:
    module = small_conv_net()
    x = torch.randn(2, 3, 8, 8)
    store = WeightStore()
    program = captured(module, x, precision=precision)
    program.take_weights(store, module, channels_last=channels_last)
    assert program.folded == 2
    held = {name: tensor for name, tensor in program.exported.state_dict.items() if name in program.rules}
    before = {name: tensor.clone() for name, tensor in held.items()}
    perturb(module)
    store.refresh(module)
    fresh = captured(module, x, precision=precision)
    fresh.take_weights(WeightStore(), module, channels_last=channels_last)
    assert held
    for name, tensor in held.items():
        assert torch.equal(tensor, fresh.exported.state_dict[name]), name
        assert tensor.stride() == fresh.exported.state_dict[name].stride(), name
        assert not torch.equal(tensor, before[name]), name


def test_the_store_computes_a_rule_once_and_refreshes_in_place() -> None:
    module = nn.Linear(3, 2)
    store = WeightStore()
    rules = [WeightRule(("weight",), dtype=torch.float16), WeightRule(("bias",), dtype=torch.float16)]
    first = store.get(rules, module)
    assert [a is b for a, b in zip(first, store.get(rules, module), strict=True)] == [True, True]
    assert store.size_bytes() == 2 * (6 + 2)
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(store.get(rules, module)[0], first[0])
    address = first[0].data_ptr()
    store.refresh(module)
    assert store.get(rules, module)[0] is first[0]
    assert first[0].data_ptr() == address
    assert torch.equal(first[0], module.weight.detach().half())
    store.clear()
    assert store.size_bytes() == 0
    assert store.get(rules, module)[0] is not first[0]


def test_a_shared_tensor_is_found_under_each_of_its_names() -> None:
    module = nn.Module()
    module.a = nn.Linear(2, 2)
    module.b = nn.Linear(2, 2)
    module.b.weight = module.a.weight
    module.register_buffer("table", torch.zeros(1))
    module.register_buffer("again", module.table)
    assert set(module_tensors(module)) == {"a.weight", "a.bias", "b.weight", "b.bias", "table", "again"}
