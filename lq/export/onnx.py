"""A model with quantizers as an ONNX file with QuantizeLinear and DequantizeLinear."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lq.export._require import require
from lq.export._staged import staged
from lq.export.fold import fold_batchnorm_
from lq.export.qdq import fits_int8, lower_fake_quant_, translation_table
from lq.nn import QuantMixin, TensorQuantizer
from lq.surgery import named_quantizers

if TYPE_CHECKING:
    import onnx_ir as ir

# A protobuf message ends at 2 GiB; the rest is for the graph itself
MAX_IN_ONE_FILE = 2**31 - 2**27


def to_onnx(
    model: nn.Module,
    args: Any,
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "batch",
    opset: int | None = None,
) -> Path:
    p = Path(path)
    check_exportable(model)
    require("onnx","onnxscript","onnx_ir")
    args = args if isinstance(args, tuple) else (args,)
    with staged(p) as file:
        copied = copy.deepcopy(model).eval()
        fold_batchnorm_(copied, args, kwargs)
        prog = torch.onnx.export(copied, args, kwargs=dict(kwargs or {}), dynamo=True, custom_translation_table=translation_table(), verbose=False, dynamic_shapes=tree_map(lambda t:{0:torch.export.Dim("batch")}, args), opset_version=opset)
        lower_fake_quant_(prog.model)
        import onnx_ir as ir
        ir.save(prog.model, file)
    return p

def check_exportable(model): pass
