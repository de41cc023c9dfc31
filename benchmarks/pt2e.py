"""torchao's quantization-aware training of exported graphs, for :mod:`peers`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import (
    FusedMovingAvgObsFakeQuantize,
    LearnableFakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    disable_observer,
    enable_observer,
)
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

aten = torch.ops.aten
LAYERS = (aten.conv2d.default, aten.linear.default)


class LayerQuantizer(Quantizer):
    """Inputs and weights of convolutions and linear layers.

    Args:
        bits: width of weights, and of inputs.
        exceptions: other widths, by the module's name.
        signed: modules with a signed input.
        learned: whether scales are parameters.
    """

    def __init__(
        self, bits: tuple[int, int], exceptions: Mapping[str, tuple[int, int]], signed: tuple[str, ...], learned: bool
    ) -> None:
        super().__init__()
        self.bits, self.exceptions, self.signed, self.learned = bits, exceptions, signed, learned

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target in LAYERS:
                name = module_name(node)
                weight_bits, input_bits = self.exceptions.get(name, self.bits)
                specs = {
                    node.args[0]: input_spec(input_bits, name in self.signed, self.learned),
                    node.args[1]: weight_spec(weight_bits, self.learned),
                }
                node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def module_name(node: Node) -> str:
    """The dotted name of the module that a node comes from."""
    return [path for path, _ in node.meta["nn_module_stack"].values()][-1]


def input_spec(bits: int, signed: bool, learned: bool) -> QuantizationSpec:
    """Per tensor: symmetric if signed, else from zero, where ReLUs begin."""
    scheme = torch.per_tensor_symmetric if signed else torch.per_tensor_affine
    observer = MinMaxObserver if learned else MovingAverageMinMaxObserver
    return _spec(bits, signed, scheme, observer, learned)


def weight_spec(bits: int, learned: bool) -> QuantizationSpec:
    observer = PerChannelMinMaxObserver if learned else MovingAveragePerChannelMinMaxObserver
    return _spec(bits, True, torch.per_channel_symmetric, observer, learned, ch_axis=0)


def _spec(bits: int, signed: bool, scheme: torch.qscheme, observer: Any, learned: bool, **axis: int) -> QuantizationSpec:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    made, options = (LearnableFakeQuantize, {"use_grad_scaling": True}) if learned else (FusedMovingAvgObsFakeQuantize, {})
    return QuantizationSpec(
        dtype=torch.int8 if signed else torch.uint8,
        quant_min=low,
        quant_max=high,
        qscheme=scheme,
        observer_or_fake_quant_ctr=made.with_args(observer=observer, **options),
        **axis,
    )


class ObservedInTraining(nn.Module):
    """A prepared graph whose observers rest in evaluation: by themselves they would learn from what is evaluated on."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def train(self, mode: bool = True) -> "ObservedInTraining":
        super().train(mode)
        self.graph.apply(enable_observer if mode else disable_observer)
        return self

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.graph(x)
        return y
