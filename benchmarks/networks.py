"""Networks of well-known shapes with random weights, built from torch's own layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq.recipes.resnet import resnet50

# Of BERT's vocabulary.
WORDS = 30522


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm and ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """A 1x1 convolution to more channels, a 3x3 in each channel, a linear 1x1 to fewer; a shortcut where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = [ConvBlock(inputs, hidden)] if expansion != 1 else []
        project = (nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.conv = nn.Sequential(*widen, ConvBlock(hidden, hidden, 3, stride, groups=hidden), *project)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """Sandler et al., 2018, arXiv:1801.04381, table 2: 3.5 million parameters."""

    # expansion, channels, blocks, stride of the first block
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features, channels = nn.Sequential(ConvBlock(3, 32, 3, 2)), 32
        for expansion, outputs, blocks, first_stride in self.STAGES:
            for block in range(blocks):
                self.features.append(InvertedResidual(channels, outputs, 1 if block else first_stride, expansion))
                channels = outputs
        self.features.append(ConvBlock(channels, 1280))
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return y


class EncoderLayer(nn.Module):
    """Attention and a feed-forward net, each with a LayerNorm after the residual add."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attention = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(attention))
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return y


class Bert(nn.Module):
    """Devlin et al., 2019, arXiv:1810.04805, BERT-base from token ids to hidden states: 109 million parameters."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12, words: int = WORDS, positions: int = 512) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, 4 * width) for _ in range(layers)))

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.layers(self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]]))
        return y


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` in evaluation, its BatchNorms with the statistics of ``x``: without them deep activations vanish or explode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches, of which there is one
    with torch.no_grad():
        model.train()(x)
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"ResNet-50": resnet50, "MobileNetV2": MobileNetV2, "BERT-base": Bert}
