"""What a module may take and return, kind by kind; tests/test_fuzz.py mixes them."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tests.fuzz_check import compare
from tests.helpers import Lambda, on_cpu
from tests.trees import Colour, Other, Pair, Record, Typed
from torchaccel.compiled import CompiledModule


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def served(function: Callable[..., Any], *calls: tuple[tuple[Any, ...], dict[str, Any]], builds: int) -> CompiledModule:
    """The function as a compiled module that has served all the calls from engines, each as the module would."""
    module = Lambda(lambda self, *args, **kwargs: function(*args, **kwargs))
    model = on_cpu(module)
    for args, kwargs in calls:
        compare(model(*args, **kwargs), module(*args, **kwargs), 2e-6)
    report = model.report()
    assert (report.calls_by_engine, report.calls_by_module, report.builds) == (len(calls), 0, builds)
    return model


# --- pytrees ---

CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"b": x, "a": y, 3: None},
    "ordered dict": lambda x, y: OrderedDict(b=x, a=y),
    "default dict": lambda x, y: defaultdict(list, {"b": x, "a": y}),
    "deque": lambda x, y: deque([x, y], maxlen=3),
    "named tuple": Pair,
    "typed named tuple": Typed,
    "dataclass": Record,
    "frozen dataclass": Other,
    "nested": lambda x, y: {"deep": [(Record([x], {"y": Pair(y, None)}),)]},
    "empty ones": lambda x, y: (x, [], {}, (), y),
}


def values(tree: Any) -> list[torch.Tensor]:
    """The tensors of any of the containers."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    inner = vars(tree) if isinstance(tree, Record | Other) else tree
    inner = inner.values() if isinstance(inner, dict) else inner
    return [tensor for item in inner or () for tensor in values(item)]


@pytest.mark.parametrize("name", CONTAINERS)
def test_any_pytree_of_tensors_goes_in_and_comes_out(name: str) -> None:
    def function(tree: Any) -> Any:
        x, y = values(tree)
        return CONTAINERS[name](x + y, x - y)

    calls = [((CONTAINERS[name](torch.randn(2, 3), torch.randn(3)),), {}) for _ in range(2)]
    served(function, *calls, builds=1)


PLAIN = (
    *(None, True, 1, 1.0, "a", b"a", 1j),
    *(Colour.RED, torch.float16, slice(0, 2), torch.Size([2]), torch.device("cpu")),
)


def test_any_plain_value_goes_in_and_comes_out_and_each_has_its_engine() -> None:
    def function(x: torch.Tensor, value: Any) -> Any:
        return {"value": value, "x": x * sum(repr(value).encode())}

    calls = [((torch.ones(2), value), {}) for value in PLAIN]
    served(function, *calls, *calls[::-1], builds=len(PLAIN))


def test_plain_values_beside_tensors_in_one_container() -> None:
    def function(batch: dict[str, Any]) -> Any:
        return [batch["x"] * batch["by"], batch["by"], batch["name"], {"flag": batch["flag"]}]

    batch = {"x": torch.ones(2), "by": 3, "name": "n", "flag": True}
    served(function, ((batch,), {}), ((batch | {"by": 4},), {}), ((batch,), {}), builds=2)


# --- arguments ---


def test_keyword_arguments_in_any_order_share_one_engine() -> None:
    class Subtract(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, *, by: float = 1.0) -> torch.Tensor:
            return (a - b) * by

    model = on_cpu(Subtract())
    a, b = torch.full((2,), 5.0), torch.full((2,), 3.0)
    for _ in range(2):
        assert model(a=a, b=b, by=2.0).tolist() == [4.0, 4.0]
        assert model(by=2.0, b=b, a=a).tolist() == [4.0, 4.0]
        assert model(a, by=2.0, b=b).tolist() == [4.0, 4.0]
        assert model(a, b=b, by=2.0).tolist() == [4.0, 4.0]
    assert model.report().builds == 2


def test_keywords_that_a_module_gathers_reach_it_in_the_caller_s_order() -> None:
    def function(**parts: torch.Tensor) -> Any:
        return torch.cat(list(parts.values())), list(parts)

    a, b = torch.ones(1), torch.zeros(1)
    served(function, ((), {"a": a, "b": b}), ((), {"b": b, "a": a}), ((), {"a": b, "b": a}), builds=2)


def test_optional_and_default_arguments() -> None:
    def function(x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 2.0, *rest: Any, **more: Any) -> Any:
        y = x * scale if mask is None else x * mask
        return y + sum(rest) + sum(more.values())

    x, mask = torch.randn(3), torch.tensor([True, False, True])
    calls = [
        ((x,), {}),
        ((x, mask), {}),
        ((x,), {"mask": mask}),
        ((x, None), {}),
        ((x, None, 3.0), {}),
        ((x, None, 3.0, x, 1), {}),
        ((x,), {"scale": 0.5, "bias": mask}),
    ]
    served(function, *calls, *calls, builds=7)


def test_several_inputs_and_several_outputs() -> None:
    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, unused: torch.Tensor) -> Any:
        return a + b, b * c, a.sum(), c > 0, (a @ c.T).argmax(1)

    for_each = [(tuple(torch.randn(2, 3) for _ in range(4)), {}) for _ in range(2)]
    served(function, *for_each, builds=1)


# --- results ---


@dataclass
class Doubles:
    """A result whose constructor changes what it is given."""

    x: torch.Tensor
    later: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.x = self.x * 2


@pytest.mark.parametrize("kind", [Pair, Typed, Record, Other])
def test_dataclass_and_named_tuple_outputs(kind: Any) -> None:
    served(lambda x: kind(x + 1, kind(x > 0, None)), ((torch.randn(2),), {}), builds=1)


def test_a_dataclass_output_is_not_constructed_a_second_time() -> None:
    def function(x: torch.Tensor) -> Doubles:
        result = Doubles(x + 1)
        result.later = x - 1
        return result

    model = served(function, ((torch.randn(2),), {}), builds=1)
    result = model(torch.ones(2))
    assert result.x.tolist() == [4.0, 4.0]
    assert result.later.tolist() == [0.0, 0.0]


def test_a_dataclass_input_is_not_constructed_a_second_time() -> None:
    given = Doubles(torch.ones(2))
    given.later = torch.full((2,), 7.0)
    served(lambda item: item.x + item.later, ((given,), {}), ((given,), {}), builds=1)


def test_a_transformers_model_output_with_and_without_what_is_optional() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def function(x: torch.Tensor, with_states: bool) -> Any:
        states = (x + 1, x + 2) if with_states else None
        return outputs.BaseModelOutputWithPooling(last_hidden_state=x * 2, pooler_output=x.sum(1), hidden_states=states)

    module = Lambda(lambda self, *args: function(*args))
    model = on_cpu(module)
    x = torch.randn(2, 3)
    for with_states in (True, False, True):
        result, expected = model(x, with_states), module(x, with_states)
        assert type(result) is type(expected)
        assert list(result) == list(expected)
        compare(result.to_tuple(), expected.to_tuple(), 2e-6)
        assert result[0] is result.last_hidden_state is result["last_hidden_state"]
        assert (result.hidden_states is None) is not with_states
        assert result.attentions is None
    assert model.report().builds == 2


def test_the_named_tuples_of_pytorch_s_own_functions() -> None:
    model = on_cpu(Lambda(lambda self, x: x.max(1)))
    x = torch.randn(3, 4)
    result = model(x)
    assert type(result) is torch.return_types.max
    compare((result.values, result.indices), tuple(x.max(1)), 0)


# --- kinds of tensors ---


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_integer_and_boolean_inputs(dtype: torch.dtype) -> None:
    numbers = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=dtype)  # not drawn, since nothing but zeros would be warned of
    calls = [((numbers, torch.randn(3)), {}) for _ in range(2)]
    served(lambda n, x: (n * x, n + n, n.bool(), n.sum(), x[n.long()]), *calls, builds=1)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_large_integers_are_not_rounded(precision: str) -> None:
    model = on_cpu(Lambda(lambda self, n, x: (n + 1, x * 2)), precision)
    n = torch.tensor([2**40 + 1, -(2**62) - 3])
    assert model(n, torch.ones(2))[0].tolist() == [2**40 + 2, -(2**62) - 2]


def test_zero_dimensional_tensors() -> None:
    def function(x: torch.Tensor, scale: torch.Tensor, n: torch.Tensor) -> Any:
        return x * scale, scale + n, (x * n).sum(), n > 2

    calls = [((torch.randn(2), torch.tensor(value), torch.tensor(n)), {}) for value, n in ((1.5, 2), (-3.0, 5))]
    served(function, *calls, builds=1)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "with an offset": lambda x: torch.cat([torch.zeros(7), x.flatten()])[7:].view(x.shape),
    "a column of a larger one": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "expanded": lambda x: x[:1, :, :1].expand(x.shape),
    "flipped memory": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("first", LAYOUTS)
def test_inputs_in_every_layout_share_one_engine_whichever_comes_first(first: str) -> None:
    layouts = [LAYOUTS[first], *LAYOUTS.values()]
    calls = [((layout(torch.randn(2, 3, 4, 5)), torch.randn(5)), {}) for layout in layouts]
    served(lambda x, w: (x * w, x.flatten(1), x.mean((2, 3))), *calls, builds=1)


def test_an_input_of_one_element_with_a_stride() -> None:
    calls = [((torch.randn(3, 4)[1:2, 1::3][:, :1], torch.arange(4)[1::2][:1]), {}) for _ in range(2)]
    served(lambda x, n: (x * 2, n + 1), *calls, builds=1)


def test_tensors_that_share_memory_and_the_same_tensor_twice() -> None:
    storage = torch.randn(10)
    other = storage.clone()
    calls = [
        ((storage[:6], storage[2:8]), {}),
        ((storage[4:], storage[4:]), {}),
        ((same := storage[:6], same), {}),
        ((storage[:6], torch.randn(6)), {}),
    ]
    served(lambda x, y: (x + 2 * y, x), *calls, builds=1)
    assert torch.equal(storage, other)


# --- whose memory results are ---


def test_an_output_that_is_an_input_is_the_caller_s_own() -> None:
    model = on_cpu(Lambda(lambda self, x, n: (x + 1, x, [n])))
    for _ in range(2):
        x, n = torch.randn(2), torch.arange(2)
        _, back, (number,) = model(x, n)
        assert back is x
        assert number is n


@pytest.mark.parametrize("view", ["view", "first", "transposed", "expanded", "detached"])
def test_an_output_that_is_a_view_of_an_input_is_a_copy(view: str) -> None:
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "view": lambda x: x.view(-1),
        "first": lambda x: x[:, 0],
        "transposed": lambda x: x.T,
        "expanded": lambda x: x.expand(2, 2, 3),
        "detached": lambda x: x.detach(),
    }
    model = on_cpu(Lambda(lambda self, x: (x + 1, views[view](x))))
    for _ in range(2):
        x = torch.randn(2, 3)
        before = x.clone()
        result = model(x)[1]
        assert torch.equal(result, views[view](x))
        result.zero_()
        assert torch.equal(x, before)


WRITES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cast": lambda x: x.float(),
    "cast by dtype": lambda x: x.to(torch.float32).to(torch.float32),
    "cast of a view": lambda x: x[:, :2].float(),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_a_cast_of_an_input_changes_no_input_where_the_engine_needs_no_cast(write: str) -> None:
    def function(x: torch.Tensor, z: torch.Tensor) -> Any:
        y = WRITES[write](x)
        y += 1
        return y, x, x * 2, z + 1

    for dtype in (torch.float16, torch.float64):
        module = Lambda(lambda self, *args: function(*args))
        model = on_cpu(module)
        for _ in range(2):
            x = torch.randint(1, 9, (2, 3)).to(dtype)
            compare(model(x, torch.ones(2)), module(x, torch.ones(2)), 2e-6)


def test_writing_to_a_contiguous_copy_of_an_input_changes_no_input() -> None:
    def function(x: torch.Tensor) -> Any:
        y = x.contiguous()
        y += 1
        return y, x * 2

    served(function, ((torch.randn(3, 2).T,), {}), builds=1)


def test_an_empty_batch_is_the_module_s_own_result_and_other_batches_are_engines() -> None:
    module = Lambda(lambda self, x: {"y": self.fc(x), "n": len(x), "any": x.any()}, fc=nn.Linear(3, 2))
    model = on_cpu(module)
    for batch in (2, 0, 2):
        x = torch.randn(batch, 3)
        compare(model(x), module(x), 2e-6)
    report = model.report()
    assert (report.calls_by_engine, report.calls_by_module, report.builds) == (2, 1, 1)


# --- the precision of the module and its inputs ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_module_in_another_dtype_is_compared_within_the_error_of_the_coarser(
    dtype: torch.dtype, precision: str
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to(dtype)
    model = on_cpu(module, precision)
    x = torch.randn(4, 64, dtype=dtype)
    compare(model(x), module(x), 5e-2)
    assert model.report().calls_by_engine == 1
