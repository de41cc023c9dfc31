"""pytorch-quantization's ``utils.reduce_amax``."""

from lq.functional.amax import reduce_amax

__all__ = ["reduce_amax"]
