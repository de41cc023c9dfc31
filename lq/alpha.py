"""SmoothQuant's migration strength: given, given by name, or the one with the least error at the layers' outputs."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lq.calib import gather
from lq.descriptor import QuantDescriptor
from lq.functional.smooth import smooth_factors
from lq.groups import Group, spread
from lq.nn.input_channels import channel_dim, input_weight, input_weight_name, is_transposed_linear, scale_input_channels_
from lq.nn.quant_module import QuantModule
from lq.nn.tensor_quantizer import TensorQuantizer

# A number in [0, 1]; numbers by patterns on names of layers, the last match wins; or "auto".
Alpha = float | str | Mapping[str, float]
AUTO = "auto"
# What "auto" tries, and where it starts.
GRID, START = tuple(i / 20 for i in range(21)), 0.5
# The share of the error that has to be gone for "auto" to insert a multiply, which costs time in every run.
WORTH = 0.2
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


def best_alpha(errors: Tensor, folded: bool) -> float | None:
    """What ``"auto"`` chooses: the alpha with the least error; ``None`` where doing nothing has less, or nearly as little.

    Args:
        errors: for each of :data:`GRID`, and without factors, ``(len(GRID) + 1,)``.
        folded: the factors cost nothing; else a multiply has to be worth it.

    >>> errors = torch.full((22,), 1.0)
    >>> errors[7] = 0.9
    >>> best_alpha(errors, folded=True), best_alpha(errors, folded=False)
    (0.35, None)
    """
    least = errors[:-1].min()
    gains = least < errors[-1] if folded else least <= (1 - WORTH) * errors[-1]
    return GRID[int(errors[:-1].argmin())] if gains else None


class Sample(NamedTuple):
    """A few of a layer's inputs, and whether they are of a batch that the ranges do not know."""

    inputs: Tensor
    held_out: bool


def held_out(samples: Sequence[Sample]) -> list[Tensor]:
    """The inputs of batches that are held out; all, where none is."""
    return [s.inputs for s in samples if s.held_out] or [s.inputs for s in samples]


def sample(module: nn.Module, x: Tensor) -> Tensor:
    """A few of a layer's inputs: rows from all over the batch of a linear layer, the first images of a convolution."""
    if channel_dim(module, x.dim()) == x.dim() - 1:
        rows = x.reshape(-1, x.shape[-1])
        step = -(-len(rows) * x.shape[-1] * BATCHES // VALUES)
        return rows[:: max(1, step)].detach().clone()
    kept = max(1, VALUES // BATCHES // max(1, x[:1].numel()))
    return x[:kept].detach().clone()


def search_alphas(
    groups: Sequence[Group], input_amax: Mapping[nn.Module, Tensor], samples: Mapping[nn.Module, Sequence[Tensor]]
) -> list[float | None]:
    """What ``"auto"`` finds for each group, with the samples of all ranks; ``None`` for one that is better left.

    A layer whose channels belong to several groups is looked at with the factors that the others have so far.
    """
    ranges = [group.ranges(input_amax) for group in groups]
    present = {module: torch.ones_like(input_amax[module]) for group in groups for module, _ in group.layers}
    for group, found in zip(groups, ranges, strict=True):
        _put(present, group, smooth_factors(*found, START))
    chosen = []
    for group, found in zip(groups, ranges, strict=True):
        candidates = [*(smooth_factors(*found, alpha) for alpha in GRID), torch.ones_like(found[0])]
        errors = _group_errors(group, candidates, present, input_amax, samples)
        # the ranks saw other samples, and must choose the same
        best = best_alpha(torch.stack(gather(errors)).sum(dim=0), folded=group.producer is not None)
        _put(present, group, candidates[-1 if best is None else GRID.index(best)])
        chosen.append(best)
    return chosen


def _put(present: dict[nn.Module, Tensor], group: Group, factors: Tensor) -> None:
    for module, index in group.layers:
        present[module] = spread(factors, index, present[module])


def _group_errors(
    group: Group,
    candidates: Sequence[Tensor],
    present: Mapping[nn.Module, Tensor],
    input_amax: Mapping[nn.Module, Tensor],
    samples: Mapping[nn.Module, Sequence[Tensor]],
) -> Tensor:
    """Errors of a group's layers for each candidate, with the samples of this rank."""
    total = torch.zeros(len(candidates), dtype=torch.float64)
    for module, index in group.layers:
        if samples.get(module):
            mine = [spread(factors, index, present[module]) for factors in candidates]
            total += output_errors(module, samples[module], input_amax[module], mine)
    return total


def output_errors(module: nn.Module, inputs: Sequence[Tensor], input_amax: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """Squared error where a layer's input meets its weight, relative to what comes out: float64 ``(len(candidates),)``.

    Input and weight are quantized as the layer's descriptors say, or else to 8 bits per tensor and per output channel, with the
    largest magnitudes for ranges.

    Args:
        module: a linear layer, a convolution, or the projections of attention, whose quantizers do nothing at present.
        inputs: samples of its input.
        input_amax: largest magnitude of each input channel that is known, ``(channels,)``.
        candidates: factors of the input channels, ``(channels,)`` each.
    """
    quantize_input, quantize_weight = _quantizers(module)
    desc = quantize_input.quant_desc
    # a range of two ends is that of each sample
    per_tensor = desc.axis is None and desc.block_size is None and not desc.affine
    weight = input_weight(module).detach()
    outputs = [_output(module, x, weight) for x in inputs]
    energy = sum(float(y.double().square().sum()) for y in outputs) or 1.0
    errors = []
    for factors in candidates:
        factors = factors.to(weight)
        scaled = weight.clone()
        scale_input_channels_(module, factors, scaled)
        scaled = quantize_weight(scaled.mT).mT if is_transposed_linear(module) else quantize_weight(scaled)
        if per_tensor:
            quantize_input.amax = (input_amax.to(weight) / factors).amax()
        error = 0.0
        for x, y in zip(inputs, outputs, strict=True):
            shape = [-1 if i == channel_dim(module, x.dim()) % x.dim() else 1 for i in range(x.dim())]
            noisy = _output(module, quantize_input(x / factors.reshape(shape)), scaled)
            error += float((noisy.double() - y.double()).square().sum())
        errors.append(error / energy)
    return torch.tensor(errors, dtype=torch.float64)


def _output(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer makes of its input with another weight; of attention, what its projections make."""
    if isinstance(module, nn.MultiheadAttention):
        return nn.functional.linear(x, weight, module.in_proj_bias)
    y: Tensor = torch.func.functional_call(module, {"weight": weight}, (x,))
    return y


def _quantizers(module: nn.Module) -> tuple[TensorQuantizer, TensorQuantizer]:
    """Quantizers without an amax, which take that of what they are given."""
    present = module.quantizers() if isinstance(module, QuantModule) else {}
    descs = (
        present[role].quant_desc if role in present else default
        for role, default in (("input", QuantDescriptor()), (input_weight_name(module), QuantDescriptor(axis=0)))
    )
    quantize_input, quantize_weight = (
        TensorQuantizer(desc.replace(amax=None, learn_amax=False, fake_quant=True)) for desc in descs
    )
    return quantize_input, quantize_weight
