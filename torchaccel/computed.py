"""Weights that PyTorch's own hooks compute anew before each forward: weight_norm, spectral_norm and pruning.

Those of torch.nn.utils, which are older than parametrizations: they keep the parameters under other names, and set the
weight, a plain attribute, as a call of the module begins. On the root of a compiled module they are no business of the
caller's, as other hooks there are, but a part of what is computed.
"""

from typing import Any

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def computes_weight(hook: Any) -> bool:
    """Whether a hook that runs before the forward is one of these."""
    from torch.nn.utils.prune import BasePruningMethod

    return isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod)


def compute_weights(module: nn.Module) -> None:
    """Set these weights of the module itself, not of its submodules, as a call of it would before its forward."""
    for hook in tuple(module._forward_pre_hooks.values()):
        if computes_weight(hook):
            hook(module, ())
