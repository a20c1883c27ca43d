"""What makes a compiled module a drop-in: its methods are those of the module that it stands for.

PyTorch calls methods on a module that it holds (`state_dict`, `_apply`, `train` …), and the module's class may have
versions of its own, besides methods that PyTorch knows nothing of (`generate`). All of them run on the module itself;
one that returns the module returns the compiled module. Python looks special methods (`len`, `[]`, `in`, `iter`) up on
the type, so each class of module gets a class of compiled module to match.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

# What a call is made of: the compiled module runs these itself, so that hooks of the root run around its engine. A
# class that has its own `__call__` has it run on the compiled module, whose `forward` it then reaches.
CALL = frozenset({"__call__", "_call_impl", "_wrapped_call_impl"})
# What is set on the compiled module alone: whoever wraps `forward` wants the engine inside the wrapper.
OF_CALLS = frozenset({"forward", "_compiled_call_impl"})
# How Python makes, copies, pickles and looks into an object: never the module's.
_OF_OBJECTS = frozenset(
    f"__{name}__"
    for name in (
        *("init", "new", "del", "init_subclass", "class_getitem", "subclasshook", "sizeof", "repr", "dir"),
        *("getattr", "getattribute", "setattr", "delattr", "annotate", "annotate_func"),
        *("copy", "deepcopy", "reduce", "reduce_ex", "getstate", "setstate", "getnewargs", "getnewargs_ex"),
    )
)

Class = TypeVar("Class", bound=type[nn.Module])


def delegating(compiled: Class) -> Class:
    """The class, with every method of `nn.Module` that it does not define run on `self.module`."""
    for name, value in vars(nn.Module).items():
        is_ours = name in vars(compiled) or name in CALL | OF_CALLS | _OF_OBJECTS | {"compile"}
        if inspect.isfunction(value) and not is_ours:
            setattr(compiled, name, _on_module(name, value))
    return compiled


@functools.lru_cache(maxsize=256)
def class_for(compiled: type, kind: type) -> type:
    """The subclass of `compiled` that stands for modules of class `kind`."""
    namespace: dict[str, Any] = {"__module__": compiled.__module__, "__doc__": compiled.__doc__}
    for name in dir(kind):
        value = inspect.getattr_static(kind, name)
        if name in _OF_OBJECTS or value is inspect.getattr_static(nn.Module, name, None):
            continue
        if name in CALL:
            namespace[name] = _on_itself(name, value)
        elif name == "forward":
            namespace[name] = _with_signature(vars(compiled)["forward"], value)
        elif inspect.isfunction(value) and name not in vars(compiled):
            namespace[name] = _on_module(name, value)
        elif hasattr(nn.Module, name) and name not in vars(compiled) and not _is_special(name):
            namespace[name] = property(functools.partial(_attribute, name=name))
    return type(f"Compiled{kind.__name__}", (compiled,), namespace)


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _attribute(compiled: Any, name: str) -> Any:
    return getattr(compiled.module, name)


def _on_module(name: str, like: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is the module's own of that name, except that `self` is returned for the module."""

    @functools.wraps(like)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self._state.module
        result = getattr(module, name)(*args, **kwargs)
        return self if result is module else result

    return method


def _on_itself(name: str, like: Callable[..., Any]) -> Callable[..., Any]:
    """The method of the module's class, run on the compiled module."""

    @functools.wraps(like)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self._state.module), name)(self, *args, **kwargs)

    return method


def _with_signature(forward: types.FunctionType, like: Any) -> types.FunctionType:
    """The same function, which says that it takes what `like` takes: trainers choose a batch's columns by that."""
    copied = types.FunctionType(forward.__code__, forward.__globals__, "forward", None, forward.__closure__)
    copied.__dict__.update(forward.__dict__)
    if callable(like):
        functools.update_wrapper(copied, like, updated=())
    return copied
