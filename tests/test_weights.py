"""Weight rules, the store, and the detection of change: what PyTorch tracks, and what only a fingerprint sees."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers import captured
from tests.models import small_conv_net
from torchaccel import weights
from torchaccel.weights import WeightRule, WeightStore, WeightWatch, fingerprint, module_tensors

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


# --- the fingerprint ---


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_equal_bits_give_equal_prints_and_a_changed_or_exchanged_value_another(data: Any) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]))
    size = data.draw(st.integers(1, 40))
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).mul(50).to(dtype)
    before = fingerprint([tensor])
    assert fingerprint([tensor.clone()]) == before
    place = data.draw(st.integers(0, size - 1))
    changed = tensor.clone()
    raw = changed.view(torch.uint8)
    byte = place * tensor.element_size() + data.draw(st.integers(0, tensor.element_size() - 1))
    raw[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert fingerprint([changed]) != before
    other = data.draw(st.integers(0, size - 1))
    swapped = tensor.clone()
    swapped[place], swapped[other] = tensor[other], tensor[place]
    assert (fingerprint([swapped]) == before) == torch.equal(swapped.view(torch.uint8), tensor.view(torch.uint8))


def test_a_fingerprint_has_one_number_for_each_tensor_of_any_kind() -> None:
    tensors = [
        torch.empty(0), torch.tensor(1.5), torch.tensor(True), torch.zeros(3, dtype=torch.uint8), torch.randn(3, 5).T,
        torch.randn(2, 2, dtype=torch.complex64), torch.zeros(5, dtype=torch.float8_e4m3fn),
        nn.Parameter(torch.ones(2)),
    ]  # fmt: skip
    prints = fingerprint(tensors)
    assert len(prints) == len(tensors)
    assert all(isinstance(number, int) for number in prints)
    assert fingerprint([tensor.detach().clone() for tensor in tensors]) == prints
    assert fingerprint([]) == []


def test_zero_and_minus_zero_and_two_nans_of_other_bits_have_different_prints() -> None:
    assert fingerprint([torch.tensor([0.0])]) != fingerprint([torch.tensor([-0.0])])
    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert fingerprint([quiet]) != fingerprint([other])
    assert fingerprint([quiet]) == fingerprint([quiet.clone()])


# --- the watch ---


def values(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())


def step_with(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[nn.Module], None]:
    def act(module: nn.Module) -> None:
        module(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer = make(module.parameters())
        optimizer.step()

    return act


def load(module: nn.Module) -> None:
    module.load_state_dict({name: tensor + 1 for name, tensor in module.state_dict().items()})


def assign(module: nn.Module) -> None:
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)


def from_vector(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(vector + 1, module.parameters())


def move_statistics(module: nn.Module) -> None:
    module.train()
    module(torch.randn(2, 3, 8, 8))
    module.eval()


def average(module: nn.Module) -> None:
    other = small_conv_net()
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    with torch.no_grad():
        ema(values(module), values(other), 0)


@torch.no_grad()
def in_place(module: nn.Module) -> None:
    module.fc.weight[0, 0] += 1


@torch.no_grad()
def foreach(module: nn.Module) -> None:
    torch._foreach_add_(values(module), 1.0)


def swap_data(module: nn.Module) -> None:
    module.fc.weight.data = module.fc.weight.data.clone()


def replace_parameter(module: nn.Module) -> None:
    module.fc.weight = nn.Parameter(module.fc.weight.detach().clone())


def replace_module(module: nn.Module) -> None:
    module.fc = nn.Linear(8, 5)


def replace_by_a_module_without_tensors(module: nn.Module) -> None:
    module.norm = nn.Identity()


def add_module(module: nn.Module) -> None:
    module.extra = nn.ReLU()


def add_module_deep(module: nn.Module) -> None:
    module.fc.extra = nn.Linear(2, 2)


def remove_module(module: nn.Module) -> None:
    del module.second_norm


def add_buffer(module: nn.Module) -> None:
    module.register_buffer("table", torch.zeros(3))


def add_at_the_very_end(module: nn.Module) -> None:
    module.fc.register_buffer("table", torch.zeros(3))


def remove_at_the_very_end(module: nn.Module) -> None:
    del module.fc.bias


def remove_bias(module: nn.Module) -> None:
    module.fc.bias = None


def move_to_double(module: nn.Module) -> None:
    module.double()


def share_memory(module: nn.Module) -> None:
    module.share_memory()


def exchange_tensors(module: nn.Module) -> None:
    torch.utils.swap_tensors(module.norm.weight, module.norm.bias)


@torch.no_grad()
def write_a_buffer(module: nn.Module) -> None:
    module.norm.running_mean.add_(1)


def restyle(module: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(module.fc)


NEW_VALUES = {
    "SGD": step_with(lambda p: torch.optim.SGD(p, 0.1, foreach=False)),
    "SGD, foreach": step_with(lambda p: torch.optim.SGD(p, 0.1, foreach=True)),
    "SGD, fused": step_with(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "AdamW": step_with(lambda p: torch.optim.AdamW(p, 0.1, foreach=False)),
    "AdamW, foreach": step_with(lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "AdamW, fused": step_with(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "load_state_dict": load,
    "vector_to_parameters": from_vector,
    "BatchNorm statistics": move_statistics,
    "EMA": average,
    "an operation in place": in_place,
    "torch._foreach_add_": foreach,
    ".data = another tensor": swap_data,
    "a write to a buffer": write_a_buffer,
    "share_memory": share_memory,
}
NEW_OBJECTS = {
    "load_state_dict(assign=True)": assign,
    "a replaced parameter": replace_parameter,
    "torch.utils.swap_tensors": exchange_tensors,
}
NEW_STRUCTURE = {
    "a replaced submodule": replace_module,
    "a submodule replaced by one without tensors": replace_by_a_module_without_tensors,
    "an added submodule": add_module,
    "an added submodule, deep": add_module_deep,
    "a removed submodule": remove_module,
    "an added buffer": add_buffer,
    "an added buffer, last of all": add_at_the_very_end,
    "a removed parameter, last of all": remove_at_the_very_end,
    "a removed bias": remove_bias,
    "double()": move_to_double,
    "a parametrization": restyle,
}
ALL = {**NEW_VALUES, **NEW_OBJECTS, **NEW_STRUCTURE}


@pytest.mark.parametrize("what", ALL)
def test_the_watch_sees_a_change_that_pytorch_tracks(what: str) -> None:
    module = small_conv_net()
    watch = WeightWatch(module)
    assert not watch.changed()
    ALL[what](module)
    assert watch.changed()
    assert watch.changed(), "asking does not accept"
    assert watch.structure_changed() == (what in NEW_STRUCTURE)
    watch.accept()
    assert not watch.changed()
    assert not watch.structure_changed()


def read_everything(module: nn.Module) -> None:
    module.state_dict()
    copy.deepcopy(module)
    list(module.named_modules())
    module(torch.randn(2, 3, 8, 8)).sum().backward()
    module.requires_grad_(False)
    module.requires_grad_(True)
    module.zero_grad()
    module.eval()
    module.register_forward_hook(lambda *_: None)
    module.note = "an attribute"
    other = small_conv_net()
    other(torch.randn(2, 3, 8, 8)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    with torch.no_grad():
        other.fc.weight.add_(1)
        module.fc.weight.clone().add_(1)


def test_the_watch_does_not_fire_for_anything_else() -> None:
    module = small_conv_net()
    watch = WeightWatch(module)
    read_everything(module)
    gc.collect()
    assert not watch.changed()
    assert not watch.structure_changed()


def test_an_optimizer_of_some_of_the_parameters_counts() -> None:
    module = small_conv_net()
    watch = WeightWatch(module)
    module.fc.weight.grad = torch.ones_like(module.fc.weight)
    torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [module.fc.weight]}], fused=True).step()
    assert watch.changed()


def test_a_write_through_data_is_seen_by_the_fingerprint_alone() -> None:
    module = small_conv_net()
    watch = WeightWatch(module)
    before = watch.fingerprint()
    module.norm.running_var.data[0] += 1e-6
    module.fc.weight.data[0, 0] += 1e-6
    assert not watch.changed()
    assert sum(a != b for a, b in zip(watch.fingerprint(), before, strict=True)) == 2


def test_a_module_made_in_inference_mode_can_be_watched() -> None:
    with torch.inference_mode():
        module = small_conv_net()
    watch = WeightWatch(module)
    assert not watch.changed()
    module.fc.weight = nn.Parameter(torch.zeros(5, 8))
    assert watch.changed()


def test_watches_are_told_of_steps_independently_and_die_with_their_module() -> None:
    module = small_conv_net()
    one, two = WeightWatch(module), WeightWatch(module)
    module.fc.weight.grad = torch.ones_like(module.fc.weight)
    torch.optim.SGD(module.parameters(), 0.1, fused=True).step()
    one.accept()
    assert not one.changed()
    assert two.changed()
    dead = weakref.ref(two)
    del two
    gc.collect()
    assert dead() is None
    assert one in weights._watches


def test_one_module_with_shared_parameters_and_modules_is_watched() -> None:
    module = small_conv_net()
    module.second_norm.weight = module.norm.weight
    module.again = module.fc
    watch = WeightWatch(module)
    assert not watch.changed()
    with torch.no_grad():
        module.norm.weight.add_(1)
    assert watch.changed()
