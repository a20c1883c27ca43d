"""torchaccel: one line makes a trained PyTorch model run fast on NVIDIA GPUs.

>>> import torch, torchaccel
>>> model = torchaccel.compile(torch.nn.Linear(4, 2), "fp32", backend="eager", device="cpu")
>>> with torch.inference_mode():
...     model(torch.ones(3, 4)).shape
torch.Size([3, 2])
"""

from torchaccel import dynamo
from torchaccel.compiled import CompiledModule
from torchaccel.compiler import backends, compile, race
from torchaccel.environment import environment
from torchaccel.errors import (
    AccuracyError,
    BackendError,
    BackendWarning,
    BuildError,
    CacheWarning,
    DeviceMemoryError,
    InputError,
    MeasurementWarning,
    OptionError,
    StaleWeightsError,
    TorchAccelError,
)
from torchaccel.precision import PRECISIONS
from torchaccel.timing import compare, measure

__all__ = [
    "PRECISIONS",
    "AccuracyError",
    "BackendError",
    "BackendWarning",
    "BuildError",
    "CacheWarning",
    "CompiledModule",
    "DeviceMemoryError",
    "InputError",
    "MeasurementWarning",
    "OptionError",
    "StaleWeightsError",
    "TorchAccelError",
    "backends",
    "compare",
    "compile",
    "dynamo",
    "environment",
    "measure",
    "race",
]
