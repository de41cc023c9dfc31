"""pytorch-quantization's ``nn.modules.clip``."""

from lq.nn.clip import Clip

__all__ = [
    "Clip",
]
