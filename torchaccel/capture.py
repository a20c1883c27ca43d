"""torch.export: a program out of a module and one call's arguments."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode

from torchaccel.computed import compute_weights
from torchaccel.errors import BackendWarning, BuildError, InputError, TorchAccelError
from torchaccel.precision import Precision
from torchaccel.prepare import drop_dead_casts, fold_batch_norm, prepare, weight_nodes, weight_rules
from torchaccel.program import Program, count_operators, drop_weights
from torchaccel.purity import attributes
from torchaccel.quiet import quiet
from torchaccel.refusals import explain, refuse_random_numbers
from torchaccel.signature import Call, OutputSpec, split_outputs
from torchaccel.weights import module_tensors

PREFIX = "module."
_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._subclasses.fake_tensor")


class _Found:
    """What tracing learns besides the graph; torch.export undoes writes to the module's own attributes."""

    outputs: OutputSpec | None = None
    failure: str = ""
    written: frozenset[int] = frozenset()


class _StoppedError(Exception):
    """Carries an exception of the module through torch.export, which would print the graph so far for its own."""


class _Flat(nn.Module):
    """The module behind flat tensors: what nests, and what is no tensor, stays outside the program."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module = module
        self._call = call
        self.found = _Found()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        versions = [tensor._version for tensor in tensors]
        args, kwargs = self._call.arguments(tensors)
        compute_weights(self.module)
        written = [tensors[index] for index in self.found.written]
        try:
            with _CastsCopy(written) if written else nullcontext():
                result = self.module.forward(*args, **kwargs)  # a call, hooks included, runs around the engine
        except TorchAccelError:
            raise
        except Exception as error:
            self.found.failure = explain(error)  # here, where its traceback still has the module's own lines
            raise _StoppedError from error
        self.found.written = frozenset(i for i, tensor in enumerate(tensors) if tensor._version != versions[i])
        computed, self.found.outputs = split_outputs(result, tensors, self.found.written)
        return computed


_CASTS = [getattr(torch.Tensor, name) for name in ("to", "type", "type_as", "float", "half", "bfloat16", "double")]


class _CastsCopy(TorchFunctionMode):
    """Casts of these inputs, and of views of them, are copies, as they are to the module.

    In the engine's dtypes and layout a cast can be none: what is then written in place would change the input.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._storages = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_none = function in (*_CASTS, torch.Tensor.contiguous) and result is args[0]
        return result.clone() if is_none and result.untyped_storage()._cdata in self._storages else result


def capture(
    module: nn.Module,
    call: Call,
    tensors: Sequence[torch.Tensor],
    precision: Precision,
    *,
    keep_fp32: Sequence[str] = (),
    dynamic_batch: tuple[int, int, int] | None = None,
) -> Program:
    """Capture `module` at `precision` for a call whose tensors, on the module's device, are `tensors`.

    Raises `BuildError` where torch.export refuses the module, with its reason.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False), _cpu_autocast_off():
        flat = _Flat(prepare(module, precision.dtype, keep_fp32), call)
        examples = tuple(engine_input(tensor, precision.dtype) for tensor in tensors)
        batched = batched_inputs(examples) if dynamic_batch else (False,) * len(examples)
        advice = _if_by_chance(examples, batched) if dynamic_batch else ""
        if dynamic_batch:
            examples = resize_batch(examples, batched, max(min(2, dynamic_batch[2]), dynamic_batch[1]))
        exported = _export(flat, examples, batched, dynamic_batch, advice)
        if flat.found.written:  # not by the module in its own dtypes: that is refused before
            exported = _export(flat, examples, batched, dynamic_batch, advice)
    outputs = flat.found.outputs
    if outputs is None or not exported.graph_signature.user_outputs:
        raise BuildError("the module computes no tensor for these inputs, so there is nothing to compile.")
    _warn_of_loose_tensors(exported, module, flat.module)
    refuse_random_numbers(exported.graph_module, type(module).__name__)
    drop_dead_casts(exported)
    rules = weight_rules(exported, PREFIX)
    folded = fold_batch_norm(exported, rules)
    rules = {name: rules[name] for name in (str(spec.target) for spec, _ in weight_nodes(exported))}
    drop_weights(exported, rules)  # the prepared copy's, which the folded graph would read wrongly
    _release(flat.module, exported)
    return Program(
        exported,
        rules,
        outputs,
        examples,
        dynamic_batch,
        batched,
        folded=folded,
        operators=count_operators(exported.graph),
    )


def _release(prepared: nn.Module, exported: ExportedProgram) -> None:
    """Give the prepared copy's memory back now: tracing leaves cycles that would hold it until they are collected."""
    held = [*exported.state_dict.values(), *exported.constants.values()]
    kept = {tensor.untyped_storage()._cdata for tensor in held if isinstance(tensor, torch.Tensor)}
    for tensor in (*prepared.parameters(), *prepared.buffers()):
        if tensor.untyped_storage()._cdata not in kept:
            tensor.untyped_storage().resize_(0)


def _warn_of_loose_tensors(exported: ExportedProgram, module: nn.Module, prepared: nn.Module) -> None:
    """A tensor that is a plain attribute is a constant of the engine: say so, since the module may change it.

    So is one in a plain list or dict, or of a module there, which the program's constants are found by in the prepared
    copy.
    """
    specs = exported.graph_signature.input_specs
    names = [str(spec.target).removeprefix(PREFIX) for spec in specs if spec.kind is InputKind.CONSTANT_TENSOR]
    held = _tensors_in_containers(prepared)
    constants = [tensor for tensor in exported.constants.values() if isinstance(tensor, torch.Tensor)]
    listed = {held[tensor.untyped_storage()._cdata] for tensor in constants if tensor.untyped_storage()._cdata in held}
    loose = [*(name for name in names if _is_attribute(module, name)), *sorted(listed)]
    if loose:
        warnings.warn(
            f"{type(module).__name__} computes with tensors that are neither parameters nor buffers "
            f"({', '.join(loose)}): engines keep the values of now. Use register_buffer, "
            f"nn.ParameterList or nn.ModuleList to have changes followed.",
            BackendWarning,
            stacklevel=2,
        )


def _tensors_in_containers(module: nn.Module) -> dict[int, str]:
    """The storages of tensors, and of modules' tensors, in lists, dicts and the like, with the attribute's name."""
    found = {}
    for name, (value, contents) in attributes(module).items():
        for item in value if isinstance(value, tuple) else contents or ():
            for tensor in module_tensors(item).values() if isinstance(item, nn.Module) else (item,):
                if isinstance(tensor, torch.Tensor):
                    found[tensor.untyped_storage()._cdata] = name
    return found


def _is_attribute(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        return isinstance(getattr(module.get_submodule(owner), leaf, None), torch.Tensor)
    except AttributeError:
        return False


def engine_input(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as an engine takes it: floating ones in the compute dtype, contiguous, free of autograd."""
    target = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(target).contiguous().clone()


def batched_inputs(tensors: Sequence[torch.Tensor]) -> tuple[bool, ...]:
    """Which tensors have the batch as their first dimension: those as long there as the first that has dimensions."""
    size = batch_size(tensors)
    return tuple(tensor.dim() > 0 and tensor.shape[0] == size for tensor in tensors)


def batch_size(tensors: Sequence[torch.Tensor]) -> int:
    """The first dimension of the first tensor that has one."""
    for tensor in tensors:
        if tensor.dim() > 0:
            return tensor.shape[0]
    raise InputError("dynamic_batch needs an input with at least one dimension; this call has none.")


def resize_batch(tensors: Sequence[torch.Tensor], batched: Sequence[bool], size: int) -> tuple[torch.Tensor, ...]:
    """The tensors with their rows repeated, or cut, to a batch of `size`."""

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(size, device=tensor.device) % max(1, tensor.shape[0])
        return tensor.index_select(0, rows) if tensor.shape[0] else tensor.new_zeros(size, *tensor.shape[1:])

    return tuple(resize(tensor) if is_batched else tensor for tensor, is_batched in zip(tensors, batched, strict=True))


def _if_by_chance(tensors: Sequence[torch.Tensor], batched: Sequence[bool]) -> str:
    """What to do where one of several inputs only happens to be as long as the batch."""
    numbers = [str(index) for index, is_batched in enumerate(batched) if is_batched]
    if len(numbers) == 1:
        return ""
    return (
        f"\nThe first dimension of the inputs {', '.join(numbers)} is {batch_size(tensors)}, and was taken for the "
        f"batch: if one of them has that size by chance, build first with a batch of another size (inputs=…)."
    )


def _export(
    flat: _Flat,
    examples: tuple[torch.Tensor, ...],
    batched: Sequence[bool],
    dynamic_batch: tuple[int, int, int] | None,
    advice: str,
) -> ExportedProgram:
    shapes: Any = None
    if dynamic_batch and dynamic_batch[0] < dynamic_batch[2]:
        batch = Dim("batch", min=dynamic_batch[0], max=dynamic_batch[2])
        shapes = (tuple({0: batch} if is_batched else None for is_batched in batched),)
    from torch._dynamo.convert_frame import compile_lock

    try:
        # One thread at a time, and none while Dynamo compiles: both keep state that the process shares.
        with quiet(*_LOGGERS), compile_lock, _without_stack_traces():
            return torch.export.export(flat, examples, dynamic_shapes=shapes, strict=False)
    except TorchAccelError:
        raise
    except Exception as error:
        what = "with a dynamic batch " if dynamic_batch else ""
        raise BuildError(
            f"torch.export could not capture {type(flat.module).__name__} {what}{flat.found.failure or explain(error)}"
            f"{advice}"
        ) from error


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Spare each node of a graph the text of the lines that made it, a tenth of an export, which nothing here reads.

    PyTorch 2.11 has no such setting, and writes them.
    """
    config: Any = torch.fx.config
    if not hasattr(config, "do_not_emit_stack_traces"):
        yield
        return
    before, config.do_not_emit_stack_traces = config.do_not_emit_stack_traces, True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


def _cpu_autocast_off() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)
