"""MCT's configuration: its fields, their defaults, and what is refused."""

import dataclasses
import math

import pytest
from hydra.utils import instantiate

import lq
from lq import QuantizationConfig, QuantizationMethod, ThresholdSelectionMethod

# Signature in the documentation of Model Compression Toolkit; its MIN_THRESHOLD is 2 ** -28.
DOCUMENTED = {
    "activation_threshold_method": ThresholdSelectionMethod.MSE,
    "weights_threshold_method": ThresholdSelectionMethod.MSE,
    "activation_quantization_method": QuantizationMethod.SYMMETRIC_UNIFORM,
    "weights_quantization_method": QuantizationMethod.SYMMETRIC_UNIFORM,
    "activation_n_bits": 8,
    "weights_n_bits": 8,
    "relu_unbound_correction": False,
    "weights_bias_correction": True,
    "weights_per_channel_threshold": True,
    "input_scaling": False,
    "enable_weights_quantization": True,
    "enable_activation_quantization": True,
    "shift_negative_activation_correction": False,
    "activation_channel_equalization": False,
    "z_threshold": math.inf,
    "min_threshold": 2**-28,
    "l_p_value": 2,
    "shift_negative_ratio": 0.25,
    "shift_negative_threshold_recalculation": False,
}


def test_fields_in_their_order_with_their_defaults():
    assert {field.name: field.default for field in dataclasses.fields(QuantizationConfig)} == DOCUMENTED
    assert list(DOCUMENTED) == [field.name for field in dataclasses.fields(QuantizationConfig)]


def test_methods():
    assert [method.name for method in ThresholdSelectionMethod] == ["NOCLIPPING", "MSE", "MAE", "KL", "LP"]
    assert ThresholdSelectionMethod.Lp is ThresholdSelectionMethod.LP
    assert [method.name for method in QuantizationMethod] == ["SYMMETRIC_UNIFORM", "UNIFORM", "POWER_OF_TWO"]


def test_the_documentations_example():
    config = QuantizationConfig(
        activation_n_bits=6,
        weights_n_bits=7,
        activation_quantization_method=QuantizationMethod.SYMMETRIC_UNIFORM,
        weights_quantization_method=QuantizationMethod.SYMMETRIC_UNIFORM,
        weights_threshold_method=ThresholdSelectionMethod.MSE,
        activation_threshold_method=ThresholdSelectionMethod.NOCLIPPING,
        relu_unbound_correction=True,
        weights_bias_correction=True,
        weights_per_channel_threshold=True,
    )
    (rule,) = config.rules()
    assert (rule.input.num_bits, rule.weight.num_bits, rule.weight.axis) == (6, 7, 0)
    assert list(config.corrections()) == ["relu_unbound_correction"]


def test_frozen_and_built_by_hydra():
    config = instantiate({"_target_": "lq.QuantizationConfig", "weights_threshold_method": "KL", "z_threshold": 3})
    assert config == QuantizationConfig(weights_threshold_method=ThresholdSelectionMethod.KL, z_threshold=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weights_n_bits = 4
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_n_bits": 1}, r"`activation_n_bits` is 1: it must lie in \[2, 16\]"),
        ({"weights_n_bits": 17}, r"`weights_n_bits` is 17"),
        ({"z_threshold": 0}, "`z_threshold` is 0: it must be above 0"),
        ({"z_threshold": math.nan}, "`z_threshold` is nan"),
        ({"min_threshold": -1.0}, "`min_threshold` is -1.0: it must be above 0"),
        ({"min_threshold": math.inf}, "`min_threshold` is inf: it must be finite"),
        ({"l_p_value": 0}, "`l_p_value` is 0"),
        ({"shift_negative_ratio": 1.5}, r"`shift_negative_ratio` is 1.5: it must lie in \(0, 1\]"),
        ({"weights_threshold_method": "MEDIAN"}, "`weights_threshold_method` is 'MEDIAN': choose one of NOCLIPPING, MSE, MAE"),
        (
            {"activation_quantization_method": 3},
            "`activation_quantization_method` is 3: choose one of SYMMETRIC",
        ),
        ({"enable_weights_quantization": False, "enable_activation_quantization": False}, "Neither weights nor activations"),
        (
            {"shift_negative_activation_correction": True, "activation_quantization_method": "UNIFORM"},
            "`shift_negative_activation_correction` has nothing to gain with UNIFORM, which gives activations a zero point",
        ),
        (
            {"relu_unbound_correction": True, "activation_quantization_method": "UNIFORM"},
            "`relu_unbound_correction` has nothing to gain with UNIFORM, .* of which no power of two is asked",
        ),
        (
            {"input_scaling": True, "enable_activation_quantization": False},
            "`input_scaling` is for activations, and `enable_activation_quantization` is False",
        ),
        ({"shift_negative_threshold_recalculation": True}, "nothing is shifted"),
    ],
)
def test_values_out_of_range_and_contradictions(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"activation_n_bits": 8.0}, {"input_scaling": 1}, {"l_p_value": True}, {"z_threshold": "3"}, {"weights_n_bits": True}],
)
def test_values_of_another_type(fields):
    with pytest.raises(TypeError, match=f"`{next(iter(fields))}` is"):
        QuantizationConfig(**fields)


def test_it_is_in_the_first_namespace():
    assert lq.post_training_quantization is not None
