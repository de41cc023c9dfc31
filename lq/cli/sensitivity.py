"""``lq sensitivity``: which quantizers, or layers, cost the most, and which widths the layers should have."""

from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lq.analysis import sensitivity
from lq.analysis.allocation import Allocator
from lq.analysis.front import front_of
from lq.callbacks import Quantize
from lq.callbacks.feeding import train_batches, untouched_data
from lq.cli.check import check
from lq.cli.deploy import by_position
from lq.cli.outputs import prepare_folder, write_json
from lq.cli.overrides import key_of
from lq.cli.plain import instantiate
from lq.cli.run import load_float, train_float
from lq.cli.sensitivity_options import Budget, about_rules, methods_of, spared, widths_of
from lq.cli.sensitivity_page import Findings, command_for, short
from lq.cli.validation import Validation
from lq.descriptor import QuantDescriptor, QuantRule
from lq.placement import check_target

# Overrides that are about this verb, and not about the model.
OWN = {
    *("run", "by", "batches", "metric", "val_batches", "worst", "below_db", "num_bits"),
    *("budget", "cost", "bits", "budgets"),
}


def find_sensitive(cfg: DictConfig) -> dict[str, float]:
    """Rank the quantizers of a calibrated model, or its layers, and write rules that spare the worst, or fit a budget.

    Returns:
        The figures in ``metrics.json``: the validation's metric of the float model, of the quantized one, and of the allocation.
    """
    cfg, told = configured(cfg, list(HydraConfig.get().overrides.task))
    console, folder = Console(), prepare_folder(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    data: LightningDataModule = instantiate(cfg.data)
    model: LightningModule = instantiate(cfg.model)
    budget = checked(cfg, data, model)
    if cfg.ckpt_path is not None:
        load_float(model, cfg.ckpt_path)
    elif cfg.float_epochs:
        console.rule("Float training")
        train_float(cfg, model, data, folder)
        told.append(f"ckpt_path={short(folder / 'checkpoints' / 'float.ckpt')}")

    console.rule("Calibration")
    trainer, batches = calibrate_(cfg, model, data)
    model.to(trainer.strategy.root_device)
    validation = Validation(cfg, data, console)
    allocator = None
    if budget is not None:
        with validation.showing("Calibrating every width"):
            bits: Any = OmegaConf.to_container(cfg.bits)
            allocator = Allocator(model, batches, bits, cfg.cost, methods_of(cfg), validation)
        mean_bits = budget.mean_bits(allocator)
    with validation.showing(f"Measuring each {cfg.by} alone, and all but it"):
        found = sensitivity(model, batches, by=cfg.by, metric=validation)
    chosen, front = None, None
    if allocator is not None:
        with validation.showing("Measuring each layer at each width, and allocations"):
            chosen = allocator.allocate(mean_bits)
            front = front_of(allocator, cfg.budgets, chosen)

    findings = Findings(cfg.name, cfg.quant.name, validation.describe(), found, front)
    # what was found is kept, even if no rule reaches a row that is to be spared
    findings.write(folder)
    console.print()
    findings.print(console)
    rules = spared(found, cfg) if chosen is None else chosen.rules
    findings.write_rules(rules, about_rules(found, cfg, chosen), command_for(folder, told, cfg), folder, console)
    metrics = findings.metrics()
    write_json(metrics, folder / "metrics.json")
    return metrics


def configured(cfg: DictConfig, told: list[str]) -> tuple[DictConfig, list[str]]:
    """The config and the overrides that it is made of; with ``run``, those of that run come first, and its float weights."""
    if cfg.run is None:
        return cfg, [override for override in told if key_of(override) not in OWN]
    folder = Path(cfg.run)
    if not (folder / ".hydra" / "overrides.yaml").is_file():
        raise FileNotFoundError(
            f"`run` is {str(folder)!r}, which has no .hydra/overrides.yaml: give the output folder of an `lq` run."
        )
    given = {key_of(override) for override in told}
    ran: Any = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
    # a choice in a group can be made once only
    merged = [override for override in ran if key_of(override) not in given] + told
    try:
        composed = compose("sensitivity", merged)
    except HydraException as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"`run` {folder} does not compose here ({first}): give its --config-dir, from the same folder."
        ) from error
    # a model that came with its weights was not trained first
    if composed.ckpt_path is None and composed.float_epochs:
        composed.ckpt_path = str(folder / "checkpoints" / "float.ckpt")
        merged.append(f"ckpt_path={composed.ckpt_path}")
    return composed, [override for override in merged if key_of(override) not in OWN]


def checked(cfg: DictConfig, data: LightningDataModule, model: LightningModule) -> Budget | None:
    """Find out what cannot work, before any training; returns the budget."""
    if cfg.ptq._target_:
        raise ValueError("`ptq` is set, and sensitivity is of the model that `quant` describes: use ptq=none.")
    if cfg.by not in ("quantizer", "layer"):
        raise ValueError(f"`by` is {cfg.by!r}: choose quantizer or layer.")
    for name, least in {"batches": 1, "worst": 0, "budgets": 2}.items():
        if not isinstance(cfg[name], int) or cfg[name] < least:
            raise ValueError(f"`{name}` is {cfg[name]}: give a whole number from {least} on.")
    check(cfg, data, model, {"quantize": quantize_of(cfg)}, alone="sensitivity")
    check_target(cfg.export.target, [QuantRule("*", QuantDescriptor(num_bits=b)) for b in widths_of(cfg)])
    return None if cfg.budget is None else Budget.read(cfg.budget)


def quantize_of(cfg: DictConfig) -> Quantize:
    """The run's own way to quantize and calibrate, without what it writes, and without its looks at each stage."""
    quantize: Quantize = instantiate(cfg.callbacks.quantize, stages=False, keep_best=False, dirpath=None)
    return quantize


class Calibrated(Callback):
    """Ends a fit where its training would begin, and keeps what ``forward`` gets of so many train batches."""

    def __init__(self, batches: int) -> None:
        self._count = batches
        self.batches: list[tuple[Any, ...]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with untouched_data(trainer.train_dataloader) as loaders:
            self.batches = [by_position(pl_module, b) for b in train_batches(trainer, pl_module, loaders, self._count)]
        trainer.should_stop = True


def calibrate_(cfg: DictConfig, model: LightningModule, data: LightningDataModule) -> tuple[Trainer, list[tuple[Any, ...]]]:
    """Quantize, rescale, correct and calibrate a model in place, as the fit of a run does before its first step.

    Returns:
        The Trainer, and the inputs of ``batches`` train batches.
    """
    options = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": 1}
    calibrated = Calibrated(cfg.batches)
    trainer: Trainer = instantiate(cfg.trainer, **options, callbacks=[quantize_of(cfg), calibrated])
    trainer.fit(model, datamodule=data)
    return trainer, calibrated.batches
