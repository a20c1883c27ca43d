"""Torch-TensorRT's Dynamo path over the exported program, strongly typed.

Torch-TensorRT partitions and converts. Where one engine holds the whole program, which is the default's demand, the
engine itself is the plan and our own context runs it: calling a Torch-TensorRT module costs more than the engine.
With `partial=True` and operators outside engines, the plan is the program that Torch-TensorRT made.
"""

import inspect
import io
import operator
import tempfile
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from torchaccel import trt
from torchaccel.backends.base import (
    Engine,
    NativeEngine,
    Plan,
    TensorRTBacked,
    has_fp32_products,
    keep_apart,
    tensorrt_honours,
)
from torchaccel.errors import BuildError
from torchaccel.precision import Precision
from torchaccel.probes import import_problem, tensorrt_of_torch_tensorrt
from torchaccel.program import Program, count_operators, drop_weights, put_weight
from torchaccel.quiet import quiet
from torchaccel.report import Coverage
from torchaccel.shares import INSIDE, time_shares

# Torch-TensorRT logs what it then raises, whatever it is given.
LOGGERS = ("torch_tensorrt", "torch_tensorrt [TensorRT Conversion Context]")
ENGINE = "_run_on_acc"  # how Torch-TensorRT names the parts that become engines


class TorchTensorRT(TensorRTBacked):
    """Torch-TensorRT, on TensorRT proper or TensorRT-RTX, whichever it was built with."""

    name = "torch_tensorrt"

    def unavailable(self) -> str | None:
        """Why `import torch_tensorrt` fails here."""
        return import_problem("torch_tensorrt") or trt.unavailable(_flavour())

    def honours(self, precision: Precision, device: torch.device) -> str | None:
        """What the GPU and the TensorRT beneath honour."""
        return tensorrt_honours(_flavour(), precision, device)

    def library(self) -> str:
        """Torch-TensorRT and the TensorRT beneath."""
        import torch_tensorrt

        return f"Torch-TensorRT {torch_tensorrt.__version__} on {self.tensorrt().name}"

    def tensorrt(self) -> trt.TensorRT:
        """The TensorRT beneath."""
        return trt.load(_flavour())

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        """Lower, convert and build; raises `BuildError` naming operators outside engines, unless `partial`."""
        settings = _settings(precision, device)
        try:
            with quiet(*LOGGERS):
                source = _decompose(program, settings)
                engine = _convert(source, program, settings, device)
            if engine is not None:
                return self._whole(program, precision, engine, source)
            compiled = _compile(program, {**settings, "require_full_compilation": not partial})
        except Exception as error:
            outside = _coverage(program, settings).outside
            if outside and not partial:
                raise BuildError(_uncovered(outside)) from error
            if not outside:
                raise BuildError(
                    f"Torch-TensorRT could not build the program: {type(error).__name__}: {error}"
                ) from error
            compiled = _compile(program, {**settings, "require_full_compilation": False})
        engine = _only_engine(compiled)
        if engine is not None:
            return self._whole(program, precision, engine)
        coverage = _coverage(program, settings)
        if not partial or not coverage.engines:
            raise BuildError(_uncovered(coverage.outside))
        payload, manifest = _serialise(compiled, program, device), {"program": True}
        return self._plan(program, precision, payload, manifest, coverage)

    def rebuild(self, plan: Plan, program: Program, device: torch.device, *, partial: bool = False) -> Plan:
        """Convert the kept program, which is decomposed already, with the new weights; only a whole one is kept."""
        if plan.source is None:
            return self.build(program, plan.precision, device, partial=partial)
        weights = {**program.exported.state_dict, **program.exported.constants}
        for name in program.rules:
            put_weight(plan.source, name, weights[name].detach())
        with quiet(*LOGGERS):
            engine = _convert(plan.source, program, _settings(plan.precision, device), device)
        if engine is None:
            raise BuildError("Torch-TensorRT converts the program no longer as it did at first; refresh() builds anew.")
        return self._whole(program, plan.precision, engine, plan.source)

    def load(self, plan: Plan, device: torch.device) -> Engine:
        """One engine runs in our own context; a program with several runs as Torch-TensorRT made it."""
        if not plan.manifest.get("program"):
            return super().load(plan, device)
        import torch_tensorrt  # noqa: F401 - it registers the operator that the program calls

        module = torch.export.load(io.BytesIO(plan.payload)).module()
        engine = _PartialEngine(module, plan.precision)
        return keep_apart(engine, _flavour(), plan.manifest["fp32_products"], device)

    def _whole(
        self, program: Program, precision: Precision, engine: tuple[bytes, dict[str, Any]], source: Any = None
    ) -> Plan:
        """The plan of a program that one engine computes."""
        serialised, manifest = engine
        coverage = Coverage(inside=program.operators, engines=1)
        plan = self._plan(program, precision, serialised, manifest, coverage)
        if source is not None:
            drop_weights(source, program.rules)
            plan.source = source
        return plan

    def _plan(
        self, program: Program, precision: Precision, payload: bytes, manifest: dict[str, Any], coverage: Coverage
    ) -> Plan:
        manifest = {"flavour": _flavour(), "fp32_products": has_fp32_products(program), **manifest}
        return Plan(self.name, precision, payload, manifest, coverage, self.library())


class _PartialEngine(NativeEngine):
    """A program with TensorRT engines in it, as Torch-TensorRT made it."""

    shares_store = False

    def __init__(self, module: Any, precision: Precision) -> None:
        super().__init__(module, precision)
        self._module = module
        self._precision = precision

    def outside_time_shares(self, *inputs: torch.Tensor) -> dict[str, float]:
        def run(interpret: Any, *tensors: torch.Tensor) -> Any:
            return NativeEngine(interpret, self._precision)(*tensors)

        shares = time_shares(self._module, _label, inputs, run)
        return {name: share for name, share in shares.items() if name != INSIDE}


def _label(node: fx.Node) -> str | None:
    """The operator's name, or that it is an engine: Torch-TensorRT calls those through operators of its own."""
    name = str(node.target)
    if name.startswith("tensorrt.") or ENGINE in name:
        return INSIDE
    return name if node.op == "call_function" else None  # torch.export's check of the inputs is a module


def _flavour() -> str:
    return tensorrt_of_torch_tensorrt() or "tensorrt"


def _settings(precision: Precision, device: torch.device) -> dict[str, Any]:
    import torch_tensorrt

    settings = {
        "device": torch_tensorrt.Device._from(device),
        "disable_tf32": not precision.tf32,
        "min_block_size": 1,  # the default of 5 leaves small modules without an engine
        "immutable_weights": True,
        "use_explicit_typing": True,  # Torch-TensorRT 2.14 always does, and no longer takes the argument
        "attn_bias_is_causal": False,  # the default takes any attention mask for a causal one
    }
    known = inspect.signature(torch_tensorrt.dynamo.compile).parameters
    return {name: value for name, value in settings.items() if name in known}


def _inputs(program: Program) -> list[Any]:
    import torch_tensorrt

    inputs = []
    for index, example in enumerate(program.inputs):
        low, best, high = program.shapes(index)
        shapes = {"shape": low} if low == high else {"min_shape": low, "opt_shape": best, "max_shape": high}
        inputs.append(torch_tensorrt.Input(dtype=example.dtype, **shapes))
    return inputs


def _decompose(program: Program, settings: dict[str, Any]) -> ExportedProgram:
    """The program in the operators that Torch-TensorRT converts; its weights keep their names."""
    from torch_tensorrt.dynamo.lowering import get_decompositions, pre_export_lowering

    lowered = pre_export_lowering(program.exported, _compilation_settings(settings))
    return lowered.run_decompositions(get_decompositions())


def _lowered(decomposed: ExportedProgram, settings: dict[str, Any]) -> fx.GraphModule:
    """The graph as Torch-TensorRT's converters take it."""
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo.lowering import post_lowering

    chosen = _compilation_settings(settings)
    DYNAMO_CONVERTERS.set_compilation_settings(chosen)  # which operators they take depends on them
    return post_lowering(decomposed.module(check_guards=False), chosen)


def _convert(
    decomposed: ExportedProgram, program: Program, settings: dict[str, Any], device: torch.device
) -> tuple[bytes, dict[str, Any]] | None:
    """One engine of the whole program and its manifest; None where its outputs are not all different tensors.

    What `torch_tensorrt.dynamo.compile` does, less what is of no use here: partitioning, and loading the engine into
    a runtime of its own, which takes a second.
    """
    from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

    chosen = _compilation_settings(settings)
    lowered = _lowered(decomposed, settings)
    results = pytree.tree_leaves(next(node for node in lowered.graph.nodes if node.op == "output").args)
    dtypes = infer_module_output_dtypes(lowered)
    interpreter = TRTInterpreter(lowered, _inputs(program), dtypes, compilation_settings=chosen)
    if program.batch is not None:
        _add_profile_at_best(interpreter, program)
    _share_timings(interpreter, trt.load(_flavour()), device)
    built = interpreter.run()
    if len(set(results)) != len(results) or len(built.output_names) != len(results):
        return None
    manifest = {"inputs": list(enumerate(built.input_names)), "outputs": list(built.output_names)}
    return bytes(built.engine.serialize()), manifest


def _add_profile_at_best(interpreter: Any, program: Program) -> None:
    """Give the network, once it is defined, a profile of the optimal shapes alone: see `trt.build_from_onnx`."""
    define = interpreter._construct_trt_network_def

    def define_with_profile() -> None:
        define()
        shapes = [(name, program.shapes(index)) for index, name in enumerate(interpreter._input_names)]
        moving = [(name, best, best, best) for name, (low, best, high) in shapes if low != high]
        if moving:
            interpreter.optimization_profiles.insert(0, trt.optimization_profile(interpreter.builder, moving))

    interpreter._construct_trt_network_def = define_with_profile


def _share_timings(interpreter: Any, library: trt.TensorRT, device: torch.device) -> None:
    """Have TensorRT proper's timings where ours are, rather than in Torch-TensorRT's own file, which is not checked."""
    if not library.is_rtx:
        interpreter._create_timing_cache = lambda config, *_: library.reuse_timings(config, device)
        interpreter._save_timing_cache = lambda config, *_: library.keep_timings(config, device)


def _compilation_settings(settings: dict[str, Any]) -> Any:
    from torch_tensorrt.dynamo import CompilationSettings

    known = {field.name for field in fields(CompilationSettings)}
    return CompilationSettings(**{name: value for name, value in settings.items() if name in known})


def _compile(program: Program, settings: dict[str, Any]) -> fx.GraphModule:
    import torch_tensorrt

    with quiet(*LOGGERS):
        return torch_tensorrt.dynamo.compile(program.exported, inputs=_inputs(program), **settings)


def _coverage(program: Program, settings: dict[str, Any]) -> Coverage:
    """Which operators Torch-TensorRT puts into engines: its partitioning alone, as a dry run prints a page."""
    from torch_tensorrt.dynamo.partitioning import fast_partition

    with quiet(*LOGGERS):
        lowered = _lowered(_decompose(program, settings), settings)
        parts, _ = fast_partition(lowered, min_block_size=settings["min_block_size"])
    coverage = Coverage(outside=count_operators(parts.graph))
    for name, part in parts.named_children():
        if isinstance(part, fx.GraphModule):
            is_engine = ENGINE in name
            (coverage.inside if is_engine else coverage.outside).update(count_operators(part.graph))
            coverage.engines += is_engine
    return coverage


def _uncovered(outside: Counter[str]) -> str:
    names = ", ".join(f"{name} ×{count}" for name, count in outside.most_common())
    return (
        f"Torch-TensorRT cannot put these operators into a TensorRT engine: {names or 'all of them'}. "
        f"Pass partial=True to run them in PyTorch between engines, or choose another backend."
    )


def _only_engine(compiled: fx.GraphModule) -> tuple[bytes, dict[str, Any]] | None:
    """The serialised engine and its manifest where one engine computes the whole program; None otherwise."""
    placeholders = [node for node in compiled.graph.nodes if node.op == "placeholder"]
    steps = [node for node in compiled.graph.nodes if node.op not in ("placeholder", "output")]
    calls = [node for node in steps if node.target is not operator.getitem]
    if len(calls) != 1 or calls[0].op != "call_module" or not set(calls[0].args) <= set(placeholders):
        return None
    (call,) = calls
    module: Any = compiled.get_submodule(str(call.target))
    results = pytree.tree_leaves(next(node for node in compiled.graph.nodes if node.op == "output").args)
    if not all(result is call or (result in steps and result.args[0] is call) for result in results):
        return None
    names = list(module.output_binding_names)
    manifest = {
        "inputs": [
            (placeholders.index(node), name) for node, name in zip(call.args, module.input_binding_names, strict=True)
        ],
        "outputs": [names[0 if result is call else result.args[1]] for result in results],
    }
    return bytes(module.serialized_engine), manifest


def _serialise(compiled: fx.GraphModule, program: Program, device: torch.device) -> bytes:
    import torch_tensorrt

    with tempfile.TemporaryDirectory() as folder, quiet(*LOGGERS):
        path = Path(folder) / "program.ep"
        examples = [torch.zeros_like(example, device=device) for example in program.inputs]
        torch_tensorrt.save(compiled, str(path), output_format="exported_program", arg_inputs=examples)
        return path.read_bytes()
