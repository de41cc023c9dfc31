"""Quantized ``nn.MultiheadAttention``: its projections and both of its matrix products."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lq.descriptor import QuantDescriptor
from lq.nn.convert import to_quantized_
from lq.nn.linear import QuantLinear
from lq.nn.quant_module import QuantInputMixin, QuantModule, register
from lq.nn.tensor_quantizer import TensorQuantizer


@register(NonDynamicallyQuantizableLinear)
class QuantOutProjection(QuantLinear, NonDynamicallyQuantizableLinear):
    """The layer ``out_proj`` of :class:`QuantMultiheadAttention`, with rules and quantizers of its own."""


@register(nn.MultiheadAttention)
class QuantMultiheadAttention(QuantInputMixin, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with quantized inputs, projections, and operands of both products.

    Per head, ``softmax(Q(q) Q(k)^T / sqrt(d))`` is quantized too (before dropout, so that it has one range in training and in
    evaluation) and multiplied with ``Q(v)``. Query, key and value share the quantizer ``input``. Scores, masks, softmax and
    biases stay float. Arguments as ``nn.MultiheadAttention``, and ``quant_desc_input``, ``quant_desc_weight``, which ``out_proj``
    gets too.

    >>> attention = QuantMultiheadAttention(8, 2)
    >>> list(attention.quantizers()), list(attention.out_proj.quantizers())
    (['input', 'q', 'k', 'v', 'probs', 'in_proj_weight'], ['input', 'weight'])
    """

    quant_desc_keywords = QuantModule.quant_desc_keywords
    input_weight = "in_proj_weight"

    q_quantizer: TensorQuantizer
    k_quantizer: TensorQuantizer
    v_quantizer: TensorQuantizer
    probs_quantizer: TensorQuantizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        descs = [kwargs.get(key, getattr(self, f"default_{key}")) for key in self.quant_desc_keywords]
        super().__init__(*args, **kwargs)
        to_quantized_(self.out_proj, *descs)

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        weights = ("in_proj_weight",) if self._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        self.make_quantizers(quant_desc_input, "input", "q", "k", "v", "probs")
        self.make_quantizers(quant_desc_weight, *weights)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results of ``nn.MultiheadAttention.forward``."""
        if self._leaves_it_to_torch():
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if is_causal and attn_mask is None:
            raise RuntimeError("`is_causal` is a hint about `attn_mask`, which is None: give the mask too.")
        batched = query.dim() == 3
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        _check(q, k, v, attn_mask, key_padding_mask)
        k, v = self._extend(k, v)
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        scores = self.q_quantizer(q) @ self.k_quantizer(k).mT * self.head_dim**-0.5
        probs = self.probs_quantizer((scores if mask is None else scores + mask).softmax(-1))
        probs = F.dropout(probs, self.dropout, self.training)
        output = self.out_proj((probs @ self.v_quantizer(v)).transpose(1, 2).flatten(2))
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        weights = probs.mean(1) if average_attn_weights else probs
        return output, weights if batched else weights.squeeze(0)

    def _leaves_it_to_torch(self) -> bool:
        # torch's own never calls `out_proj`, so whatever wants to see that call needs ours
        projection = self.out_proj
        watched = projection._forward_hooks or projection._forward_pre_hooks
        return self.idle and not watched and (not isinstance(projection, QuantModule) or projection.idle)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """``q``, ``k``, ``v`` in the shapes of the inputs, each distinct one of which is quantized once."""
        x_q = self.input_quantizer(query)
        x_k = x_q if key is query else self.input_quantizer(key)
        x_v = x_k if value is key else x_q if value is query else self.input_quantizer(value)
        quantize = self.quantizers()
        if self.in_proj_weight is None:
            weights = [quantize[role](weight) for role, weight in self.weights().items()]
        else:
            weight = quantize["in_proj_weight"](self.in_proj_weight)
            if x_q is x_k is x_v:
                return F.linear(x_q, weight, self.in_proj_bias).chunk(3, -1)
            weights = list(weight.chunk(3))
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((x_q, x_k, x_v), weights, biases, strict=True))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """``(batch, heads, length, head_dim)``."""
        x = (x if self.batch_first else x.transpose(0, 1)) if batched else x.unsqueeze(0)
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values that ``add_bias_kv`` and ``add_zero_attn`` ask for."""
        shape = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.reshape(1, *shape[1:]).expand(shape)], 2) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(shape)], 2) for x in (k, v))
        return k, v

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """What is added to the scores ``(batch, heads, queries, keys)``: both masks, 0 for keys that were appended."""
        total: Tensor | None = None
        for mask, padding in ((attn_mask, False), (key_padding_mask, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = q.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
            # keys that `_extend` appended are never masked
            mask = F.pad(mask.to(q.dtype), (0, k.shape[2] - mask.shape[-1]))
            if padding:
                mask = mask[:, None, None]
            elif mask.dim() == 3:  # one for each head of each sample
                mask = mask.reshape(q.shape[0], self.num_heads, *mask.shape[1:])
            total = mask if total is None else total + mask
        return total


def _check(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> None:
    """Refuse what ``nn.MultiheadAttention`` refuses: the rest would broadcast. Shapes of ``q``: batch, heads, length, size."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if (k.shape[0], v.shape[0], v.shape[2]) != (batch, batch, keys):
        raise ValueError(
            f"`query` has batch {batch}, `key` batch {k.shape[0]} and length {keys}, `value` batch {v.shape[0]} and length "
            f"{v.shape[2]}: batches, and the lengths of `key` and `value`, must agree."
        )
    for name, mask, shapes in (
        ("attn_mask", attn_mask, [(queries, keys), (batch * heads, queries, keys)]),
        ("key_padding_mask", key_padding_mask, [(batch, keys)]),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"`{name}` is {mask.dtype}: give True where attention is not allowed, or numbers to add to the scores."
            )
        if tuple(mask.shape) not in shapes:
            raise ValueError(f"`{name}` has shape {tuple(mask.shape)}: it must be {' or '.join(map(str, shapes))}.")
