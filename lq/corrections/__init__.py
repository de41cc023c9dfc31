"""Changes to a model that leave its float output as it is, and make it easier to quantize; or make up for what was lost by it."""

from lq.corrections.batchnorm import batchnorms, reestimate_batchnorm_, reestimating_batchnorm
from lq.corrections.bias import weights_bias_correction_
from lq.corrections.equalization import activation_channel_equalization_
from lq.corrections.input_scaling import input_scaling_
from lq.corrections.places import RecordingError
from lq.corrections.ranges import power_of_two
from lq.corrections.record import Applied, Correction, Corrections
from lq.corrections.relu_bound import relu_unbound_correction_
from lq.corrections.shift_negative import TAKE_SHIFTS, shift_negative_activation_correction_

__all__ = [
    "TAKE_SHIFTS",
    "Applied",
    "Correction",
    "Corrections",
    "RecordingError",
    "activation_channel_equalization_",
    "batchnorms",
    "input_scaling_",
    "power_of_two",
    "reestimate_batchnorm_",
    "reestimating_batchnorm",
    "relu_unbound_correction_",
    "shift_negative_activation_correction_",
    "weights_bias_correction_",
]
