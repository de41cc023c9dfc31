"""``lq run``: from a float model to a verified INT8 graph."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig
from rich.console import Console

from lq.analysis.records import Report, Stage, read_history
from lq.analysis.report import print_report, write_report
from lq.callbacks import Quantize
from lq.checkpoint import Original, original, read_checkpoint
from lq.cli.check import check
from lq.cli.deploy import Deployment, deploy, validate_onnx
from lq.cli.outputs import log_figures, log_last, measure_layers, prepare_folder, write_metrics
from lq.cli.plain import instantiate
from lq.cli.ptq import check_ptq, run_ptq
from lq.ptq import QuantizationConfig


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
    callbacks: dict[str, Callback] = {k: v for k, v in instantiate(cfg.callbacks).items() if v is not None}
    # everything that the config can get wrong shows here, before any training
    ptq: QuantizationConfig | None = instantiate(cfg.ptq) if cfg.ptq._target_ else None
    quantize = check(cfg, data, model, callbacks, alone=None if ptq is None else "ptq")
    if ptq is not None:
        check_ptq(cfg, ptq)

    if cfg.ckpt_path is not None:
        load_float(model, cfg.ckpt_path)
    elif cfg.float_epochs:
        console.rule("Float training")
        train_float(cfg, model, data, folder)
    if ptq is not None:
        return run_ptq(cfg, ptq, model, data, folder, console)
    float_model = copy.deepcopy(model)

    epochs = qat_epochs(cfg)
    quantize.fine_tune = epochs > 0
    console.rule("Calibration, rescaling" + ", quantization-aware training" * quantize.fine_tune)
    loggers = list(instantiate(cfg.logger).values())
    # LearningRateMonitor refuses to be without a logger
    used = [c for c in callbacks.values() if loggers or not isinstance(c, LearningRateMonitor)]
    trainer: Trainer = instantiate(cfg.trainer, max_epochs=max(1, epochs), callbacks=used, logger=loggers)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(folder / "checkpoints" / f"{cfg.quant.name}.ckpt")
    with console.status("Exporting, verifying and timing the graphs"):
        deployment = deploy(cfg, trainer, data, float_model, model, folder)
        if deployment is not None:
            metrics = validate_onnx(cfg, model, data, deployment.quantized.path, deployment.layout)
            quantize.stages["onnxruntime"] = metrics
            log_last(trainer, {f"onnxruntime/{name}": value for name, value in metrics.items()})
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
    layers = measure_layers(model, data, quantize.histograms, cfg.export.batches)
    methods = {name: quantize.methods[name] for name in quantize.histograms}
    if len(set(methods.values())) > 1:
        layers = [replace(row, method=methods.get(row.name)) for row in layers]
    notes = getattr(data, "notes", {}) | {"calibration": f"{quantize.method}, {quantize.batches} train batches"}
    if quantize.rescaled:
        alphas = [group.alpha for group in quantize.rescaled]
        alpha = f"alpha {min(alphas):.2f} to {max(alphas):.2f}" if len(set(alphas)) > 1 else f"alpha {alphas[0]}"
        notes["rescaling"] = f"{alpha}: {folded} of {len(alphas)} groups folded, others inserted"
    return Report(
        title=f"{cfg.name}: float to {cfg.quant.name}",
        stages=[Stage(name, metrics) for name, metrics in quantize.stages.items()],
        deployed=[] if deployment is None else [deployment.float, deployment.quantized, *deployment.engines],
        layers=layers,
        notes=notes | ({} if deployment is None else deployment.notes()),
        histograms=quantize.histograms,
        rescaled=quantize.rescaled,
        left=quantize.left,
        corrected=quantize.corrected,
        history=read_history(history) if history.exists() else [],
    )


def qat_epochs(cfg: DictConfig) -> int:
    """How long to fine-tune: as the schedule says, or a tenth of the float training; 0 is not at all."""
    if cfg.schedule.epochs is not None:
        return int(cfg.schedule.epochs)
    return (Original(cfg.float_epochs, []) if cfg.ckpt_path is None else original(cfg.ckpt_path)).share()


def train_float(cfg: DictConfig, model: LightningModule, data: LightningDataModule, folder: Path) -> None:
    """Train in float and keep the checkpoint."""
    trainer: Trainer = instantiate(cfg.trainer, max_epochs=cfg.float_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(folder / "checkpoints" / "float.ckpt")


def load_float(model: LightningModule, path: str) -> None:
    """Load float weights from a Lightning checkpoint or a state dict."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("state_dict", checkpoint)
    if quantized := [key for key in state if key.endswith("_quantizer._amax")]:
        raise ValueError(f"`ckpt_path` {path} is quantized already (it has {quantized[0]}): give the float checkpoint.")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()[1:4]
        raise ValueError(
            f"`ckpt_path` {path} does not fit {type(model).__name__}: give the checkpoint of this architecture, or choose "
            f"another `model`. {' '.join(line.strip() for line in lines)[:300]}"
        ) from None
