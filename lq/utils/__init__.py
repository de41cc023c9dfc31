"""pytorch-quantization's ``utils``."""

from lq.utils.reduce_amax import reduce_amax

__all__ = ["reduce_amax"]
