"""What cannot become an engine is refused in a few lines: the reason, the line of the module, the remedy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import Lambda, captured, on_cpu, relative_error
from torchaccel.compiler import BACKENDS
from torchaccel.errors import BuildError
from torchaccel.refusals import MAX_REASON, explain

pytestmark = pytest.mark.usefixtures("_no_gradients")


@pytest.fixture
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def refused(module: nn.Module, x: torch.Tensor) -> str:
    with pytest.raises(BuildError) as caught:
        on_cpu(module)(x)
    return str(caught.value)


# --- random numbers ---

RANDOM: dict[str, tuple[Any, str]] = {
    "rand": (lambda self, x: x + torch.rand(3, 4), "aten.rand.default"),
    "randn_like, though it has no effect": (lambda self, x: x + torch.randn_like(x) * 0, "aten.randn_like.default"),
    "bernoulli": (lambda self, x: x * torch.bernoulli(torch.full_like(x, 0.5)), "aten.bernoulli.default"),
    "in place": (lambda self, x: x + torch.empty(4).normal_(), "aten.normal_.default"),
    "randperm": (lambda self, x: x[torch.randperm(3)], "aten.randperm.default"),
    "multinomial": (lambda self, x: x.abs().multinomial(1), "aten.multinomial.default"),
    "functional dropout that is always on": (lambda self, x: F.dropout(x, 0.5, training=True), "aten.dropout.default"),
    "rrelu": (lambda self, x: F.rrelu(x, training=True), "aten.rrelu.default"),
    "attention with dropout": (
        lambda self, x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5),
        "aten.scaled_dot_product_attention.default",
    ),
    "in a branch of cond": (
        lambda self, x: torch.cond(x.sum() > 0, lambda x: x + torch.rand_like(x), lambda x: x + 1, (x,)),
        "aten.rand_like.default",
    ),
}


@pytest.mark.parametrize("what", RANDOM)
def test_a_module_that_draws_random_numbers_is_refused_with_the_operators(what: str) -> None:
    function, operator = RANDOM[what]
    message = refused(Lambda(function), torch.randn(3, 4))
    assert f"Lambda draws random numbers in eval mode ({operator} ×1)" in message
    assert "pass them as an input" in message


EVALUATED: dict[str, Any] = {
    "Dropout": nn.Dropout(0.5),
    "Dropout1d": nn.Dropout1d(0.5),
    "AlphaDropout": nn.AlphaDropout(0.5),
    "RReLU": nn.RReLU(),
    "functional dropout": Lambda(lambda self, x: F.dropout(x, 0.5, training=self.training)),
    "LSTM": Lambda(lambda self, x: self.lstm(x[None])[0], lstm=nn.LSTM(4, 4, 2, dropout=0.5)),
    "GRU": Lambda(lambda self, x: self.gru(x[None])[0], gru=nn.GRU(4, 4, 2, dropout=0.5)),
    "attention": Lambda(lambda self, x: self.mha(x[None], x[None], x[None])[0], mha=nn.MultiheadAttention(4, 2, 0.5)),
    "transformer": nn.TransformerEncoderLayer(4, 2, 8, 0.5, batch_first=True),
}


@pytest.mark.parametrize("what", EVALUATED)
def test_what_is_random_only_in_training_is_served_in_eval_mode(what: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), EVALUATED[what]).eval()
    x = torch.randn(2, 3, 4) if what == "transformer" else torch.randn(3, 4)
    assert relative_error(on_cpu(module)(x), module(x)) < 1e-5


# --- what torch.export stops at ---


class Branches(nn.Module):
    """Its flow of control depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


@torch.library.custom_op("torchaccel_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """2x, through NumPy."""
    return torch.from_numpy(x.detach().numpy() * 2)


@doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("torchaccel_tests::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    """3x, without a fake implementation."""
    return x * 3


STOPS: dict[str, tuple[Any, str, str, str]] = {
    "control flow": (Branches(), "depends on the values of a tensor", "if x.sum() > 0:", "torch.where or torch.cond"),
    "a size": (
        Lambda(lambda self, x: x.new_zeros(int(x.abs().sum().item()) + 1)),
        "depends on the values of a tensor", "x.abs().sum().item()", "pass it as an argument",
    ),
    "a number of turns": (
        Lambda(lambda self, x: sum((x for _ in range(int(x.abs().sum()))), x)),
        "depends on the values of a tensor", "range(int(", "torch.cond",
    ),
    "NumPy": (
        Lambda(lambda self, x: torch.from_numpy(np.sin(x.numpy()))),
        "leaves PyTorch's operators", "np.sin(x.numpy())", "torch.library.custom_op",
    ),
    "a raw pointer": (
        Lambda(lambda self, x: x * (x.data_ptr() % 7)), "leaves PyTorch's operators", "x.data_ptr()", "custom_op",
    ),
    "a custom operator that is incomplete": (
        Lambda(lambda self, x: tripled(x)), "has no fake implementation", "tripled(x)", "register_fake",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", STOPS)
def test_the_reason_the_line_and_the_remedy_are_said_in_a_few_lines_and_nothing_is_printed(
    what: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    module, reason, line, remedy = STOPS[what]
    message = refused(module, torch.randn(3, 4))
    assert f"torch.export could not capture {type(module).__name__} (" in message
    for said in (reason, line, remedy):
        assert said in message
    assert "test_refusals.py:" in message
    assert len(message) < 1200
    assert len(message.splitlines()) < 4
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_an_error_of_the_module_s_own_comes_with_its_line() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise ValueError("not like this")
        return x

    message = refused(Lambda(forward), torch.ones(2))
    assert "(ValueError): not like this, at " in message
    assert "in forward: `raise ValueError(" in message


def test_a_long_complaint_is_cut() -> None:
    assert len(explain(RuntimeError("x" * 10_000))) < MAX_REASON + 50
    assert explain(RuntimeError("a\n\nb\nFor more information, run with")) == "(RuntimeError): a b"


# --- what is served ---


class Doubles(torch.autograd.Function):
    """A function with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 2


SERVED: dict[str, Any] = {
    "a number of the data's": lambda self, x: x * x.sum().item(),
    "a selection": lambda self, x: x[x > 0].sum() + torch.nonzero(x > 0).sum() + x,
    "a size of the data's": lambda self, x: x[x > 0],
    "a print": lambda self, x: print("in forward") or x * 2,
    "an autograd function": lambda self, x: Doubles.apply(x),
    "a custom operator": lambda self, x: doubled(x) + 1,
    "cond": lambda self, x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)),
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("what", SERVED)
def test_what_can_be_captured_is_served_right_for_other_values_too(what: str, backend: str) -> None:
    if reason := BACKENDS[backend].unavailable():
        pytest.skip(reason)
    module = Lambda(SERVED[what])
    model = on_cpu(module, backend=backend)
    for seed in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(model(x), module(x))
    assert model.report().calls_by_engine == 4
    assert model.report().calls_by_module == 0


def test_casts_that_nothing_reads_are_not_in_the_program() -> None:
    program = captured(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2), precision="fp16")
    assert not [name for name in program.operators if "_assert_tensor_metadata" in name]
