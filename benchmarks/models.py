"""The models that the suite measures, with weights that look trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.functional import FunctionalResNet, FunctionalViT

SEED = 0
PRECISIONS = ("fp16", "bf16")  # that the suite measures them at
BATCHES = (1, 8, 32, 128)
VOCABULARY, TOKENS = 30522, 128  # BERT's own vocabulary, and a usual length


@dataclass(frozen=True)
class Model:
    """A model, and the shape of one item of its only input: images, or token ids below `vocabulary`."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 224, 224)
    vocabulary: int | None = None

    def module(self) -> nn.Module:
        """The same one every time, in FP32 on the CPU, in eval mode."""
        torch.manual_seed(SEED)
        return look_trained(self.make())


def look_trained(module: nn.Module, size: int = 64) -> nn.Module:
    """Give a new network the statistics of a trained one; eval mode.

    BatchNorm takes the statistics of real activations, so that these neither vanish nor explode with depth, a small
    scale and spread biases: then the output depends on the input, and rounding does not grow from layer to layer as it
    does in a network at random. Layers that start at zero get small weights.
    """
    generator = torch.Generator().manual_seed(0)
    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        module.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
            norm.weight.fill_(0.3)
            norm.bias.copy_(torch.randn(norm.num_features, generator=generator))
        if norms:
            module(torch.randn(16, 3, size, size, generator=generator))
        for norm in norms:
            norm.momentum = 0.1
    return module.eval()


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision.models

        return torchvision.models.get_model(name)

    return make


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=VOCABULARY, return_dict=False))


CONVOLUTIONAL = ("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny")
MODELS = {
    model.name: model
    for model in (
        *(Model(name, _torchvision(name)) for name in (*CONVOLUTIONAL, "swin_t", "vit_b_16")),
        Model("bert_base", _bert, (TOKENS,), VOCABULARY),
    )
}


def _resnet_twin(name: str) -> nn.Module:
    return FunctionalResNet(MODELS[name].module().state_dict())


def _vit_twin() -> nn.Module:
    return FunctionalViT(MODELS["vit_b_16"].module().state_dict(), heads=12)


# The same networks in functional style, with the same weights; they are measured where they are named.
TWINS = {
    model.name: model
    for model in (
        *(Model(f"{name}_functional", partial(_resnet_twin, name)) for name in ("resnet18", "resnet50")),
        Model("vit_b_16_functional", _vit_twin),
    )
}


def named_model(name: str) -> Model:
    """One of `MODELS` or `TWINS`."""
    return (MODELS | TWINS)[name]
