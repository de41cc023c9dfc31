"""The float model as the teacher of the quantized one."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lq.callbacks.adding import add_to_loss_
from lq.callbacks.building import build, is_compiled
from lq.callbacks.feeding import feed, has_forward
from lq.callbacks.teacher import (
    Outputs,
    call,
    fingerprint,
    logits_of,
    matching,
    mirrored,
    outputs_of,
    remove,
    set_parameter,
    share_frozen_,
    warn_if_rescaled,
    watch,
)
from lq.functional.distill import relative_error, soft_targets_loss
from lq.functional.fake_quant import widened
from lq.nn.evaluating import evaluating
from lq.surgery import dequantize_, has_quantized_layers, named_quantizers, unquantized

# Precisions of a teacher.
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Distill(Callback):
    """Adds to the loss how far the quantized module is from the float one that it was made of.

    The teacher is a copy of the module as it is when its first fit is set up: put Distill before Quantize. It runs without
    gradients, in evaluation mode, on the arguments of each call ``self(...)`` in ``training_step``; calls are averaged. Frozen
    parameters are shared, not copied: nothing may change them while they are frozen. A checkpoint has a fingerprint of the
    teacher, not its weights: to resume, give the module its float weights. With manual optimization the first backward gets the
    sum, in the very tensor that ``manual_backward`` was given. Logs ``distill/loss``, without ``weight``.

    Args:
        weight: factor on the distillation loss.
        temperature: of :func:`soft_targets_loss`, on what ``forward`` returns: logits ``(..., classes)``, or what has ``logits``.
        layers: names or wildcards of modules to compare by :func:`relative_error` instead, averaged. SmoothQuant scales what is
            between a layer and the next: compare whole blocks, or use ``alpha=None``. If the module has no ``forward`` of its
            own, the teacher runs ``training_step``, on the same random numbers.
        mirror: have the teacher look at images mirrored too, and give the mean of both logits, as one does with crops and
            reflections in testing (Krizhevsky et al., 2012, "ImageNet Classification with Deep Convolutional Neural Networks",
            section 4.1): a better teacher, for a second forward. Not with ``layers``; for images that mean the same mirrored.
        precision: the Trainer's word for what the teacher computes in, ``"bf16-mixed"`` or ``"16-mixed"``; by default as the
            Trainer has it. A student that trains in float32 loses nothing by a teacher in bfloat16, which takes less time where
            the device has the arithmetic. Float64 stays what it is.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: no ``forward``, and no ``layers``; a pattern that matches nothing; an output without logits;
            a step that does not call the module; a module that is calibrated or compiled already; a checkpoint with another
            teacher.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 4.0,
        layers: Sequence[str] | None = None,
        precision: str | None = None,
        mirror: bool = False,
    ) -> None:
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}: it must be a positive, finite number.")
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(f"`layers` is {layers!r}: give a list of names or wildcards, or None for the module's output.")
        if precision is not None and precision not in AUTOCAST:
            raise ValueError(f"`precision` is {precision!r}: choose one of {', '.join(AUTOCAST)}, or None for the Trainer's.")
        if mirror and layers is not None:
            raise ValueError("`mirror` is True, and `layers` is given: only logits have a mean over both views.")
        self.weight, self.temperature, self.layers, self.precision, self.mirror = weight, temperature, layers, precision, mirror
        self.teacher: Any = None
        self._student: LightningModule | None = None
        self._fingerprint, self._names, self._fitting, self._fresh = "", list[str](), False, False
        # frozen parameters that the teacher has in common with the student; None before the first batch
        self._shared: dict[str, nn.Parameter] | None = None
        self._hooks: list[RemovableHandle] = []
        # running calls of the module: what the teacher gave, what the student does, and its hooks; None for what does not count
        self._calls: list[tuple[Outputs, Outputs, list[RemovableHandle]] | None] = []
        self._losses: list[Tensor] = []
        self._value: Tensor | None = None
        self._logged: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        build(trainer, pl_module)
        kind, automatic = type(pl_module).__name__, pl_module.automatic_optimization
        if is_compiled(pl_module):
            raise MisconfigurationException(
                f"{kind} is compiled: give the Trainer the module itself, and a `lq.callbacks.Compile` before Distill."
            )
        if not has_forward(pl_module) and (self.layers is None or not automatic):
            raise MisconfigurationException(
                f"{kind} has no `forward` to compare: write one that `training_step` calls"
                + (", or give `layers`." if automatic else ": `layers` alone need automatic optimization.")
            )
        self._names = matching(self.layers or (), pl_module)
        if self._student is not pl_module:
            self.teacher, self._student = _float_copy(pl_module).eval().requires_grad_(False), pl_module
            self._fingerprint, self._fresh = fingerprint(self.teacher), True
        self._shared = self._logged = None
        if trainer.strategy.broadcast(self._fingerprint) != self._fingerprint:
            raise MisconfigurationException(f"{kind} has other weights on rank {trainer.global_rank}: load them on every rank.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.precision_plugin.convert_module(self.teacher).to(pl_module.device)
        self.teacher.trainer = trainer

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._shared is None:
            # not earlier: a checkpoint, or SmoothQuant, may have changed the student's
            self._shared = share_frozen_(self.teacher, pl_module)
        self._close()
        self._value, self._fresh = None, self._fresh and trainer.global_step == 0
        if not has_forward(pl_module):
            with trainer.precision_plugin.forward_context():
                self._ask(pl_module, feed, batch)
            return
        forward = pl_module.forward

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # a strategy that wraps the module calls it to run `training_step`, which then stands in the place of `forward`
            if self._is_done(pl_module) or not torch.is_grad_enabled() or pl_module.forward != forward:
                self._calls.append(None)
            else:
                self._ask(pl_module, call, (args, kwargs))

        self._hooks.append(pl_module.register_forward_pre_hook(enter, with_kwargs=True))
        self._hooks.append(pl_module.register_forward_hook(lambda _, args, output: self._compare(output)))

    def _is_done(self, pl_module: LightningModule) -> bool:
        return self._value is not None and not pl_module.automatic_optimization

    def _ask(self, pl_module: LightningModule, run: Callable[[Any, Any], Any], inputs: Any) -> None:
        """Let the teacher go first, on the random numbers that the student will have."""
        kind = pl_module.device.type
        with nullcontext() if self.precision is None else torch.autocast(kind, AUTOCAST[self.precision]):
            targets = outputs_of(self.teacher, self._names, run, inputs)
            if self.mirror:
                (other,) = outputs_of(self.teacher, [], run, mirrored(inputs))[""]
                targets[""] = [(widened(targets[""][0]) + widened(other)) / 2]
            if self._fresh and self._names:
                with unquantized(pl_module), evaluating(pl_module):
                    warn_if_rescaled(outputs_of(pl_module, self._names, run, inputs), targets)
        self._fresh = False
        self._calls.append((targets, *watch(pl_module, self._names)))

    def _compare(self, output: Any = None) -> None:
        running = self._calls.pop()
        if running is None:
            return
        targets, found, hooks = running
        remove(hooks)
        if self.layers is None:
            self._losses.append(soft_targets_loss(logits_of(output), targets[""][0], self.temperature))
        for name in self._names:
            if len(found[name]) != len(targets[name]):
                raise MisconfigurationException(
                    f"`{name}` ran {len(found[name])} times, and {len(targets[name])} times in the teacher, in evaluation mode: "
                    "compare other `layers`."
                )
            self._losses += [relative_error(*pair) for pair in zip(found[name], targets[name], strict=True)]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._is_done(pl_module):
            return
        if self._calls and not has_forward(pl_module):
            self._compare()
        if not self._losses:
            raise MisconfigurationException(
                f"`training_step` of {type(pl_module).__name__} ran nothing to compare before its backward: let it call "
                "`self(...)` with gradients (`self.forward(...)` is not seen), or leave Distill out."
            )
        value = torch.stack(self._losses).mean()
        self._losses, self._value = [], value.detach()
        add_to_loss_(trainer, loss, self.weight * value)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._part([name for name, parameter in (self._shared or {}).items() if parameter.requires_grad])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._close()
        every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
        if self._value is not None and every and step % every == 0 and step != self._logged and trainer.is_global_zero:
            self._logged = step
            for logger in trainer.loggers:
                logger.log_metrics({"distill/loss": self._value.item()}, step=step)

    def _close(self) -> None:
        self._losses = []
        remove(self._hooks)
        while self._calls:
            remove((self._calls.pop() or ({}, {}, []))[2])

    def _part(self, names: list[str]) -> None:
        """Give the teacher parameters of its own."""
        for name in names:
            own = (self._shared or {}).pop(name).detach().clone()
            set_parameter(self.teacher, name, nn.Parameter(own, requires_grad=False))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        if self.teacher is not None:
            self._part(list(self._shared or {}))
            self.teacher.cpu().trainer = None

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # outside of a fit there is no teacher
        if self._fitting and state_dict["fingerprint"] not in ("", self._fingerprint):
            raise MisconfigurationException(
                "The checkpoint was trained with another teacher: give the module its float weights before `fit(ckpt_path=...)`."
            )


def _float_copy(pl_module: LightningModule) -> LightningModule:
    """A copy without quantizers, out of which Lightning leaves the trainer."""
    quantized = has_quantized_layers(pl_module)
    # those that a validation or a test before the fit placed are not calibrated yet
    if quantized and all(quantizer.amax is not None for _, quantizer in named_quantizers(pl_module)):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} is quantized already, and no float model is left: put Distill before Quantize, in the "
            "first fit."
        )
    twin = copy.deepcopy(pl_module)
    if quantized:
        dequantize_(twin)
    for _, quantizer in named_quantizers(twin):
        quantizer.disable_quant()
    return twin
