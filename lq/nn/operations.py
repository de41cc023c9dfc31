"""Modules that stand for functional operations, so that what they take can be quantized.

Put them in a model where it would write ``a + b`` or ``q @ k``. :func:`lq.quantize_` gives them the input descriptor of the rule
that matches; ``quant_desc_input=None`` makes them plain operations until then.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lq.descriptor import QuantDescriptor
from lq.nn.quant_module import QuantModule, register
from lq.nn.tensor_quantizer import TensorQuantizer


class _Operation(QuantModule):
    quant_desc_keywords = ("quant_desc_input",)
    operands: ClassVar[tuple[str, ...]]

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        self.make_quantizers(quant_desc_input, *self.operands)


class QuantAdd(_Operation):
    """``input + Q(residual)``: TensorRT fuses an add into the layer before it if the shortcut, and it alone, is quantized.

    >>> add = QuantAdd(quant_desc_input=QuantDescriptor(amax=1.27))
    >>> add(F.relu(Tensor([0.333])), Tensor([0.333]))
    tensor([0.6630])
    """

    operands = ("residual",)
    residual_quantizer: TensorQuantizer

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """The sum of two tensors that broadcast."""
        y: Tensor = input + self.residual_quantizer(residual)
        return y


class QuantMatmul(_Operation):
    """``Q(input) @ Q(other)``."""

    operands = ("input", "other")
    input_quantizer: TensorQuantizer
    other_quantizer: TensorQuantizer

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """The product of ``(..., n, k)`` and ``(..., k, m)``."""
        y: Tensor = self.input_quantizer(input) @ self.other_quantizer(other)
        return y


class QuantScaledDotProductAttention(_Operation):
    """``F.scaled_dot_product_attention`` of ``Q(query)``, ``Q(key)`` and ``Q(value)``.

    The probabilities stay inside the fused kernel, in float.
    """

    operands = ("q", "k", "v")
    q_quantizer: TensorQuantizer
    k_quantizer: TensorQuantizer
    v_quantizer: TensorQuantizer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention output ``(..., queries, features)``; arguments as of the function."""
        q, k, v = self.q_quantizer(query), self.k_quantizer(key), self.v_quantizer(value)
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


for _operation in (QuantAdd, QuantMatmul, QuantScaledDotProductAttention):
    register(_operation)(_operation)
