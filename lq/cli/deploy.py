"""Export of a run's models, and the proof that the graph computes what was trained."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lq.analysis.records import Deployed
from lq.callbacks.feeding import forward_arguments, transferred
from lq.cli.plain import instantiate
from lq.export import (
    Engine,
    OnnxModel,
    RuntimeDifference,
    Verification,
    benchmark_engine,
    build_engine,
    compare_latency,
    to_onnx,
    verify,
)
from lq.nn.evaluating import evaluating

# What the first output can be: what has an argmax, or what has a cosine.
OUTPUTS = ("classes", "embeddings")


@dataclass(frozen=True)
class Deployment:
    """The exported graphs, engines of them, and, on rank 0, how the quantized one compares with the fake-quantized model."""

    float: Deployed
    quantized: Deployed
    engines: list[Deployed]
    verification: Verification | None
    outputs: str
    layout: TreeSpec
    conditions: str

    def notes(self) -> dict[str, str]:
        """What the report says about the agreement."""
        if self.verification is None:
            return {}
        notes = self._agreement("ONNX Runtime", self.verification.onnxruntime)
        if self.verification.tensorrt is not None:
            notes |= self._agreement("TensorRT", self.verification.tensorrt)
        return {**notes, "latency": self.conditions}

    def figures(self) -> dict[str, Any]:
        """What ``metrics.json`` says about it."""
        if self.verification is None:
            return {}
        found = self.verification.onnxruntime
        if self.outputs == "embeddings":
            return {"least_cosine": found.least_cosine}
        return {"agreement": found.agreement, "worst_disagreement_steps": found.worst_disagreement_steps}

    def _agreement(self, name: str, found: RuntimeDifference) -> dict[str, str]:
        assert self.verification is not None
        output, count = found.outputs[0], found.predictions.numel()
        steps = f" ({output.max_steps:.3g} quantization steps)"
        apart = f"; {found.disagreements} disagree, at most {found.worst_disagreement_steps:.3g} steps apart"
        agreement = f"{100 * found.agreement:.2f} % of {count} predictions" + apart * (found.disagreements > 0)
        if self.outputs == "embeddings":
            agreement = f"cosine at least {found.least_cosine:.6f}, of {self.verification.samples} embeddings"
        largest = f"{output.max_abs:.3g} at the output" + steps * (not math.isnan(output.step))
        return {f"agreement with {name}": agreement, f"largest difference, {name}": largest}


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
    latency, engines = dict.fromkeys(paths, float("nan")), []
    batches = list(islice(inputs(model, data), cfg.export.batches))
    size, target = cfg.export.latency_batch, cfg.export.target or "tensorrt"
    example = tuple(a[:size] if isinstance(a, Tensor) else a for a in batches[0])
    verification = None
    if trainer.is_global_zero:
        for name, module in models.items():
            to_onnx(module, example, paths[name], target=target, **graph_options(cfg))
        plans = {} if cfg.export.engine is None else build(cfg, paths)
        verification = verify(
            model, paths[cfg.quant.name], plans.get(cfg.quant.name), batches=batches, class_axis=cfg.export.class_axis
        )
        engines = time_engines(plans, example)
        latency = compare_latency({name: OnnxModel(path) for name, path in paths.items()}, example)
    trainer.strategy.barrier()
    with evaluating(model):
        layout = tree_flatten(model(*example))[1]
    deployed = {name: Deployed(name, path, path.stat().st_size, latency[name]) for name, path in paths.items()}
    conditions = (
        f"ONNX Runtime {version('onnxruntime')} on this CPU, batch {min(size, len(batches[0][0]))}; the graph is laid out for "
        f"{target}" + " (export.target=onnxruntime suits this one)" * (target != "onnxruntime")
    )
    return Deployment(deployed["float"], deployed[cfg.quant.name], engines, verification, cfg.export.outputs, layout, conditions)


def graph_options(cfg: DictConfig) -> dict[str, Any]:
    """What ``export`` says of the graph, for :func:`lq.export.to_onnx`."""
    told: Any = OmegaConf.to_container(cfg.export, resolve=True)
    return {name: told[name] for name in ("opset", "precision", "dynamic_shapes")}


def build(cfg: DictConfig, paths: dict[str, Path]) -> dict[str, Path]:
    """A TensorRT engine of each graph."""
    options: Any = OmegaConf.to_container(cfg.export.engine, resolve=True)
    return {name: build_engine(path, path.with_suffix(".plan"), **options) for name, path in paths.items()}


def time_engines(plans: dict[str, Path], example: tuple[Any, ...]) -> list[Deployed]:
    """Latencies of a float engine and another one, in turns; nothing without engines."""
    if not plans:
        return []
    (base, float_plan), (name, plan) = plans.items()
    times = benchmark_engine(Engine(plan), example, against=Engine(float_plan))
    assert times.against is not None
    found = ((base, float_plan, times.against), (name, plan, times.engine))
    return [Deployed(f"{name}, TensorRT", path, path.stat().st_size, latency.median_ms) for name, path, latency in found]


def attach_(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> None:
    """Have a Trainer know a model and its data before it runs them: hooks of both may ask it how far it is."""
    trainer.strategy.connect(model)
    trainer._data_connector.attach_data(model, datamodule=data)


def inputs(model: LightningModule, data: LightningDataModule) -> Iterator[tuple[Any, ...]]:
    """What ``forward`` gets of each validation batch, by position; the model is one that a Trainer ran, or was attached to."""
    model.trainer.validating = True
    # `iter` starts the loaders once more, which draws a random number: the documented float models were trained after it
    for batch, _, dataloader_idx in iter(CombinedLoader(data.val_dataloader(), "sequential")):
        yield by_position(model, transferred(model, batch, dataloader_idx))


def by_position(model: LightningModule, batch: Any) -> tuple[Any, ...]:
    """What ``forward`` gets of a batch, by position."""
    args, kwargs = forward_arguments(model.forward, batch)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    if bound.kwargs:
        raise TypeError(f"`forward` takes {', '.join(bound.kwargs)} by keyword only: graphs and measurements go by position.")
    return bound.args


def validate_onnx(
    cfg: DictConfig, model: LightningModule, data: LightningDataModule, path: Path, layout: TreeSpec
) -> dict[str, float]:
    """Metrics of the module's own validation loop with ONNX Runtime in place of its ``forward``."""
    session, own = OnnxModel(path), inspect.signature(model.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in own.bind(*args, **kwargs).args if isinstance(a, Tensor)]
        # the loop's metrics live where its batches do
        outputs = [output.float() if output.is_floating_point() else output for output in session(*tensors)]
        return tree_unflatten([output.to(tensors[0].device) for output in outputs], layout)

    trainer: Trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model.forward = forward  # type: ignore[method-assign]
    try:
        found = trainer.validate(model, datamodule=data, verbose=False)
    finally:
        del model.forward
    return {name: float(value) for metrics in found for name, value in metrics.items()}
