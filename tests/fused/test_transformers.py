"""The passes for attention and matrix products, on programs that they should rewrite and on ones to be left alone."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.fused.programs import check, lowered, operators
from tests.helpers import Lambda, captured
from torchaccel.fused import cudnn_plans, transformers
from torchaccel.fused.passes import rewrite
from torchaccel.program import Program

attend = functional.scaled_dot_product_attention


def orders(program: Program) -> list[Any]:
    """How the result of each attention is laid out."""
    return [node.args[6] for node in program.exported.graph.nodes if "torchaccel.attention" in str(node.target)]


def test_attention_is_chosen_but_not_where_it_drops_or_groups() -> None:
    x = torch.randn(2, 4, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    for function, ours in (
        (lambda m, x: attend(x, x * 2, x), 1),
        (lambda m, x: attend(x, x * 2, x, mask.clone(), scale=0.3), 1),
        (lambda m, x: attend(x, x * 2, x, is_causal=True), 1),
        (lambda m, x: attend(x, x[:, :2], x[:, :2], enable_gqa=True), 0),
        (lambda m, x: attend(x[0], x[0], x[0]), 0),
        (lambda m, x: attend(x, x[0], x[0]), 0),
    ):
        module = Lambda(function).eval()
        program = lowered(module, x)
        assert operators(program)["torchaccel.attention"] == ours
        check(program, module, x)


def packed(m: nn.Module, x: torch.Tensor, function: Any) -> torch.Tensor:
    """Queries, keys and values out of one product, [length, batch, 3, width], as `nn.MultiheadAttention` takes them."""
    length, batch, _ = x.shape
    triple = m.qkv(x).unflatten(-1, (3, 16)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    parts = (triple.select(0, index).reshape(length, batch * 2, 8).transpose(0, 1) for index in range(3))
    return function(triple, [part.view(batch, 2, length, 8) for part in parts])


READ = {
    "by attention alone": (lambda triple, heads: attend(*heads), 0),
    "by others too": (lambda triple, heads: (attend(*heads), triple * 2), 1),
    "as a mask": (lambda triple, heads: attend(*heads, heads[0] @ heads[1].transpose(-1, -2)), 1),
    "through a view that needs it": (lambda triple, heads: attend(*(head.reshape(3, 1, 12, 8) for head in heads)), 1),
    "along another dimension": (lambda triple, heads: attend(*(head.transpose(-1, -2) for head in heads)), 1),
}


@pytest.mark.parametrize("name", READ)
def test_a_copy_goes_where_only_attention_reads_it(name: str) -> None:
    function, left = READ[name]
    module = Lambda(lambda m, x: packed(m, x, function), qkv=nn.Linear(12, 48)).eval()
    x = torch.randn(6, 3, 12)
    program = lowered(module, x)
    assert operators(program)["contiguous"] == left
    if not left:
        assert orders(program) == [[2, 0, 1, 3]]
    check(program, module, x)


def test_a_copy_stays_where_anything_is_written() -> None:
    def write(triple: torch.Tensor, heads: list[torch.Tensor]) -> torch.Tensor:
        return attend(*heads).mul_(2)

    module = Lambda(lambda m, x: packed(m, x, write), qkv=nn.Linear(12, 48)).eval()
    x = torch.randn(6, 3, 12)
    program = lowered(module, x)
    assert operators(program)["contiguous"] == 1
    check(program, module, x)


@pytest.mark.parametrize("batch_first", [False, True])
def test_multi_head_attention_copies_nothing(batch_first: bool) -> None:
    """Neither before its attention nor behind it: all that is reordered is what it gives, for whoever adds it."""
    attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
    module = Lambda(lambda m, x: m.attention(x, x, x, need_weights=False)[0] + x, attention=attention).eval()
    x = torch.randn(5, 3, 16)
    program = lowered(module, x)
    assert orders(program) == [[0, 2, 1, 3] if batch_first else [2, 0, 1, 3]]
    assert "contiguous" not in operators(program)
    for node in program.exported.graph.nodes:
        if "linear" in str(node.target):
            assert node.args[0].meta["val"].is_contiguous()
            assert "permute" not in str(node.args[0].target) or batch_first
    check(program, module, x)


def separate(m: Any, x: torch.Tensor, other: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Queries, keys and values out of a product each: [3, 5, 8] to [3, 2, 5, 4]."""
    given = ((m.q, x), (m.k, x), (m.v, x if other is None else other))
    return [layer(tensor).view(3, 5, 2, -1).transpose(1, 2) for layer, tensor in given]


MERGED = {
    "by attention alone": (lambda m, x: attend(*separate(m, x)), 1),
    "of a part of the input": (lambda m, x: attend(*separate(m, x.chunk(1, 1)[0])), 1),
    "by others too": (lambda m, x: attend(*(parts := separate(m, x))) + parts[0], 2),
    "of another input": (lambda m, x: attend(*separate(m, x, x * 2)), 2),
    "as a mask": (lambda m, x: attend(*separate(m, x), m.o(x).view(3, 1, 5, 5)), 2),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MERGED)
def test_products_for_attention_are_one(name: str, bias: bool) -> None:
    function, left = MERGED[name]
    parts = {key: nn.Linear(8, 8 if key in "qkv" else 5, bias=bias) for key in "qkvo"}
    module, x = Lambda(function, **parts).eval(), torch.randn(3, 5, 8)
    program = lowered(module, x)
    assert operators(program)["linear"] == left
    check(program, module, x)


def filled_in_part() -> torch.Tensor:
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[:, 3:] = False
    return mask


MASKS = {
    "full": (lambda m, x: attend(x, x, x, torch.arange(5)[:, None] >= torch.zeros(5)), True),
    "causal": (lambda m, x: attend(x, x, x, torch.arange(5)[:, None] >= torch.arange(5)), False),
    "full, of a weight": (lambda m, x: attend(x, x, x, m.limit >= torch.zeros(5, 5)), False),
    "full, of an input": (lambda m, x: attend(x, x, x, (x >= x - 1)[0, 0, :, :5]), False),
    "of numbers": (lambda m, x: attend(x, x, x, torch.zeros(5, 5)), False),
    "of numbers, none of them 0": (lambda m, x: attend(x, x, x, 1 + torch.arange(25.0).view(5, 5)), False),
    "full until it is filled": (lambda m, x: attend(x, x, x, filled_in_part()), False),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_hides_nothing_is_dropped(name: str) -> None:
    function, dropped = MASKS[name]
    module, x = Lambda(function).eval(), torch.randn(2, 3, 5, 8)
    module.register_buffer("limit", torch.ones(5, 5))
    program = lowered(module, x)
    (node,) = (node for node in program.exported.graph.nodes if "torchaccel.attention" in str(node.target))
    assert (node.args[3] is None) == dropped
    check(program, module, x)


def doubled(x: torch.Tensor, times: int = 60) -> torch.Tensor:
    for _ in range(times):
        x = x + x.relu()
    return x


@pytest.mark.timeout(60)
@pytest.mark.parametrize("constant", [False, True])
def test_a_mask_at_the_end_of_many_ways_through_the_network_takes_no_longer(constant: bool) -> None:
    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        return attend(x, x, x, doubled(torch.zeros(5, 5) if constant else x[0, 0, :, :5]) > -1e30)

    module, x = Lambda(forward).eval(), torch.randn(2, 3, 5, 8)
    program = lowered(module, x)
    (node,) = (node for node in program.exported.graph.nodes if "torchaccel.attention" in str(node.target))
    assert (node.args[3] is None) == constant
    check(program, module, x)


def test_a_layer_that_serves_twice_is_not_merged() -> None:
    layer = nn.Linear(8, 8)
    module, x = Lambda(lambda m, x: attend(*separate(m, x)), q=layer, k=layer, v=nn.Linear(8, 8)).eval(), images()
    program = lowered(module, x)
    assert operators(program)["linear"] == 3
    check(program, module, x)


def images() -> torch.Tensor:
    return torch.randn(3, 5, 8)


ROWS = {
    "turned": (lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1) * 2, True),
    "turned and flattened": (lambda m, x: m.a(x.transpose(0, 1).reshape(15, 8)), True),
    "of more than two dimensions": (lambda m, x: m.a(x.view(5, 3, 2, 4).permute(1, 0, 2, 3).reshape(15, 8)), True),
    "in order": (lambda m, x: m.a(x.reshape(15, 8)), False),
    "of another dimension": (lambda m, x: m.b(x.transpose(1, 2)), False),
    "with more to turn": (lambda m, x: m.wide(x.transpose(0, 1)) * 2, False),
    "that lie apart": (lambda m, x: m.a(x[:, :2].transpose(0, 1)), False),
    "of a part": (lambda m, x: m.part(x.view(5, 3, 2, 4).select(2, 1).transpose(0, 1)), False),
}


@pytest.mark.parametrize("name", ROWS)
def test_linear_layers_take_rows_as_they_lie(name: str) -> None:
    function, moved = ROWS[name]
    parts = {"a": nn.Linear(8, 8), "b": nn.Linear(3, 3), "wide": nn.Linear(8, 9), "part": nn.Linear(4, 4)}
    module, x = Lambda(function, **parts).eval(), torch.randn(5, 3, 8)
    program = captured(module, x)
    counts = rewrite(program)
    assert counts["keep_rows"] == moved
    check(program, module, x)


def test_a_layer_does_not_take_rows_that_are_written_after_they_were_copied() -> None:
    def write(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        copied = y.transpose(0, 1).contiguous()
        y.view(-1).mul_(3)
        return m.a(copied)

    module, x = Lambda(write, a=nn.Linear(8, 8)).eval(), torch.randn(5, 3, 8)
    check(lowered(module, x), module, x)


def test_the_result_of_attention_is_laid_out_as_its_queries_are() -> None:
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [2, 0, 1, 3], [1, 0, 2, 3]):
        module = Lambda(lambda m, x, order=order: attend(*[x.permute(*map(order.index, range(4)))] * 3)).eval()
        x = torch.randn(3, 4, 5, 8)
        program = lowered(module, x)
        assert orders(program) == [order]
        check(program, module, x)


# --- matrix products ---


def written_between(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = m.a(y)
    y.view(-1).mul_(3)
    return z.relu()


LINEARS = {
    "gelu": (lambda m, x: functional.gelu(m.a(x)), ["gelu"]),
    "gelu by tanh": (lambda m, x: functional.gelu(m.a(x), approximate="tanh"), ["gelu_tanh"]),
    "relu": (lambda m, x: m.a(x).relu(), ["relu"]),
    "no bias": (lambda m, x: m.bare(x).relu(), ["relu"]),
    "none": (lambda m, x: m.a(x) * 2, ["none"]),
    "used twice": (lambda m, x: functional.gelu(y := m.a(x)) + y, ["none"]),
    "more dimensions": (lambda m, x: functional.silu(m.a(x[:, None])), ["silu"]),
    "of no plan": (lambda m, x: m.a(x).tanh(), ["none"]),
    "its input written in between": (written_between, ["none"]),
    "odd": (lambda m, x: m.odd(x).relu(), []),
    "odd, of odd rows": (lambda m, x: m.narrow(x[..., :7]).relu(), []),
}


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_layer_takes_in_its_activation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_plans, "possible", lambda x: True)
    monkeypatch.setattr(transformers, "LEAST_PRODUCTS", 1)
    function, expected = LINEARS[name]
    sizes = {"a": (8, 16), "odd": (8, 7), "narrow": (7, 16)}
    parts = {name: nn.Linear(*size) for name, size in sizes.items()} | {"bare": nn.Linear(8, 16, bias=False)}
    module, x = Lambda(function, **parts).eval(), torch.randn(3, 5, 8)
    program = lowered(module, x)
    nodes = [node for node in program.exported.graph.nodes if "linear_act" in str(node.target)]
    assert [node.args[3] for node in nodes] == expected
    check(program, module, x)


def test_a_linear_layer_stays_without_plans_and_where_it_is_all_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Lambda(lambda m, x: m.a(x).relu(), a=nn.Linear(64, 64)).eval(), torch.randn(4, 64)
    assert "torchaccel.linear_act" not in operators(lowered(module, x))
    monkeypatch.setattr(cudnn_plans, "possible", lambda x: True)
    assert "torchaccel.linear_act" not in operators(lowered(module, x))
    assert operators(lowered(module, torch.randn(4096, 64)))["torchaccel.linear_act"] == 1
