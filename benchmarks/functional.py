"""ResNet and ViT written anew: one module each, whose forward is nothing but `torch.nn.functional`.

They compute what torchvision's do from the weights of torchvision's, and share no code or class with them: what makes
those fast has to make these as fast.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Flat(nn.Module):
    """All tensors of a state_dict side by side: `layer1.0.conv1.weight` is `weights["layer1_0_conv1_weight"]`.

    Running statistics are buffers of the same flat names; counts of batches are left out.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict()
        for name, tensor in state.items():
            flat = name.replace(".", "_")
            if "running_" in name:
                self.register_buffer(flat, tensor.detach().clone())
            elif "num_batches" not in name:
                self.weights[flat] = nn.Parameter(tensor.detach().clone())

    def linear(self, x: Tensor, name: str) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return F.linear(x, self.weights[f"{name}_weight"], self.weights[f"{name}_bias"])


class FunctionalResNet(_Flat):
    """A ResNet in eval mode: images `[N, 3, H, W]` to scores `[N, classes]`; the depth is that of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        x = F.relu(self._convolved(x, "conv1", "bn1", stride=2, padding=3))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in range(1, 5):
            block = 0
            while f"layer{stage}_{block}_conv1_weight" in self.weights:
                x = self._block(x, f"layer{stage}_{block}", stride=2 if stage > 1 and block == 0 else 1)
                block += 1
        return self.linear(x.mean(dim=(2, 3)), "fc")

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        """Two 3x3 convolutions, or 1x1, 3x3 (with the stride) and 1x1, beside the identity or a 1x1 convolution."""
        if f"{name}_conv3_weight" in self.weights:
            y = F.relu(self._convolved(x, f"{name}_conv1", f"{name}_bn1"))
            y = F.relu(self._convolved(y, f"{name}_conv2", f"{name}_bn2", stride=stride, padding=1))
            y = self._convolved(y, f"{name}_conv3", f"{name}_bn3")
        else:
            y = F.relu(self._convolved(x, f"{name}_conv1", f"{name}_bn1", stride=stride, padding=1))
            y = self._convolved(y, f"{name}_conv2", f"{name}_bn2", padding=1)
        if f"{name}_downsample_0_weight" in self.weights:
            x = self._convolved(x, f"{name}_downsample_0", f"{name}_downsample_1", stride=stride)
        return F.relu(x + y)

    def _convolved(self, x: Tensor, name: str, norm: str, stride: int = 1, padding: int = 0) -> Tensor:
        x = F.conv2d(x, self.weights[f"{name}_weight"], stride=stride, padding=padding)
        mean, variance = self.get_buffer(f"{norm}_running_mean"), self.get_buffer(f"{norm}_running_var")
        return F.batch_norm(x, mean, variance, self.weights[f"{norm}_weight"], self.weights[f"{norm}_bias"])


class FunctionalViT(_Flat):
    """A vision transformer in eval mode: images `[N, 3, H, W]`, H and W fixed by the weights, to `[N, classes]`."""

    def __init__(self, state: Mapping[str, Tensor], heads: int) -> None:
        super().__init__(state)
        self.heads = heads
        self.layers = sum(name.endswith("ln_1.weight") for name in state)

    def forward(self, images: Tensor) -> Tensor:
        """The scores."""
        kernel = self.weights["conv_proj_weight"]  # [width, 3, patch, patch]
        patches = F.conv2d(images, kernel, self.weights["conv_proj_bias"], stride=kernel.shape[2:])
        tokens = patches.flatten(2).transpose(1, 2)  # [N, patches, width]
        first = self.weights["class_token"].expand(len(images), -1, -1)
        x = torch.cat((first, tokens), dim=1) + self.weights["encoder_pos_embedding"]
        for index in range(self.layers):
            name = f"encoder_layers_encoder_layer_{index}"
            x = x + self._attended(self._normed(x, f"{name}_ln_1"), f"{name}_self_attention")
            hidden = F.gelu(self.linear(self._normed(x, f"{name}_ln_2"), f"{name}_mlp_0"))
            x = x + self.linear(hidden, f"{name}_mlp_3")
        return self.linear(self._normed(x, "encoder_ln")[:, 0], "heads_head")

    def _attended(self, x: Tensor, name: str) -> Tensor:
        projected = F.linear(x, self.weights[f"{name}_in_proj_weight"], self.weights[f"{name}_in_proj_bias"])
        split = projected.unflatten(-1, (3, self.heads, -1))  # [N, tokens, 3, heads, width of a head]
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.linear(mixed.transpose(1, 2).flatten(2), f"{name}_out_proj")

    def _normed(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}_weight"], self.weights[f"{name}_bias"], 1e-6)
