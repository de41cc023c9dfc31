"""pytorch-quantization's ``nn.modules.quant_rnn``."""

from lq.nn.rnn import QuantLSTM, QuantLSTMCell

__all__ = [
    "QuantLSTM",
    "QuantLSTMCell",
]
