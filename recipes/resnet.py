"""ResNet (He et al., 2015, arXiv:1512.03385) with a switch that builds it quantized, shortcut of every residual add included.

TensorRT fuses a quantized convolution with the residual add behind it if the shortcut is quantized too; so a block built with
``quantize=True`` has, besides quantized convolutions, a quantizer on that side of the add. A state dict of the float net loads
into the quantized one. Modules have torchvision's names, so its ``resnet50-*.pth`` loads into :func:`resnet50`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lq import nn as quant_nn


def conv(in_planes: int, planes: int, kernel_size: int, stride: int = 1, quantize: bool = False) -> nn.Conv2d:
    """Convolution without bias that keeps the size of the image, but for the stride."""
    kind = quant_nn.QuantConv2d if quantize else nn.Conv2d
    return kind(in_planes, planes, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


class Block(nn.Module):
    """``relu(layers(x) + shortcut(x))``; subclasses say what the layers are."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1, quantize: bool = False) -> None:
        super().__init__()
        out_planes = planes * self.expansion
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_planes != out_planes:
            self.downsample = nn.Sequential(conv(in_planes, out_planes, 1, stride, quantize), nn.BatchNorm2d(out_planes))
        if quantize:
            self.residual_quantizer = quant_nn.TensorQuantizer(quant_nn.QuantConv2d.default_quant_desc_input)

    def layers(self, x: Tensor) -> Tensor:
        """The side of the add that has the convolutions."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        if hasattr(self, "residual_quantizer"):
            shortcut = self.residual_quantizer(shortcut)
        y: Tensor = self.relu(out + shortcut)
        return y


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1, quantize: bool = False) -> None:
        super().__init__(in_planes, planes, stride, quantize)
        self.conv1, self.bn1 = conv(in_planes, planes, 3, stride, quantize), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, 1, quantize), nn.BatchNorm2d(planes)

    def layers(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return y


class Bottleneck(Block):
    """A 1x1, a 3x3, and a 1x1 convolution to four times the width; the stride is the 3x3's."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int = 1, quantize: bool = False) -> None:
        super().__init__(in_planes, planes, stride, quantize)
        self.conv1, self.bn1 = conv(in_planes, planes, 1, 1, quantize), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride, quantize), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, planes * 4, 1, 1, quantize), nn.BatchNorm2d(planes * 4)

    def layers(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        y: Tensor = self.bn3(self.conv3(x))
        return y


class ResNet(nn.Module):
    """Images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``.

    Args:
        block: kind of block.
        blocks: how many of them each stage has; from the second stage on, the first halves the image.
        width: channels of the first stage; each further one doubles them.
        small: a 3x3 convolution as stem, in place of a 7x7 with stride and pooling, for small images.
        channels: of the image.
        num_classes: logits.
        quantize: build it with quantizers, which take the default descriptors of their classes.
    """

    def __init__(
        self,
        block: type[Block],
        blocks: tuple[int, ...],
        width: int = 64,
        small: bool = False,
        channels: int = 3,
        num_classes: int = 1000,
        quantize: bool = False,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3 if small else 7, 1 if small else 2, quantize), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stages = [f"layer{i}" for i in range(1, len(blocks) + 1)]
        planes = width
        for i, (stage, number) in enumerate(zip(self.stages, blocks, strict=True)):
            made = nn.Sequential()
            for j in range(number):
                made.append(block(planes, width * 2**i, 2 if i and not j else 1, quantize))
                planes = width * 2**i * block.expansion
            self.add_module(stage, made)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = (quant_nn.QuantLinear if quantize else nn.Linear)(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        y: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return y


def resnet50(quantize: bool = False, **kwargs: Any) -> ResNet:
    """The net of the paper's table 1, 25.6 million parameters at 1000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), quantize=quantize, **kwargs)


def resnet8(quantize: bool = False, **kwargs: Any) -> ResNet:
    """Three blocks for small images: 78 thousand parameters with one channel and ten classes."""
    return ResNet(
        BasicBlock, (1, 1, 1), **{"width": 16, "small": True, "channels": 1, "num_classes": 10, **kwargs}, quantize=quantize
    )
