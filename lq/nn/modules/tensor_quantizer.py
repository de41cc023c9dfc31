"""pytorch-quantization's ``nn.modules.tensor_quantizer``."""

from lq.nn.tensor_quantizer import TensorQuantizer

__all__ = ["TensorQuantizer"]
