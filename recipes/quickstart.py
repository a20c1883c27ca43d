"""An image through a compiled classifier: `python -m recipes.quickstart` (`pip install scikit-image`)."""

import torch
from skimage.data import chelsea
from torchvision.models import ResNet18_Weights, resnet18

import torchaccel

weights = ResNet18_Weights.DEFAULT
precision = "fp16" if torch.cuda.is_available() else "fp32"
model = torchaccel.compile(resnet18(weights=weights), precision)
image = weights.transforms()(torch.from_numpy(chelsea()).permute(2, 0, 1))
with torch.inference_mode():
    probabilities, classes = model(image[None])[0].softmax(0).topk(3)
for probability, index in zip(probabilities.tolist(), classes.tolist(), strict=True):
    print(f"{probability:6.1%}  {weights.meta['categories'][index]}")
