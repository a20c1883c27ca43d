"""What a forward leaves behind besides its result is found: writes to inputs and tensors, changed attributes, draws."""

import dataclasses
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import Lambda, on_cpu, relative_error
from torchaccel.errors import AccuracyError, BackendWarning, BuildError
from torchaccel.purity import attributes, differing
from torchaccel.signature import flatten

pytestmark = pytest.mark.usefixtures("_no_gradients")


@pytest.fixture
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


# --- inputs ---

WRITES: dict[str, Any] = {
    "to a view": lambda x: x.view(-1)[1:].zero_(),
    "to a part": lambda x: x.__setitem__((slice(None), 0), 7.0),
    "that changes nothing this time": lambda x: x.relu_(),
    "behind PyTorch's back": lambda x: x.data.add_(1),
    "through NumPy": lambda x: x.numpy().__setitem__(0, 3.0),
}


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("place", ["positional", "keyword", "nested"])
def test_a_write_to_an_input_is_refused_wherever_the_input_is(what: str, place: str) -> None:
    def forward(self: Any, x: torch.Tensor, y: Any = None, *, extra: Any = None) -> torch.Tensor:
        target = extra["deep"][0] if place == "nested" else extra if place == "keyword" else y
        WRITES[what](target)
        return x + target

    y = torch.ones(2, 3)
    given: dict[str, Any] = {
        "positional": ((y,), {}), "keyword": ((), {"extra": y}), "nested": ((), {"extra": {"deep": [y]}}),
    }  # fmt: skip
    args, kwargs = given[place]
    with pytest.raises(BuildError, match="writes to its input 1"):
        on_cpu(Lambda(forward))(torch.ones(2, 3), *args, **kwargs)
    assert torch.equal(y, torch.ones(2, 3))


def test_an_input_with_values_that_are_not_numbers_is_no_write() -> None:
    x = torch.tensor([[float("nan"), float("inf"), 1.0]])
    model = on_cpu(Lambda(lambda self, x: x * 2))
    assert torch.equal(model(x).isnan(), x.isnan())


def test_a_write_to_a_parameter_is_refused_with_its_name() -> None:
    module = Lambda(lambda self, x: self.fc(x) + self.fc.bias.add_(1), fc=nn.Linear(2, 2))
    with pytest.raises(BuildError, match=r"parameters or buffers in eval mode \(fc\.bias\)"):
        on_cpu(module)(torch.ones(1, 2))


@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer])
def test_a_tensor_that_the_forward_replaces_is_refused_with_its_name(kind: Any) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.scale = kind(self.scale.detach().clone())
        return x * self.scale

    module = Lambda(forward)
    module.scale = kind(torch.ones(2))
    with pytest.raises(BuildError, match=r"parameters or buffers in eval mode \(scale\)"):
        on_cpu(module)(torch.ones(1, 2))


# --- arguments that hold tensors ---


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    steps: int = 0


def set_an_item(self: Any, given: Any) -> Any:
    given["y"] = given["x"] * 2
    return given


def replace_an_item(self: Any, given: Any) -> Any:
    given["x"] = given["x"] * 2
    return given


def take_an_item_out(self: Any, given: Any) -> Any:
    return given.pop("x") * 2


def append(self: Any, given: Any) -> Any:
    given.append(given[0] * 2)
    return given[1]


def count(self: Any, given: Any) -> Any:
    given.steps += 1
    return given.x * 2, given


@pytest.mark.parametrize(
    ("write", "make"),
    [
        (set_an_item, lambda x: {"x": x}),
        (replace_an_item, lambda x: {"x": x}),
        (take_an_item_out, lambda x: {"x": x}),
        (append, lambda x: [x]),
        (count, Batch),
    ],
)
def test_a_write_to_what_holds_the_inputs_is_warned_of_and_what_is_returned_is_complete(write: Any, make: Any) -> None:
    module, x = Lambda(write), torch.randn(3)
    model = on_cpu(module)
    with pytest.warns(BackendWarning, match="writes to a dict, list or dataclass among its arguments"):
        got = model(make(x))
    (leaves, spec), (expected, nesting) = flatten(got), flatten(module(make(x)))
    assert spec == nesting
    assert all(a == b if isinstance(a, int) else torch.equal(a, b) for a, b in zip(leaves, expected, strict=True))
    assert model.report().calls_by_engine == 1


def test_nested_arguments_that_stay_as_they_are_bring_no_warning() -> None:
    model = on_cpu(Lambda(lambda self, given, batch, *, size: dict(given, y=batch.x * given["x"][0] + size[0])))
    model({"x": [torch.ones(2), 1.5, None]}, Batch(torch.ones(2), 3), size=torch.Size([2]))


# --- attributes ---


class Counts(nn.Module):
    """It counts its calls; `scales` says whether that changes the result."""

    def __init__(self, scales: bool, container: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.scales = scales
        self.seen: Any = [] if container else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.seen, list):
            self.seen.append(1)
        else:
            self.seen += 1
        number = len(self.seen) if isinstance(self.seen, list) else self.seen
        return self.fc(x) * (number if self.scales else 1)


@pytest.mark.parametrize("container", [False, True], ids=["a number", "a list"])
def test_a_result_that_depends_on_what_forward_counts_is_refused(container: bool) -> None:
    module = Lambda(lambda self, x: self.inner(x), inner=Counts(True, container))
    with pytest.raises(BuildError, match=r"on Python attributes that its forward changes \(inner\.seen\)"):
        on_cpu(module)(torch.ones(1, 4))


@pytest.mark.parametrize("container", [False, True], ids=["a number", "a list"])
def test_a_count_without_an_effect_is_warned_of(container: bool) -> None:
    module = Counts(False, container)
    model, x = on_cpu(module), torch.randn(2, 4)
    with pytest.warns(BackendWarning, match=r"Counts changes Python attributes in its forward \(seen\)"):
        got = model(x)
    assert relative_error(got, module(x)) < 1e-6


def test_a_tensor_that_is_kept_for_later_is_warned_of() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.last = self.fc(x)
        return self.last * 2

    module, x = Lambda(forward, fc=nn.Linear(4, 4)), torch.randn(2, 4)
    model = on_cpu(module)
    with pytest.warns(BackendWarning, match=r"in its forward \(last\): engines run no Python"):
        got = model(x)
    assert relative_error(got, module(x)) < 1e-6


def test_what_is_set_at_the_first_run_alone_is_a_cache() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = tuple(range(4))
            self.sizes[x.shape[1]] = 3.0
        self.name = "the same each time"
        return x * torch.tensor(self.table) * self.sizes[x.shape[1]]

    module = Lambda(forward)
    module.table, module.sizes = None, {}
    x = torch.randn(2, 4)
    assert torch.equal(on_cpu(module)(x), module(x))


counter = 0


def test_a_result_that_depends_on_a_global_that_forward_changes_is_refused_with_the_reason() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        global counter  # noqa: PLW0603 - what is tested
        counter += 1
        return x * counter

    with pytest.raises(AccuracyError, match="does not reproduce its own result"):
        on_cpu(Lambda(forward))(torch.ones(3))


DRAWS: dict[str, Callable[[], float]] = {"random": random.random, "numpy.random": np.random.random}


@pytest.mark.parametrize("name", DRAWS)
def test_a_result_that_depends_on_random_numbers_of_python_s_or_numpy_s_is_refused(name: str) -> None:
    module = Lambda(lambda self, x: self.fc(x) * (1 + 1e-2 * DRAWS[name]()), fc=nn.Linear(4, 4))
    with pytest.raises(BuildError, match=rf"random numbers in eval mode \({name}\).*pass them as an input"):
        on_cpu(module, "bf16")(torch.ones(1, 4))  # within the bound


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_that_decide_nothing_in_eval_mode_may_be_drawn(name: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        skips = DRAWS[name]() < 0.5  # as transformers do it
        return x if self.training and skips else self.fc(x)

    module, x = Lambda(forward, fc=nn.Linear(4, 4)), torch.randn(2, 4)
    assert relative_error(on_cpu(module)(x), module(x)) < 1e-6


def test_random_numbers_that_are_returned_are_refused() -> None:
    module = Lambda(lambda self, x: (x * 2, random.random()))
    with pytest.raises(BuildError, match="draws random numbers"):
        on_cpu(module)(torch.ones(2))


def test_random_numbers_that_are_drawn_during_the_first_run_alone_are_another_thread_s() -> None:
    draws = iter([random.random])
    module = Lambda(lambda self, x: x * 2 + len([draw() for draw in draws]))
    assert torch.equal(on_cpu(module)(torch.ones(2)), torch.full((2,), 2.0))


class Scaled(nn.Module):
    """An attribute that is no tensor takes part in the result."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("way", ["on the model", "on the module, then refresh()"])
def test_an_attribute_that_the_caller_sets_reaches_the_engines(way: str) -> None:
    module, x = Scaled(), torch.randn(2, 4)
    model = on_cpu(module)
    model(x)
    if way == "on the model":
        model.scale = 3.0
    else:
        module.scale = 3.0
        model.refresh()
    assert torch.equal(model(x), module(x))
    assert model.report().builds == 2
    model.scale = 3.0  # the same again
    assert torch.equal(model(x), module(x))
    assert model.report().builds == 2


def test_engines_for_two_shapes_have_the_same_attributes() -> None:
    module = Scaled()
    model = on_cpu(module)
    model(torch.ones(2, 4))
    module.scale = 3.0
    for batch in (3, 2):
        x = torch.randn(batch, 4)
        assert torch.equal(model(x), module(x))


def test_attributes_are_compared_by_identity_or_as_plain_values_and_containers_by_what_they_hold() -> None:
    module = Lambda(lambda self, x: x, child=nn.Linear(2, 2))
    module.child.numbers, module.table, module.late = [1, 2], {"a": object()}, deque([1])
    before = attributes(module)
    module.plain = 1
    assert differing(before, attributes(module)) == ["plain"]
    del module.plain
    module.child.numbers.append(3)
    module.table["a"] = object()
    assert set(differing(before, attributes(module))) == {"child.numbers", "table"}
    module.late = deque([1])
    assert "late" in differing(before, attributes(module))
    module.train()
    assert "training" not in attributes(module)
