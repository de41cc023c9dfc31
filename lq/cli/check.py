"""What a config can get wrong, found before any training."""

import copy
import difflib
from importlib.resources import files

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lq.callbacks import Quantize, ReestimateBatchNorm
from lq.callbacks.best import monitored
from lq.callbacks.building import averages
from lq.cli.deploy import OUTPUTS, attach_, inputs
from lq.cli.plain import instantiate
from lq.export import require_tensorrt
from lq.export._require import require
from lq.export.check import E4M3, checked_opset, fits_int8
from lq.export.onnx import PRECISIONS
from lq.surgery import named_quantizers, quantize_

# Groups that `lq` reads by itself, each with the option that has all of their keys.
COMPLETE = {"schedule": "cosine", "calib": "default", "rescale": "smoothquant", "export": "onnx"}
# What `lq` and its rules read of a group that may have more.
QUANT = ("name", "input", "weight", "rules", "overrides")
# What a run gives its Trainers itself, and where it takes it from.
ELSEWHERE = {
    "max_epochs": "set schedule.epochs, of fine-tuning, and float_epochs",
    "callbacks": "give +callbacks.mine._target_=my_package.MyCallback, in the group `callbacks`",
    "logger": "choose logger=csv, or another of the group `logger`",
}
# Those that keep weights in float32, as scales and graphs are.
TRAINED_IN = ("32-true", "16-mixed", "bf16-mixed")


def check(
    cfg: DictConfig, data: LightningDataModule, model: LightningModule, callbacks: dict[str, Callback], alone: str | None = None
) -> Quantize:
    """Find out what cannot work; returns the callback that quantizes. What is ``alone`` runs in one process."""
    quantize = callbacks.get("quantize")
    if not isinstance(quantize, Quantize):
        raise ValueError(f"`callbacks.quantize` is {quantize}: `lq` needs a lq.callbacks.Quantize there.")
    check_keys(cfg)
    if cfg.schedule.epochs is not None and cfg.schedule.epochs < 0:
        raise ValueError(f"`schedule.epochs` is {cfg.schedule.epochs}: give at least 0, which calibrates and trains nothing.")
    if cfg.export.batches is not None and cfg.export.batches < 1:
        raise ValueError(f"`export.batches` is {cfg.export.batches}: give at least 1, or null for all validation batches.")
    if not is_overridden("validation_step", model) or not is_overridden("val_dataloader", data):
        raise ValueError(
            f"{type(model).__name__} needs a `validation_step`, and {type(data).__name__} a `val_dataloader`: `lq` measures each "
            "stage with them. The callbacks alone do without."
        )
    trainer = checked_trainer(cfg, callbacks)
    if alone is not None and trainer.world_size > 1:
        raise ValueError(f"`trainer` has {trainer.world_size} processes, and {alone} runs in one: use trainer=default.")
    check_callbacks(trainer, model, callbacks, quantize)
    if quantize.target is not None and model.example_input_array is None:
        data.prepare_data()
        data.setup("fit")
        attach_(trainer, model, data)
        model.example_input_array = next(inputs(model, data))
    check_export(cfg, quantize_(copy.deepcopy(model), quantize.rules, target=quantize.target))
    return quantize


def check_keys(cfg: DictConfig) -> None:
    """Refuse what nobody reads: Hydra looks at the keys of overrides, and not at those of files."""
    ptq = cfg.get("ptq", {})
    idle = [] if ptq.get("_target_") else [name for name in ptq if name != "_target_"]
    if idle:
        raise ValueError(f"`ptq.{idle[0]}` is set, and ptq=none reads none of it: choose ptq=mct.")
    for name in cfg.get("quant", {}):
        # others may be there, for `${...}`
        if name not in QUANT and (meant := difflib.get_close_matches(str(name), QUANT, n=1, cutoff=0.75)):
            raise ValueError(f"`quant.{name}` is {cfg.quant[name]!r}, and nothing reads it: is `quant.{meant[0]}` meant?")
    for group, option in COMPLETE.items():
        if group not in cfg:  # another verb's
            continue
        complete = OmegaConf.create((files("lq.conf") / group / f"{option}.yaml").read_text(encoding="utf-8"))
        known, given = list(map(str, complete)), dict(OmegaConf.to_container(cfg[group]))  # type: ignore[arg-type]
        for key, value in given.items():
            if str(key) not in known:
                (close,) = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                raise ValueError(
                    f"`{group}.{key}` is {value!r}, and nothing reads it: the closest is `{group}.{close}`. Values of your own "
                    "stand beside the groups."
                )


def checked_trainer(cfg: DictConfig, callbacks: dict[str, Callback]) -> Trainer:
    """A Trainer as that of the fit will be."""
    for name, remedy in ELSEWHERE.items():
        if name in cfg.trainer:
            raise ValueError(f"`trainer.{name}` is {cfg.trainer[name]}, which a run sets itself: {remedy}.")
    trainer: Trainer = instantiate(cfg.trainer, max_epochs=1, callbacks=list(callbacks.values()), logger=False)
    if trainer.precision not in TRAINED_IN:
        raise ValueError(
            f"`trainer.precision` is {trainer.precision!r}, which leaves weights in another type than float32: choose "
            f"{', '.join(TRAINED_IN[:-1])} or {TRAINED_IN[-1]}."
        )
    return trainer


def check_callbacks(trainer: Trainer, model: LightningModule, callbacks: dict[str, Callback], quantize: Quantize) -> None:
    """Refuse callbacks that do not go together."""
    for callback in callbacks.values():
        if isinstance(callback, ReestimateBatchNorm):
            # all that it does there is to look at the others
            callback.setup(trainer, model, "fit")
    if not quantize.keep_best:
        return
    if averages(trainer):
        raise ValueError("`schedule.keep_best` is true, and `callbacks.average` validates another model: use one of them.")
    try:
        monitored(trainer, quantize.monitor, quantize.mode)
    except MisconfigurationException:
        raise ValueError(
            f"`schedule.keep_best` is true, with schedule.monitor={quantize.monitor} and schedule.mode={quantize.mode}: say "
            "which metric of the validation, and whether min or max is good, as schedule.monitor=val_acc schedule.mode=max."
        ) from None


def check_export(cfg: DictConfig, quantized: nn.Module) -> None:
    """Refuse what no graph can be made of, or nothing can be said about."""
    if cfg.export.format not in (None, "onnx"):
        raise ValueError(f"`export.format` is {cfg.export.format!r}: choose onnx or null.")
    if cfg.export.outputs not in OUTPUTS:
        raise ValueError(f"`export.outputs` is {cfg.export.outputs!r}: choose {' or '.join(OUTPUTS)}.")
    if cfg.quant.name == "float":
        raise ValueError("`quant.name` is 'float', which is what the float graph is called: choose another.")
    if cfg.export.format is None:
        return
    require("onnx", "onnxscript", "onnxruntime")
    if cfg.export.precision not in ("fp32", "fp16"):
        raise ValueError(
            f"`export.precision` is {cfg.export.precision!r}: choose fp32 or fp16, which ONNX Runtime runs on the CPU; "
            "`lq.export.to_onnx` also writes bf16."
        )
    checked_opset(quantized, PRECISIONS[cfg.export.precision], cfg.export.opset)
    if cfg.export.engine is not None:
        require_tensorrt()
    for name, quantizer in named_quantizers(quantized):
        if quantizer.num_bits != E4M3 and not fits_int8(quantizer.num_bits, quantizer.unsigned):
            raise ValueError(f"`{name}` has {quantizer.num_bits} bits, and its codes exceed int8: fewer, or export=none.")
