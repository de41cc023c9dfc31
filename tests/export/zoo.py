"""Models as people write them, narrow: what export meets."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exported import set_statistics


def norm(channels: int) -> nn.Module:
    return set_statistics(nn.BatchNorm2d(channels), channels)


# Convolutions


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(out + identity)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


class ResNet(nn.Module):
    def __init__(self, block: Any, depths: tuple[int, ...], width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], width
        for i, depth in enumerate(depths):
            for j in range(depth):
                stages.append(block(inputs, width * 2**i, 2 if i and not j else 1))
                inputs = width * 2**i * block.expansion
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.stages(x)), 1))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *(nn.Conv2d(inputs, hidden, 1, bias=False), norm(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), norm(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), norm(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def mobilenet_v2() -> nn.Module:
    blocks = [InvertedResidual(i, o, s) for i, o, s in ((8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 12, 1))]
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), nn.ReLU6(inplace=True)),
        *blocks,
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 10)),
    )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Module:
            layers = [(nn.Conv2d(n, outputs, 3, 1, 1), norm(outputs), nn.ReLU()) for n in (inputs, outputs)]
            return nn.Sequential(*layers[0], *layers[1])

        self.enc1, self.enc2, self.dec = double(3, 8), double(8, 16), double(16, 8)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.enc1(x)
        deep = self.enc2(F.max_pool2d(wide, 2))
        return self.head(self.dec(torch.cat([self.up(deep), wide], 1)))


# Transformers


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, rotate: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(-2))


class ViT(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 17, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(5))
        self.attention = nn.ModuleList(Attention(dim, 2) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Linear(32, dim)) for _ in range(2))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x)[:, 0])


class Bert(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(50, dim), nn.Embedding(12, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.attention = Attention(dim, 2)
        self.up, self.down = nn.Linear(dim, 32), nn.Linear(32, dim)
        self.pooler = nn.Linear(dim, dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norms[0](self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1])))
        x = self.norms[1](x + self.attention(x, attention_mask[:, None, None] > 0))
        x = self.norms[2](x + self.down(F.gelu(self.up(x))))
        return x, torch.tanh(self.pooler(x[:, 0]))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class LlamaBlock(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.input_norm, self.post_norm = RMSNorm(dim), RMSNorm(dim)
        self.attention = Attention(dim, 2, causal=True)
        self.gate, self.up, self.down = (
            nn.Linear(dim, 40, bias=False),
            nn.Linear(dim, 40, bias=False),
            nn.Linear(40, dim, bias=False),
        )
        angles = torch.outer(torch.arange(12.0), 10 ** -torch.arange(0, 1, 0.25)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        n = x.shape[-2]
        return x * self.cos[:n] + torch.cat([-right, left], -1) * self.sin[:n]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x), rotate=self.rotate)
        y = self.post_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


# Others


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(tokens))[0].mean(1))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv1(x))
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0) + x
        x = F.leaky_relu(F.layer_norm(self.conv2(F.pad(x, (1, 1, 1, 1))), (18, 18)), 0.1).clamp(max=4)
        return F.log_softmax(self.linear(torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)), -1)


class ControlFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.large, self.small = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor, deep: bool = True) -> Tensor:
        positive = x.sum() > 0
        for layer in self.layers if deep else self.layers[:1]:
            x = torch.tanh(layer(x))
        return torch.cond(positive, lambda x: self.large(x), lambda x: self.small(x), (x,))


class TwoInputsTwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)
        self.kind, self.value = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, image: Tensor, table: Tensor) -> dict[str, Tensor]:
        joined = torch.cat([self.image(image).relu().mean((2, 3)), self.table(table).relu()], 1)
        return {"kind": self.kind(joined), "value": self.value(joined)}


class SharedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.head = self.linear

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.conv(x).relu()
        return self.head(self.linear(x.mean((2, 3))).relu())


def images(rows: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 3, 32, 32),)


def tokens(rows: int) -> tuple[Tensor, ...]:
    mask = torch.ones(rows, 12, dtype=torch.int64)
    mask[:, 9:] = 0
    return torch.randint(50, (rows, 12)), mask


# A model, and inputs for a number of rows.
ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "resnet18": (lambda: ResNet(BasicBlock, (2, 2, 2, 2)), images),
    "resnet50": (lambda: ResNet(Bottleneck, (3, 4, 6, 3)), images),
    "mobilenet_v2": (mobilenet_v2, images),
    "unet": (UNet, lambda rows: (torch.randn(rows, 3, 16, 16),)),
    "vit": (ViT, lambda rows: (torch.randn(rows, 3, 16, 16),)),
    "bert": (Bert, tokens),
    "llama_block": (LlamaBlock, lambda rows: (torch.randn(rows, 12, 16),)),
    "lstm": (Recurrent, lambda rows: (torch.randint(20, (rows, 7)),)),
    "functional": (Functional, lambda rows: (torch.randn(rows, 3, 16, 16),)),
    "control_flow": (ControlFlow, lambda rows: (torch.randn(rows, 6),)),
    "two_inputs_two_outputs": (TwoInputsTwoOutputs, lambda rows: (torch.randn(rows, 3, 8, 8), torch.randn(rows, 5))),
    "shared_layers": (SharedLayers, lambda rows: (torch.randn(rows, 4, 8, 8),)),
}
