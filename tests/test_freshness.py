"""Every way in which weights can change: the next call in eval mode computes with the new ones, to the bit.

What PyTorch tracks is seen at the next call, whoever wrote; the module stays in eval mode here, so that nothing but the
tracking can see it. What nothing tracks is seen at `eval()`, at `refresh()` and at a scheduled check.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.helpers import assert_served_afresh, engine_weights, on_cpu, same_bits, settled
from torchaccel.compiled import CompiledModule
from torchaccel.compiler import BACKENDS
from torchaccel.weights import module_tensors

Change = Callable[[CompiledModule], None]


class Net(nn.Module):
    """Two outputs, two heads, buffers of both kinds, a BatchNorm to fold and rows of a table that no input looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.table = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.register_buffer("scale", torch.rand(4) + 0.5)
        self.register_buffer("shift", torch.rand(4), persistent=False)

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden = torch.relu(self.norm(self.conv(x))).mean((2, 3)) * self.scale + self.table(rows)
        return self.first(hidden), {"second": self.second(hidden) + self.shift}


def made(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return settled(Net())


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype), torch.tensor([0, 1])


@torch.no_grad()
def compiled(precision: str, module: nn.Module | None = None, **options: Any) -> CompiledModule:
    """A compiled module whose engine has served a call."""
    model = on_cpu(made() if module is None else module, precision, **options)
    model(*inputs())
    return model


def copies(model: CompiledModule) -> dict[Any, torch.Tensor]:
    return {rule: tensor.clone() for rule, tensor in engine_weights(model).items()}


def differ(before: dict[Any, torch.Tensor], model: CompiledModule) -> bool:
    """Whether the engine computes with other weights than before: without, a test would prove nothing."""
    now = engine_weights(model)
    return now.keys() != before.keys() or any(not same_bits(now[rule], before[rule]) for rule in now)


both_precisions = pytest.mark.parametrize("precision", ["fp32", "fp16"])


# --- optimizers ---


def give_gradients(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters, **how: torch.optim.SGD(parameters, 0.01, **how),
    "SGD with momentum": lambda parameters, **how: torch.optim.SGD(parameters, 0.01, momentum=0.9, **how),
    "Adam": lambda parameters, **how: torch.optim.Adam(parameters, 0.01, **how),
    "AdamW": lambda parameters, **how: torch.optim.AdamW(parameters, 0.01, **how),
}
HOW: tuple[dict[str, bool], ...] = ({"foreach": False}, {"foreach": True}, {"fused": True})


@both_precisions
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_s_steps(name: str, precision: str) -> None:
    module = made()
    optimizers = [OPTIMIZERS[name](module.parameters(), **how) for how in HOW]  # made before the module is compiled
    model = compiled(precision, module)
    for count, optimizer in enumerate(optimizers, 1):
        before = copies(model)
        give_gradients(module)
        optimizer.step()
        with torch.no_grad():
            model(*inputs())
        assert differ(before, model)
        optimizer.step()  # the second one has momentum
        assert_served_afresh(model, *inputs())
        assert (model.report().builds, model.report().refreshes) == (1, 2 * count)


def test_a_compiled_step() -> None:
    model = compiled("fp32")
    before = copies(model)
    give_gradients(model.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it compiles
        torch.compile(torch.optim.SGD(model.parameters(), 0.01).step, backend="aot_eager")()
    assert_served_afresh(model, *inputs())
    assert differ(before, model)


@both_precisions
def test_training_as_usual(precision: str) -> None:
    model = compiled(precision)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    for epoch in (1, 2, 3):
        before = copies(model)
        model.train()
        first, others = model(*inputs())
        (first.square().sum() + others["second"].sum()).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(*inputs())
        assert differ(before, model)
        assert (model.report().builds, model.report().refreshes) == (1, epoch)
    assert_served_afresh(model, *inputs())


# --- what PyTorch tracks ---


def load(model: CompiledModule) -> None:
    model.load_state_dict(made(1).state_dict())


def load_assign(model: CompiledModule) -> None:
    model.load_state_dict(made(1).state_dict(), assign=True)


def load_swap(model: CompiledModule) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        load(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@torch.no_grad()
def ema_by_copy(model: CompiledModule) -> None:
    for parameter, averaged in zip(model.parameters(), made(1).parameters(), strict=True):
        parameter.copy_(averaged)


def ema_by_data(model: CompiledModule) -> None:
    for parameter, averaged in zip(model.parameters(), made(1).parameters(), strict=True):
        parameter.data = averaged.data


@torch.no_grad()
def ema_by_lerp(model: CompiledModule) -> None:
    get_ema_multi_avg_fn(0.9)(list(model.parameters()), list(made(1).parameters()), 0)


@torch.no_grad()
def merge_lora(model: CompiledModule) -> None:
    down, up = torch.randn(2, 4), torch.randn(4, 2)
    model.module.second.weight.add_(up @ down)


@torch.no_grad()
def write_in_place(model: CompiledModule) -> None:
    model.module.first.weight[1, 2] = 3.0


@torch.no_grad()
def write_through_a_view(model: CompiledModule) -> None:
    model.module.second.weight.view(-1)[5:7].fill_(3.0)


@torch.inference_mode()
def write_in_inference_mode(model: CompiledModule) -> None:
    model.module.first.weight.add_(1.0)


@torch.no_grad()
def write_a_buffer(model: CompiledModule) -> None:
    model.module.scale.mul_(2.0)


def replace_parameter(model: CompiledModule) -> None:
    model.module.second.weight = nn.Parameter(torch.randn(4, 4))


def replace_buffer(model: CompiledModule) -> None:
    model.module.shift = torch.randn(4)


def replace_parameter_through_the_model(model: CompiledModule) -> None:
    model.second.bias = nn.Parameter(torch.randn(4))


def move_statistics(model: CompiledModule) -> None:
    model.module.train()
    model.module(*inputs())
    model.module.eval()


def reset_statistics(model: CompiledModule) -> None:
    model.module.norm.reset_running_stats()


def initialise(model: CompiledModule) -> None:
    nn.init.kaiming_uniform_(model.module.first.weight)


def from_vector(model: CompiledModule) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 1.1, model.parameters())


@torch.no_grad()
def foreach_add(model: CompiledModule) -> None:
    torch._foreach_add_(list(model.parameters()), 0.1)


@torch.no_grad()
def foreach_mul(model: CompiledModule) -> None:
    torch._foreach_mul_(list(model.parameters()), 1.1)


def exchange_within(model: CompiledModule) -> None:
    torch.utils.swap_tensors(model.module.first.weight, model.module.second.weight)


def exchange_with_another(model: CompiledModule) -> None:
    torch.utils.swap_tensors(model.module.first.weight, nn.Parameter(torch.randn(4, 4)))


def exchange_names(model: CompiledModule) -> None:
    first, second = model.module.first, model.module.second
    first.weight, second.weight = second.weight, first.weight


def exchange_data(model: CompiledModule) -> None:
    first, second = model.module.first.weight, model.module.second.weight
    first.data, second.data = second.data, first.data


def transpose_data(model: CompiledModule) -> None:
    model.module.second.weight.data = model.module.second.weight.data.t()  # the same memory, read in another order


def there_and_back(model: CompiledModule) -> None:
    model.half()
    model.float()


IN_PLACE: dict[str, Change] = {
    "load_state_dict": load,
    "load_state_dict(assign=True)": load_assign,
    "load_state_dict, swapping": load_swap,
    "EMA, by copy_": ema_by_copy,
    "EMA, by .data": ema_by_data,
    "EMA, by lerp": ema_by_lerp,
    "a merged LoRA": merge_lora,
    "one element": write_in_place,
    "through a view": write_through_a_view,
    "in inference mode": write_in_inference_mode,
    "a buffer": write_a_buffer,
    "another parameter": replace_parameter,
    "another parameter, through the model": replace_parameter_through_the_model,
    "another buffer": replace_buffer,
    "BatchNorm statistics": move_statistics,
    "BatchNorm statistics, reset": reset_statistics,
    "nn.init": initialise,
    "vector_to_parameters": from_vector,
    "_foreach_add_": foreach_add,
    "_foreach_mul_": foreach_mul,
    "swap_tensors within": exchange_within,
    "swap_tensors with another": exchange_with_another,
    "two parameters exchanged": exchange_names,
    "two .data exchanged": exchange_data,
    ".data = its transpose": transpose_data,
    "half() and float()": there_and_back,
}


@both_precisions
@pytest.mark.parametrize("change", IN_PLACE)
def test_new_values_are_taken_in_place(change: str, precision: str) -> None:
    model = compiled(precision)
    before = copies(model)
    IN_PLACE[change](model)
    assert_served_afresh(model, *inputs())
    assert differ(before, model)
    assert (model.report().builds, model.report().refreshes) == (1, 1)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def replace_head(model: CompiledModule) -> None:
    model.module.first = nn.Linear(4, 7)


def replace_head_alike(model: CompiledModule) -> None:
    model.first = nn.Linear(4, 4)


def exchange_submodules(model: CompiledModule) -> None:
    model.module.first, model.module.second = model.module.second, model.module.first


def replace_by_nothing(model: CompiledModule) -> None:
    model.module.norm = nn.Identity()


def replace_parameter_by_another_shape(model: CompiledModule) -> None:
    model.module.table.weight = nn.Parameter(torch.randn(9, 4))


def remove_bias(model: CompiledModule) -> None:
    model.module.second.bias = None


def register_parametrization(model: CompiledModule) -> None:
    parametrize.register_parametrization(model.module.first, "weight", Doubled())


def register_weight_norm(model: CompiledModule) -> None:
    parametrizations.weight_norm(model.module.second)
    with torch.no_grad():
        model.module.second.parametrizations.weight.original0.mul_(1.5)


def prune(model: CompiledModule) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.module.first, "weight", 0.5)
    with torch.no_grad():
        model.module(*inputs())  # until then PyTorch cannot copy a pruned module


def share_submodule(model: CompiledModule) -> None:
    model.module.second = model.module.first


ANEW: dict[str, Change] = {
    "another submodule": replace_head,
    "another submodule of the same shapes": replace_head_alike,
    "two submodules exchanged": exchange_submodules,
    "one without tensors": replace_by_nothing,
    "a parameter of another shape": replace_parameter_by_another_shape,
    "a removed bias": remove_bias,
    "a parametrization": register_parametrization,
    "weight_norm": register_weight_norm,
    "pruning": prune,
    "a shared submodule": share_submodule,
}


@pytest.mark.parametrize("change", ANEW)
def test_another_structure_is_built_anew(change: str) -> None:
    model = compiled("fp16")
    before = copies(model)
    ANEW[change](model)
    assert_served_afresh(model, *inputs())
    assert differ(before, model)
    assert any("structure" in event for event in model.report().events)
    with torch.no_grad():
        model(*inputs())
    assert (model.report().builds, model.report().refreshes) == (2, 1)


@both_precisions
def test_what_stands_behind_a_parametrization_and_what_is_left_of_it(precision: str) -> None:
    model = compiled(precision)
    register_parametrization(model)
    assert_served_afresh(model, *inputs())
    with torch.no_grad():
        model.module.first.parametrizations.weight.original.add_(0.5)
    assert_served_afresh(model, *inputs())
    assert (model.report().builds, model.report().refreshes) == (2, 2)
    parametrize.remove_parametrizations(model.module.first, "weight")
    assert_served_afresh(model, *inputs())
    write_in_place(model)
    assert_served_afresh(model, *inputs())
    assert (model.report().builds, model.report().refreshes) == (3, 4)


@both_precisions
def test_a_spectral_norm_s_own_buffers(precision: str) -> None:
    module = made()
    parametrizations.spectral_norm(module.first)
    model = compiled(precision, module)
    before = copies(model)
    move_statistics(model)
    assert_served_afresh(model, *inputs())
    assert differ(before, model)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("fp32", torch.float64)])
def test_a_module_that_is_cast(precision: str, dtype: torch.dtype) -> None:
    model = compiled(precision)
    assert model.to(dtype) is model
    with torch.no_grad():
        assert model(*inputs(dtype))[0].dtype is dtype
    assert_served_afresh(model, *inputs(dtype))
    assert model.report().builds == 2
    model.float()
    assert_served_afresh(model, *inputs())
    assert model.report().builds == 3


@pytest.mark.filterwarnings("ignore:AveragedModel has attributes:torchaccel.BackendWarning")
@pytest.mark.parametrize("what", ["the average", "what averages"])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["SWA", "EMA"])
def test_an_averaged_model(what: str, average: Any) -> None:
    trained = made()
    averaged = AveragedModel(trained, multi_avg_fn=average, use_buffers=True).eval()
    model = compiled("fp32", averaged.module if what == "the average" else averaged)
    for seed in (1, 2, 3):  # the first update copies, the second one averages
        before = copies(model)
        trained.load_state_dict(made(seed).state_dict())
        averaged.update_parameters(trained)
        with torch.no_grad():
            model(*inputs())
        assert differ(before, model)
    assert_served_afresh(model, *inputs())
    assert model.report().builds == 1


# --- tied weights ---


def tied() -> Net:
    module = made()
    module.second.weight = module.first.weight
    return module


@both_precisions
def test_weights_that_are_tied_after_the_compilation(precision: str) -> None:
    model = compiled(precision)
    before = copies(model)
    model.module.second.weight = model.module.first.weight
    assert_served_afresh(model, *inputs())
    with torch.no_grad():
        model.module.first.weight.add_(1.0)
    assert_served_afresh(model, *inputs())
    assert differ(before, model)


@both_precisions
@pytest.mark.parametrize("head", ["first", "second"])
def test_weights_that_are_untied_after_the_compilation(head: str, precision: str) -> None:
    model = compiled(precision, tied())
    getattr(model.module, head).weight = nn.Parameter(torch.randn(4, 4))
    assert_served_afresh(model, *inputs())


@both_precisions
def test_weights_that_stay_tied(precision: str) -> None:
    model = compiled(precision, tied())
    with torch.no_grad():
        model.module.second.weight.add_(1.0)
    assert_served_afresh(model, *inputs())
    model.module.first.weight = model.module.second.weight = nn.Parameter(torch.randn(4, 4))
    assert_served_afresh(model, *inputs())


# --- what nothing tracks ---


def data_add(model: CompiledModule) -> None:
    model.module.second.weight.data.add_(1.0)


def data_copy(model: CompiledModule) -> None:
    for parameter, averaged in zip(model.parameters(), made(1).parameters(), strict=True):
        parameter.data.copy_((parameter + averaged) / 2)


def data_of_statistics(model: CompiledModule) -> None:
    model.module.norm.running_var.data.mul_(4.0)


def numpy_write(model: CompiledModule) -> None:
    model.module.table.weight.detach().numpy()[5] += 7.0  # a row that no input looks up


def fused_kernel(model: CompiledModule) -> None:
    parameters = [parameter.detach() for parameter in model.parameters()]
    gradients = [torch.ones_like(parameter) for parameter in parameters]
    rates = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0}
    flags = {"nesterov": False, "maximize": False, "is_first_step": True}
    torch._fused_sgd_(parameters, gradients, [], **rates, **flags)


def functional_statistics(model: CompiledModule) -> None:
    norm = model.module.norm
    nn.functional.batch_norm(torch.randn(8, 4, 3, 3), norm.running_mean, norm.running_var, training=True)


UNTRACKED: dict[str, Change] = {
    ".data.add_": data_add,
    "EMA, by .data.copy_": data_copy,
    ".data of a statistic": data_of_statistics,
    "NumPy": numpy_write,
    "a fused kernel": fused_kernel,
    "functional BatchNorm": functional_statistics,
}


@both_precisions
@pytest.mark.parametrize("change", UNTRACKED)
def test_what_nothing_tracks_is_seen_when_it_is_looked_for(change: str, precision: str) -> None:
    model = compiled(precision)
    for count, look in enumerate((model.eval, model.refresh), 1):
        before = copies(model)
        UNTRACKED[change](model)
        look()
        with torch.no_grad():
            model(*inputs())
        assert differ(before, model)
        assert (model.report().builds, model.report().refreshes) == (1, count)
        if count == 1:
            assert_served_afresh(model, *inputs())


@both_precisions
def test_what_nothing_tracks_is_seen_at_the_next_call_where_every_call_looks(precision: str) -> None:
    model = compiled(precision, check_weights_every=1)
    for refreshes, change in enumerate(UNTRACKED.values(), 1):
        change(model)
        with torch.no_grad():
            model(*inputs())
        assert model.report().refreshes == refreshes
    assert_served_afresh(model, *inputs())


@both_precisions
def test_parameters_made_in_inference_mode_have_no_version_and_are_looked_at(precision: str) -> None:
    with torch.inference_mode():
        model = compiled(precision)
        model.module.first.weight.add_(1.0)
        model.eval()
    assert_served_afresh(model, *inputs())
    assert model.report().refreshes == 1


# --- memory that is used again ---


@both_precisions
def test_a_vector_that_is_written_to_and_given_to_the_parameters_again(precision: str) -> None:
    """As an evolution strategy or a line search does.

    The first time the parameters become parts of the vector, without its version counter: the next write to it is one
    that PyTorch does not track, whether or not it is given to them again.
    """
    model = compiled(precision)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    for given in (True, True, False):
        vector.mul_(1.1)
        if given:
            nn.utils.vector_to_parameters(vector, model.parameters())
        assert_served_afresh(model, *inputs())


def test_new_data_in_the_place_of_the_old_in_memory() -> None:
    """Replaced twice between two calls, data comes to where it was: a GPU's allocator hands out what was freed last.

    The C library does so from 32 MiB on, which it maps and unmaps.
    """
    model = on_cpu(nn.Linear(3000, 3000, bias=False))
    x = torch.randn(2, 3000)
    with torch.no_grad():
        model(x)
    weight = model.module.weight
    seen = weight.data_ptr()
    for _ in range(10):
        weight.data = weight.data * 1.01
        if weight.data_ptr() == seen:
            break
    assert_served_afresh(model, x)


# --- how little is enough ---


@both_precisions
def test_a_millionth_in_any_one_tensor_is_taken(precision: str) -> None:
    model = compiled(precision)
    for count, (name, tensor) in enumerate(floating(model.module), 1):
        before = copies(model)
        with torch.no_grad():
            tensor.view(-1)[-1] += 1e-6
            model(*inputs())
        assert model.report().refreshes == count, name
        if precision == "fp32":
            for rule, old in before.items():
                assert same_bits(engine_weights(model)[rule], old) == (name not in rule.sources), (name, rule.sources)
    assert_served_afresh(model, *inputs())


def floating(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in module_tensors(module).items() if tensor.is_floating_point()]


@both_precisions
def test_a_change_that_shows_in_the_second_output_alone(precision: str) -> None:
    model = compiled(precision)
    with torch.no_grad():
        first, others = model(*inputs())
        merge_lora(model)
        first_again, others_again = model(*inputs())
    assert same_bits(first, first_again)
    assert not same_bits(others["second"], others_again["second"])
    assert_served_afresh(model, *inputs())


@both_precisions
def test_a_change_that_no_input_has_shown_yet(precision: str) -> None:
    model = compiled(precision)
    with torch.no_grad():
        model.module.table.weight[5].mul_(-3.0)
        model(*inputs())
    x, _ = inputs()
    assert_served_afresh(model, x, torch.tensor([5, 5]))
    assert model.report().builds == 1


# --- what is no change ---


def freeze(model: CompiledModule) -> None:
    model.requires_grad_(False)


def go_to_train_and_back(model: CompiledModule) -> None:
    model.train()
    model.eval()


def forget_gradients(model: CompiledModule) -> None:
    give_gradients(model)
    model.zero_grad()


def step_another(model: CompiledModule) -> None:
    other = made(1)
    give_gradients(other)
    torch.optim.AdamW(other.parameters(), fused=True).step()


NOTHING: dict[str, Change] = {
    "freezing": freeze,
    "train() and eval()": go_to_train_and_back,
    "gradients": forget_gradients,
    "another module's optimizer": step_another,
    "state_dict": lambda model: model.state_dict() and None,
    "a copy": lambda model: copy.deepcopy(model.module) and None,
}


@pytest.mark.parametrize("change", NOTHING)
def test_what_leaves_the_weights_as_they_are_costs_no_refresh(change: str) -> None:
    model = compiled("fp32")
    NOTHING[change](model)
    assert_served_afresh(model, *inputs())
    assert (model.report().builds, model.report().refreshes) == (1, 0)


@both_precisions
def test_what_is_frozen_can_still_be_written_to(precision: str) -> None:
    model = compiled(precision)
    freeze(model)
    write_in_place(model)
    assert_served_afresh(model, *inputs())
    assert (model.report().builds, model.report().refreshes) == (1, 1)


# --- Inductor ---


def step_fused(model: CompiledModule) -> None:
    give_gradients(model)
    torch.optim.AdamW(model.parameters(), 0.01, fused=True).step()


def test_inductor_s_kernels_read_new_weights() -> None:
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    model = compiled("fp32", backend="inductor")
    changes = (step_fused, ema_by_data, merge_lora, move_statistics, replace_buffer, exchange_within, load_assign)
    for refreshes, change in enumerate(changes, 1):
        before = copies(model)
        change(model)
        eager = on_cpu(copy.deepcopy(model.module))
        with torch.no_grad():
            results, expected = model(*inputs()), eager(*inputs())
        assert torch.allclose(results[0], expected[0], rtol=1e-4, atol=1e-5)
        assert torch.allclose(results[1]["second"], expected[1]["second"], rtol=1e-4, atol=1e-5)
        for rule, tensor in engine_weights(eager).items():
            assert same_bits(engine_weights(model)[rule], tensor), f"{change.__name__}: {rule.sources}"
        assert differ(before, model)
        assert (model.report().builds, model.report().refreshes) == (1, refreshes)
    assert_served_afresh(model, *inputs())
