"""What to do with a tensor (:class:`QuantDescriptor`), and which tensors to do it with (:class:`QuantRule`)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import yaml

from lq.functional.grid import Bits, check_num_bits

Nested = float | tuple["Nested", ...]

CALIB_METHODS = ("max", "histogram")
LEARNING = ("lsq", "pact")


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
    if not isinstance(values, Mapping):
        raise TypeError(f"A {what} is made from a mapping of its fields, not from {values!r}.")
    names = [f.name for f in fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"Unknown {what} key {', '.join(map(repr, unknown))}: choose among {', '.join(names)}.")
    return values


@dataclass(frozen=True)
class QuantDescriptor:
    """How a tensor is quantized: immutable data, equal when every field is.

    Args:
        num_bits: width of the integer, 2 to 32; or a float format, ``(4, 3)`` for FP8 E4M3 and ``(5, 2)`` for E5M2.
        name: a label for people.
        fake_quant: return real values on the grid; ``False`` returns the integer codes (in a floating dtype).
        axis: dimensions that keep an amax of their own, an int or several; ``None`` is per tensor.
        amax: a fixed amax, number or (nested) list; ``None`` leaves it to calibration. With ``learn_amax`` where learning starts.
        learn_amax: learn amax by gradient, from where calibration puts it. ``"lsq"`` learns the step size from what is rounded
            and clipped, with LSQ's scaled gradient (both ends of an ``affine`` range: LSQ+), ``"pact"`` from what is clipped only
            (:func:`lq.functional.learned.fake_quant_learned`). ``True`` is pytorch-quantization's: two bounds to clip to, and
            an ``amax`` to start from (:class:`lq.nn.Clip`).
        scale_amax: a number to multiply every amax with, for quick experiments.
        calib_method: statistics the quantizer's calibrator takes, ``"max"`` or ``"histogram"``; with a learned step amax of a
            weight follows the method of the calibration in any case.
        unsigned: codes from 0 to ``2**num_bits - 1``.
        narrow_range: signed codes leave out the most negative one: [-127, 127] in place of [-128, 127].
        num_bins: resolution of the histogram.
        block_size: as many values along the last dimension share an amax, beside ``axis``; ``None``: no blocks.
        affine: codes from 0 to ``2**num_bits - 1`` for a range with two ends, and so a zero point.
        normalize: for weights: amax is in units of their root mean square (of each channel with ``axis``), which is given back
            behind the rounding: the range, learned or not, follows the weights while they train, and a layer computes at first
            what it would without. ``"center"`` also takes their mean away, for good, as weight normalization does (APoT: Li et
            al., 2020, arXiv:1909.13144, section 2.4): another function, which training has to get used to.

    Raises:
        ValueError: a field out of its range, or two that contradict each other.
        TypeError: a field of the wrong type.

    >>> desc = QuantDescriptor(num_bits=4, axis=0, unsigned=True)
    >>> desc.dict()
    {'num_bits': 4, 'axis': 0, 'unsigned': True}
    >>> QuantDescriptor.from_yaml(desc.to_yaml()) == desc
    True
    """

    num_bits: Bits = 8
    name: str | None = None
    _: KW_ONLY
    fake_quant: bool = True
    axis: int | tuple[int, ...] | None = None
    amax: Nested | None = None
    learn_amax: bool | str = False
    scale_amax: float | None = None
    calib_method: str = "max"
    unsigned: bool = False
    narrow_range: bool = True
    num_bins: int = 2048
    block_size: int | None = None
    affine: bool = False
    normalize: bool | str = False

    def __post_init__(self) -> None:
        for name in ("num_bits", "axis", "amax"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        for name in ("num_bins", "block_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | None if name == "block_size" else int):
                raise TypeError(f"`{name}` is {value!r}: it must be an integer.")
        if isinstance(self.learn_amax, str) and self.learn_amax not in LEARNING:
            raise ValueError(f"`learn_amax` is {self.learn_amax!r}: choose one of {', '.join(LEARNING)}, true or false.")
        for name in ("unsigned", "narrow_range", "fake_quant", "learn_amax", "affine"):
            value = getattr(self, name)
            if not isinstance(value, bool) and value not in LEARNING:
                raise TypeError(f"`{name}` is {value!r}: it must be true or false.")
        if not isinstance(self.normalize, bool) and self.normalize != "center":
            raise ValueError(f"`normalize` is {self.normalize!r}: it must be true, false or 'center'.")
        if not isinstance(self.name, str | None):
            raise TypeError(f"`name` is {self.name!r}: it must be text.")
        check_num_bits(self.num_bits, self.unsigned)
        if self.num_bins < 2:
            raise ValueError(f"`num_bins` is {self.num_bins}: it must be at least 2.")
        if self.calib_method not in CALIB_METHODS:
            raise ValueError(f"`calib_method` is {self.calib_method!r}: choose one of {', '.join(CALIB_METHODS)}.")
        self._check_axis()
        self._check_amax()
        self._check_affine()
        if self.normalize and (self.unsigned or self.learn_amax is True):
            found = "unsigned" if self.unsigned else "learn_amax"
            raise ValueError(f"`normalize` is {self.normalize!r}, which does not go with `{found}=True`: leave one out.")
        if isinstance(self.learn_amax, str) and (isinstance(self.num_bits, tuple) or not self.fake_quant):
            raise ValueError(f"`learn_amax` is {self.learn_amax!r}, which is for integers (`num_bits`) and `fake_quant=True`.")
        if isinstance(self.num_bits, tuple) and not self.fake_quant:
            raise ValueError(f"`fake_quant` is False with `num_bits={self.num_bits}`: floats have no integer codes.")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"`block_size` is {self.block_size}: it must be at least 1, or null.")

    def _check_affine(self) -> None:
        if not self.affine:
            return
        if isinstance(self.num_bits, tuple):
            raise ValueError(f"`affine` is True with `num_bits={self.num_bits}`: floats have no zero point.")
        allowed = {
            "unsigned": (False,),
            "fake_quant": (True,),
            "learn_amax": (False, "lsq"),
            "block_size": (None,),
            "normalize": (False,),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`affine` is True, which does not go with `{name}={getattr(self, name)}`: leave one out.")
        if self.amax is not None or self.scale_amax is not None:
            raise ValueError("`affine` is True: calibration finds the two ends of its range; leave `amax` and `scale_amax` out.")

    def _check_axis(self) -> None:
        axes = self.axis if isinstance(self.axis, tuple) else () if self.axis is None else (self.axis,)
        if not all(isinstance(a, int) and not isinstance(a, bool) for a in axes):
            raise TypeError(f"`axis` is {self.axis!r}: it must be an integer, several, or null.")
        if len(set(axes)) != len(axes):
            raise ValueError(f"`axis` names a dimension twice: {axes}.")
        if self.block_size is not None and -1 in axes:
            raise ValueError(f"`axis` is {self.axis} with `block_size={self.block_size}`: blocks lie along that dimension.")

    def _check_amax(self) -> None:
        for name in ("amax", "scale_amax"):
            value = getattr(self, name)
            try:
                numbers = [] if value is None else list(_numbers(value))
                if any(isinstance(a, bool) for a in numbers):
                    raise TypeError
                valid = value is None or (bool(numbers) and all(0 <= a < math.inf for a in numbers))
            except TypeError:
                raise TypeError(f"`{name}` is {value!r}: it must be a number{' or numbers' * (name == 'amax')}.") from None
            if not valid:
                raise ValueError(f"`{name}` is {value}: give numbers that are finite and not negative.")

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

    def search_options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options of a search for amax, and with them the share of a power of two that the grid ends at.

        Where amax is no power of two it is multiplied to see what another one does, which a search must not make up for; and one
        that is learned is not multiplied.

        >>> QuantDescriptor(scale_amax=0.5).search_options({"power_of_two": True})
        {'power_of_two': True, 'scale_amax': 0.5}
        """
        shares = options.get("power_of_two") and self.scale_amax and not self.learn_amax
        return {**options, "scale_amax": self.scale_amax} if shares else options


@dataclass(frozen=True)
class QuantRule:
    """Which modules get which descriptors: in a list of rules the last one that matches a module wins.

    Args:
        pattern: shell wildcards, matched against the module's dotted name; ``*`` also crosses dots. With a target,
            ``conv.residual`` and ``conv.branch`` are what the add behind ``conv`` takes; else they follow the rule of ``conv``.
        input: descriptor of the input, or a mapping of its fields; ``None`` leaves it in float.
        weight: of the weight, likewise. With both ``None`` the module is not touched.
        types: names of classes, as ``"Conv2d"``; only their modules match. By default all match but those that gain little by
            integers (pooling, instance norms, embeddings), which are quantized where ``types`` or the whole name says so.

    >>> QuantRule("*.head", weight={"num_bits": 4, "axis": 0}).weight.dict()
    {'num_bits': 4, 'axis': 0}
    """

    pattern: str
    input: QuantDescriptor | None = field(default=None)
    weight: QuantDescriptor | None = field(default=None)
    types: tuple[str, ...] | None = field(default=None)

    def __post_init__(self) -> None:
        for name in ("input", "weight"):
            desc = getattr(self, name)
            if isinstance(desc, Mapping):
                desc = QuantDescriptor.from_dict(desc)
                object.__setattr__(self, name, desc)
            if desc is not None and not isinstance(desc, QuantDescriptor):
                raise TypeError(f"`{name}` of rule {self.pattern!r} is {desc!r}: it must be a QuantDescriptor or None.")
        if self.input is not None and self.input.normalize:
            raise ValueError(f"`input` of rule {self.pattern!r} has `normalize`, which is for weights: give it to `weight`.")
        types = _frozen((self.types,) if isinstance(self.types, str) else self.types)
        if types is not None and not (isinstance(types, tuple) and all(isinstance(t, str) for t in types)):
            raise TypeError(f"`types` of rule {self.pattern!r} is {self.types!r}: it must be names of classes.")
        object.__setattr__(self, "types", types)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantRule":
        """A rule from a mapping; an unknown key is refused by name."""
        return cls(**_known(cls, values, "rule"))


# A preset's name, a rule, or several, each of them also as a mapping.
Rules = str | QuantRule | Sequence[QuantRule | Mapping[str, Any]]

# What TensorRT and ONNX Runtime execute: full-range activations per tensor, narrow weights per output channel.
INT8_INPUT = QuantDescriptor(narrow_range=False)
INT8_WEIGHT = QuantDescriptor(axis=0)
# FP8 E4M3 has exponent enough for one scale per tensor.
FP8 = QuantDescriptor(num_bits=(4, 3))
# Every code is needed, and steps are learned from where calibration puts them (LSQ).
LOW_BIT_INPUT = INT8_INPUT.replace(learn_amax="lsq")
LOW_BIT_WEIGHT = INT8_WEIGHT.replace(learn_amax="lsq", narrow_range=False)
# Blocks of 128 weights of one output, as TensorRT and the 4-bit formats of language models have them.
INT4_BLOCKS = QuantDescriptor(num_bits=4, axis=0, block_size=128)

PRESETS: dict[str, list[QuantRule]] = {
    "int8": [QuantRule("*", INT8_INPUT, INT8_WEIGHT)],
    "int8_attention": [
        QuantRule("*", INT8_INPUT, INT8_WEIGHT),
        QuantRule("*", INT8_INPUT, types=("QuantMatmul", "QuantScaledDotProductAttention")),
    ],
    "int8_per_tensor": [QuantRule("*", INT8_INPUT, INT8_WEIGHT.replace(axis=None))],
    "int8_weight_only": [QuantRule("*", None, INT8_WEIGHT)],
    "fp8": [QuantRule("*", FP8, FP8)],
    "w4a16": [QuantRule("*", None, INT4_BLOCKS, types=("Linear",))],
    "w4a8": [QuantRule("*", INT8_INPUT, INT8_WEIGHT.replace(num_bits=4))],
    **{f"w{n}a{n}": [QuantRule("*", LOW_BIT_INPUT.replace(num_bits=n), LOW_BIT_WEIGHT.replace(num_bits=n))] for n in (4, 3, 2)},
}


def resolve_rules(rules: Rules) -> list[QuantRule]:
    """A preset's rules, or the given ones."""
    if isinstance(rules, QuantRule):
        return [rules]
    if not isinstance(rules, str):
        return [rule if isinstance(rule, QuantRule) else QuantRule.from_dict(rule) for rule in rules]
    if rules not in PRESETS:
        raise ValueError(f"`rules` is {rules!r}: choose a preset among {', '.join(PRESETS)}, or give a list of QuantRule.")
    return PRESETS[rules]
