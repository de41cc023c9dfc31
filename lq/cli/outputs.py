"""What a run finds and leaves behind, besides its report."""

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from torch.utils._pytree import tree_map

from lq.analysis.quantizer_stats import LayerRow, measuring, table
from lq.analysis.records import Histogram, Report
from lq.cli.deploy import Deployment, inputs
from lq.nn.evaluating import evaluating


def prepare_folder(cfg: DictConfig) -> Path:
    """The output folder, with the resolved config in it: made, and tried out, before any work."""
    folder = Path(cfg.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _get_rank():
            OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    except OSError as error:
        raise OSError(f"`output_dir` {folder} cannot be written ({error.strerror}): set hydra.run.dir to another.") from error
    return folder


def measure_layers(
    model: LightningModule, data: LightningDataModule, seen: dict[str, Histogram], batches: int | None
) -> list[LayerRow]:
    """SQNR and saturation of every quantizer over so many validation batches; the peak is what calibration saw."""
    model.cpu()
    with evaluating(model), measuring(model) as stats:
        for args in islice(inputs(model, data), batches):
            model(*args)
    return [replace(row, peak=seen[row.name].peak) if row.name in seen else row for row in table(model, stats)]


def write_metrics(report: Report, deployment: Deployment | None, folder: Path) -> dict[str, Any]:
    """``metrics.json``: the run's figures, flat, for programs and for the table of a sweep."""
    metrics: dict[str, Any] = {f"{s.name}/{name}": value for s in report.stages for name, value in s.metrics.items()}
    for graph in report.deployed:
        metrics |= {f"{graph.name}/bytes": graph.bytes, f"{graph.name}/latency_ms": graph.latency_ms}
    metrics |= {} if deployment is None else deployment.figures()
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def write_json(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Plain data as JSON, which has no NaN and no infinities: they become ``null``; returns what is in the file."""
    plain: dict[str, Any] = tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, found)
    path.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return plain


def log_last(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Metrics that came after the fit, to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()


def log_figures(trainer: Trainer, folder: Path) -> None:
    """The report's figures as W&B media, where the run has a W&B logger."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for path in sorted(folder.glob("*.png")):
                logger.log_image(f"figures/{path.stem}", [str(path)])
            logger.experiment.finish()
