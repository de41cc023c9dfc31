"""Exports the fake-quantized module after a fit."""

import os
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lq.callbacks.building import all_callbacks, warn_if_unquantized
from lq.callbacks.feeding import feed, first_inputs, has_forward, remedied
from lq.callbacks.quantize import Quantize
from lq.export import to_onnx
from lq.export._require import require
from lq.nn.evaluating import evaluating
from lq.nn.example import Example, example_inputs


class OnnxExport(Callback):
    """Writes an ONNX Q/DQ graph when the fit ends, on rank 0; the module stays as it is.

    Example inputs are the module's ``example_input_array``, or what its ``forward`` gets when ``Quantize.calibration_step`` runs
    the first train batch; they are the inputs of the graph.

    Args:
        path: the file; its folder must exist and be writable before the fit starts.
        options: of :func:`lq.export.to_onnx`, such as ``dynamic_shapes`` and ``opset``; ``target`` is that of ``Quantize``.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.path, self.options = Path(path), options
        self._example: Example | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._example = None
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
        if self._example is not None or pl_module.example_input_array is not None:
            return
        quantize = _quantize_of(trainer)
        # now, so that what cannot be exported shows before the training and not behind it; and on every rank, as one that fails
        # alone leaves the others waiting
        step = feed if quantize is None else quantize.calibration_step
        name = type(pl_module).__name__
        what = f"For the export, without an `example_input_array`, the first train batch does not run through {name}"
        with remedied(what, RuntimeError), isolate_rng(), evaluating(pl_module):
            self._example = first_inputs(pl_module, step, batch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        example, self._example = self._example, None
        if not trainer.is_global_zero:
            return
        if pl_module.example_input_array is not None:
            example = example_inputs(pl_module)
        if example is None:
            rank_zero_warn(f"Nothing was exported to {self.path}: there was no train batch, and no `example_input_array`.")
            return
        warn_if_unquantized(self, pl_module)
        quantize = _quantize_of(trainer)
        placed = {} if quantize is None or quantize.target is None else {"target": quantize.target}
        path = to_onnx(pl_module, example[0], self.path, kwargs=example[1], **placed | self.options)
        rank_zero_info(f"Exported {path}, with the inputs {', '.join(_inputs_of(path))}")


def _quantize_of(trainer: Trainer) -> Quantize | None:
    return next((callback for callback in all_callbacks(trainer) if isinstance(callback, Quantize)), None)


def _inputs_of(path: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]
