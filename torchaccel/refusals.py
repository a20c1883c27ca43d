"""What cannot become an engine, said in a few lines: why torch.export stopped and where, and random numbers."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import fx

from torchaccel.errors import BuildError

MAX_REASON = 400  # characters of what PyTorch says

# What PyTorch says, what that means, and what to do.
_KNOWN = (
    (
        ("data-dependent", "GuardOnDataDependent", "DataDependentOutput"),
        "its flow of control, or a Python number in it, depends on the values of a tensor, and an engine has one flow "
        "for all values",
        "Use torch.where or torch.cond, or compute the number outside and pass it as an argument.",
    ),
    (
        ("no fake impl", "fake impl", "meta kernel", "UnsupportedOperator"),
        "an operator has no fake implementation, which tells the shapes of its outputs without running it",
        "Register one with torch.library.register_fake.",
    ),
    (
        (".numpy()", "data pointer", "__array__", "no storage"),
        "it leaves PyTorch's operators, for NumPy or an extension that reads a tensor's memory",
        "Write that in PyTorch's operators, or make it a torch.library.custom_op with a fake implementation.",
    ),
)
_NOISE = ("For more ", "For extended ", "For C++", "If you suspect", "Caused by:", "The error above", "consider using")
_OWN = tuple(str(Path(file).parent) for file in (torch.__file__, __file__))


def explain(error: BaseException) -> str:
    """Why PyTorch could not trace a module: the reason in a few words, the line of the module, and the remedy."""
    said = f"{type(error).__name__}: {error}"
    kind, where = type(error).__name__, _place(error)
    for signs, meaning, remedy in _KNOWN:
        if any(sign.lower() in said.lower() for sign in signs):
            return f"({kind}): {meaning}{where}. {remedy} PyTorch says: {_brief(str(error))}"
    return f"({kind}): {_brief(str(error))}{where}"


def _brief(message: str) -> str:
    lines = [line.strip() for line in message.partition("The following call raised")[0].strip().splitlines()]
    kept = " ".join(line for line in lines if line and not line.startswith(_NOISE))
    return kept if len(kept) <= MAX_REASON else f"{kept[:MAX_REASON]}…"


def _place(error: BaseException) -> str:
    """The innermost line that is neither PyTorch's nor ours."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((*_OWN, "<"))
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f", at {frame.filename}:{frame.lineno}, in {frame.name}: `{frame.line}`"


def refuse_random_numbers(graph_module: fx.GraphModule, module: str) -> None:
    """Raise `BuildError` naming the operators of a program that draw random numbers.

    An engine has a generator of its own, or none: it would draw other numbers than the module, or the same ones for
    ever, and nothing could be checked.
    """
    drawn = Counter(
        str(node.target)
        for part in graph_module.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_function" and _draws(node)
    )
    if drawn:
        names = ", ".join(f"{name} ×{count}" for name, count in drawn.most_common())
        raise BuildError(
            f"{module} draws random numbers in eval mode ({names}): an engine would draw others, or the same ones at "
            f"each call, and its outputs could not be checked. Draw them outside and pass them as an input, or switch "
            f"them off in eval mode (functional dropout takes training=self.training)."
        )


def _draws(node: fx.Node) -> bool:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = {
        argument.name: argument.default_value if argument.has_default_value() else None
        for argument in target._schema.arguments
    }
    given |= dict(zip(given, node.args, strict=False)) | node.kwargs
    if given.get("train") is False or given.get("training") is False:
        return False
    return not any(given.get(name) == 0 for name in ("dropout_p", "dropout"))
