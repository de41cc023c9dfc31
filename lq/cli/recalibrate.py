"""``lq recalibrate``: another method for a calibrated model, from the statistics alone."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from lq.analysis.calibration import calibrator_row
from lq.analysis.tables import Table, layer_table
from lq.calib import Calibrator, read_statistics
from lq.calibration import amaxs_by_name, ranges_by_name, suits
from lq.checkpoint import read_checkpoint
from lq.cli.check import check_keys
from lq.cli.outputs import prepare_folder
from lq.methods import check_options, choices_by_name
from lq.staged import staged


def recalibrate(cfg: DictConfig) -> None:
    """Give every quantizer of a checkpoint the amax that ``calib`` chooses from the statistics of its run."""
    check_keys(cfg)
    settings: Any = OmegaConf.to_container(cfg.calib, resolve=True)
    method, options = settings["method"], settings["options"]
    check_options(method, options)
    calibrators = read_statistics(cfg.stats)
    path = Path(cfg.ckpt_path or Path(cfg.stats).with_name("calibrated.ckpt"))
    checkpoint = read_checkpoint(path)
    folder = prepare_folder(cfg)

    choices = choices_by_name(calibrators, method, options)
    if not any(suits(calibrator, choices[name].method) for name, calibrator in calibrators.items()):
        raise ValueError(f"{cfg.stats} has no statistics for `calib.method` {method}: calibrate a run with it.")
    amaxs, ranges = amaxs_by_name(calibrators, choices), ranges_by_name(calibrators, choices)
    highs = {name: high for name, (_, high) in ranges.items()}
    state = checkpoint.get("state_dict", checkpoint)
    replace_(state, "_amax", amaxs | highs, path)
    replace_(state, "_low", {name: low for name, (low, _) in ranges.items()}, path)
    table = summary(calibrators, amaxs | highs)
    (folder / "calibration.md").write_text(table.markdown() + "\n", encoding="utf-8")
    target = folder / "recalibrated.ckpt"
    with staged(target) as file:
        torch.save(checkpoint, file)

    console = Console()
    console.print(table)
    console.print(f"Checkpoint: {target}", soft_wrap=True)


def replace_(state: dict[str, Tensor], what: str, values: dict[str, Tensor], path: Path) -> None:
    """Put ``values``, by the short names of quantizers, into a state dict; all of them or, on an error, none."""
    keys: dict[str, Tensor] = {}
    for name, amax in values.items():
        # a quantizer that stands alone has no suffix
        key = next((key for key in (f"{name}_quantizer.{what}", f"{name}.{what}") if key in state), None)
        if key is None:
            raise ValueError(f"{path} has no amax for `{name}`, which the statistics have: give the checkpoint of the same run.")
        if state[key].shape != amax.shape:
            shapes = f"{tuple(state[key].shape)} in {path} and {tuple(amax.shape)} in the statistics"
            raise ValueError(f"The amax of `{name}` has shape {shapes}: give the checkpoint of the same run.")
        keys |= dict.fromkeys(_names_of(state[key], state), amax)
    state.update(keys)


def _names_of(tensor: Tensor, state: dict[str, Tensor]) -> list[str]:
    """The keys of a tensor: a quantizer that several layers share has one for each of them."""
    return [key for key, other in state.items() if isinstance(other, Tensor) and other.is_set_to(tensor)]


def summary(calibrators: dict[str, Calibrator], amaxs: dict[str, Tensor]) -> Table:
    """What was chosen, and what it costs on the data of the statistics."""
    ordered = [(name, amaxs[name]) for name in calibrators]
    return layer_table([calibrator_row(name, calibrators[name], amax) for name, amax in ordered])
