"""Export of a run's models, and the proof that the graph computes what was trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig
from torch import Tensor

from lq.analysis.records import Deployed
from lq.callbacks.feeding import forward_arguments
from lq.export import OnnxModel, Verification, compare_latency, to_onnx, verify


@dataclass(frozen=True)
class Deployment:
    """The exported graphs, and, on rank 0, how the quantized one compares with the fake-quantized model."""

    float: Deployed
    quantized: Deployed
    verification: Verification | None

    def notes(self) -> dict[str, str]:
        """What the report says about the agreement."""
        if self.verification is None:
            return {}
        v = self.verification
        return {
            "agreement with ONNX Runtime": f"{100 * v.agreement:.2f} % of {v.samples} predictions",
            "largest difference at the output": f"{v.max_abs_diff:.3g} ({v.max_diff_steps:.3g} quantization steps)",
            "latency": "ONNX Runtime on this CPU, which has no INT8 kernel for a convolution with symmetric scales and ReLU: it "
            "computes those in float. The graph is laid out for TensorRT.",
            "disagreements": f"{v.disagreements}, at most {v.worst_disagreement_steps:.3g} steps apart",
        }


def deploy(
    cfg: DictConfig,
    trainer: Trainer,
    data: LightningDataModule,
    float_model: LightningModule,
    model: LightningModule,
    folder: Path,
) -> Deployment | None:
    """Write the float and the quantized graph on rank 0, verify and time them; ``None`` with ``export=none``."""
    if cfg.export.format is None:
        return None
    models = {"float": float_model, cfg.quant.name: model}
    paths = {name: folder / f"{name}.onnx" for name in models}
    latency = dict.fromkeys(paths, float("nan"))
    verification = None
    if trainer.is_global_zero:
        batches = list(inputs(model, data))
        example = tuple(t[: cfg.export.latency_batch] for t in batches[0])
        for name, module in models.items():
            to_onnx(module.cpu(), example, paths[name], opset=cfg.export.opset, runtime=cfg.export.runtime)
        verification = verify(model, paths[cfg.quant.name], batches)
        latency = compare_latency({name: OnnxModel(path) for name, path in paths.items()}, example)
    trainer.strategy.barrier()
    deployed = {name: Deployed(name, path, path.stat().st_size, latency[name]) for name, path in paths.items()}
    return Deployment(deployed["float"], deployed[cfg.quant.name], verification)


def inputs(model: LightningModule, data: LightningDataModule) -> Iterator[tuple[Tensor, ...]]:
    """What ``forward`` gets of each validation batch."""
    for batch in data.val_dataloader():
        args, kwargs = forward_arguments(model.forward, batch)
        if kwargs:
            raise TypeError(f"Export needs positional inputs, but the batch fills {', '.join(kwargs)} of `forward` by name.")
        yield args


def validate_onnx(cfg: DictConfig, model: LightningModule, data: LightningDataModule, path: Path) -> dict[str, float]:
    """Metrics of the module's own validation loop with ONNX Runtime in place of its ``forward``."""
    session = OnnxModel(path)

    def forward(*args: Tensor) -> Any:
        outputs = session(*args)
        return outputs[0] if len(outputs) == 1 else outputs

    trainer: Trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model.forward = forward  # type: ignore[method-assign]
    try:
        (metrics,) = trainer.validate(model, datamodule=data, verbose=False)
    finally:
        del model.forward
    return {name: float(value) for name, value in metrics.items()}
