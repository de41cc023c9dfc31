"""Exports the fake-quantized module after a fit."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lq.callbacks.feeding import forward_arguments
from lq.export import to_onnx


class OnnxExport(Callback):
    """Writes an ONNX Q/DQ graph when the fit ends, on rank 0; the module stays as it is.

    Example inputs are the module's ``example_input_array``, or what ``forward`` takes of the last train batch.

    Args:
        path: the file; its folder must exist and be writable before the fit starts.
        options: of :func:`lq.export.to_onnx`, such as ``dynamic_shapes`` and ``opset``.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.path, self.options = Path(path), options
        self._batch: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not self.path.parent.is_dir():
            raise MisconfigurationException(f"The folder of `path`, {self.path.parent}, does not exist: create it first.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        example = pl_module.example_input_array
        if example is None:
            args, kwargs = forward_arguments(pl_module.forward, self._batch)
        elif isinstance(example, dict):
            args, kwargs = (), example
        else:
            args, kwargs = (example,) if isinstance(example, Tensor) else tuple(example), {}
        rank_zero_info(f"Exported {to_onnx(pl_module, args, self.path, kwargs=kwargs, **self.options)}")
        self._batch = None
