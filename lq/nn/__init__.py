"""Quantized modules and the quantizer they are made of.

Plain names are aliases, as in pytorch-quantization: ``lq.nn.Linear`` is :class:`QuantLinear`.
"""

from lq.nn import functional, modules
from lq.nn.attention import QuantMultiheadAttention
from lq.nn.clip import Clip
from lq.nn.conv import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from lq.nn.embedding import QuantEmbedding
from lq.nn.linear import QuantLinear
from lq.nn.norm import QuantInstanceNorm1d, QuantInstanceNorm2d, QuantInstanceNorm3d
from lq.nn.operations import QuantAdd, QuantMatmul, QuantScaledDotProductAttention
from lq.nn.pooling import (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAdaptiveAvgPool3d,
    QuantAvgPool1d,
    QuantAvgPool2d,
    QuantAvgPool3d,
    QuantMaxPool1d,
    QuantMaxPool2d,
    QuantMaxPool3d,
)
from lq.nn.quant_module import QUANT_MODULES, QuantInputMixin, QuantMixin, QuantModule, register
from lq.nn.recompute import recompute_
from lq.nn.rnn import QuantLSTM, QuantLSTMCell
from lq.nn.tensor_quantizer import TensorQuantizer

Conv1d, Conv2d, Conv3d = QuantConv1d, QuantConv2d, QuantConv3d
ConvTranspose1d, ConvTranspose2d, ConvTranspose3d = QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
Linear, Embedding = QuantLinear, QuantEmbedding
MaxPool1d, MaxPool2d, MaxPool3d = QuantMaxPool1d, QuantMaxPool2d, QuantMaxPool3d
AvgPool1d, AvgPool2d, AvgPool3d = QuantAvgPool1d, QuantAvgPool2d, QuantAvgPool3d
AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d = (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAdaptiveAvgPool3d,
)
LSTM, LSTMCell = QuantLSTM, QuantLSTMCell
MultiheadAttention = QuantMultiheadAttention
InstanceNorm1d, InstanceNorm2d, InstanceNorm3d = QuantInstanceNorm1d, QuantInstanceNorm2d, QuantInstanceNorm3d

__all__ = [
    "LSTM",
    "QUANT_MODULES",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "Clip",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LSTMCell",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MultiheadAttention",
    "QuantAdaptiveAvgPool1d",
    "QuantAdaptiveAvgPool2d",
    "QuantAdaptiveAvgPool3d",
    "QuantAdd",
    "QuantAvgPool1d",
    "QuantAvgPool2d",
    "QuantAvgPool3d",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantInputMixin",
    "QuantInstanceNorm1d",
    "QuantInstanceNorm2d",
    "QuantInstanceNorm3d",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLinear",
    "QuantMatmul",
    "QuantMaxPool1d",
    "QuantMaxPool2d",
    "QuantMaxPool3d",
    "QuantMixin",
    "QuantModule",
    "QuantMultiheadAttention",
    "QuantScaledDotProductAttention",
    "TensorQuantizer",
    "functional",
    "modules",
    "recompute_",
    "register",
]
