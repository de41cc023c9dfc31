"""What to do with a tensor (:class:`QuantDescriptor`), and which tensors to do it with (:class:`QuantRule`)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

Nested = float | tuple["Nested", ...]

CALIB_METHODS = ("max", "histogram")


def _frozen(value: Any) -> Any:
    """Arrays, tensors and lists as nested tuples: comparable, hashable, and plain in YAML."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_frozen(v) for v in value)
    return value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
    else:
        yield value


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _known(cls: type[Any], values: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """``values``, if every key is a field of the dataclass ``cls``."""
    names = [f.name for f in fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"Unknown {what} key {', '.join(map(repr, unknown))}: choose among {', '.join(names)}.")
    return values


@dataclass(frozen=True)
class QuantDescriptor:
    """How a tensor is quantized: immutable data, equal when every field is.

    Args:
        num_bits: width of the integer, 2 to 16.
        name: a label for people.
        axis: dimensions that keep an amax of their own, an int or several; ``None`` is per tensor.
        amax: a fixed amax, number or (nested) list; ``None`` leaves it to calibration.
        unsigned: codes from 0 to ``2**num_bits - 1``.
        narrow_range: signed codes leave out the most negative one: [-127, 127] in place of [-128, 127].
        fake_quant: return real values on the grid; ``False`` returns the integer codes (in a floating dtype).
        calib_method: statistics the quantizer's calibrator takes: ``"max"`` or ``"histogram"``.
        num_bins: resolution of the histogram.

    Raises:
        ValueError: a field out of its range.
        TypeError: a field of the wrong type.

    >>> desc = QuantDescriptor(num_bits=4, axis=0, unsigned=True)
    >>> desc.dict()
    {'num_bits': 4, 'axis': 0, 'unsigned': True}
    >>> QuantDescriptor.from_yaml(desc.to_yaml()) == desc
    True
    """

    num_bits: int = 8
    name: str | None = None
    axis: int | tuple[int, ...] | None = None
    amax: Nested | None = None
    unsigned: bool = False
    narrow_range: bool = True
    fake_quant: bool = True
    calib_method: str = "max"
    num_bins: int = 2048

    def __post_init__(self) -> None:
        for name in ("axis", "amax"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        for name in ("num_bits", "num_bins"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` is {value!r}: it must be an integer.")
        for name in ("unsigned", "narrow_range", "fake_quant"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"`{name}` is {value!r}: it must be true or false.")
        if not 2 <= self.num_bits <= 16:
            raise ValueError(f"`num_bits` is {self.num_bits}: it must lie in 2 to 16.")
        if self.num_bins < 2:
            raise ValueError(f"`num_bins` is {self.num_bins}: it must be at least 2.")
        if self.calib_method not in CALIB_METHODS:
            raise ValueError(f"`calib_method` is {self.calib_method!r}: choose one of {', '.join(CALIB_METHODS)}.")
        if self.amax is not None and not all(0 <= a < math.inf for a in _numbers(self.amax)):
            raise ValueError(f"`amax` is {self.amax}: it must be finite and not negative.")
        axes = self.axis if isinstance(self.axis, tuple) else () if self.axis is None else (self.axis,)
        if not all(isinstance(a, int) for a in axes):
            raise TypeError(f"`axis` is {self.axis!r}: it must be an integer, several, or null.")

    def dict(self) -> Mapping[str, Any]:
        """Fields that differ from their defaults, in plain Python types; ``QuantDescriptor(**d)`` rebuilds it."""
        changed = (f.name for f in fields(self) if getattr(self, f.name) != f.default)
        return {name: _plain(getattr(self, name)) for name in changed}

    def to_yaml(self) -> str:
        """YAML of :meth:`dict`."""
        return yaml.safe_dump(self.dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "QuantDescriptor":
        """The descriptor that :meth:`to_yaml` wrote."""
        return cls.from_dict(yaml.safe_load(text) or {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantDescriptor":
        """A descriptor from a mapping; an unknown key is refused by name."""
        return cls(**_known(cls, values, "descriptor"))

    def replace(self, **changes: Any) -> "QuantDescriptor":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class QuantRule:
    """Which modules get which descriptors: in a list of rules the last one that matches a module wins.

    Args:
        pattern: shell wildcards, matched against the module's dotted name; ``*`` also crosses dots.
        input: descriptor of the input, or a mapping of its fields; ``None`` leaves it in float.
        weight: of the weight, likewise. With both ``None`` the module is not touched.

    >>> QuantRule("*.head", weight={"num_bits": 4, "axis": 0}).weight.dict()
    {'num_bits': 4, 'axis': 0}
    """

    pattern: str
    input: QuantDescriptor | None = field(default=None)
    weight: QuantDescriptor | None = field(default=None)

    def __post_init__(self) -> None:
        for name in ("input", "weight"):
            desc = getattr(self, name)
            if isinstance(desc, Mapping):
                desc = QuantDescriptor.from_dict(desc)
                object.__setattr__(self, name, desc)
            if desc is not None and not isinstance(desc, QuantDescriptor):
                raise TypeError(f"`{name}` of rule {self.pattern!r} is {desc!r}: it must be a QuantDescriptor or None.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantRule":
        """A rule from a mapping; an unknown key is refused by name."""
        return cls(**_known(cls, values, "rule"))


# A preset's name, or rules, each of them also as a mapping.
Rules = str | Sequence[QuantRule | Mapping[str, Any]]

# What TensorRT and ONNX Runtime execute: full-range activations per tensor, narrow weights per output channel.
INT8_INPUT = QuantDescriptor(narrow_range=False)
INT8_WEIGHT = QuantDescriptor(axis=0)

PRESETS: dict[str, list[QuantRule]] = {
    "int8": [QuantRule("*", INT8_INPUT, INT8_WEIGHT)],
    "int8_per_tensor": [QuantRule("*", INT8_INPUT, INT8_WEIGHT.replace(axis=None))],
    "int8_weight_only": [QuantRule("*", None, INT8_WEIGHT)],
    "w4a8": [QuantRule("*", INT8_INPUT, INT8_WEIGHT.replace(num_bits=4))],
}


def resolve_rules(rules: Rules) -> list[QuantRule]:
    """A preset's rules, or the given ones."""
    if not isinstance(rules, str):
        return [rule if isinstance(rule, QuantRule) else QuantRule.from_dict(rule) for rule in rules]
    if rules not in PRESETS:
        raise ValueError(f"`rules` is {rules!r}: choose a preset among {', '.join(PRESETS)}, or give a list of QuantRule.")
    return PRESETS[rules]
