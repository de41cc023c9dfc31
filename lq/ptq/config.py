"""What post-training quantization does, in one object: Sony's Model Compression Toolkit's ``QuantizationConfig``."""

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from lq.corrections import (
    Correction,
    activation_channel_equalization_,
    input_scaling_,
    relu_unbound_correction_,
    shift_negative_activation_correction_,
)
from lq.descriptor import QuantDescriptor, QuantRule
from lq.functional.grid import largest_code

# The least threshold, MCT's.
MIN_THRESHOLD = 2.0**-28

NUMBERS = ("z_threshold", "min_threshold", "l_p_value", "shift_negative_ratio")

E = TypeVar("E", bound=Enum)


class ThresholdSelectionMethod(Enum):
    """By which criterion a threshold is chosen; the values are methods of :func:`lq.calibrating`."""

    NOCLIPPING = "noclipping"
    """The largest magnitude."""
    MSE = "mse"
    """The least mean squared error."""
    MAE = "mae"
    """The least mean absolute error."""
    KL = "kl"
    """The least Kullback-Leibler divergence from the distribution of what is quantized."""
    LP = "lp"
    """The least mean error to the power of ``l_p_value``."""
    Lp = "lp"


class QuantizationMethod(Enum):
    """How codes stand for values."""

    SYMMETRIC_UNIFORM = "symmetric_uniform"
    """A scale, and no zero point: from minus the threshold to the threshold, or from 0 where nothing is negative."""
    UNIFORM = "uniform"
    """A range of two ends: a scale and a zero point."""
    POWER_OF_TWO = "power_of_two"
    """As the symmetric one, with thresholds, and so scales, that are powers of two: hardware shifts for them."""


@dataclass(frozen=True)
class QuantizationConfig:
    """How to quantize a trained model: MCT's fields, with their defaults.

    The methods may be given by name, as in a Hydra config: ``activation_threshold_method="KL"``.

    Args:
        activation_threshold_method: how thresholds of activations are chosen.
        weights_threshold_method: how those of weights are.
        activation_quantization_method: how codes stand for activations.
        weights_quantization_method: how they do for weights.
        activation_n_bits: width of activations' codes, 2 to 16.
        weights_n_bits: width of weights' codes, 2 to 16.
        relu_unbound_correction: bring the range behind unbounded ReLUs to a power of two, by scaling what is before and behind:
            :func:`lq.corrections.relu_unbound_correction_`.
        weights_bias_correction: the bias takes up the mean error of rounded weights:
            :func:`lq.corrections.weights_bias_correction_`.
        weights_per_channel_threshold: a threshold for each output channel of a weight, or one for all.
        input_scaling: bring the range of the model's input to a power of two, by scaling the weights of the first layers:
            :func:`lq.corrections.input_scaling_`.
        enable_weights_quantization: quantize weights.
        enable_activation_quantization: quantize activations.
        shift_negative_activation_correction: shift activations with a small negative lobe, so that they need no sign:
            :func:`lq.corrections.shift_negative_activation_correction_`.
        activation_channel_equalization: even out the channels between layers:
            :func:`lq.corrections.activation_channel_equalization_`.
        z_threshold: leave out values of activations that lie more standard deviations than this from their mean, when a
            threshold is chosen.
        min_threshold: the least threshold.
        l_p_value: exponent of the method LP.
        shift_negative_ratio: most that the magnitude of the smallest value may be beside the threshold for it to be shifted.
        shift_negative_threshold_recalculation: choose the threshold anew after the shift; else it is the old one plus the shift.

    Raises:
        ValueError: a field out of its range, or two that contradict each other.
        TypeError: a field of the wrong type.

    >>> config = QuantizationConfig(activation_n_bits=6, weights_n_bits=7, activation_threshold_method="NOCLIPPING")
    >>> config.activation_threshold_method, config.weights_threshold_method.value
    (<ThresholdSelectionMethod.NOCLIPPING: 'noclipping'>, 'mse')
    >>> QuantizationConfig(activation_n_bits=1)
    Traceback (most recent call last):
      ...
    ValueError: `activation_n_bits` is 1: it must lie in [2, 16].
    """

    activation_threshold_method: ThresholdSelectionMethod = ThresholdSelectionMethod.MSE
    weights_threshold_method: ThresholdSelectionMethod = ThresholdSelectionMethod.MSE
    activation_quantization_method: QuantizationMethod = QuantizationMethod.SYMMETRIC_UNIFORM
    weights_quantization_method: QuantizationMethod = QuantizationMethod.SYMMETRIC_UNIFORM
    activation_n_bits: int = 8
    weights_n_bits: int = 8
    relu_unbound_correction: bool = False
    weights_bias_correction: bool = True
    weights_per_channel_threshold: bool = True
    input_scaling: bool = False
    enable_weights_quantization: bool = True
    enable_activation_quantization: bool = True
    shift_negative_activation_correction: bool = False
    activation_channel_equalization: bool = False
    z_threshold: float = math.inf
    min_threshold: float = MIN_THRESHOLD
    l_p_value: float = 2
    shift_negative_ratio: float = 0.25
    shift_negative_threshold_recalculation: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, Enum):
                object.__setattr__(self, field.name, _member(type(field.default), value, field.name))
            elif isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"`{field.name}` is {value!r}: it must be True or False.")
            elif field.name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"`{field.name}` is {value!r}: it must be a number.")
        for name in ("activation_n_bits", "weights_n_bits"):
            bits = getattr(self, name)
            if type(bits) is not int:
                raise TypeError(f"`{name}` is {bits!r}: it must be an integer.")
            if not 2 <= bits <= 16:
                raise ValueError(f"`{name}` is {bits}: it must lie in [2, 16].")
        for name in ("z_threshold", "min_threshold", "l_p_value"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be above 0.")
        if not math.isfinite(self.min_threshold):
            raise ValueError(f"`min_threshold` is {self.min_threshold}: it must be finite.")
        if not 0 < self.shift_negative_ratio <= 1:
            raise ValueError(f"`shift_negative_ratio` is {self.shift_negative_ratio}: it must lie in (0, 1].")
        self._check_together()

    def _check_together(self) -> None:
        """What no model can have at once, or what would do nothing."""
        if not (self.enable_weights_quantization or self.enable_activation_quantization):
            raise ValueError("Neither weights nor activations are quantized: enable one of them.")
        for_activations = ("shift_negative_activation_correction", "relu_unbound_correction", "input_scaling")
        for name in (name for name in for_activations if getattr(self, name)):
            if not self.enable_activation_quantization:
                raise ValueError(f"`{name}` is for activations, and `enable_activation_quantization` is False: leave one out.")
            if self.activation_quantization_method is QuantizationMethod.UNIFORM:
                has = "a zero point" if name.startswith("shift") else "a range of its own, of which no power of two is asked"
                raise ValueError(f"`{name}` has nothing to gain with UNIFORM, which gives activations {has}: leave one out.")
        if self.shift_negative_threshold_recalculation and not self.shift_negative_activation_correction:
            raise ValueError(
                "`shift_negative_threshold_recalculation` is True, and `shift_negative_activation_correction` False: nothing is "
                "shifted."
            )

    # What it means in the words of this package

    def rules(self) -> list[QuantRule]:
        """Descriptors for the layers.

        >>> QuantizationConfig(weights_n_bits=4, enable_activation_quantization=False).rules()[0].input is None
        True
        """
        axis = 0 if self.weights_per_channel_threshold else None
        return [
            QuantRule(
                "*",
                input=self._activations() if self.enable_activation_quantization else None,
                weight=_descriptor(self.weights_quantization_method, self.weights_n_bits, narrow_range=True, axis=axis)
                if self.enable_weights_quantization
                else None,
            )
        ]

    def _activations(self) -> QuantDescriptor:
        return _descriptor(self.activation_quantization_method, self.activation_n_bits, narrow_range=False)

    def activation_calibration(self) -> dict[str, Any]:
        """Method and options that thresholds of activations are chosen by, as :func:`lq.calibrating` has them."""
        return {
            **_calibration(self.activation_threshold_method, self.activation_quantization_method, self),
            "z_threshold": self.z_threshold,
        }

    def weights_calibration(self) -> dict[str, Any]:
        """Method and options that thresholds of weights are chosen by, likewise."""
        chosen = _calibration(self.weights_threshold_method, self.weights_quantization_method, self)
        # a weight has thousands of channels with few values each: thresholds an eighth as dense are found eight times as fast
        return {**chosen, "stride": 8}

    def corrections(self) -> dict[str, Correction]:
        """What is done to the float model before it is quantized, in this order, by the names of the fields.

        Channels are evened out first: that changes every range. Shifts come last: a shifted layer takes no factor any more.
        """
        measured = {"desc": self._activations(), **self.activation_calibration()}
        # those that bring a range to a power of two themselves
        unrounded = {name: value for name, value in measured.items() if name != "power_of_two"}
        shifted = {
            "ratio": self.shift_negative_ratio,
            "threshold_recalculation": self.shift_negative_threshold_recalculation,
            **measured,
        }
        found: dict[str, Correction] = {
            "activation_channel_equalization": activation_channel_equalization_,
            "relu_unbound_correction": partial(relu_unbound_correction_, **unrounded),
            "input_scaling": partial(input_scaling_, **unrounded),
            "shift_negative_activation_correction": partial(shift_negative_activation_correction_, **shifted),
        }
        return {name: correction for name, correction in found.items() if getattr(self, name)}


def _member(enum: type[E], value: Any, name: str) -> E:
    if isinstance(value, enum):
        return value
    if isinstance(value, str) and value in enum.__members__:
        return enum[value]
    raise ValueError(f"`{name}` is {value!r}: choose one of {', '.join(enum.__members__)}.")


def _descriptor(method: QuantizationMethod, bits: int, *, narrow_range: bool, axis: int | None = None) -> QuantDescriptor:
    if method is QuantizationMethod.UNIFORM:
        return QuantDescriptor(bits, axis=axis, calib_method="histogram", affine=True)
    desc = QuantDescriptor(bits, axis=axis, calib_method="histogram", narrow_range=narrow_range)
    return desc if method is QuantizationMethod.SYMMETRIC_UNIFORM else with_power_of_two_scale(desc)


def with_power_of_two_scale(desc: QuantDescriptor) -> QuantDescriptor:
    """A descriptor whose scale is a power of two where amax is one, as the largest code is one short of a power of two.

    >>> with_power_of_two_scale(QuantDescriptor(8)).scale_amax == 127 / 128
    True
    """
    assert isinstance(desc.num_bits, int)
    largest = largest_code(desc.num_bits, desc.unsigned)
    return desc.replace(scale_amax=largest / (largest + 1))


def _calibration(threshold: ThresholdSelectionMethod, method: QuantizationMethod, config: QuantizationConfig) -> dict[str, Any]:
    return {
        "method": threshold.value,
        "p": config.l_p_value,
        "min_threshold": config.min_threshold,
        "power_of_two": method is QuantizationMethod.POWER_OF_TWO,
    }
