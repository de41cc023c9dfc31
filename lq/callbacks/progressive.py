"""A fit that goes from more bits to fewer."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lq.callbacks.building import all_callbacks
from lq.callbacks.feeding import feed, train_batches, untouched_data
from lq.callbacks.oscillation import SettleWeights
from lq.callbacks.quantize import Quantize
from lq.callbacks.steps import in_steps, step_of, total_steps
from lq.progressive import changing_widths, set_widths_, widths_of
from lq.schedule import Length, to_steps


class ProgressiveBits(Callback):
    """Begins a fit with more bits than the descriptors say, and comes down to theirs in stages.

    Progressive quantization (Zhuang et al., 2018, "Towards Effective Low-bitwidth Convolutional Neural Networks",
    arXiv:1711.00205): a network of fewer bits starts from one of more.

    A stage gives its width to every integer quantizer that has fewer bits by its descriptor; 8-bit layers stay. Where one begins,
    train batches run through the model with the widths of before, and each amax, learned or not, starts anew where its error is
    least. The calibration of the fit's ``Quantize`` is for the first stage. A function of the step; a checkpoint has
    the widths it was written with.

    Among checkpoints, those of the last stage are what the descriptors say: choose the best one there.

    Args:
        bits: width from a length on: ``{0: 4, "1 epoch": 3, "2 epochs": 2}``; lengths as steps, shares of all steps, or epochs.
            The first begins at 0, and the last is no wider than the narrowest descriptor.
        batches: train batches to look at where a stage begins, on each rank.
        method: how amax is chosen then.

    Raises:
        ValueError: stages out of order, or an argument out of range.
        MisconfigurationException: the last stage leaves quantizers wider than their descriptors, or does not begin in this fit;
            ``keep_best``, which would choose a wide one; or a SettleWeights that freezes codes before the last stage.
    """

    def __init__(self, bits: Mapping[Any, int] | None = None, *, batches: int = 8, method: str = "mse") -> None:
        if batches < 1:
            raise ValueError(f"`batches` is {batches}: a stage needs at least 1 to find its scales.")
        self.bits = {_length(start): width for start, width in (bits or {}).items()}
        widths = list(self.bits.values())
        if not all(isinstance(width, int) and 2 <= width <= 8 for width in widths) or sorted(widths, reverse=True) != widths:
            raise ValueError(f"`bits` is {dict(bits or {})}: give widths from 8 down to 2, in the order of their lengths.")
        if self.bits and str(next(iter(self.bits))).split()[0] not in ("0", "0.0"):
            raise ValueError(f"`bits` is {dict(bits or {})}: the first stage begins at 0.")
        for start in self.bits:
            to_steps(start, 1, "bits", 1)
        self.batches, self.method = batches, method
        self._stages: list[tuple[int, int]] = []
        self._own: dict[str, int] = {}
        self._width: int | None = None
        self._restored: int | None = None

    def calibration_step(self, pl_module: LightningModule, batch: Any) -> None:
        """Run the model on a batch, as :meth:`Quantize.calibration_step` does. Override it for batches that need more."""
        feed(pl_module, batch)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None  # what a test of a checkpoint left

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, None
        if not self.bits:
            return
        self._own = widths_of(pl_module)
        self._check(trainer)
        # before anything is calibrated, or validated with what a checkpoint had
        self._width = restored or next(iter(self.bits.values()))
        set_widths_(pl_module, self._widths(self._width))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.bits:
            return
        total, starts = total_steps(trainer), [in_steps(trainer, start, "bits") or 0 for start in self.bits]
        if sorted(starts) != starts:
            raise MisconfigurationException(f"`bits` is {self.bits}, which are the steps {starts}: give them in their order.")
        if starts[-1] >= total:
            raise MisconfigurationException(
                f"The last stage of `bits`, {self.bits}, begins at step {starts[-1]}, and the fit has {total:g}: it would end "
                "with more bits than the descriptors say."
            )
        self._stages = list(zip(starts, self.bits.values(), strict=True))
        for callback in all_callbacks(trainer):
            if isinstance(callback, SettleWeights) and callback.freeze is not None:
                after = in_steps(trainer, callback.after, "after") or 0
                if after < starts[-1]:
                    raise MisconfigurationException(
                        f"SettleWeights freezes codes from step {after} on, and the last stage of `bits` begins at {starts[-1]}: "
                        "set `after` (`schedule.settle_after`) to that."
                    )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = step_of(trainer)
        width = next((width for start, width in reversed(self._stages) if start <= step), self._width)
        if width is None or width == self._width:
            return
        changing = changing_widths(pl_module, self._widths(width), self.method)
        with untouched_data(trainer.train_dataloader) as loaders, changing, trainer.precision_plugin.forward_context():
            for calibration_batch in train_batches(trainer, pl_module, loaders, self.batches):
                self.calibration_step(pl_module, calibration_batch)
        self._width = width
        rank_zero_info(f"From step {step} on: {width} bits.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stages and self._width != self._stages[-1][1]:
            rank_zero_warn(f"The fit ended before the last stage of `bits`: the model has {self._width} bits.")
        self._stages = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # a checkpoint may be written after this, of the width that there was
        set_widths_(pl_module, self._own)
        self._stages = []

    def state_dict(self) -> dict[str, Any]:
        return {"width": self._width}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["width"]

    def _widths(self, width: int) -> dict[str, int]:
        return {name: max(own, width) for name, own in self._own.items()}

    def _check(self, trainer: Trainer) -> None:
        last = list(self.bits.values())[-1]
        if wider := [name for name, own in self._own.items() if own < last]:
            raise MisconfigurationException(
                f"`bits` ends with {last}, and `{wider[0]}` has {self._own[wider[0]]} ({len(wider)} quantizers are narrower): "
                "end with the least width of the descriptors."
            )
        if any(isinstance(callback, Quantize) and callback.keep_best for callback in all_callbacks(trainer)):
            raise MisconfigurationException("`keep_best` is True, and would keep a model of an earlier stage, with more bits.")


def _length(start: Any) -> Length:
    """A length, out of a key, which a config may have made a text of.

    >>> _length("0"), _length("0.5"), _length("1 epoch")
    (0, 0.5, '1 epoch')
    """
    if not isinstance(start, str):
        return start  # type: ignore[no-any-return]
    for kind in (int, float):
        try:
            return kind(start)
        except ValueError:
            continue
    return start
