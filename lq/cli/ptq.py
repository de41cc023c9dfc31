"""``lq ptq=mct``: post-training quantization of a float model, without fine-tuning."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig
from rich.console import Console

from lq.analysis.records import Report, Stage
from lq.analysis.report import print_report, write_report
from lq.callbacks.feeding import train_batches
from lq.cli.deploy import Deployment, attach_, by_position, deploy, validate_onnx
from lq.cli.outputs import log_figures, log_last, measure_layers, write_metrics
from lq.cli.overrides import key_of
from lq.cli.plain import instantiate
from lq.load import origin_of
from lq.placement import check_target
from lq.ptq import PtqReport, QuantizationConfig, QuantizationMethod, post_training_quantization
from lq.surgery import named_quantizers

# In their place are the options of `ptq`, but for two. An experiment may choose them for other runs.
IDLE = ("quant", "calib", "rescale")
USED = ("quant.name", "calib.batches")


def check_ptq(cfg: DictConfig, config: QuantizationConfig) -> None:
    """Find out what cannot work, before any training."""
    for override in HydraConfig.get().overrides.task:
        key = key_of(override)
        if key.split(".")[0] in IDLE and key not in USED:
            raise ValueError(f"`{override}` has no effect beside ptq=mct: leave it out, and set the fields of `ptq`.")
    if cfg.export.format is None:
        check_target(cfg.export.target, config.rules())
        return
    if max(config.activation_n_bits, config.weights_n_bits) > 8:
        raise ValueError(
            f"`ptq.activation_n_bits` is {config.activation_n_bits} and `ptq.weights_n_bits` {config.weights_n_bits}: graphs "
            "have at most 8 bits. Choose fewer, or export=none."
        )
    if QuantizationMethod.UNIFORM in (config.activation_quantization_method, config.weights_quantization_method):
        raise ValueError("UNIFORM has a zero point, which graphs have not: choose another method, or export=none.")
    check_target(cfg.export.target, config.rules())


def run_ptq(
    cfg: DictConfig, config: QuantizationConfig, model: LightningModule, data: LightningDataModule, folder: Path, console: Console
) -> dict[str, Any]:
    """Quantize, validate, export and write the report.

    Returns:
        The run's figures, as in ``metrics.json``.
    """
    console.rule("Post-training quantization")
    loggers = list(instantiate(cfg.logger).values())
    trainer: Trainer = instantiate(cfg.trainer, max_epochs=1, logger=loggers, enable_checkpointing=False)
    data.prepare_data()
    data.setup("fit")
    attach_(trainer, model, data)
    trainer.training = True
    batches = [by_position(model, batch) for batch in train_batches(trainer, model, data.train_dataloader(), cfg.calib.batches)]
    quantized, found = post_training_quantization(model, batches, config, target=cfg.export.target)
    stages = {"float": validate(trainer, model, data), "ptq": validate(trainer, quantized, data)}
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True) | origin_of(quantized)
    trainer.strategy.save_checkpoint(checkpoint, folder / "checkpoints" / f"{cfg.quant.name}.ckpt")
    with console.status("Exporting, verifying and timing the graphs"):
        deployment = deploy(cfg, trainer, data, model, quantized, folder)
        if deployment is not None:
            stages["onnxruntime"] = validate_onnx(cfg, quantized, data, deployment.quantized.path, deployment.layout)
    log_last(trainer, {f"{stage}/{name}": value for stage, metrics in stages.items() for name, value in metrics.items()})

    with console.status("Measuring the layers and drawing the report"):
        report = describe(cfg, found, stages, quantized, data, deployment, len(batches))
        page = write_report(report, folder)
        log_figures(trainer, folder / "figures")
    console.print()
    print_report(report, console)
    console.print(f"Report: {page}", soft_wrap=True)
    return write_metrics(report, deployment, folder)


def validate(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """Metrics of the module's own validation."""
    found = trainer.validate(model, datamodule=data, verbose=False)
    return {name: float(value) for metrics in found for name, value in metrics.items()}


def describe(
    cfg: DictConfig,
    found: PtqReport,
    stages: dict[str, dict[str, float]],
    model: LightningModule,
    data: LightningDataModule,
    deployment: Deployment | None,
    batches: int,
) -> Report:
    """The report of the run."""
    given = {name: getattr(value, "name", value) for name, value in asdict(found.config).items()}
    default = {name: getattr(value, "name", value) for name, value in asdict(QuantizationConfig()).items()}
    changed = ", ".join(f"{name} {value}" for name, value in given.items() if value != default[name]) or "as it is by default"
    notes = getattr(data, "notes", {}) | {"config": changed, "calibration": f"{batches} train batches"}
    quantizers = len(dict(named_quantizers(model)))
    if found.left:
        notes["left in float"] = f"{len(found.left)} of {quantizers} quantizers: {', '.join(found.left)}"
    return Report(
        title=f"{cfg.name}: post-training quantization",
        stages=[Stage(name, metrics) for name, metrics in stages.items()],
        deployed=[] if deployment is None else [deployment.float, deployment.quantized, *deployment.engines],
        layers=measure_layers(model, data, {}, cfg.export.batches),
        notes=notes | ({} if deployment is None else deployment.notes()),
        output_sqnr=found.sqnr,
        corrected=found.corrections,
    )
