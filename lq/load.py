"""A quantized model out of its checkpoint, without a Trainer."""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from torch import nn

from lq.checkpoint import read_checkpoint
from lq.descriptor import Rules, resolve_rules
from lq.nn.batchnorm import has_fixed_statistics, replace_
from lq.nn.convert import to_quantized_
from lq.nn.fast_paths import leave_fast_paths_
from lq.nn.input_channels import add_to_bias_, has_input_channels
from lq.nn.quant_module import QuantModule
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.placed import Placement, placement_of
from lq.surgery import has_quantized_layers, quantize_, quantize_as_, rules_of

M = TypeVar("M", bound=nn.Module)

# Where a checkpoint has the rules that its quantizers were placed by.
RULES = "lq_rules"
# ... and where for its target: a lq.placed.Placement as a dictionary.
PLACEMENT = "lq_placement"


def load_quantized(
    model: M | type[M],
    path: str | Path,
    rules: Rules | None = None,
    *,
    target: str | None = None,
    args: Any = (),
    **kwargs: Any,
) -> M:
    """The model that a fit with :class:`lq.callbacks.Quantize` left in a checkpoint, in evaluation mode, on the CPU.

    Args:
        model: a module, or its class: a ``LightningModule`` is built with the hyperparameters in the checkpoint.
        path: a Lightning checkpoint, or a state dict.
        rules: what the quantizers were placed by, where the checkpoint does not have it; those of ``Quantize`` have.
        target: what they were placed for, as for :func:`lq.quantize_`, where the checkpoint does not have it.
        args: positional inputs of one forward, with a target; by default the model's ``example_input_array``.
        kwargs: for the class.

    Raises:
        ValueError: the file cannot be read, is of a float model, has no rules or other ones, or does not fit the model.
        TypeError: ``kwargs`` for a model that exists already.

    >>> import tempfile, torch, lq
    >>> fitted = lq.quantize_(nn.Sequential(nn.Linear(4, 2)), "int8")
    >>> with lq.calibrating(fitted):
    ...     _ = fitted(torch.ones(1, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(fitted.state_dict(), f"{folder}/model.pt")
    ...     loaded = load_quantized(nn.Sequential(nn.Linear(4, 2)), f"{folder}/model.pt", rules="int8")
    >>> torch.equal(loaded(torch.ones(1, 4)), fitted(torch.ones(1, 4)))
    True
    """
    checkpoint = read_checkpoint(path, "path")
    state: dict[str, Any] = checkpoint.get("state_dict", checkpoint)
    if not any(".input_quantizer." in key or "_quantizer._amax" in key or "_quantizer.clip." in key for key in state):
        raise ValueError(f"`path` {path} has no amax: it is of a float model. Load it into that, and quantize.")
    rules = agreed(checkpoint.get(RULES), rules, f"`path` {path}")
    if rules is None:
        raise ValueError(f"`path` {path} does not say which rules its quantizers were placed by: give `rules`.")
    module = _built(model, path, kwargs)
    leave_folded_(module, state)
    if has_quantized_layers(module):
        agreed(rules, rules_of(module), f"`path` {path}")
    else:
        placement = checkpoint.get(PLACEMENT)
        if target is None and placement is None and any(".residual_quantizer." in key for key in state):
            raise ValueError(f"`path` {path} has quantized shortcuts, and does not say for which target: give `target`.")
        if target is None and placement is not None:
            try:
                quantize_as_(module, rules, Placement(**placement))
            except ValueError as error:
                raise ValueError(f"`path` {path} does not fit {type(module).__name__}: {error}") from None
        else:
            quantize_(module, rules, target=target, args=args)
    place_factors_(module, state)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise ValueError(f"`path` {path} does not fit {type(module).__name__} with these rules: {lines[:300]}") from None
    if stray := [n for n, m in module.named_modules() if isinstance(m, TensorQuantizer) and m._disabled and m.amax is not None]:
        raise ValueError(f"`path` {path} has an amax for `{stray[0]}` ({len(stray)} in all), which these rules leave in float.")
    return module.eval()


def _built(model: M | type[M], path: str | Path, kwargs: dict[str, Any]) -> M:
    if not isinstance(model, type):
        if kwargs:
            raise TypeError(f"`model` exists already, and {', '.join(map(repr, kwargs))} would be for its class.")
        return model
    if issubclass(model, LightningModule):
        with warnings.catch_warnings():
            # quantizers are not placed yet, so their keys are left; afterwards all are loaded, strictly
            warnings.filterwarnings("ignore", "Found keys that are")
            return model.load_from_checkpoint(path, map_location="cpu", strict=False, **kwargs)
    return model(**kwargs)


def leave_folded_(module: nn.Module, state: dict[str, Any]) -> None:
    """A BatchNorm of which a state dict has nothing was folded into the layer before it, which has a bias now."""
    for name, norm in list(module.named_modules()):
        if has_fixed_statistics(norm) and not any(key.startswith(f"{name}.") for key in state):
            replace_(module, norm, nn.Identity())


def place_factors_(module: nn.Module, state: dict[str, Any]) -> None:
    """Layers that SmoothQuant gave a factor, or a correction a shift, and the rules no quantizer; and those that got a bias."""
    layers = dict(module.named_modules())
    for key in state:
        owner = re.sub(r"\.input_quantizer\._pre_quant_(scale|shift)$", "", key)
        if owner != key and owner in layers and not isinstance(layers[owner], QuantModule):
            to_quantized_(layers[owner])
    for name, layer in module.named_modules():
        if f"{name}.bias" in state and has_input_channels(layer) and layer._parameters.get("bias", 0) is None:
            add_to_bias_(layer, state[f"{name}.bias"])
    leave_fast_paths_(module)


def origin_of(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint needs beside the state of a quantized model, so that :func:`load_quantized` can build it again."""
    rules = rules_of(model)
    return ({} if rules is None else {RULES: to_plain(rules)}) | {PLACEMENT: dataclasses.asdict(placement_of(model))}


def agreed(saved: Rules | None, given: Rules | None, what: str) -> Rules | None:
    """The rules that ``what`` was quantized by: those saved, or those given; where both are known they are the same.

    Raises:
        ValueError: they are others: amax would fit, and the codes not.
    """
    if saved is None or given is None:
        return given if saved is None else saved
    found, wanted = resolve_rules(saved), resolve_rules(given)
    if found != wanted:
        other = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), None)
        how = f"by {len(found)} rules, not by these {len(wanted)}" if other is None else f"by {other[0]}, not by {other[1]}"
        raise ValueError(f"{what} was quantized {how}: give `rules` as they were, `torch.load(path)[{RULES!r}]`.")
    return given


def to_plain(rules: Rules) -> list[dict[str, Any]]:
    """Rules as what ``torch.load(weights_only=True)`` loads, and :func:`lq.quantize_` takes.

    >>> to_plain("int8")[0]["weight"]["axis"]
    0
    """
    return [dataclasses.asdict(rule) for rule in resolve_rules(rules)]
