"""pytorch-quantization's ``nn.modules._utils``, of which its tutorial makes custom modules."""

from lq.nn.quant_module import QuantInputMixin, QuantMixin, pop_quant_desc_in_kwargs

__all__ = ["QuantInputMixin", "QuantMixin", "pop_quant_desc_in_kwargs"]
