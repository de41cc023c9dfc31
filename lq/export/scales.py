"""Scales as a graph wants them: large enough for every runtime, constant, and of any precision."""

import torch
from torch import Tensor, nn

from lq.export.fold import OUTPUTS_FIRST
from lq.functional.grid import largest_code
from lq.nn import QuantMixin, QuantModule
from lq.surgery import named_quantizers

# Half of int32's range: the sum of products has to fit beside the bias.
MAX_BIAS_CODE = 2**30


@torch.no_grad()
def raise_dead_scales_(model: nn.Module) -> list[str]:
    """Raise the weight scale of channels that are dead or nearly so, in place.

    ONNX Runtime keeps the bias of a quantized layer as int32 in units of ``scale(input) * scale(weight)``. Where the weights of a
    channel have all but vanished (pruned, or behind a BatchNorm of tiny variance) and its bias has not, that overflows and the
    bias is lost. There the scale becomes the least that holds the bias. What that rounds away of the weights is at most
    ``2**-24`` of the bias per product, and a channel whose codes are all 0 computes what it did. Others keep their codes.

    Returns:
        Names of the layers with a raised scale.
    """
    raised = []
    for name, module in model.named_modules():
        if isinstance(module, QuantMixin) and module.weight_quantizer.active and module.weight_quantizer.amax is not None:
            quantizer, amax = module.weight_quantizer, module.weight_quantizer.amax
            floor = _floor(module, amax)
            if floor is not None and bool((floor > amax).any()):
                quantizer._amax = torch.maximum(floor, amax)
                raised.append(name)
    return raised


def _floor(module: QuantMixin, amax: Tensor) -> Tensor | None:
    """Least amax of the weight with which the bias fits, in the shape of ``amax``; ``None`` where nothing can overflow."""
    bias, quantizer = getattr(module, "bias", None), module.input_quantizer
    if not isinstance(bias, Tensor) or not quantizer.active or quantizer.scale is None:
        return None
    qmax = largest_code(module.weight_quantizer.num_bits, module.weight_quantizer.unsigned)
    floor = bias.abs().float() / (quantizer.scale.min() * MAX_BIAS_CODE) * qmax
    if amax.numel() == 1:
        return floor.max().reshape(amax.shape)
    if isinstance(module, OUTPUTS_FIRST) and amax.shape[0] == amax.numel() == floor.numel():
        return floor.reshape(amax.shape)
    return None


@torch.no_grad()
def fix_learned_scales_(model: nn.Module) -> None:
    """Turn learned ranges into fixed ones, in place: an exported graph has constants.

    Ranges that reach as far on both sides, and those of unsigned quantizers: others clip more than their amax says. What is
    learned is clipped to before quantization, so the most negative code is never used.
    """
    for _, quantizer in named_quantizers(model):
        clip, amax = quantizer.clip, quantizer.amax
        if quantizer.learns_step:
            quantizer.fix_step()
        if clip is not None and (quantizer.unsigned or torch.equal(-clip.clip_value_min, clip.clip_value_max)):
            desc = quantizer.quant_desc
            quantizer.clip = None
            quantizer.quant_desc = desc.replace(learn_amax=False, narrow_range=True, scale_amax=None)
            quantizer._amax = amax


@torch.no_grad()
def round_weights_(model: nn.Module) -> None:
    """Replace weights by what their quantizers make of them, in place: half precision then rounds no value to another code."""
    for module in model.modules():
        for role, quantizer in module.quantizers().items() if isinstance(module, QuantModule) else ():
            weight = module._parameters.get(role)
            if weight is not None and quantizer.active:
                module._parameters[role] = nn.Parameter(quantizer(weight), requires_grad=False)
                quantizer._pre_quant_scale = None
