"""The table of precisions, and tf32_state, which leaves the process's TF32 settings exactly as they were."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.helpers import on_cpu, relative_error
from tests.models import ZOO
from torchaccel.precision import PRECISIONS, tf32_state

BACKENDS: Any = torch.backends
UNREADABLE = "PyTorch refuses to say: the older and the newer settings disagree"


def read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:
        return UNREADABLE


def settings() -> dict[str, Any]:
    """Every setting that decides about TF32, and the newer ones as they are set rather than as they are inherited."""
    found = {
        "matmul.allow_tf32": read(lambda: BACKENDS.cuda.matmul.allow_tf32),
        "cudnn.allow_tf32": read(lambda: BACKENDS.cudnn.allow_tf32),
        "float32_matmul_precision": read(torch.get_float32_matmul_precision),
        "fp32_precision": BACKENDS.fp32_precision,
        "cudnn.fp32_precision": BACKENDS.cudnn.fp32_precision,
    }
    BACKENDS.fp32_precision = BACKENDS.cudnn.fp32_precision = "none"
    for name, place in newer_settings().items():
        found[name] = place.fp32_precision
    BACKENDS.fp32_precision = found["fp32_precision"]
    if found["cudnn.fp32_precision"] != found["fp32_precision"]:
        BACKENDS.cudnn.fp32_precision = found["cudnn.fp32_precision"]
    return found


def newer_settings() -> dict[str, Any]:
    return {
        "matmul": BACKENDS.cuda.matmul,
        "conv": BACKENDS.cudnn.conv,
        "rnn": BACKENDS.cudnn.rnn,
        "mkldnn.matmul": BACKENDS.mkldnn.matmul,
    }


def reset() -> None:
    """PyTorch's own defaults."""
    BACKENDS.fp32_precision = BACKENDS.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cuda.matmul.fp32_precision = BACKENDS.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    reset()
    yield
    reset()


def set_to(path: str, value: Any) -> Callable[[], None]:
    *places, name = path.split(".")

    def apply() -> None:
        place = BACKENDS
        for part in places:
            place = getattr(place, part)
        setattr(place, name, value)

    return apply


STATES: dict[str, Callable[[], None]] = {
    "PyTorch's defaults": lambda: None,
    **{f"set_float32_matmul_precision({p!r})": lambda p=p: torch.set_float32_matmul_precision(p)  # type: ignore[misc]
       for p in ("highest", "high", "medium")},
    **{f"{path}={value!r}": set_to(path, value)
       for path in ("cuda.matmul.allow_tf32", "cudnn.allow_tf32") for value in (True, False)},
    **{f"{path}.fp32_precision={value!r}": set_to(f"{path}.fp32_precision", value)
       for path in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "cudnn") for value in ("ieee", "tf32")},
    **{f"fp32_precision={value!r}": set_to("fp32_precision", value) for value in ("ieee", "tf32")},
}  # fmt: skip


@pytest.mark.parametrize("allowed", [True, False], ids=["allowed", "forbidden"])
@pytest.mark.parametrize("state", STATES)
def test_tf32_state_holds_inside_and_restores_what_was_there(state: str, allowed: bool) -> None:
    STATES[state]()
    before = settings()
    with tf32_state(allowed):
        assert BACKENDS.cuda.matmul.allow_tf32 is allowed
        assert BACKENDS.cudnn.allow_tf32 is allowed
        for name, place in newer_settings().items():
            if name != "mkldnn.matmul":
                assert (place.fp32_precision == "tf32") is allowed, name
    assert settings() == before


@pytest.mark.parametrize("state", ["PyTorch's defaults", "set_float32_matmul_precision('medium')"])
def test_a_nested_tf32_state_and_an_exception_restore_too(state: str) -> None:
    STATES[state]()
    before = settings()
    with tf32_state(True):
        outer = settings()
        with pytest.raises(KeyError), tf32_state(False):
            assert BACKENDS.cudnn.allow_tf32 is False
            raise KeyError
        assert settings() == outer
        with tf32_state(True):
            pass
        assert settings() == outer
    assert settings() == before


def test_two_threads_never_see_each_others_state() -> None:
    before = settings()
    wrong: list[bool] = []
    inside = threading.Event()

    def work(allowed: bool) -> None:
        for _ in range(200):
            with tf32_state(allowed):
                inside.set()
                seen = [BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32]
                wrong.extend(value for value in seen if value is not allowed)

    threads = [threading.Thread(target=work, args=(allowed,)) for allowed in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside.is_set()
    assert wrong == []
    assert settings() == before


def test_a_second_thread_waits_for_the_first_to_leave() -> None:
    entered = threading.Event()

    def enter() -> None:
        with tf32_state(False):
            entered.set()

    with tf32_state(True):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
        assert BACKENDS.cudnn.allow_tf32 is True
    thread.join()
    assert entered.is_set()


def test_the_table_has_the_rows_of_the_design() -> None:
    rows = {name: (row.name, row.dtype, row.tf32, row.bound) for name, row in PRECISIONS.items()}
    assert rows == {
        "fp32": ("fp32", torch.float32, False, 1e-5),
        "tf32": ("tf32", torch.float32, True, 2e-3),
        "fp16": ("fp16", torch.float16, False, 1e-2),
        "bf16": ("bf16", torch.bfloat16, False, 5e-2),
    }
    assert all(any(digit in row.spread for digit in "123456789") for row in PRECISIONS.values())


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_a_row_s_bound_is_above_the_error_of_a_real_network_and_not_far_above(name: str) -> None:
    module = ZOO["resnet18"].module()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exact = module.double()(x.double())
        error = relative_error(on_cpu(module.float(), name)(x), exact)
    bound = PRECISIONS[name].bound
    assert bound / 100 < error < bound
