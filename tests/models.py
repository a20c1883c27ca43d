"""Test models with real-looking weights, and the calls that go with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.models import look_trained


@dataclass(frozen=True)
class Case:
    """A model, and the arguments of a call with a batch of `batch`."""

    name: str
    make: Callable[[], nn.Module]
    size: int = 64
    variance: float | None = None  # draws BatchNorm's statistics, instead of measuring them

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.make()
        return look_trained(module) if self.variance is None else draw_statistics(module, self.variance)

    def inputs(self, batch: int, device: str | torch.device = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        torch.manual_seed(1)
        if self.name == "bert":
            tokens = torch.randint(0, 100, (batch, 16), device=device)
            mask = torch.ones_like(tokens)
            mask[:, 12:] = 0
            return (), {"input_ids": tokens, "attention_mask": mask}
        return (torch.randn(batch, 3, self.size, self.size, device=device),), {}


def draw_statistics(module: nn.Module, variance: float) -> nn.Module:
    """BatchNorm statistics at random around a variance, for a network whose measured ones amplify rounding; eval mode.

    DeepLab's do: with `look_trained`, PyTorch's own fp16 is off by 1.7 % and its bf16 by 19 %.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.running_mean.copy_(torch.randn(child.num_features, generator=generator) * 0.1)
                child.running_var.copy_((torch.rand(child.num_features, generator=generator) + 0.5) * variance)
    return module.eval()


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return BertModel(config)


def _fpn() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None)


def _deeplab() -> nn.Module:
    return torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)


def _torchvision(name: str, size: int = 64) -> Case:
    return Case(name, getattr(torchvision.models, name), size)


ZOO = {
    case.name: case
    for case in (
        _torchvision("resnet18"),
        _torchvision("resnet50"),
        _torchvision("mobilenet_v3_large"),
        _torchvision("efficientnet_b0"),
        _torchvision("convnext_tiny"),
        _torchvision("swin_t"),
        _torchvision("vit_b_16", 224),
        _torchvision("densenet121"),
        _torchvision("regnet_y_400mf"),
        Case("deeplabv3_mobilenet_v3_large", _deeplab, variance=0.2),
        Case("fpn_resnet18", _fpn),
        Case("bert", _bert),
    )
}


class SmallConvNet(nn.Module):
    """Convolutions with BatchNorm, written in functional style, small enough for any engine to build in a second."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.norm(self.first(x)))
        x = nn.functional.relu(x + self.second_norm(self.second(x)))
        return self.fc(x.mean((2, 3)))


def small_conv_net(classes: int = 5) -> SmallConvNet:
    """A `SmallConvNet` that looks trained; the same one every time."""
    torch.manual_seed(0)
    module = SmallConvNet(classes)
    look_trained(module)
    return module


def small_transformer() -> nn.Module:
    """A vision transformer for images of 32 × 32, in eval mode with fixed random weights; its head has some too."""
    torch.manual_seed(0)
    module = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    nn.init.normal_(module.heads.head.weight)
    return module.eval()
