"""The options of compile(): a frozen dataclass that validates itself."""

import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from os import PathLike, fspath
from typing import Any, Literal, cast

import torch

from torchaccel.errors import OptionError
from torchaccel.precision import PRECISIONS

BACKENDS = ("torch_tensorrt", "onnx_tensorrt", "fused", "inductor", "eager")
ON_WEIGHT_CHANGE = ("refresh", "raise", "ignore")
CHECK_WEIGHTS_EVERY = 1000  # a look takes the host about a millisecond: a microsecond a call
OBJECTIVES = ("latency", "throughput", "stream")
RACE_BUDGET_S = 600.0


@dataclass(frozen=True)
class Options:
    """What `compile` was asked for, checked. The fields are the arguments of `torchaccel.compile`."""

    precision: str = "fp16"
    backend: str = "auto"
    fallback: str | None = None
    dynamic_batch: tuple[int, int, int] | None = None
    device: torch.device | None = None
    tolerance: float | None = None
    keep_fp32: tuple[str, ...] = ()
    partial: bool = False
    cuda_graph: bool = True
    max_runners: int = 8
    on_weight_change: str = "refresh"
    check_weights_every: int | None = CHECK_WEIGHTS_EVERY
    objective: str = "latency"
    race_budget_s: float | None = None
    cache_dir: str | PathLike[str] | Literal[False] | None = None

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("backend", self.backend, ("auto", "fastest", *BACKENDS))
        if self.fallback is not None:
            _one_of("fallback", self.fallback, BACKENDS)
            if self.fallback == self.backend:
                raise OptionError(f"fallback={self.fallback!r} is the backend itself; name another one, or None.")
            if self.backend == "fastest":
                raise OptionError(f"fallback={self.fallback!r}: backend='fastest' tries every backend; leave it out.")
        _one_of("on_weight_change", self.on_weight_change, ON_WEIGHT_CHANGE)
        _one_of("objective", self.objective, OBJECTIVES)
        if self.objective != "latency" and self.backend != "fastest":
            raise OptionError(f"objective={self.objective!r} is what backend='fastest' decides by; give both.")
        for name in ("partial", "cuda_graph"):
            _check(name, getattr(self, name), lambda value: isinstance(value, bool), "True or False")
        _check("max_runners", self.max_runners, _is_count, "a whole number of at least 1")
        if self.check_weights_every is not None:
            _check("check_weights_every", self.check_weights_every, _is_count, "None or a number of calls, at least 1")
        if self.tolerance is not None:
            _check("tolerance", self.tolerance, _is_positive, "None or a positive relative error such as 1e-2")
        if self.race_budget_s is not None:
            _check("race_budget_s", self.race_budget_s, _is_positive, "None or a positive number of seconds")
            if self.backend != "fastest":
                raise OptionError("race_budget_s belongs to backend='fastest'; leave it out, or give that.")
        _check("cache_dir", self.cache_dir, _is_folder, "None (the default folder), False (none) or a folder's path")
        self._check_dynamic_batch()
        if self.keep_fp32 and self.precision == "tf32":
            raise OptionError(
                "keep_fp32 belongs to 'fp16' and 'bf16': TF32 is a setting of a whole engine. Compile at 'fp32', or "
                "leave it out."
            )
        if self.partial and self.backend not in ("auto", "fastest", "torch_tensorrt"):
            raise OptionError(
                f"partial=True lets operators run outside engines, which only backend='torch_tensorrt' (or 'auto', "
                f"or 'fastest') can do; it was given with backend={self.backend!r}."
            )

    def _check_dynamic_batch(self) -> None:
        sizes = self.dynamic_batch
        if sizes is None:
            return
        allowed = "None or three whole numbers (min, opt, max) with 1 <= min <= opt <= max and max >= 2"
        if not (isinstance(sizes, tuple) and len(sizes) == 3 and all(_is_count(size) for size in sizes)):
            raise OptionError(f"dynamic_batch={sizes!r}: allowed are {allowed}.")
        if not (sizes[0] <= sizes[1] <= sizes[2] and sizes[2] >= 2):
            raise OptionError(f"dynamic_batch={sizes!r}: allowed are {allowed}.")

    @property
    def bound(self) -> float:
        """The relative error that an output may have: `tolerance`, or the precision's own."""
        return self.tolerance if self.tolerance is not None else PRECISIONS[self.precision].bound

    def bound_beside(self, dtypes: Iterable[torch.dtype]) -> float:
        """The bound where the module, which is compared with, has tensors of `dtypes`: that of the coarsest of all.

        A module in float16 has float16's own error: a finer engine that is right differs from it by as much.

        >>> Options("fp32").bound_beside([torch.float32]), Options("fp32").bound_beside([torch.float16])
        (1e-05, 0.01)
        """
        if self.tolerance is not None:
            return self.tolerance
        held = set(dtypes)
        return max([self.bound, *(row.bound for row in PRECISIONS.values() if row.dtype in held and not row.tf32)])


def make_options(precision: str, device: Any, keep_fp32: Any, dynamic_batch: Any, **others: Any) -> Options:
    """Turn the arguments of compile() into `Options`; raises `OptionError` for a wrong name, type or combination."""
    known = {field.name for field in fields(Options)}
    for name in others:
        if name not in known:
            raise OptionError(f"compile() has no argument {name!r}. {_suggest(name, known)}")
    if isinstance(dynamic_batch, list):
        dynamic_batch = tuple(dynamic_batch)
    return Options(
        precision=precision,
        device=_device(device),
        keep_fp32=_names(keep_fp32),
        dynamic_batch=dynamic_batch,
        **others,
    )


def check_module_names(module: torch.nn.Module, names: Iterable[str]) -> None:
    """Raise `OptionError` unless each name of `keep_fp32` is a submodule's."""
    known = {name for name, _ in module.named_modules() if name}
    for name in names:
        if name not in known:
            raise OptionError(f"keep_fp32 names {name!r}, which is no submodule of the module. {_suggest(name, known)}")


def _device(device: Any) -> torch.device | None:
    if device is None:
        return None
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise OptionError(f"device={device!r}: allowed are None, 'cpu', 'cuda' and 'cuda:N'.") from error
    if parsed.type not in ("cpu", "cuda"):
        raise OptionError(f"device={device!r}: allowed are None, 'cpu', 'cuda' and 'cuda:N'.")
    if parsed.type == "cuda":
        count, index = torch.cuda.device_count(), cast("int | None", parsed.index)
        if (index or 0) >= count:
            raise OptionError(
                f"device={device!r}: this machine has {count} usable CUDA device(s); run `python -m torchaccel env`."
            )
        if index is None:
            parsed = torch.device("cuda", torch.cuda.current_device())
    return parsed


def _names(keep_fp32: Any) -> tuple[str, ...]:
    allowed = "give a list of submodule names, such as ['layer4', 'fc']"
    if isinstance(keep_fp32, str):
        raise OptionError(f"keep_fp32={keep_fp32!r}: {allowed}.")
    try:
        names = tuple(keep_fp32)
    except TypeError as error:
        raise OptionError(f"keep_fp32={keep_fp32!r}: {allowed}.") from error
    if not all(isinstance(name, str) for name in names):
        raise OptionError(f"keep_fp32={keep_fp32!r}: every item must be the name (str) of a submodule.")
    return names


def _one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}.")


def _check(name: str, value: Any, is_allowed: Any, allowed: str) -> None:
    if not is_allowed(value):
        raise OptionError(f"{name}={value!r}: allowed is {allowed}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_folder(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | PathLike) and bool(fspath(value)))


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max


def _suggest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    if not known:
        return "There are none."
    shown = ", ".join(map(repr, known[:20])) + (", …" if len(known) > 20 else "")
    return f"There are: {shown}."
