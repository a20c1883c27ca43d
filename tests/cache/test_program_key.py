"""What tells two programs apart: pairs that a naive key takes for the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import Lambda, captured
from tests.models import small_conv_net
from torchaccel.cache.canonical import key_digest
from torchaccel.cache.program_key import NoKeyError, content, program_key
from torchaccel.program import Program
from torchaccel.weights import WeightStore


def program(module: nn.Module, *args: Any, **options: Any) -> Program:
    found = captured(module, *args, **options)
    found.take_weights(WeightStore(), module)
    return found


def digest(module: nn.Module, *args: Any, **options: Any) -> str:
    return key_digest(program_key(program(module, *args, **options)))


def of(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    return digest(Lambda(lambda self, *tensors: function(*tensors)), *args, **options)


def linears(*fills: float, bias: bool = True) -> nn.Sequential:
    module = nn.Sequential(*(nn.Linear(4, 4, bias=bias) for _ in fills))
    with torch.no_grad():
        for layer, fill in zip(module, fills, strict=True):
            layer.weight.fill_(fill)
            if bias:
                layer.bias.zero_()
    return module


X = torch.randn(2, 4, 4)
A = torch.ones(2, 4, 4)
PAIRS: dict[str, Any] = {
    "softmax over another dimension": lambda: (of(lambda x: x.softmax(1), X), of(lambda x: x.softmax(2), X)),
    "swapped operands": lambda: (of(lambda x, y: x - y, X, A), of(lambda x, y: y - x, X, A)),
    "swapped operands of one input": lambda: (of(lambda x: x - x.exp(), X), of(lambda x: x.exp() - x, X)),
    "another constant": lambda: (of(lambda x: x + 1, X), of(lambda x: x + 2, X)),
    "a constant of another type": lambda: (of(lambda x: x.long() + 1, X), of(lambda x: x.long() + 1.0, X)),
    "a keyword argument": lambda: (
        of(nn.functional.gelu, X),
        of(lambda x: nn.functional.gelu(x, approximate="tanh"), X),
    ),
    "another axis of two": lambda: (of(lambda x: x.sum((0, 1)), X), of(lambda x: x.sum((0, 2)), X)),
    "another result of a split": lambda: (of(lambda x: x.split(2, 1)[0], X), of(lambda x: x.split(2, 1)[1], X)),
    "outputs in another order": lambda: (of(lambda x: (x.exp(), x.sin()), X), of(lambda x: (x.sin(), x.exp()), X)),
    "inputs in another order": lambda: (of(lambda x, y: x.exp() @ y, X, A), of(lambda y, x: x.exp() @ y, X, A)),
    "another shape": lambda: (of(torch.exp, X), of(torch.exp, X[:1])),
    "another input dtype": lambda: (of(torch.abs, X.int()), of(torch.abs, X.long())),
    "another precision": lambda: (of(torch.exp, X, precision="fp16"), of(torch.exp, X, precision="bf16")),
    "another cast": lambda: (of(lambda x: x.half().float(), X), of(lambda x: x.bfloat16().float(), X)),
    "a dynamic batch": lambda: (of(torch.exp, X), of(torch.exp, X, dynamic_batch=(1, 2, 4))),
    "another range": lambda: (
        of(torch.exp, X, dynamic_batch=(1, 2, 8)),
        of(torch.exp, X, dynamic_batch=(1, 2, 4)),
    ),
    "another optimum": lambda: (of(torch.exp, X, dynamic_batch=(1, 2, 8)), of(torch.exp, X, dynamic_batch=(1, 4, 8))),
    "other weights": lambda: (digest(linears(1.0), X), digest(linears(1 + 2**-20), X)),
    "weights of another sign of zero": lambda: (digest(linears(0.0), X), digest(linears(-0.0), X)),
    "weights swapped between two layers": lambda: (digest(linears(1, 2), X), digest(linears(2, 1), X)),
    "another bias": lambda: (digest(linears(1.0), X), digest(linears(1.0, bias=False), X)),
    "a submodule kept in fp32": lambda: (
        digest(linears(1, 1), X, precision="fp16"),
        digest(linears(1, 1), X, precision="fp16", keep_fp32=["1"]),
    ),
    "another stride of a convolution": lambda: (
        digest(convolution(stride=1), X[:, None]),
        digest(convolution(stride=2), X[:, None]),
    ),
    "another epsilon": lambda: (digest(nn.LayerNorm(4, 1e-5), X), digest(nn.LayerNorm(4, 1e-6), X)),
    "another constant tensor": lambda: (
        of(lambda x: x + torch.tensor([1.0, 2, 3, 4]), X),
        of(lambda x: x + torch.tensor([1.0, 2, 4, 3]), X),
    ),
}


def convolution(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(1, 2, 1, **options)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_programs_that_differ_have_other_keys(pair: Any) -> None:
    torch.manual_seed(0)
    one, other = pair()
    assert one != other
    torch.manual_seed(0)
    assert pair() == (one, other), "and the same programs the same"


def test_a_branch_counts_with_what_is_in_it() -> None:
    def with_branch(function: Any) -> str:
        return of(lambda x: torch.cond(x.sum() > 0, function, torch.sin, (x,)), X)

    assert with_branch(torch.exp) != with_branch(torch.tanh)
    assert with_branch(torch.exp) == with_branch(torch.exp)


def test_new_running_statistics_are_other_weights() -> None:
    module, x = small_conv_net(), torch.randn(2, 3, 16, 16)
    before = digest(module, x)
    assert digest(small_conv_net(), x) == before
    next(part for part in module.modules() if isinstance(part, nn.BatchNorm2d)).running_mean.add_(0.1)
    assert digest(module, x) != before


def test_another_process_finds_the_same_keys() -> None:
    code = "from tests.cache.test_program_key import of_a_net; print(of_a_net(None)); print(of_a_net((1, 2, 4)))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [of_a_net(None), of_a_net((1, 2, 4))], done.stderr


def of_a_net(dynamic_batch: Any) -> str:
    return digest(small_conv_net(), torch.randn(2, 3, 16, 16), precision="fp16", dynamic_batch=dynamic_batch)


def test_a_key_is_json_that_a_reader_understands() -> None:
    text = json.dumps(program_key(program(small_conv_net(), torch.randn(2, 3, 16, 16))))
    for part in ("aten.conv2d.default", "torch.float32", "PARAMETER"):
        assert part in text


def test_what_no_version_fixes_has_no_key() -> None:
    with torch.library._scoped_library("torchaccel_test_key", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", torch.empty_like, "Meta")
        with pytest.raises(NoKeyError, match=r"torchaccel_test_key\.twice"):
            of(torch.ops.torchaccel_test_key.twice, X)


def test_weights_without_values_have_no_key() -> None:
    found = program(linears(1.0), X)
    found.drop_weights()
    with pytest.raises(NoKeyError, match="meta"):
        program_key(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_the_content_of_a_tensor_is_its_values_in_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    assert content(tensor) == content(tensor.t().contiguous().t())
    assert content(tensor) != content(tensor.flip(0))
    assert content(tensor[2:]) == content(tensor[2:].clone())
    assert content(tensor.conj()) == content(tensor.conj().resolve_conj())
    assert content(tensor[:0]) == content(tensor[:0].clone())
    assert content(tensor[1, 1]) == content(tensor[1, 1].clone())
    assert content(tensor[:1, ::6]) == content(tensor[:1, :1].clone())
