"""What must hold of every call of a compiled module, whatever is drawn."""

import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.fuzz import Example, Signature
from tests.fuzz_module import SAME_OBJECT, Drawn
from tests.trees import leaves_of, make, nesting
from torchaccel.compiled import CompiledModule
from torchaccel.errors import BackendWarning
from torchaccel.options import Options
from torchaccel.precision import PRECISIONS

LAYOUTS = ("contiguous", "transposed", "channels last", "strided", "offset", "expanded", "shared", "again")
MODES = ("no_grad", "inference_mode", "inference inputs")


Tensors = list[torch.Tensor]


class Maker:
    """Makes the tensors of one call, values and layouts from a seed."""

    def __init__(self, seed: int, device: str) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device
        self._made: list[torch.Tensor] = []
        self._arenas: dict[torch.dtype, torch.Tensor] = {}

    def _values(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            values = torch.randint(1, 17, shape, generator=self._generator) / 8
        else:
            values = torch.randint(0 if dtype is torch.bool else 1, 4, shape, generator=self._generator) % 4
        return values.to(dtype).to(self._device)

    def tensor(self, _: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in some layout."""
        self._made.append(self._laid_out(self._random.choice(LAYOUTS), shape, dtype))
        return self._made[-1]

    def _laid_out(self, layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:  # noqa: PLR0911
        count = torch.Size(shape).numel()
        if layout == "transposed":
            return self._values(shape[::-1], dtype).permute(tuple(range(len(shape)))[::-1])
        if layout == "channels last" and len(shape) in (4, 5):
            form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            return self._values(shape, dtype).to(memory_format=form)
        if layout == "strided":
            return self._values(tuple(2 * size for size in shape), dtype)[(slice(1, None, 2),) * len(shape)]
        if layout == "offset":
            return self._values((count + 3,), dtype)[3:].view(shape)
        if layout == "expanded":
            return self._values(tuple(self._random.choice([1, size]) for size in shape), dtype).expand(shape)
        if layout == "shared":
            arena = self._arenas.setdefault(dtype, self._values((256,), dtype))
            start = self._random.randint(0, 5)
            return arena[start : start + count].view(shape)
        if layout == "again":
            for earlier in self._made:
                if (earlier.shape, earlier.dtype) == (shape, dtype):
                    return earlier
        return self._values(shape, dtype)


@dataclass
class Checker:
    """A drawn module and the model that was compiled of it."""

    example: Example
    module: nn.Module
    model: CompiledModule
    device: str

    def options(self) -> Options:
        return self.model._state.options

    def arguments(self, signature: Signature, seed: int, device: str) -> tuple[list[Any], dict[str, Any], Tensors]:
        """The arguments of a call, and the tensors among them; the same values for the same seed."""
        maker = Maker(seed, device)
        args = [make(tree, maker.tensor) for tree in signature.args]
        kwargs = {name: make(tree, maker.tensor) for name, tree in signature.kwargs.items()}
        return args, kwargs, [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, torch.Tensor)]

    def call(self, signature: Signature, seed: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One call with tensors on `device`, compared; returns its tensors beside copies of what they hold."""
        mode = MODES[seed // 2 % 3]
        with torch.inference_mode(mode != "no_grad"):
            args, kwargs, inputs = self.arguments(signature, seed, device)
            its_args, its_kwargs, its_inputs = self.arguments(signature, seed, self.device)
            before = [tensor.clone() for tensor in inputs]
        casts: Any = torch.autocast(self.device, torch.bfloat16) if signature.autocast else nullcontext()
        with torch.inference_mode() if mode == "inference_mode" else torch.no_grad(), casts:
            expected = self.module(*its_args, **its_kwargs)
            result = self.model(*args, **kwargs)
            assert all(map(_same_bits, inputs, before)), "a call changed its inputs"
            compare(result, expected, self._bound(inputs, signature.autocast), device)
            if not {name for name, *_ in self.example.recipe.steps} & SAME_OBJECT:
                _compare_identities(leaves_of(result), inputs, leaves_of(expected), its_inputs)
            own = [leaf for leaf in leaves_of(result) if isinstance(leaf, torch.Tensor)]
            if seed // 6 % 2 and not signature.is_empty:  # results are the caller's, who may write to them
                for leaf in own:
                    if not any(leaf is tensor for tensor in inputs):
                        leaf.zero_()
                assert all(map(_same_bits, inputs, before)), "a result shares memory with an input"
            return [(leaf, leaf.clone()) for leaf in own]

    def _bound(self, inputs: Tensors, autocast: bool) -> float:
        """The relative error that is allowed; where all is float32 or wider, much less than the gate allows."""
        dtypes = [tensor.dtype for tensor in inputs]
        bound = self.options().bound_beside([*dtypes, torch.bfloat16] if autocast else dtypes)
        return 2e-6 if bound == PRECISIONS["fp32"].bound else bound


def check_example(example: Example, compiled: Callable[[nn.Module], CompiledModule], device: str = "cpu") -> int:
    """Serve the calls of an example and compare each with the module; returns how many were compared.

    On a GPU a quarter of the calls have their tensors on the CPU, as their results are to be.
    """
    module = Drawn(example.recipe).eval().to(device)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    checker = Checker(example, module, compiled(module), device)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    engines = set()
    by_module = 0
    for seed in example.calls:
        signature = example.signatures[seed % len(example.signatures)]
        place = "cpu" if seed // 12 % 4 == 0 else device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*next to nothing but zeros", BackendWarning)
            kept += checker.call(signature, seed, place)
        by_module += signature.is_empty
        engines |= set() if signature.is_empty else {repr(signature)}
    for result, copy in kept:
        assert _same_bits(result, copy), "a later call changed an earlier result"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    report = checker.model.report()
    assert (report.calls_by_module, report.calls_by_engine) == (by_module, len(example.calls) - by_module)
    assert report.builds == len(engines)
    return len(example.calls)


def compare(result: Any, expected: Any, bound: float, device: str = "cpu") -> None:
    """The same types, keys, plain values, dtypes and shapes, on that device, and values within a relative error."""
    assert nesting(result) == nesting(expected)
    for y, theirs in zip(leaves_of(result), leaves_of(expected), strict=True):
        if not isinstance(theirs, torch.Tensor):
            continue
        r = theirs.to(device)
        assert y.device == r.device
        assert not y.requires_grad or y is theirs  # the module's own parameter, where the module itself served
        if not r.is_floating_point():
            assert torch.equal(y, r)
            continue
        assert torch.equal(torch.isfinite(y), torch.isfinite(r))
        wide = r.double().nan_to_num()
        assert (y.double().nan_to_num() - wide).norm() <= bound * wide.norm(), f"{y} is not {r}"


def _compare_identities(got: list[Any], inputs: Tensors, expected: list[Any], its_inputs: Tensors) -> None:
    """An input that is handed back is the caller's own, and an output that stands in two places one tensor."""
    for index, (y, r) in enumerate(zip(got, expected, strict=True)):
        if isinstance(r, torch.Tensor):
            assert [y is tensor for tensor in inputs] == [r is tensor for tensor in its_inputs]
            assert [y is other for other in got[:index]] == [r is other for other in expected[:index]]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)
