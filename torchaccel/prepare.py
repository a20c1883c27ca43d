"""From the caller's module to something an engine can be built from: copy and cast, then fold.

The copy is cast before it is captured, so the program says in each operator what it computes in: that is how engines
of strongly typed TensorRT get their precision. BatchNorm is folded in the captured program rather than in the module,
since only the data flow tells which convolution feeds it; networks in functional style fold as well as nested ones.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from torchaccel.borders import outermost, set_border
from torchaccel.computed import computes_weight
from torchaccel.errors import BuildError
from torchaccel.weights import WeightRule, module_tensors

aten = torch.ops.aten
WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def prepare(module: nn.Module, dtype: torch.dtype, keep_fp32: Iterable[str] = ()) -> nn.Module:
    """A copy of `module` in eval mode that computes in `dtype`, except the submodules named by `keep_fp32`.

    The caller's tensors are not touched: floating parameters and buffers are cast on the way into the copy, others
    are copied. Hooks on the root are left out, since the compiled module runs those itself, but for those that compute
    a weight: what they compute it from is a part of the program.
    """
    kept = {f"{name}." for name in keep_fp32}
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        memo[id(parameter)] = nn.Parameter(_cast(name, parameter, dtype, kept), requires_grad=False)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        memo[id(buffer)] = _cast(name, buffer, dtype, kept)
    try:
        prepared = copy.deepcopy(module, memo).eval()
    except Exception as error:
        raise BuildError(
            f"{type(module).__name__} cannot be copied, and engines are built from a copy ({error}): keep what cannot "
            f"be copied out of its attributes."
        ) from error
    _untie(module, prepared, dtype, kept)
    prepared._forward_hooks.clear()
    prepared._backward_hooks.clear()
    for key, hook in tuple(prepared._forward_pre_hooks.items()):
        if not computes_weight(hook):
            del prepared._forward_pre_hooks[key]
    for name in outermost(keep_fp32):
        set_border(prepared.get_submodule(name), inside=torch.float32, outside=dtype)
    return prepared


def _untie(module: nn.Module, prepared: nn.Module, dtype: torch.dtype, kept: set[str]) -> None:
    """Give a tensor that has several places a copy of its own where it is to have another dtype than elsewhere."""
    for name, tensor in module_tensors(module).items():
        owner, _, leaf = name.rpartition(".")
        place = prepared.get_submodule(owner)
        if getattr(place, leaf).dtype == _dtype(name, tensor, dtype, kept):
            continue
        own = _cast(name, tensor, dtype, kept)
        if isinstance(tensor, nn.Parameter):
            place._parameters[leaf] = nn.Parameter(own, requires_grad=False)
        else:
            place._buffers[leaf] = own


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype, kept: set[str]) -> torch.Tensor:
    return tensor.detach().to(_dtype(name, tensor, dtype, kept), copy=True)


def _dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype, kept: set[str]) -> torch.dtype:
    """The dtype that the prepared copy's tensor of that name is to have."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if any(name.startswith(prefix) for prefix in kept) else dtype


def weight_rules(program: ExportedProgram, prefix: str) -> dict[str, WeightRule]:
    """The rule of each weight of a captured program, before anything is folded: a cast to what the program holds."""
    rules = {}
    for spec, node in weight_nodes(program):
        value = node.meta["val"]
        dtype = value.dtype if value.is_floating_point() else None
        rules[str(spec.target)] = WeightRule((str(spec.target).removeprefix(prefix),), dtype=dtype)
    return rules


def weight_nodes(program: ExportedProgram) -> list[tuple[InputSpec, fx.Node]]:
    """The parameters and buffers among a program's inputs, with their nodes."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [(spec, nodes[spec.arg.name]) for spec in program.graph_signature.input_specs if spec.kind in WEIGHT_KINDS]


def fold_batch_norm(program: ExportedProgram, rules: dict[str, WeightRule]) -> int:
    """Fold each BatchNorm into the convolution that alone feeds it; returns how many were folded.

    The program is edited in place: the convolution's weight takes the folded values, and one of the vectors that the
    BatchNorm no longer needs becomes its bias. `rules` then says how both follow from the module's tensors, so new
    weights and new running statistics fold the same way. Exact up to one rounding.
    """
    targets = {node: str(spec.target) for spec, node in weight_nodes(program)}
    folded = 0
    for norm in list(program.graph.nodes):
        if norm.op == "call_function" and norm.target is aten.batch_norm.default and not norm.args[5]:
            folded += _fold(program.graph, norm, targets, rules)
    drop_unused_weights(program)
    return folded


def _fold(graph: fx.Graph, norm: fx.Node, targets: dict[fx.Node, str], rules: dict[str, WeightRule]) -> bool:
    arguments: list[Any] = list(norm.args)
    conv, gamma, beta, mean, variance, _, _, epsilon = arguments[:8]
    if conv.target not in CONVOLUTIONS or conv.kwargs or len(conv.users) != 1:
        return False
    weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
    vectors = [node for node in (bias, beta, mean, gamma, variance) if node is not None]
    own = [node for node in (weight, *vectors) if node in targets]
    if len(own) != 1 + len(vectors) or len(weight.users) != 1:  # a computed or shared weight
        return False
    if any(rules[targets[node]].function != "cast" for node in own):  # folded into already
        return False
    slot = next((node for node in vectors if len(node.users) == 1), None)
    if slot is None or conv.meta["val"].dtype != norm.meta["val"].dtype:
        return False
    given = {node: rules[targets[node]].sources[0] for node in own}

    def name(node: Any) -> str | None:
        return None if node is None else given[node]

    dtype = weight.meta["val"].dtype
    rules[targets[weight]] = WeightRule(
        (name(weight), name(gamma), name(variance)), "folded_weight", dtype, float(epsilon)
    )
    rules[targets[slot]] = WeightRule(
        tuple(map(name, (bias, gamma, beta, mean, variance))), "folded_bias", dtype, float(epsilon)
    )
    slot.meta["val"] = slot.meta["val"].to(dtype)
    conv.args = (conv.args[0], weight, slot, *conv.args[3:])
    norm.replace_all_uses_with(conv)
    graph.erase_node(norm)
    return True


def drop_unused_weights(program: ExportedProgram) -> None:
    """Remove the weights that no operator reads from a program's inputs and state."""
    unused = {spec.arg.name: node for spec, node in weight_nodes(program) if not node.users}
    signature = program.graph_signature
    for spec in [spec for spec in signature.input_specs if spec.arg.name in unused]:
        signature.input_specs.remove(spec)
        program.state_dict.pop(str(spec.target), None)
        program.constants.pop(str(spec.target), None)
        program.graph.erase_node(unused[spec.arg.name])
    program.graph_module.recompile()


def drop_dead_casts(program: ExportedProgram) -> None:
    """Remove casts that nothing reads, which borders leave behind, and the checks of dtypes that come with casts."""
    for node in reversed(program.graph.nodes):
        is_dead = node.target is aten.to.dtype and not node.users
        if is_dead or node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.graph_module.recompile()
