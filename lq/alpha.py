"""SmoothQuant's migration strength: given, given by name, or the one with the least error at the layers' outputs."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lq.descriptor import QuantDescriptor
from lq.nn.quant_module import QuantInputMixin, QuantMixin, scale_input_channels_
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.producers import channel_dim

# A number in [0, 1]; numbers by patterns on names of layers, the last match wins; or "auto".
Alpha = float | str | Mapping[str, float]
AUTO = "auto"
# What "auto" tries.
GRID = tuple(i / 20 for i in range(21))
# Values of a layer's inputs that are kept for it, and from how many batches.
VALUES, BATCHES = 2**17, 4


def check_alpha(alpha: Alpha) -> None:
    """Raise ``ValueError`` for what is neither ``"auto"`` nor numbers in [0, 1]."""
    if isinstance(alpha, str):
        if alpha != AUTO:
            raise ValueError(f"`alpha` is {alpha!r}: give a number in [0, 1], numbers by patterns, or 'auto'.")
        return
    for value in alpha.values() if isinstance(alpha, Mapping) else [alpha]:
        if not 0 <= value <= 1:
            raise ValueError(f"`alpha` is {value}: it must lie in [0, 1].")


def alphas_by_name(alpha: Mapping[str, float], groups: Sequence[Sequence[str]]) -> list[float]:
    """Alpha of each group of layers, of which a pattern matches any.

    Raises:
        ValueError: a pattern that matches nothing, or a group that none matches.

    >>> alphas_by_name({"*": 0.5, "*.fc1": 0.8}, [["0.q", "0.k"], ["0.fc1"]])
    [0.5, 0.8]
    """
    chosen: list[float | None] = [None] * len(groups)
    for pattern, value in alpha.items():
        matches = [i for i, names in enumerate(groups) if any(fnmatchcase(name, pattern) for name in names)]
        if not matches:
            known = ", ".join(name for names in groups for name in names)
            raise ValueError(f"`alpha` has the pattern {pattern!r}, which matches no layer: known are {known}.")
        for i in matches:
            chosen[i] = value
    found = [value for value in chosen if value is not None]
    if len(found) < len(groups):
        left = groups[chosen.index(None)][0]
        raise ValueError(f"`alpha` says nothing about `{left}`: begin it with a pattern '*'.")
    return found


def sample(module: nn.Module, x: Tensor) -> Tensor:
    """A few of a layer's inputs: rows from all over the batch of a linear layer, the first images of a convolution."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        step = -(-len(rows) * x.shape[-1] * BATCHES // VALUES)
        return rows[:: max(1, step)].detach().clone()
    kept = max(1, VALUES // BATCHES // max(1, x[:1].numel()))
    return x[:kept].detach().clone()


def output_errors(module: nn.Module, inputs: Sequence[Tensor], candidates: Sequence[Tensor]) -> Tensor:
    """Squared error at a layer's output, relative to the output, for each candidate: float64 ``(len(candidates),)``.

    Input and weight are quantized as the layer's descriptors say, or else to 8 bits per tensor and per output channel, with the
    ranges that they have.

    Args:
        module: a linear layer or convolution whose quantizers do nothing at present.
        inputs: samples of its input.
        candidates: factors of the input channels, ``(channels,)`` each.
    """
    quantize_input, quantize_weight = _quantizers(module)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    before, errors = weight.data, []
    outputs = [module(x) for x in inputs]
    energy = sum(float(y.double().square().sum()) for y in outputs) or 1.0
    try:
        for factors in candidates:
            factors = factors.to(before)
            weight.data = before.clone()
            scale_input_channels_(module, factors)
            weight.data = quantize_weight(weight.data)
            error = 0.0
            for x, y in zip(inputs, outputs, strict=True):
                shape = [-1 if i == channel_dim(module, x.dim()) % x.dim() else 1 for i in range(x.dim())]
                noisy = module(quantize_input(x / factors.reshape(shape)))
                error += float((noisy.double() - y.double()).square().sum())
            errors.append(error / energy)
    finally:
        weight.data = before
    return torch.tensor(errors, dtype=torch.float64)


def _quantizers(module: nn.Module) -> tuple[TensorQuantizer, TensorQuantizer]:
    """Quantizers without an amax, which take that of what they are given."""
    desc_input, desc_weight = QuantDescriptor(), QuantDescriptor(axis=0)
    if isinstance(module, QuantInputMixin):
        desc_input = module.input_quantizer.quant_desc
    if isinstance(module, QuantMixin):
        desc_weight = module.weight_quantizer.quant_desc
    made = (TensorQuantizer(desc.replace(amax=None, learn_amax=False, fake_quant=True)) for desc in (desc_input, desc_weight))
    quantize_input, quantize_weight = made
    return quantize_input, quantize_weight
