"""Weights that are quantized in units of their own spread (``QuantDescriptor.normalize``)."""

import torch
from torch import nn

from lq.nn.quant_module import QuantModule


@torch.no_grad()
def fold_normalized_(model: nn.Module) -> nn.Module:
    """Have weights be quantized as they are, in place, with the codes that they have: after training, before an export.

    Each amax becomes ``amax * spread``, of the weight as it is now; with ``normalize="center"`` the weight loses its mean.
    :func:`lq.export.to_onnx` does it by itself, on its copy.

    Raises:
        ValueError: ``normalize="center"`` of a weight that is no parameter, but computed (named).

    >>> from lq import QuantDescriptor
    >>> from lq.nn import QuantLinear
    >>> layer = QuantLinear(4, 1, bias=False, quant_desc_weight=QuantDescriptor(normalize=True, amax=2.0))
    >>> _ = layer.weight.data.copy_(torch.tensor([3.0, 0.0, 0.0, 4.0]))
    >>> before = layer.weight_quantizer(layer.weight)
    >>> fold_normalized_(layer).weight_quantizer.amax, torch.equal(before, layer.weight_quantizer(layer.weight))
    (tensor(5.), True)
    """
    for name, module in model.named_modules():
        for role, weight in module.weights().items() if isinstance(module, QuantModule) else ():
            quantizer = module.quantizers()[role]
            amax, normalize = quantizer.amax, quantizer.quant_desc.normalize
            if not normalize or amax is None:
                continue
            if normalize == "center" and role not in module._parameters:
                raise ValueError(f"`{name}.{role}` is computed, so its mean cannot be taken away: use `normalize=True`.")
            arriving = quantizer.arriving(weight)
            centered, spread = quantizer.centered(quantizer.blocks(arriving))
            if normalize == "center":
                requires_grad = weight.requires_grad
                module._parameters[role] = nn.Parameter(centered.reshape(weight.shape), requires_grad=requires_grad)
                quantizer._pre_quant_scale = None
            quantizer._quant_desc = quantizer.quant_desc.replace(normalize=False)
            quantizer._hold("_amax", amax * spread)
    return model
