"""Export of a run's models, and the proof that the graph computes what was trained."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from omegaconf import DictConfig
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lq.analysis.records import Deployed
from lq.callbacks.feeding import forward_arguments
from lq.export import OnnxModel, Verification, compare_latency, to_onnx, verify
from lq.nn.evaluating import evaluating


@dataclass(frozen=True)
class Deployment:
    """The exported graphs, and, on rank 0, how the quantized one compares with the fake-quantized model."""

    float: Deployed
    quantized: Deployed
    verification: Verification | None
    layout: TreeSpec
    conditions: str

    def notes(self) -> dict[str, str]:
        """What the report says about the agreement."""
        if self.verification is None:
            return {}
        v = self.verification
        return {
            "agreement with ONNX Runtime": f"{100 * v.agreement:.2f} % of {v.samples} predictions",
            "largest difference at the output": f"{v.max_abs_diff:.3g} ({v.max_diff_steps:.3g} quantization steps)",
            "disagreements": f"{v.disagreements}"
            + f", at most {v.worst_disagreement_steps:.3g} steps apart" * (v.disagreements > 0),
            "latency": self.conditions,
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
    models = {"float": float_model.cpu(), cfg.quant.name: model.cpu()}
    paths = {name: folder / f"{name}.onnx" for name in models}
    latency = dict.fromkeys(paths, float("nan"))
    batches = list(inputs(model, data))
    size = cfg.export.latency_batch
    example = tuple(a[:size] if isinstance(a, Tensor) else a for a in batches[0])
    verification = None
    if trainer.is_global_zero:
        for name, module in models.items():
            to_onnx(module, example, paths[name], opset=cfg.export.opset, runtime=cfg.export.runtime)
        verification = verify(model, paths[cfg.quant.name], batches)
        latency = compare_latency({name: OnnxModel(path) for name, path in paths.items()}, example)
    trainer.strategy.barrier()
    with evaluating(model):
        layout = tree_flatten(model(*example))[1]
    deployed = {name: Deployed(name, path, path.stat().st_size, latency[name]) for name, path in paths.items()}
    conditions = (
        f"ONNX Runtime {version('onnxruntime')} on this CPU, batch {min(size, len(batches[0][0]))}; the graph is laid out for "
        f"{cfg.export.runtime}" + " (export.runtime=onnxruntime suits this one)" * (cfg.export.runtime == "tensorrt")
    )
    return Deployment(deployed["float"], deployed[cfg.quant.name], verification, layout, conditions)


def inputs(model: LightningModule, data: LightningDataModule) -> Iterator[tuple[Any, ...]]:
    """What ``forward`` gets of each validation batch, by position."""
    signature = inspect.signature(model.forward)
    for batch, _, _ in iter(CombinedLoader(data.val_dataloader(), "sequential")):
        args, kwargs = forward_arguments(model.forward, batch)
        bound = signature.bind(*args, **kwargs)
        if bound.kwargs:
            raise TypeError(f"`forward` takes {', '.join(bound.kwargs)} by keyword only: an exported graph has positions.")
        yield bound.args


def validate_onnx(
    cfg: DictConfig, model: LightningModule, data: LightningDataModule, path: Path, layout: TreeSpec
) -> dict[str, float]:
    """Metrics of the module's own validation loop with ONNX Runtime in place of its ``forward``."""
    session, own = OnnxModel(path), inspect.signature(model.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in own.bind(*args, **kwargs).args if isinstance(a, Tensor)]
        # the loop's metrics live where its batches do
        return tree_unflatten([output.to(tensors[0].device) for output in session(*tensors)], layout)

    trainer: Trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model.forward = forward  # type: ignore[method-assign]
    try:
        found = trainer.validate(model, datamodule=data, verbose=False)
    finally:
        del model.forward
    return {name: float(value) for metrics in found for name, value in metrics.items()}
