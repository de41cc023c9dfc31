"""BatchNorm into the quantized layer before it, so that its codes stay what they were trained to be."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.fake_quant import quantize
from lq.functional.grid import FLOAT_FORMATS, scale_from_amax
from lq.graph import Flow, trace
from lq.nn import QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear, TensorQuantizer
from lq.nn.batchnorm import BATCH_NORMS, affine_of, fold_into_, has_fixed_statistics, replace_

# Layers whose weight has its output channels first. Transposed convolutions have them second, where a factor per output does
# not commute with a scale per axis 0: their BatchNorm stays.
FLOAT_OUTPUTS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
OUTPUTS_FIRST = (QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear)


def fold_batchnorm_(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> list[str]:
    """Fold each BatchNorm that alone consumes a convolution or linear layer into that layer, in place.

    With :math:`f = \\gamma / \\sqrt{\\sigma^2 + \\epsilon}` the layer's weight becomes :math:`f Q(W)`, its bias
    :math:`f (b - \\mu) + \\beta` and the weight's amax :math:`|f|\\,amax`, per output channel also where it was per tensor: the
    integer codes of a quantized weight are those of before, negated where :math:`f < 0`. (Jacob et al., 2018, arXiv:1712.05877,
    section 3.2, fold before they quantize; here the scales are trained already.) Where codes could not stay, -128 with a negative
    f, the BatchNorm does.

    Args:
        model: in evaluation mode; a copy, since it changes.
        args: positional inputs of one forward.
        kwargs: keyword inputs of it.

    Returns:
        Names of the layers that took a BatchNorm in.
    """
    layers = {name: m for name, m in model.named_modules() if _takes_factor(m)}
    if not layers or not any(type(m) in BATCH_NORMS for m in model.modules()):
        return []
    flow = trace(model, args, dict(kwargs or {}))
    folded = []
    for name, layer in layers.items():
        norm = flow.only_consumer(layer)
        if norm is not None and has_fixed_statistics(norm) and _on_channels(flow, layer) and _fold_(layer, norm):
            replace_(model, norm, nn.Identity())
            folded.append(name)
    return folded


def _takes_factor(module: nn.Module) -> bool:
    # a weight that is computed (a parametrization, weight_norm) would be computed again
    if not isinstance(module, FLOAT_OUTPUTS_FIRST) or module._parameters.get("weight") is None:
        return False
    quantizer = _quantizer_of(module)
    if quantizer is None:
        return True
    amax = quantizer.amax
    if amax is None:
        return False
    return amax.numel() == 1 or (amax.dim() == module.weight.dim() and amax.shape[0] == amax.numel())


def _quantizer_of(layer: nn.Module) -> TensorQuantizer | None:
    """The quantizer of a layer's weight; ``None`` for one in float."""
    quantizer = getattr(layer, "weight_quantizer", None)
    return quantizer if isinstance(quantizer, TensorQuantizer) and quantizer.active else None


def _on_channels(flow: Flow, layer: nn.Module) -> bool:
    # BatchNorm works on axis 1: a Linear layer on (batch, time, features) has its channels elsewhere
    assert isinstance(layer.weight, Tensor)
    return len(flow.shape[flow.calls_of(layer)[0].outputs[0]]) == layer.weight.dim()


@torch.no_grad()
def _fold_(layer: nn.Module, norm: Any) -> bool:
    """Fold, and say whether the codes could stay."""
    quantizer = _quantizer_of(layer)
    if quantizer is None:
        untie_(layer, "weight", "bias")
        fold_into_(layer, norm)
        return True
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    factor, shift = affine_of(norm)
    column = factor.reshape(-1, *[1] * (weight.dim() - 1))
    old_amax, quantized = quantizer.amax, quantizer(weight)
    assert old_amax is not None
    # a channel that gamma silences keeps its amax: all of its codes are 0, whatever the scale
    amax = (old_amax * torch.where(column == 0, 1.0, column.abs())).float()
    new_weight = (quantized * column).float()
    if not _same_codes(quantizer, quantized, new_weight, amax, column.sign().float()):
        return False
    layer.weight = nn.Parameter(new_weight.to(weight.dtype), requires_grad=False)
    new_bias = shift if not isinstance(bias, Tensor) else bias * factor + shift
    layer.bias = nn.Parameter(new_bias.to(weight.dtype), requires_grad=False)
    # the factor that came before quantization is in the codes now
    quantizer._amax, quantizer._pre_quant_scale = amax, None
    return True


def untie_(layer: nn.Module, *names: str) -> None:
    """Give a layer parameters of its own, in place: what others hold too must not change for them.

    >>> one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> other.weight, other.bias = one.weight, one.bias
    >>> untie_(other, "bias")
    >>> other.weight is one.weight, other.bias is one.bias, other.bias.equal(one.bias)
    (True, False, True)
    """
    for name in names:
        if (shared := layer._parameters.get(name)) is not None:
            layer._parameters[name] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)


def _same_codes(quantizer: TensorQuantizer, old: Tensor, new: Tensor, new_amax: Tensor, sign: Tensor) -> bool:
    desc = quantizer.quant_desc
    assert quantizer.amax is not None
    if isinstance(desc.num_bits, tuple):
        floats = FLOAT_FORMATS[desc.num_bits]
        scales = (scale_from_amax(amax, desc.num_bits) for amax in (quantizer.amax, new_amax))
        before, after = ((x / scale).to(floats).float() for x, scale in zip((old, new), scales, strict=True))
        return torch.equal(before * sign, after)
    grid = (desc.num_bits, desc.unsigned, desc.narrow_range)
    before = quantize(old, quantizer.amax, *grid) * sign
    return torch.equal(before, quantize(new, new_amax, *grid))
