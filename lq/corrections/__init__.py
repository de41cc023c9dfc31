"""Changes to a float model that leave its output as it is, or nearly so, and make it easier to quantize."""

from lq.corrections.equalization import activation_channel_equalization_
from lq.corrections.record import Applied, Corrections

__all__ = ["Applied", "Corrections", "activation_channel_equalization_"]
