"""An overflow: the module where it begins is named, and what the error proposes works when it is followed."""

import ast
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import Lambda, on_cpu, relative_error, same_values, state_of
from tests.test_borders import large
from tests.test_build import Wrong, build
from torchaccel.backends.base import Engine, NativeEngine, Plan
from torchaccel.diagnosis import MAX_TRIES
from torchaccel.errors import AccuracyError
from torchaccel.options import Options

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Squash(nn.Module):
    """Two layers, and operations between them that bring large values back."""

    def __init__(self, scale: float = 1e6) -> None:
        super().__init__()
        self.up = large(nn.Linear(8, 8), scale)
        self.down = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) * 1e-6)


class Squares(nn.Module):
    """It overflows in an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner((x * 1e3).square() * 1e-5)


class Twice(nn.Module):
    """Its submodule is called twice, and overflows the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.up = large(nn.Linear(8, 8), 1e4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.up(self.up(x * 1e-2)))


def residual(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.norm(x + self.up(x))


def of_its_own(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.first(x) * 1e6).sum(-1) * 1e-6


def layer() -> nn.Linear:
    return nn.Linear(8, 8)


# what overflows, the module that is to be named, and the names to keep (None: bf16 alone helps)
OVERFLOWS: dict[str, tuple[Any, str, list[str] | None]] = {
    "a layer and the normalisation after it": (
        lambda: nn.Sequential(layer(), large(layer()), nn.LayerNorm(8), layer()), "'1' (Linear)", ["1", "2"],
    ),
    "a weight": (lambda: nn.Sequential(layer(), Weighted(), layer()), "'1' (Weighted)", ["1"]),
    "a block whose operations bring it back": (
        lambda: nn.Sequential(layer(), Squash(), layer()), "'1.up' (Linear)", ["1"],
    ),
    "operations of a block": (lambda: nn.Sequential(layer(), Squares(), layer()), "'1' (Squares)", ["1"]),
    "the second call of a layer": (lambda: nn.Sequential(Twice(), layer()), "'0.up' (Linear)", ["0.up", "0.norm"]),
    "a residual sum of the root": (
        lambda: Lambda(residual, up=large(layer()), norm=nn.LayerNorm(8)), "'up' (Linear)", None,
    ),
    "the root's own operation": (
        lambda: Lambda(of_its_own, first=layer(), last=layer()), "Lambda itself, between its submodules.", None,
    ),
    "the output": (lambda: nn.Sequential(layer(), large(layer())), "'1' (Linear)", None),
}  # fmt: skip


class Weighted(nn.Module):
    """A weight that fp16 cannot hold; what is computed with it fits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1e6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1e-6 * self.scale


def proposed(error: AccuracyError) -> list[str] | None:
    found = re.search(r"keep_fp32=(\[.*?\])", str(error))
    return ast.literal_eval(found[1]) if found else None


@pytest.mark.parametrize("what", OVERFLOWS)
def test_the_first_module_that_overflows_is_named_and_what_is_proposed_works(what: str) -> None:
    make, named, names = OVERFLOWS[what]
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(4, 8)
    state = state_of(module)
    hooks = [(len(child._forward_hooks), len(child._forward_pre_hooks)) for child in module.modules()]
    expected = module(x)
    with pytest.raises(AccuracyError) as caught:
        on_cpu(module, "fp16")(x)
    assert f"while the module's own are: {named}" in str(caught.value)
    assert "FAIL output 0" in str(caught.value)
    assert proposed(caught.value) == names
    assert "precision 'bf16'" in str(caught.value)
    assert relative_error(on_cpu(module, "bf16")(x), expected) < 5e-2
    if names is not None:
        assert relative_error(on_cpu(module, "fp16", keep_fp32=names)(x), expected) < 1e-2
    assert same_values(module, state)
    assert [(len(child._forward_hooks), len(child._forward_pre_hooks)) for child in module.modules()] == hooks


def test_an_overflow_that_a_later_module_hides_is_found_too() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(layer(), large(layer(), 1e5), Saturates(), layer()), torch.randn(4, 8) * 10
    with pytest.raises(AccuracyError, match=r"are: '1' \(Linear\)") as caught:
        on_cpu(module, "fp16")(x)
    assert "finite in only one" not in str(caught.value)
    assert "Pass precision 'bf16'" in str(caught.value)
    assert relative_error(on_cpu(module, "bf16")(x), module(x)) < 5e-2


class Saturates(nn.Module):
    """Finite whatever it gets, and not the same for 1e5 and for infinity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x / 1000 / 1000)


def test_names_that_are_kept_already_stay_in_the_proposal() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(layer(), large(layer()), nn.LayerNorm(8), layer()).eval()
    x = torch.randn(4, 8)
    with pytest.raises(AccuracyError) as caught:
        on_cpu(module, "fp16", keep_fp32=["0"])(x)
    assert proposed(caught.value) == ["0", "1", "2"]
    on_cpu(module, "fp16", keep_fp32=["0", "1", "2"])(x)


def test_inputs_beyond_the_range_are_said_to_be() -> None:
    with pytest.raises(AccuracyError, match=r"inputs themselves are beyond the range of fp16\. Pass precision 'bf16'"):
        on_cpu(nn.Sequential(layer(), nn.LayerNorm(8)), "fp16")(torch.full((2, 8), 1e6))


def test_what_the_module_itself_has_infinite_is_no_fault() -> None:
    torch.manual_seed(0)
    mask = Lambda(lambda self, x: x.masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf))
    module = nn.Sequential(layer(), mask, nn.Softmax(-1), large(layer()), nn.LayerNorm(8))
    with pytest.raises(AccuracyError, match=r"are: '3' \(Linear\)"):
        on_cpu(module, "fp16")(torch.randn(8, 8))


def test_an_engine_that_overflows_where_pytorch_does_not_is_blamed_itself() -> None:
    class Overflows(Wrong):
        def load(self, plan: Plan, device: torch.device) -> Engine:
            return NativeEngine(lambda x: (x / 0,), plan.precision)

    with pytest.raises(AccuracyError, match="so it is the engine that does not: choose another backend"):
        build(layer(), torch.randn(2, 8), Overflows(), options=Options("fp16", device=CPU))


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("fp32", "\nTry another backend, or pass tolerance="),  # nothing computes in less than fp32
        ("fp16", "\nTry keep_fp32=[…] for the submodules that need it, or pass tolerance="),
    ],
)
def test_an_error_of_mere_size_gets_the_general_advice(precision: str, advice: str) -> None:
    with pytest.raises(AccuracyError) as caught:
        build(layer(), torch.randn(2, 8), Wrong(), options=Options(precision, device=CPU))
    assert advice in str(caught.value)
    assert "bf16" not in str(caught.value)


def test_bf16_is_proposed_only_where_the_backend_honours_it() -> None:
    class NoBFloat(Wrong):
        def honours(self, precision: Any, device: torch.device) -> str | None:
            return "an old GPU" if precision.name == "bf16" else None

    torch.manual_seed(0)
    module = nn.Sequential(large(layer()), nn.LayerNorm(8))
    with pytest.raises(AccuracyError, match=r"Pass keep_fp32=\['0', '1'\]: in PyTorch"):
        build(module, torch.randn(2, 8), NoBFloat(wrong_from=9), options=Options("fp16", device=CPU))
    with pytest.raises(AccuracyError, match="Nothing that was tried mends it: compile at 'fp32' or 'tf32'"):
        build(large(layer()), torch.randn(2, 8), NoBFloat(wrong_from=9), options=Options("fp16", device=CPU))


def test_bf16_is_proposed_only_where_it_passes() -> None:
    torch.manual_seed(0)
    options = Options("fp16", device=CPU, tolerance=1e-6)
    with pytest.raises(AccuracyError, match="Nothing that was tried mends it: compile at 'fp32' or 'tf32'"):
        build(large(layer()), torch.randn(2, 8), Wrong(wrong_from=9), options=options)


def test_the_search_is_bounded() -> None:
    torch.manual_seed(0)
    chain = [nn.Identity() for _ in range(MAX_TRIES + 3)]
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    module = nn.Sequential(large(layer()), *[Passes() for _ in chain], nn.LayerNorm(8))
    module[0].register_forward_hook(count)
    with pytest.raises(AccuracyError) as caught:
        on_cpu(module, "fp16")(torch.randn(2, 8))
    assert proposed(caught.value) is None
    assert "'bf16'" in str(caught.value)
    assert runs <= MAX_TRIES + 10


class Passes(nn.Module):
    """It hands on what it gets, in a tensor of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1
