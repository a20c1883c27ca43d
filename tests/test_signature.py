"""A call's arguments come apart and together again; its key tells apart what needs different engines, and no more."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from tests.trees import PLAIN, Other, Pair, Record, make, tensors, trees
from torchaccel.errors import InputError
from torchaccel.signature import HOLE, fill, flatten, keyword_names, read_call, split_outputs

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TREE = trees(tensors(SHAPES, [torch.float32, torch.float16, torch.int64, torch.bool]) | PLAIN)
CALL = st.tuples(st.lists(TREE, max_size=3), st.dictionaries(st.sampled_from(["x", "y", "z"]), TREE, max_size=2))


def make_call(described: Any, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = described
    generator = torch.Generator().manual_seed(seed)

    def tensor(_: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)

    return tuple(make(tree, tensor) for tree in args), {name: make(tree, tensor) for name, tree in kwargs.items()}


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same tensors, in the sense of identity, and the same values of the same types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Record | Other):
        return same(a.x, b.x) and same(a.note, b.note)
    return repr(a) == repr(b)


@settings(max_examples=200)
@given(CALL)
def test_a_call_comes_together_again(described: Any) -> None:
    args, kwargs = make_call(described)
    call = read_call(args, kwargs)
    assert all(isinstance(tensor, torch.Tensor) for tensor in call.tensors)
    assert same(call.arguments(call.tensors), (args, kwargs))
    others = [tensor.clone() for tensor in call.tensors]
    again = read_call(*call.arguments(others))
    assert all(a is b for a, b in zip(again.tensors, others, strict=True))
    assert again.key == call.key


@settings(max_examples=300)
@given(CALL, CALL)
@example(([("plain", True)], {}), ([("plain", 1)], {}))
@example(([("plain", 1)], {}), ([("plain", 1.0)], {}))
@example(([("plain", 0.0)], {}), ([("plain", -0.0)], {}))
@example(([("plain", math.nan)], {}), ([("plain", float("nan"))], {}))
@example(([("plain", complex(0, 0.0))], {}), ([("plain", complex(0, -0.0))], {}))
@example(([("plain", complex(math.nan, 0))], {}), ([("plain", complex(float("nan"), 0))], {}))
@example(([("plain", "1")], {}), ([("plain", b"1")], {}))
@example(([("plain", None)], {}), ([], {}))
@example(([("list", [])], {}), ([("tuple", [])], {}))
@example(([(Record, ("plain", 1), ("plain", 1))], {}), ([(Other, ("plain", 1), ("plain", 1))], {}))
@example(([(Pair, ("plain", 1), ("plain", 1))], {}), ([("tuple", [("plain", 1), ("plain", 1)])], {}))
@example(([("dict", {"a": ("plain", 1)})], {}), ([("ordered", {"a": ("plain", 1)})], {}))
@example(([("plain", 1)], {}), ([], {"x": ("plain", 1)}))
def test_keys_are_equal_exactly_where_the_calls_are_described_alike(one: Any, two: Any) -> None:
    key, same_key, other_key = (
        read_call(*make_call(described, seed)).key for described, seed in ((one, 0), (one, 1), (two, 2))
    )
    assert key == same_key
    assert hash(key) == hash(same_key)
    assert (key == other_key) == (repr(one) == repr(two))


@pytest.mark.parametrize("further", [(), (None,)], ids=["one tensor", "more"])
def test_the_key_of_a_tensor_has_its_shape_and_dtype_and_not_its_values(further: tuple[None, ...]) -> None:
    def key(tensor: torch.Tensor) -> Any:
        return read_call((tensor, *further), {}).key

    assert key(torch.zeros(2, 3)) == key(torch.ones(2, 3))
    assert key(torch.zeros(2, 3)) == key(torch.zeros(3, 2).T)
    assert key(torch.zeros(2, 3)) != key(torch.zeros(3, 2))
    assert key(torch.zeros(2, 3)) != key(torch.zeros(6))
    assert key(torch.zeros(2, 3)) != key(torch.zeros(2, 3, dtype=torch.float64))
    assert key(torch.zeros(2)) != key(torch.zeros(2, device="meta"))
    assert key(torch.zeros(2)) == key(torch.zeros(2, requires_grad=True))
    assert key(torch.zeros(2)) == key(nn.Parameter(torch.zeros(2)))


@pytest.mark.parametrize("args", [(torch.zeros(2),), (torch.zeros(2), 3)], ids=["one tensor", "more"])
def test_the_key_has_the_state_of_autocast(args: tuple[Any, ...]) -> None:
    plain = read_call(args, {})
    assert plain.autocast is None
    keys = [plain.key]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(read_call(args, {}).key)
            assert read_call(args, {}).autocast is not None
            with torch.autocast("cpu", enabled=False):
                assert read_call(args, {}).key == plain.key
    assert len(set(keys)) == 3


def test_a_slice_is_a_value_like_another() -> None:
    x = torch.zeros(2)
    keys = {read_call((x, part), {}).key for part in (slice(0, 2), slice(0, 2), slice(0, 3), slice(0, 2, 1))}
    assert len(keys) == 3


def test_a_size_is_a_value_like_another() -> None:
    x = torch.zeros(2, 3)
    assert read_call((x, x.shape), {}).key == read_call((x, torch.Size([2, 3])), {}).key
    assert read_call((x, x.shape), {}).key != read_call((x, x.T.shape), {}).key
    with torch.no_grad():
        torch.export.export(nn.Linear(1, 1), (torch.ones(1),))  # teaches PyTorch to take sizes apart
    call = read_call((x, [x.shape]), {})
    assert type(call.arguments(call.tensors)[0][1][0]) is torch.Size


@pytest.mark.parametrize(
    "value",
    [np.zeros(2), {1, 2}, object(), lambda: 0, [object()], {"a": np.float32(1)}, Record(object()), bytearray(b"a")],
    ids=lambda value: type(value).__name__,  # an address would differ between two processes
)
def test_what_an_engine_would_keep_for_ever_is_refused_by_its_type(value: Any) -> None:
    leaf = pytree.tree_leaves(value)[0]
    inner = leaf.x if isinstance(leaf, Record) else leaf
    with pytest.raises(InputError, match=type(inner).__qualname__):
        read_call((torch.zeros(1), value), {})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_has_no_shape_and_is_refused_with_its_number_and_the_remedy() -> None:
    x = torch.ones(2, 4)
    nested = torch.nested.nested_tensor([x, x[:1]])
    for args, number in (((nested,), 0), ((x, {"y": nested}), 1)):
        with pytest.raises(InputError, match=rf"input {number} is nested: use torch\.nested\.to_padded_tensor"):
            read_call(args, {})


def test_a_dataclass_that_pytorch_does_not_know_is_made_known_and_a_class_is_no_instance() -> None:
    @dataclass
    class Unknown:
        x: torch.Tensor
        inner: Any

    x = torch.zeros(1)
    leaves, spec = flatten(Unknown(x, [Unknown(x, None)]))
    assert [leaf is x for leaf in leaves] == [True, True, False]
    assert same_fields(pytree.tree_unflatten(leaves, spec), Unknown(x, [Unknown(x, None)]))
    with pytest.raises(InputError, match="type"):
        read_call((Unknown,), {})


def same_fields(a: Any, b: Any) -> bool:
    return a.x is b.x and a.inner[0].x is b.inner[0].x and a.inner[0].inner is b.inner[0].inner


@dataclass
class Doubles:
    """Its constructor changes what it is given, and leaves a field and an attribute to be set later."""

    x: Any
    later: Any = field(init=False)

    def __post_init__(self) -> None:
        self.x = self.x * 2
        self.extra = self.x + 1


@pytest.mark.parametrize("later", [False, True])
def test_a_dataclass_comes_together_without_its_constructor(later: bool) -> None:
    value = Doubles(torch.ones(1))
    if later:
        value.later = torch.zeros(1)
    again = pytree.tree_unflatten(*flatten(value))
    assert type(again) is Doubles
    assert list(vars(again)) == (["x", "later", "extra"] if later else ["x", "extra"])
    assert all(getattr(again, name) is held for name, held in vars(value).items())


def test_threads_that_meet_a_dataclass_for_the_first_time_make_it_known_once(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Unknown:
        x: Any

    def slowly(*what: Any, register: Any = pytree.register_pytree_node) -> None:
        time.sleep(0.1)  # meanwhile the others come
        register(*what)

    monkeypatch.setattr(pytree, "register_pytree_node", slowly)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda x: flatten(Unknown(x))[0], range(4)))
    assert found == [[0], [1], [2], [3]]


def test_a_dataclass_with_slots_and_a_dataclass_that_is_a_dictionary_come_together() -> None:
    @dataclass(frozen=True, slots=True)
    class Slots:
        x: Any
        note: Any = None

    @dataclass
    class Mapped(dict):
        x: Any

    for kind in (Slots, Mapped):
        value = kind(torch.ones(1))
        again = pytree.tree_unflatten(*flatten(value))
        assert type(again) is kind
        assert again.x is value.x


def test_the_order_of_keywords_is_that_of_their_names_and_of_gathered_ones_the_caller_s() -> None:
    def forward(self: Any, x: Any, /, a: Any, *rest: Any, b: Any, **more: Any) -> None: ...

    names = keyword_names(forward)
    assert names == {"a", "b"}
    one, two = torch.ones(1), torch.zeros(1)
    written = read_call((), {"b": one, "y": 1, "a": two, "x": 2}, names)
    assert list(written.arguments(written.tensors)[1].items()) == [("a", two), ("b", one), ("y", 1), ("x", 2)]
    assert written.key == read_call((), {"a": two, "y": 1, "b": one, "x": 2}, names).key
    assert written.key != read_call((), {"a": two, "x": 2, "b": one, "y": 1}, names).key
    assert keyword_names(type) == frozenset()


class Namespace:
    @dataclass
    class Record:
        x: Any
        note: Any = None


def test_two_classes_of_the_same_name_and_fields_have_different_keys() -> None:
    x = torch.zeros(1)
    assert read_call((Record(x),), {}).key == read_call((Record(x),), {}).key
    assert read_call((Record(x),), {}).key != read_call((Namespace.Record(x),), {}).key


def test_fill_puts_tensors_into_the_holes_in_order() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert fill([HOLE, None, HOLE, "x"], [a, b]) == [a, None, b, "x"]
    assert repr(HOLE) == "tensor"


def test_outputs_are_split_into_what_is_computed_handed_back_repeated_and_plain() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    out, extra = torch.full((1,), 2.0), torch.full((1,), 3.0)
    result = {"out": out, "back": y, "again": [out, 7, None, "text"], "extra": Pair(extra, x)}
    computed, spec = split_outputs(result, [x, y])
    assert [t is u for t, u in zip(computed, (out, extra), strict=True)] == [True, True]
    assert spec.reads_inputs
    leaves = pytree.tree_leaves(result)
    assert [t is u for t, u in zip(spec.computed(leaves), (out, extra), strict=True)] == [True, True]
    served = [torch.tensor([20.0]), torch.tensor([30.0])]
    inputs = [torch.tensor([-1.0]), torch.tensor([-2.0])]
    assembled = spec.assemble(served, inputs)
    assert assembled["out"] is served[0]
    assert assembled["back"] is inputs[1]
    assert assembled["again"][0] is served[0]
    assert assembled["again"][1:] == [7, None, "text"]
    assert type(assembled["extra"]) is Pair
    assert assembled["extra"].first is served[1]
    assert assembled["extra"].second is inputs[0]


def test_a_single_output_is_handed_on_and_reads_no_input() -> None:
    out = torch.zeros(1)
    computed, spec = split_outputs(out, [torch.zeros(1)])
    assert computed == (out,)
    assert not spec.reads_inputs
    assert spec.assemble([out], []) is out


def test_a_single_output_in_a_list_stays_in_its_list() -> None:
    out = torch.zeros(1)
    _, spec = split_outputs([out], [])
    assert same(spec.assemble([out], []), [out])


def test_a_dataclass_output_of_a_transformer_comes_back_as_itself() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    result = outputs.BaseModelOutput(last_hidden_state=torch.zeros(1), hidden_states=(torch.ones(1), torch.ones(2)))
    computed, spec = split_outputs(result, [])
    assembled = spec.assemble(computed, [])
    assert type(assembled) is outputs.BaseModelOutput
    assert assembled.last_hidden_state is result.last_hidden_state
    assert assembled.hidden_states[1] is result.hidden_states[1]
    assert assembled.attentions is None


def test_an_output_that_is_neither_tensor_nor_plain_is_refused_by_its_type() -> None:
    with pytest.raises(InputError, match=r"output.*ndarray"):
        split_outputs((torch.zeros(1), np.zeros(1)), [])
