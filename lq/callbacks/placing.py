"""Quantizers into a module whose fit is being set up."""

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lq.callbacks.feeding import example_of
from lq.descriptor import Rules
from lq.functional.amax import amax_shape
from lq.load import place_factors_
from lq.nn.quant_module import QuantModule
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.surgery import named_quantizers, quantize_


def place_(
    trainer: Trainer,
    pl_module: LightningModule,
    rules: Rules,
    target: str | None,
    step: Callable[[LightningModule, Any], None],
) -> None:
    """Place quantizers, in place; for a target the module runs once, by ``step``, and a warning says where it cannot."""
    example: Any = ((), {})
    if target is not None:
        try:
            example = example_of(trainer, pl_module, step)
        except Exception as error:  # data code may raise anything where it counts on a hook that comes later
            rank_zero_warn(
                f"Only inputs and weights of layers are quantized for `target={target!r}`: the module has to run once, "
                f"and there is no example ({type(error).__name__}: {error}). Give {type(pl_module).__name__} an "
                "`example_input_array`, or set `target=None`."
            )
            target = None
    quantize_(pl_module, rules, target=target, args=example[0], kwargs=example[1])
    # a checkpoint may have factors, shifts and biases where this module has none yet
    pl_module.register_load_state_dict_pre_hook(_take_structure_)  # type: ignore[no-untyped-call]


def _take_structure_(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    place_factors_(module, state_dict)
    places = {path for path, m in module.named_modules(remove_duplicate=False) if isinstance(m, TensorQuantizer)}
    own = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    saved = {key.rpartition(".")[0] for key in own if key.endswith("_quantizer._amax")}
    if strict and (strays := sorted(saved - places)):
        names = f"`{strays[0].removesuffix('_quantizer')}` ({len(strays)} in all)"
        errors.append(
            f"It has an amax for {names}, where nothing is quantized here: give `target` and `rules` of the fit that wrote it."
        )


def await_learned_(pl_module: LightningModule) -> None:
    """Create the parameters of ranges that are learned, in place: the optimizer is made before they are calibrated.

    Raises:
        MisconfigurationException: the shape of one is not known, or with ``learn_amax=True`` its start.
    """
    layers = [m for m in pl_module.modules() if isinstance(m, QuantModule)]
    weights = {layer.quantizers()[role]: weight for layer in layers for role, weight in layer.weights().items()}
    for name, quantizer in named_quantizers(pl_module):
        desc = quantizer.quant_desc
        if not desc.learn_amax or quantizer.amax is not None or quantizer.learned:
            continue
        if desc.learn_amax is True:
            raise MisconfigurationException(
                f"`{name}` has `learn_amax=True` and no `amax` to start from: give its descriptor an `amax`, or calibrate "
                "and call `init_learn_amax()` before the fit."
            )
        weight = weights.get(quantizer)
        if weight is None and (desc.axis is not None or desc.block_size is not None):
            raise MisconfigurationException(
                f"`{name}` has `learn_amax={desc.learn_amax!r}` and an amax for parts of an input, whose shape is not known "
                "before the fit: leave out `axis` and `block_size`, or `learn_amax`."
            )
        quantizer.await_amax(() if weight is None else amax_shape(quantizer.blocks(weight), quantizer.calibrator.axis))
