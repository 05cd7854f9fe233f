"""Backbones that benchmarks name as `model.name`."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet18 as for_large_images


def resnet18(image_size: int, channels: int) -> nn.Sequential:
    """ResNet-18 for small images: no stride and no pooling before the first block.

    Source: He et al. 2016, arXiv:1512.03385, with the stem that its section 4.2 has for CIFAR-10.
    """
    if image_size > 64:
        raise ValueError(f"images of {image_size} pixels are large; use torchvision's resnet18")
    made = for_large_images(weights=None)
    stem = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(
        nn.Sequential(stem, made.bn1, made.relu, made.layer1),
        made.layer2,
        made.layer3,
        nn.Sequential(made.layer4, made.avgpool, nn.Flatten()),
    )
