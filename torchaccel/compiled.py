"""CompiledModule: the drop-in that finds the runner for a call."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from torchaccel import streaming
from torchaccel.dropin import OF_CALLS, class_for, delegating
from torchaccel.errors import BackendWarning, BuildError
from torchaccel.forking import refuse_forked_cuda
from torchaccel.report import Report
from torchaccel.runner import Runner
from torchaccel.signature import Call, flatten, keyword_names, read_call
from torchaccel.state import State, module_device


@delegating
class CompiledModule(nn.Module):
    """A drop-in for the module: calls in eval mode run engines, calls in training mode run the module itself.

    `module` is the module. Parameters, buffers, submodules, hooks, mode, attributes and methods are the module's, and
    `isinstance` takes the one for the other. Setting an attribute sets the module's. Two things differ: `modules()` and
    `named_modules()` begin with the compiled module, as does what hooks of the root are given; and the module's methods
    run on the module, so one that calls `self(x)` runs no engine. Replacing `forward` wraps the engine.
    """

    _state: State
    _keywords: frozenset[str]

    def __new__(cls, state: State) -> "CompiledModule":
        """Of a class with the special methods and the signature of the module's."""
        kinds: tuple[Any, Any] = cls, type(state.module)
        return object.__new__(class_for(*kinds))

    def __init__(self, state: State) -> None:
        # The module's own dictionaries, not copies: what is registered on one is registered on the other. That of the
        # submodules is asked for each time, since `del` on a Sequential puts another in its place.
        shared = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)} - {"_modules"}
        self.__dict__.update({name: value for name, value in state.module.__dict__.items() if name in shared})
        self.__dict__["_state"] = state
        self.__dict__["_keywords"] = keyword_names(state.module.forward)

    @property
    def module(self) -> nn.Module:
        """The caller's module, which owns the weights."""
        return self._state.module

    @property
    def training(self) -> bool:
        """The module's mode."""
        return self._state.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._state.module.training = mode

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The module's class, for `isinstance`; `type` tells them apart."""
        return self._state.module.__class__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run an engine (building it at the first call of a signature), or the module in training mode.

        Results are the caller's own, each in memory of its own. An input that the module hands back is that very
        tensor; where the module returns a view of an input, or of another output, an engine returns a copy. A call with
        an empty tensor goes to the module.
        """
        state = self._state
        if state.module.training or _is_transformed():
            return self._run_module(args, kwargs)
        if torch._C._get_dispatch_mode(_FAKE) is not None:  # this thread traces, for torch.export or a build
            raise BuildError("a compiled module cannot be exported, nor compiled as a part of another; give `.module`.")
        call = read_call(args, kwargs, self._keywords)
        if torch.is_grad_enabled():
            if any(tensor.requires_grad for tensor in call.tensors):
                return self._run_moved(call, args, kwargs)
            if not state.warned_of_gradients and state.watch.is_trainable():
                self._warn_of_gradients()
        if any(tensor.numel() == 0 for tensor in call.tensors):
            return self._run_moved(call, args, kwargs)
        state.check_weights()
        if DistributedDataParallel._active_ddp_module is not None:
            state.check_untracked()  # it has just sent the first process's buffers, which PyTorch 2.14 does not track
        runner = state.find(call)
        outputs = runner(call.tensors)
        return runner.outputs.assemble(outputs, call.tensors)

    def stream(
        self, batches: Iterable[Any], preprocess: Callable[..., Any] | None = None, *, pinned_buffers: int = 1
    ) -> Iterator[Any]:
        """Serve batches from the host, in order, with copy in, compute and copy out overlapped; yields CPU results.

        A batch is a tensor or array, a tuple or list of positional arguments, or a dict of keyword arguments; CPU
        tensors, pinned or not, and NumPy arrays. `preprocess` gets a batch's tensors on the device and returns the
        module's arguments: decode bytes and normalise there, and copy a quarter of the data. A source that gives its
        own pinned buffer may fill it anew for the next batch, which waits until the last is copied; one that fills
        several in turn says how many in `pinned_buffers`, and need not wait.

        Raises `OptionError` for a `preprocess` or `pinned_buffers` of the wrong kind.
        """
        streaming.check_preprocess(preprocess)
        streaming.check_pinned_buffers(pinned_buffers)
        if self._state.device.type == "cuda":
            refuse_forked_cuda()
        if self._state.device.type == "cuda" and not self.training and not self._wraps_calls():
            ring = streaming.Ring(self._state.device, self._find_checked, preprocess, self._keywords, pinned_buffers)
            return ring.serve(batches)
        return (self._serve_one(batch, preprocess) for batch in batches)

    def refresh(self) -> None:
        """Take the module's weights as they are now, however they were written; enqueued on the current stream."""
        self._state.refresh("refresh()")

    def report(self) -> Report:
        """What was built, how it was checked, and what served the calls so far."""
        state = self._state
        state.report.runners = [runner.record for runner in state.kept_runners()]
        state.report.calls_by_engine = state.pool.calls
        state.report.device_memory_mib = state.memory_mib()
        return copy.deepcopy(state.report)

    def runner_for(self, *args: Any, **kwargs: Any) -> Runner:
        """The runner that serves such a call, built if need be; `replay()` on it runs the engine without copies."""
        return self._find_checked(read_call(args, kwargs, self._keywords))

    def train(self, mode: bool = True) -> "CompiledModule":
        """The module's mode; entering eval mode looks for writes to the weights that PyTorch does not track."""
        self._state.module.train(mode)
        if not mode:
            self._state.check_untracked()
        return self

    def eval(self) -> "CompiledModule":
        """As `train(False)`, by the module's own `eval`."""
        self._state.module.eval()
        self._state.check_untracked()
        return self

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        """The module's, beginning with the compiled module in its place."""
        module = self._state.module
        return (self if child is module else child for child in module.modules(*args, **kwargs))

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The module's, beginning with the compiled module in its place."""
        module = self._state.module
        return ((name, self if child is module else child) for name, child in module.named_modules(*args, **kwargs))

    def _find_checked(self, call: Call) -> Runner:
        self._state.check_weights()
        return self._state.find(call)

    def _wraps_calls(self) -> bool:
        """Whether a call is more than `forward`: hooks on the root, or a `__call__` of the module's class."""
        has_hooks = bool(self._forward_hooks or self._forward_pre_hooks or self.__dict__.keys() & OF_CALLS)
        return has_hooks or type(self._state.module).__call__ is not nn.Module.__call__

    def _serve_one(self, batch: Any, preprocess: Callable[..., Any] | None) -> Any:
        """What a ring does for a batch, as one call; only training mode has gradients."""
        args, kwargs = streaming.read_batch(batch)
        on_cpu = self._state.device.type == "cpu"
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            if not on_cpu:
                args, kwargs = _moved((args, kwargs), self._state.device)
            args, kwargs = streaming.preprocessed(args, kwargs, preprocess)
            result = self(*args, **kwargs)
            return result if on_cpu else _moved(result, torch.device("cpu"))

    def _run_module(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._state.report.calls_by_module += 1
        return self._state.module.forward(*args, **kwargs)

    def _run_moved(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module on inputs from the host too, whose results go back there, as an engine's do."""
        device = module_device(self._state.module) or self._state.device
        if all(tensor.device == device for tensor in call.tensors):
            return self._run_module(args, kwargs)
        tensors = [tensor.to(device) for tensor in call.tensors]
        result = self._run_module(*call.arguments(tensors))
        if not all(tensor.is_cpu for tensor in call.tensors):
            return result
        given = dict(zip(map(id, tensors), call.tensors, strict=True))  # an input that comes back is that very tensor
        leaves, spec = flatten(result)
        return pytree.tree_unflatten(
            [given.get(id(leaf), leaf.cpu()) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
        )

    def _warn_of_gradients(self) -> None:
        self._state.warned_of_gradients = True
        warnings.warn(
            "gradients are enabled, and engines compute none: no gradient will flow to the module's parameters. "
            "Call under torch.no_grad() or torch.inference_mode(), or train() to run the module itself.",
            BackendWarning,
            stacklevel=5,
        )

    def __reduce__(self) -> Any:
        """A pickle holds the module and the options; engines are built anew, where they are used."""
        on_itself = {name: value for name, value in self.__dict__.items() if name in OF_CALLS}
        return self._state.remake, (self._state.module,), on_itself or None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledModule":
        """A copy of the module, compiled with the same options."""
        remake, (module,), on_itself = self.__reduce__()
        other = memo[id(self)] = remake(copy.deepcopy(module, memo))
        other.__dict__.update(copy.deepcopy(on_itself or {}, memo))
        return other

    def __getattr__(self, name: str) -> Any:
        if name == "_state":  # not there before __init__ has run
            raise AttributeError(name)
        return getattr(self._state.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ITS_OWN:
            raise AttributeError(f"{name} is the compiled module's own; the module's is `.module.{name}`.")
        if name in OF_CALLS:
            self.__dict__[name] = value
            return
        setattr(self._state.module, name, value)
        if name != "training" and not isinstance(value, nn.Module | torch.Tensor):  # those are watched at each call
            self._state.note_attribute()

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.keys() & OF_CALLS:
            del self.__dict__[name]
        else:
            delattr(self._state.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *dir(self._state.module)})

    def __repr__(self) -> str:
        options = self._state.options
        return f"CompiledModule(precision={options.precision!r}, backend={options.backend!r}, module={self.module!r})"


_FAKE = torch._C._TorchDispatchModeKey.FAKE

# The names that a module's own attributes are hidden behind, and those of them that are there for callers.
ITS_OWN = ("module", "stream", "refresh", "report", "runner_for")
HIDES = tuple(
    name
    for name in (*vars(CompiledModule), *CompiledModule.__annotations__)
    if not name.startswith("__") and not hasattr(nn.Module(), name)
)

# Dynamo neither traces a call of a compiled module nor anything below it: torch.compile runs the engine as it is. It
# is what `torch.compiler.disable` does, without importing Dynamo and without a wrapper around each call.
_SKIP = eval_frame._FrameAction.SKIP
eval_frame.set_code_exec_strategy(CompiledModule.forward.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP))
CompiledModule.forward.__dict__.update(_torchdynamo_disable=True, _torchdynamo_disable_msg="it runs an engine")


def _is_transformed() -> bool:
    """Whether the call is inside `torch.func` (vmap, grad, jvp) or forward-mode AD, which no engine follows."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _moved(tree: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)
