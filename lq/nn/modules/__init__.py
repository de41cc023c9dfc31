"""pytorch-quantization's ``nn.modules``."""

from lq.nn.modules import clip, quant_conv, quant_instancenorm, quant_linear, quant_pooling, quant_rnn, tensor_quantizer

__all__ = ["clip", "quant_conv", "quant_instancenorm", "quant_linear", "quant_pooling", "quant_rnn", "tensor_quantizer"]
