"""Quantized shortcuts, whatever runs the block."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lq
from lq.descriptor import INT8_INPUT
from lq.nn import QuantConv2d
from lq.nn.residual import quantize_shortcut_

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(x) + x

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def placed(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(block, nn.ReLU()).eval()
    lq.quantize_(model, target="tensorrt", args=IMAGES)
    with lq.calibrating(model):
        model(IMAGES)
    assert model[0].conv.residual_quantizer.amax is not None
    return model


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    conv = model[0].conv
    y: Tensor = (conv(x) + conv.residual_quantizer(x)).relu()
    return y


def test_threads_have_adds_of_their_own():
    model = placed(Block())
    inputs = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [by_hand(model, x) for x in inputs]
        assert all(map(torch.equal, pool.map(torch.no_grad()(model), inputs * 20), expected * 20))


def test_it_travels_through_pickle():
    model = placed(Block())
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), model(IMAGES))


class DropPath(Block):
    """Stochastic depth with a keep-probability that is a tensor: another add, in training only."""

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.training:
            y = y * torch.floor(torch.tensor([1.0]) + torch.zeros(len(x), 1, 1, 1))
        return y + x


def test_an_add_of_another_shape_is_not_the_one():
    model = placed(DropPath()).train()
    assert torch.equal(model(IMAGES), by_hand(model, IMAGES))


class Whole(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = checkpoint(module, x, use_reentrant=False)
        return x


class Part(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.training else self.body(x)


def test_a_block_may_be_checkpointed_as_a_whole():
    model, x = placed(Block()).train(), IMAGES.clone().requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(Whole(*model)(x).square().sum(), x)[0], expected)


def test_a_block_that_checkpoints_a_part_of_itself_is_refused():
    model = placed(Part()).train()
    y = model(IMAGES.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"runs again for its gradients without the block .*: checkpoint the whole block"):
        y.sum().backward()


def test_a_layer_alone_waits_for_nothing():
    layer = QuantConv2d(3, 3, 1, quant_desc_input=INT8_INPUT.replace(amax=4.0))
    block = nn.Sequential(layer)
    quantize_shortcut_(block, layer, 1, {"residual": INT8_INPUT.replace(amax=4.0)})
    expected = layer(IMAGES) + IMAGES
    assert torch.equal(layer(IMAGES) + IMAGES, expected)
