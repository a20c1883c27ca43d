"""CompiledModule: the drop-in that finds the runner for a call."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from torchaccel import streaming
from torchaccel.errors import BackendWarning
from torchaccel.report import Report
from torchaccel.runner import Runner
from torchaccel.signature import Call, read_call
from torchaccel.state import State


class CompiledModule(nn.Module):
    """A drop-in for the module: calls in eval mode run engines, calls in training mode run the module itself.

    It shares the module's parameters, buffers, submodules, hooks and mode; `module` is the module. Attributes that are
    not its own are the module's, and setting one sets the module's.
    """

    _state: State

    def __init__(self, state: State) -> None:
        # The module's own dictionaries, not copies: what is registered on one is registered on the other.
        self.__dict__.update(
            {name: value for name, value in state.module.__dict__.items() if name in vars(nn.Module())}
        )
        self.__dict__.pop("training", None)
        self.__dict__["_state"] = state

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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run an engine (building it at the first call of a signature), or the module in training mode."""
        state = self._state
        if state.module.training:
            return self._run_module(args, kwargs)
        call = read_call(args, kwargs)
        if torch.is_grad_enabled():
            if any(tensor.requires_grad for tensor in call.tensors):
                return self._run_module(args, kwargs)
            if not state.warned_of_gradients and state.watch.is_trainable():
                self._warn_of_gradients()
        if any(tensor.numel() == 0 for tensor in call.tensors):
            return self._run_module(args, kwargs)
        state.check_weights()
        runner = state.find(call)
        outputs = runner(call.tensors)
        return runner.outputs.assemble(outputs, call.tensors)

    def stream(self, batches: Iterable[Any], preprocess: Callable[..., Any] | None = None) -> Iterator[Any]:
        """Serve batches from the host, in order, with copy in, compute and copy out overlapped; yields CPU results.

        A batch is a tensor or array, a tuple or list of positional arguments, or a dict of keyword arguments; CPU
        tensors, pinned or not, and NumPy arrays. `preprocess` gets a batch's tensors on the device and returns the
        module's arguments: decode bytes and normalise there, and copy a quarter of the data.
        """
        streaming.check_preprocess(preprocess)
        if self._state.device.type == "cuda" and not self.training:
            return streaming.Ring(self._state.device, self._find_checked, preprocess).serve(batches)
        return (self._serve_one(batch, preprocess) for batch in batches)

    def refresh(self) -> None:
        """Take the module's weights as they are now, however they were written; waits for the device."""
        self._state.refresh("refresh()")

    def report(self) -> Report:
        """What was built, how it was checked, and what served the calls so far."""
        state = self._state
        state.report.runners = [runner.record for runner in state.runners.values()]
        state.report.calls_by_engine = state.pool.calls
        state.report.device_memory_mib = state.memory_mib()
        return copy.deepcopy(state.report)

    def runner_for(self, *args: Any, **kwargs: Any) -> Runner:
        """The runner that serves such a call, built if need be; `replay()` on it runs the engine without copies."""
        return self._find_checked(read_call(args, kwargs))

    def train(self, mode: bool = True) -> "CompiledModule":
        """The module's mode; entering eval mode looks for writes to the weights that PyTorch does not track."""
        self._state.module.train(mode)
        if not mode:
            self._state.check_untracked()
        return self

    def _find_checked(self, call: Call) -> Runner:
        self._state.check_weights()
        return self._state.find(call)

    def _serve_one(self, batch: Any, preprocess: Callable[..., Any] | None) -> Any:
        args, kwargs = streaming.preprocessed(*streaming.read_batch(batch), preprocess)
        return self(*args, **kwargs)

    def _run_module(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._state.report.calls_by_module += 1
        return self._state.module.forward(*args, **kwargs)

    def _warn_of_gradients(self) -> None:
        self._state.warned_of_gradients = True
        warnings.warn(
            "gradients are enabled, and engines compute none: no gradient will flow to the module's parameters. "
            "Call under torch.no_grad() or torch.inference_mode(), or train() to run the module itself.",
            BackendWarning,
            stacklevel=5,
        )

    def __reduce__(self) -> Any:
        """Copies and pickles hold the module and the options; engines are built anew, where they are used."""
        module = self._state.module
        return _remade, (self._state.remake, module, [child.training for child in module.modules()])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_state"].module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._state.module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._state.module, name)

    def __repr__(self) -> str:
        options = self._state.options
        return f"CompiledModule(precision={options.precision!r}, backend={options.backend!r}, module={self.module!r})"


def _remade(remake: Callable[[nn.Module], nn.Module], module: nn.Module, modes: list[bool]) -> nn.Module:
    model = remake(module)
    for child, mode in zip(module.modules(), modes, strict=True):
        child.training = mode
    return model
