"""What is left of each layer's output when a model is quantized."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lq.analysis.output_error import signal_and_noise
from lq.analysis.outputs import OUTPUT
from lq.analysis.quantizer_stats import decibels
from lq.nn.evaluating import evaluating
from lq.nn.fast_paths import without_fast_paths
from lq.nn.quant_module import QuantModule

Energies = tuple[float, float]


@torch.no_grad()
def layer_sqnr(reference: nn.Module, model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> dict[str, float]:
    """Signal to quantization noise ratio of each quantized layer's output, and of the model's, in dB.

    The noise is all that has gathered up to there: the layer's own, and what those before it left in its input.

    Args:
        reference: computes in float, and has modules of the same names.
        model: the same, quantized.
        batches: positional inputs.

    Returns:
        By name of the layer, in the order of the model; ``""`` is the model's own output.

    >>> import lq
    >>> reference = nn.Sequential(nn.Linear(1, 1, bias=False)).requires_grad_(False)
    >>> model = lq.quantize_(nn.Sequential(nn.Linear(1, 1, bias=False)).requires_grad_(False))
    >>> reference[0].weight[:], model[0].weight[:] = 1.0, 0.9
    >>> layer_sqnr(reference, model, [(torch.ones(4, 1),)])
    {'0': 20.0, '': 20.0}
    """
    names = [name for name, m in model.named_modules() if isinstance(m, QuantModule)]
    known = dict(reference.named_modules())
    names = [name for name in names if name in known and name]
    energies: dict[str, Energies] = {}
    with ExitStack() as stack:
        outputs = [_outputs(stack, one, names) for one in (reference, model)]
        for batch in batches:
            for one, found in zip((reference, model), outputs, strict=True):
                found.clear()
                found[OUTPUT] = [one(*batch)]
            for name in outputs[1]:
                before = energies.get(name, (0.0, 0.0))
                signal, noise = signal_and_noise(outputs[0].get(name, []), outputs[1][name])
                energies[name] = before[0] + signal, before[1] + noise
    return {name: round(decibels(*energies[name]), 2) for name in [*names, OUTPUT] if name in energies}


def _outputs(stack: ExitStack, model: nn.Module, names: list[str]) -> dict[str, list[Any]]:
    """What the named modules give from now on, call by call."""
    found: dict[str, list[Any]] = {}

    def hook(name: str) -> Any:
        return lambda module, args, output: found.setdefault(name, []).append(output)

    for context in (evaluating, without_fast_paths):
        stack.enter_context(context(model))
    for name in names:
        stack.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
    return found
