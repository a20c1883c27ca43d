"""The JSON file beside an engine: what it was built from, by what, and what it takes.

`recipes.build_engine` writes it, `recipes.run_engine` reads it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")  # TensorRT's, by PyTorch's names


class ManifestError(Exception):
    """An engine has no manifest that can be read, or is not the file that its manifest describes."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: its shape in the ONNX file, where a free dimension is a name or None.

    An input has three shapes more: the smallest, the best and the largest that the engine takes.
    """

    name: str
    dtype: str
    shape: list[int | str | None]
    min: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    max: list[int] = field(default_factory=list)

    def of_batch(self, batch: int) -> list[int]:
        """The shape at a batch, which a static input has at its own alone."""
        return self.best if self.min == self.max else [batch, *self.best[1:]]


@dataclass(frozen=True)
class Manifest:
    """What is known of an engine. `gpu` and `compute_capability` are None for an engine that no GPU took part in.

    `external_data_sha256` has the files beside the ONNX file that hold its weights; `versions` whatever took part.
    """

    engine: str
    engine_sha256: str
    onnx: str
    onnx_sha256: str
    external_data_sha256: dict[str, str]
    precision: str
    flavour: str
    library: str
    library_version: str
    gpu: str | None
    compute_capability: list[int] | None
    inputs: list[Tensor]
    outputs: list[Tensor]
    versions: dict[str, str | None]
    build_ms: float
    schema: int = SCHEMA

    def batches(self) -> tuple[int, int, int]:
        """The smallest, best and largest batch; three times its own for an engine of one."""
        free = [tensor for tensor in self.inputs if tensor.min != tensor.max]
        shapes = [free[0].min, free[0].best, free[0].max] if free else [self.inputs[0].best] * 3
        low, best, high = (shape[0] if shape else 1 for shape in shapes)
        return low, best, high

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def path_of(engine: Path) -> Path:
    """Where the manifest of an engine lies: PREFIX.json beside PREFIX.trt."""
    return engine.with_suffix(".json")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read(engine: Path) -> Manifest:
    """The manifest of an engine that is the file described; raises `ManifestError`, or `OSError` for the engine."""
    given = sha256(engine)
    path = path_of(engine)
    try:
        manifest = _parsed(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ManifestError(f"{engine} has no manifest: {path}: {error.strerror}. {_REMEDY}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ManifestError(f"{path} is no manifest of an engine: {error}. {_REMEDY}") from error
    if given != manifest.engine_sha256:
        raise ManifestError(
            f"{engine} is not the file that {path} describes: its SHA-256 is {given[:12]}… and "
            f"{manifest.engine_sha256[:12]}… was built. It is damaged, or one of the two is of another build. {_REMEDY}"
        )
    return manifest


_REMEDY = "`python -m recipes.build_engine MODEL.onnx PREFIX PRECISION` writes both."


def _parsed(content: Any) -> Manifest:
    """A manifest from what JSON gives; raises `ValueError`, `TypeError` or `AttributeError` for anything else."""
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {content.get('schema')!r}, and {SCHEMA} is the one known here")
    known = [row.name for row in fields(Manifest)]
    if missing := [name for name in known if name not in content]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    values = {name: content[name] for name in known}
    for name in ("inputs", "outputs"):
        values[name] = [Tensor(**tensor) for tensor in values[name]]
    for name in ("engine_sha256", "precision", "flavour", "library", "library_version"):
        if not isinstance(values[name], str):
            raise ValueError(f"its {name} is {values[name]!r}, which is no text")
    if not values["inputs"] or not values["outputs"]:
        raise ValueError("it names no inputs or no outputs")
    for tensor in values["inputs"]:
        _check(tensor)
    return Manifest(**values)


def _check(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"input {tensor.name!r} is of {tensor.dtype!r}; known are {', '.join(DTYPES)}")
    shapes = tensor.min, tensor.best, tensor.max
    whole = all(type(size) is int and size >= 0 for shape in shapes for size in shape)
    if not whole or len({len(shape) for shape in (*shapes, tensor.shape)}) > 1:
        raise ValueError(f"the shapes of input {tensor.name!r} do not fit each other")
