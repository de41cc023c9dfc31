"""Helpers for optimizers of quantized models: parameters by name, and weights rounded in place."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lq.nn.quant_module import QuantModule


def match_parameters(model: nn.Module, patterns: Sequence[str]) -> Iterator[nn.Parameter]:
    """Parameters whose name contains any of ``patterns``.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> [tuple(p.shape) for p in match_parameters(model, ["0.weight", "bias"])]
    [(3, 2), (3,), (1,)]
    """
    if isinstance(patterns, str):
        raise TypeError(f"`patterns` is {patterns!r}: give a list of patterns, of one too.")
    return (parameter for name, parameter in model.named_parameters() if any(pattern in name for pattern in patterns))


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Set ``requires_grad`` to False for parameters whose name contains any of ``patterns``, in place."""
    for parameter in match_parameters(model, patterns):
        parameter.requires_grad = False


def group_parameters(
    model: nn.Module,
    patterns_list: Sequence[Sequence[str]],
    lrs: Sequence[float | None] | None = None,
    momentums: Sequence[float | None] | None = None,
    weight_decays: Sequence[float | None] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one for each list of patterns.

    Args:
        model: a module.
        patterns_list: for each group, patterns of which a parameter's name contains one.
        lrs: a learning rate for each group, ``None`` where it has none of its own; likewise the next two.
        momentums: a momentum for each group.
        weight_decays: a weight decay for each group.

    Raises:
        ValueError: a list of another length than ``patterns_list``, patterns that match nothing, or a parameter that two groups
            match, which no optimizer takes.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> groups = group_parameters(model, [["0."], ["1."]], lrs=[0.1, 0.01])
    >>> [(len(g["params"]), g["lr"]) for g in groups]
    [(2, 0.1), (2, 0.01)]
    """
    if isinstance(patterns_list, str):
        raise TypeError(f"`patterns_list` is {patterns_list!r}: give a list of patterns for each group.")
    groups: list[dict[str, Any]] = [{"params": list(match_parameters(model, patterns))} for patterns in patterns_list]
    for patterns, group in zip(patterns_list, groups, strict=True):
        if not group["params"]:
            raise ValueError(f"`patterns_list` has {list(patterns)}, which no parameter's name contains.")
    if len(set(all_ := [id(p) for group in groups for p in group["params"]])) < len(all_):
        raise ValueError("`patterns_list` puts a parameter into two groups: make the patterns exclude each other.")
    for option, values in (("lr", lrs), ("momentum", momentums), ("weight_decay", weight_decays)):
        if values is None:
            continue
        if len(values) != len(groups):
            raise ValueError(f"`{option}s` has {len(values)} values for {len(groups)} groups: give one for each.")
        for group, value in zip(groups, values, strict=True):
            if value is not None:
                group[option] = value
    return groups


@torch.no_grad()
def quant_weight_inplace(model: nn.Module) -> None:
    """Round the weights of quantized modules to their grids, in place: relax-and-round, not the straight-through estimator.

    Raises:
        ValueError: a quantizer that returns integer codes, which are no weights (named).

    >>> from lq.nn import QuantLinear
    >>> layer = QuantLinear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.27, 0.104]]))
    >>> quant_weight_inplace(layer)
    >>> layer.weight.data
    tensor([[1.2700, 0.1000]])
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            for role, weight in module.weights().items():
                quantizer = module.quantizers()[role]
                if not quantizer.fake_quant:
                    raise ValueError(f"`{name}.{role}` has `fake_quant=False`: it returns codes, which are no weights.")
                weight.copy_(quantizer(weight))
