"""Exports the fake-quantized module after a fit."""

import os
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lq.callbacks.feeding import forward_arguments, has_forward
from lq.export import to_onnx
from lq.export._require import require
from lq.nn.example import example_inputs


class OnnxExport(Callback):
    """Writes an ONNX Q/DQ graph when the fit ends, on rank 0; the module stays as it is.

    Example inputs are the module's ``example_input_array``, or what ``forward`` takes of the first train batch.

    Args:
        path: the file; its folder must exist and be writable before the fit starts.
        options: of :func:`lq.export.to_onnx`, such as ``dynamic_shapes`` and ``opset``.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.path, self.options = Path(path), options
        self._batch: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require("onnx", "onnxscript")
        folder = self.path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise MisconfigurationException(f"`path` is {self.path}, but its folder cannot be written: make it first.")
        if not has_forward(pl_module):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no `forward` to export: write one, or leave OnnxExport out."
            )
        if str(trainer.precision) in ("16-true", "bf16-true", "64-true"):
            raise MisconfigurationException(f"`precision` is {trainer.precision}, but the graph is float32: use mixed precision.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._batch is None and trainer.is_global_zero:
            self._batch = batch

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        example, batch = pl_module.example_input_array, self._batch
        self._batch = None
        if example is None and batch is None:
            rank_zero_warn(f"Nothing was exported to {self.path}: there was no train batch, and no `example_input_array`.")
            return
        args, kwargs = example_inputs(pl_module) if example is not None else forward_arguments(pl_module.forward, batch)
        rank_zero_info(f"Exported {to_onnx(pl_module, args, self.path, kwargs=kwargs, **self.options)}")
