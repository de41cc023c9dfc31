"""Modules that stand for functional operations, so that what they take can be quantized.

Put them in a model where it would write ``a + b`` or ``q @ k``. :func:`lq.quantize_` gives them the input descriptor of the rule
that matches; ``quant_desc_input=None`` makes them plain operations until then.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lq.descriptor import QuantDescriptor
from lq.nn.quant_module import QuantModule, register
from lq.nn.tensor_quantizer import TensorQuantizer


class Operation(QuantModule):
    """A function of tensors as a module; ``operands`` says which of its arguments each quantizer takes."""

    quant_desc_keywords = ("quant_desc_input",)
    operands: ClassVar[dict[str, int]]

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        self.make_quantizers(quant_desc_input, *self.operands)


class QuantAdd(Operation):
    """``input + Q(residual)``: TensorRT fuses an add into the layer before it if the shortcut, and it alone, is quantized.

    >>> add = QuantAdd(quant_desc_input=QuantDescriptor(amax=1.27))
    >>> add(F.relu(Tensor([0.333])), Tensor([0.333]))
    tensor([0.6630])
    """

    operands = {"residual": 1}
    residual_quantizer: TensorQuantizer

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """The sum of two tensors that broadcast."""
        y: Tensor = input + self.residual_quantizer(residual)
        return y


class QuantMatmul(Operation):
    """``Q(input) @ Q(other)``."""

    operands = {"input": 0, "other": 1}
    input_quantizer: TensorQuantizer
    other_quantizer: TensorQuantizer

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """The product of ``(..., n, k)`` and ``(..., k, m)``."""
        y: Tensor = self.input_quantizer(input) @ self.other_quantizer(other)
        return y


class QuantScaledDotProductAttention(Operation):
    """``F.scaled_dot_product_attention`` with both of its products quantized: ``Q(softmax(Q(query) Q(key)^T * scale)) Q(value)``.

    As :class:`QuantMultiheadAttention` has it, and as TensorRT needs it: the probabilities are quantized too, before dropout, so
    the products are computed one after the other. Where every key is masked a row of probabilities is uniform. In float it is
    torch's function, with its fused kernels.
    """

    operands = {"q": 0, "k": 1, "v": 2}
    q_quantizer: TensorQuantizer
    k_quantizer: TensorQuantizer
    v_quantizer: TensorQuantizer
    probs_quantizer: TensorQuantizer

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        self.make_quantizers(quant_desc_input, *self.operands, "probs")

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
        if self.idle:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        q, k, v = self.q_quantizer(query), self.k_quantizer(key), self.v_quantizer(value)
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        if is_causal:
            future = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
        probs = F.dropout(self.probs_quantizer(scores.softmax(-1)), dropout_p)
        y: Tensor = probs @ v
        return y


for _operation in (QuantAdd, QuantMatmul, QuantScaledDotProductAttention):
    register(_operation)(_operation)
