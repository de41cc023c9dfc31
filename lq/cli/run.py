"""``lq run``: from a float model to a verified INT8 graph."""

import copy
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lq.analysis.records import Report, Stage, histograms, read_history
from lq.analysis.report import print_report, write_report
from lq.callbacks import Quantize
from lq.cli.deploy import Deployment, deploy, validate_onnx
from lq.cli.outputs import log_figures, measure_layers, write_metrics
from lq.surgery import quantize_


def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Train or load a float model, quantize and fine-tune it, export, verify, and write the report.

    Returns:
        The run's figures, as in ``metrics.json``; ``None`` on ranks other than 0.
    """
    console = Console(quiet=(_get_rank() or 0) > 0)
    folder = prepare_folder(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    data: LightningDataModule = instantiate(cfg.data)
    model: LightningModule = instantiate(cfg.model)
    # everything that the config can get wrong shows here, before any training
    callbacks: dict[str, Callback] = {k: v for k, v in instantiate(cfg.callbacks).items() if v is not None}
    quantize = callbacks["quantize"]
    assert isinstance(quantize, Quantize)
    quantize_(copy.deepcopy(model), quantize.rules)

    if cfg.ckpt_path is None:
        console.rule("Float training")
        train_float(cfg, model, data, folder)
    else:
        load_float(model, cfg.ckpt_path)
    float_model = copy.deepcopy(model)

    console.rule("Calibration, rescaling, quantization-aware training")
    loggers = list(instantiate(cfg.logger).values())
    # LearningRateMonitor refuses to be without a logger
    used = [c for c in callbacks.values() if loggers or not isinstance(c, LearningRateMonitor)]
    trainer: Trainer = instantiate(cfg.trainer, max_epochs=cfg.schedule.epochs, callbacks=used, logger=loggers)
    trainer.fit(model, datamodule=data)
    with console.status("Exporting, verifying and timing the graphs"):
        deployment = deploy(cfg, trainer, data, float_model, model, folder)
        if deployment is not None:
            quantize.stages["onnxruntime"] = validate_onnx(cfg, model, data, deployment.quantized.path)
    if not trainer.is_global_zero:
        return None

    with console.status("Measuring the layers and drawing the report"):
        report = describe(cfg, quantize, model, data, deployment, folder)
        page = write_report(report, folder)
        log_figures(trainer, folder / "figures")
    console.print()
    print_report(report, console)
    console.print(f"Report: {page}", soft_wrap=True)
    return write_metrics(report, deployment, folder)


def describe(
    cfg: DictConfig,
    quantize: Quantize,
    model: LightningModule,
    data: LightningDataModule,
    deployment: Deployment | None,
    folder: Path,
) -> Report:
    """The report of the run."""
    history = folder / "metrics" / "metrics.csv"
    folded = sum(group.action == "folded" for group in quantize.rescaled)
    notes = {"calibration": f"{quantize.method}, {quantize.batches} train batches"}
    if quantize.alpha is not None:
        notes["rescaling"] = f"alpha {quantize.alpha}: {folded} of {len(quantize.rescaled)} groups folded, others inserted"
    return Report(
        title=f"{cfg.name}: float to INT8",
        stages=[Stage(name, metrics) for name, metrics in quantize.stages.items()],
        deployed=[] if deployment is None else [deployment.float, deployment.quantized],
        layers=measure_layers(model, data),
        notes=notes | ({} if deployment is None else deployment.notes()),
        histograms=histograms(model),
        history=read_history(history) if history.exists() else [],
    )


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


def train_float(cfg: DictConfig, model: LightningModule, data: LightningDataModule, folder: Path) -> None:
    """Train in float and keep the checkpoint."""
    trainer: Trainer = instantiate(cfg.trainer, max_epochs=cfg.float_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(folder / "checkpoints" / "float.ckpt")


def load_float(model: LightningModule, path: str) -> None:
    """Load float weights from a Lightning checkpoint or a state dict."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(checkpoint.get("state_dict", checkpoint))
    except RuntimeError as error:
        raise ValueError(
            f"`ckpt_path` {path} does not fit {type(model).__name__}: give the checkpoint of this architecture, or choose "
            f"another `model`. {error}"
        ) from None
