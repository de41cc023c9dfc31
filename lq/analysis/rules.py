"""The rules of a quantized model, layer by layer, and the config group that they are on the command line."""

from collections.abc import Iterable, Sequence
from glob import escape
from typing import Any

import yaml
from torch import nn

from lq.analysis.parts import Kind, Part
from lq.descriptor import QuantDescriptor, QuantRule
from lq.nn.operations import Operation

# Descriptors by layer and kind of tensor; what is not there is in float.
Descriptors = dict[str, dict[Kind, QuantDescriptor]]


def descriptors_of(parts: Iterable[Part]) -> Descriptors:
    """What the layers of a model do."""
    found: Descriptors = {}
    for part in parts:
        for site in part.sites:
            found.setdefault(site.layer, {}).setdefault(site.kind, site.quantizer.quant_desc)
    return found


def rules_of(model: nn.Module, descriptors: Descriptors) -> dict[str, QuantRule]:
    """A rule for each layer, by the layer's name."""
    rules = {}
    for layer, descs in descriptors.items():
        module = model.get_submodule(layer)
        # the products of a ``forward`` are looked for where a rule names their class
        types = (type(module).__name__,) if isinstance(module, Operation) else None
        rules[layer] = QuantRule(escape(layer), descs.get("input"), descs.get("weight"), types)
    return rules


def quant_group(rules: Sequence[QuantRule], name: str) -> str:
    """Rules as YAML: an option of the config group ``quant``, which ``lq quant=<name> --config-dir <folder>`` takes from
    ``<folder>/quant/<name>.yaml``.

    >>> print(quant_group([QuantRule("head", weight={"num_bits": 4, "axis": 0})], "mixed"))
    name: mixed
    rules:
    - pattern: head
      weight:
        num_bits: 4
        axis: 0
    overrides: []
    <BLANKLINE>
    """
    return yaml.safe_dump({"name": name, "rules": list(map(_plain, rules)), "overrides": []}, sort_keys=False)


def _plain(rule: QuantRule) -> dict[str, Any]:
    descs = {kind: dict(desc.dict()) for kind in ("input", "weight") if (desc := getattr(rule, kind)) is not None}
    return {"pattern": rule.pattern, **descs, **({} if rule.types is None else {"types": list(rule.types)})}
