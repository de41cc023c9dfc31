"""Quantized ``nn.Embedding``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq.descriptor import QuantDescriptor
from lq.nn.quant_module import QuantModule, register
from lq.nn.tensor_quantizer import TensorQuantizer


@register(nn.Embedding, by_default=False)
class QuantEmbedding(QuantModule, nn.Embedding):
    """Looks up rows of ``Q(W)``; arguments as ``nn.Embedding``, and ``quant_desc_weight``. The indices have no quantizer.

    By default each row of the table ``(num_embeddings, embedding_dim)`` has an amax of its own. A rule quantizes it only if it
    names the class or the module.

    Raises:
        ValueError: ``sparse=True``: a gradient through the quantizer is dense.

    >>> layer = QuantEmbedding.from_pretrained(torch.tensor([[0.1, -1.27], [2.54, 0.03]]))
    >>> layer(torch.tensor([1, 0]))
    tensor([[ 2.5400,  0.0400],
            [ 0.1000, -1.2700]])
    """

    quant_desc_keywords = ("quant_desc_weight",)
    weight_quantizer: TensorQuantizer

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        if self.sparse:
            raise ValueError("`sparse` is True: a gradient through the quantizer is dense, so use `sparse=False`.")
        self.make_quantizers(quant_desc_weight, "weight")

    def forward(self, input: Tensor) -> Tensor:
        """Rows ``(*, embedding_dim)`` of indices ``(*)``."""
        if self.max_norm is not None:  # changes the table itself, which is not what the quantizer returns
            with torch.no_grad():
                torch.embedding_renorm_(self.weight, input.contiguous(), self.max_norm, self.norm_type)
        weight = self.weight_quantizer(self.weight)
        return F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
