"""The detection of change, by the compiled helper and by Python alike."""

import copy
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import small_conv_net
from torchaccel import watch as module_of_watches
from torchaccel.fingerprint import equal
from torchaccel.helper import Helper, helper
from torchaccel.watch import WeightWatch


@pytest.fixture(params=["compiled", "python"], autouse=True)
def looked_at_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test of this file with the compiled helper and without it."""
    if request.param == "compiled" and helper.wait() is None:
        pytest.skip(f"no compiled helper: {helper.problem}")
    monkeypatch.setattr(module_of_watches, "helper", helper if request.param == "compiled" else Helper())
    return str(request.param)


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


def transpose_data(module: nn.Module) -> None:
    module.second.weight.data = module.second.weight.data.transpose(0, 1)


def narrow_data(module: nn.Module) -> None:
    module.fc.weight.data = module.fc.weight.data[:4]


def hook_before(module: nn.Module) -> None:
    module.fc.register_forward_pre_hook(lambda *_: None)


def hook_after(module: nn.Module) -> None:
    module.fc.register_forward_hook(lambda *_: None)


def set_a_mode(module: nn.Module) -> None:
    module.norm.train()


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
    ".data = a transpose of it": transpose_data,
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
    ".data = a part of it": narrow_data,
    "a hook before a submodule": hook_before,
    "a hook after a submodule": hook_after,
    "a submodule's mode": set_a_mode,
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
    module.train()
    module.eval()
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
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


def test_a_removed_hook_is_seen_and_what_is_accepted_in_training_mode_counts_as_in_eval_mode() -> None:
    module = small_conv_net()
    handle = module.fc.register_forward_hook(lambda *_: None)
    watch = WeightWatch(module)
    handle.remove()
    assert watch.structure_changed()
    module.train()
    assert not WeightWatch(module).structure_changed()
    watch.accept()
    module.eval()
    assert not watch.changed()
    assert not watch.structure_changed()


def test_a_submodule_of_another_name_is_another_structure() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    watch = WeightWatch(module)
    module._modules["renamed"] = module._modules.pop("0")
    assert watch.structure_changed()


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
    assert not equal(watch.fingerprint(), before)


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
    assert one in module_of_watches._watches


def test_one_module_with_shared_parameters_and_modules_is_watched() -> None:
    module = small_conv_net()
    module.second_norm.weight = module.norm.weight
    module.again = module.fc
    watch = WeightWatch(module)
    assert not watch.changed()
    with torch.no_grad():
        module.norm.weight.add_(1)
    assert watch.changed()


def test_a_helper_that_comes_later_takes_over_without_missing_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    if helper.wait() is None:
        pytest.skip(f"no compiled helper: {helper.problem}")
    late = Helper()
    monkeypatch.setattr(module_of_watches, "helper", late)
    quiet, written = small_conv_net(), small_conv_net()
    watches = [WeightWatch(quiet), WeightWatch(written)]
    with torch.no_grad():
        written.fc.bias.add_(1)
    late.module = helper.module
    assert [watch.changed() for watch in watches] == [False, True]
    with torch.no_grad():
        quiet.fc.bias.add_(1)
    assert watches[0].changed()


def test_a_write_while_the_helper_takes_over_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    if (compiled := helper.wait()) is None:
        pytest.skip(f"no compiled helper: {helper.problem}")
    late, module = Helper(), small_conv_net()
    monkeypatch.setattr(module_of_watches, "helper", late)
    watch = WeightWatch(module)

    @torch.no_grad()
    def written_meanwhile(tensors: tuple[torch.Tensor, ...]) -> bytes:
        module.fc.bias.add_(1)
        return bytes(compiled.snapshot(tensors))

    late.module = SimpleNamespace(snapshot=written_meanwhile, same=compiled.same)
    assert watch.changed()


def test_parts_of_two_states_are_never_the_same() -> None:
    if (compiled := helper.wait()) is None:
        pytest.skip(f"no compiled helper: {helper.problem}")
    tensors, modes = (torch.ones(2), torch.ones(3)), (False,)
    whole = compiled.snapshot(tensors)
    assert compiled.same((), (), tensors, whole, ({"training": False},), modes)
    assert not compiled.same((), (), tensors, whole[: len(whole) // 2], ({"training": False},), modes)
    assert not compiled.same((), (), tensors, whole, ({"training": False},) * 2, modes)


def test_parameters_that_are_parts_of_one_vector_are_told_from_others_that_share_memory() -> None:
    ordinary, tied, recurrent, views, flat = (small_conv_net() for _ in range(5))
    tied.norm.weight = tied.second_norm.weight
    recurrent.rnn = nn.LSTM(4, 4)
    pieces = list(recurrent.rnn.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(pieces).detach(), pieces)  # as cuDNN has them
    whole = torch.randn(8)
    views.register_buffer("low", whole[:4])
    views.register_buffer("high", whole[4:])
    from_vector(flat)
    found = [WeightWatch(module).shares_storage for module in (ordinary, tied, recurrent, views, flat)]
    assert found == [False, False, False, False, True]
