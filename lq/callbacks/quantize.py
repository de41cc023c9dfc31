"""Places quantizers when a fit is set up, calibrates and rescales it when training starts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm.auto import tqdm

from lq.alpha import Alpha, check_alpha
from lq.analysis.records import Histogram, histograms
from lq.calib import failing_together, save_statistics
from lq.calib.statistics import require_safetensors
from lq.calibration import calibrating
from lq.callbacks.best import Best, monitored
from lq.callbacks.building import averages, averaging_later, begin_averages_, build, check_strategy
from lq.callbacks.correcting import AFTERWARDS, add_biases_, correct_float_, correct_quantized_, function_of, positional
from lq.callbacks.feeding import feed, train_batches, untouched_data
from lq.callbacks.keeping import KeepsWeights
from lq.callbacks.placing import await_learned_, place_
from lq.callbacks.stages import validate_stage
from lq.corrections import Correction, Corrections
from lq.descriptor import Rules, resolve_rules
from lq.load import PLACEMENT, RULES, agreed, origin_of
from lq.methods import Method, check_options
from lq.nn import recompute_
from lq.placement import check_target
from lq.rescale import Excluded, RescaledGroup, RescalingCalibrator
from lq.sharing import separate_as_placed_
from lq.surgery import has_quantized_layers, named_quantizers, rules_of

# Where a checkpoint has the best model so far.
BEST = "lq_best"


class Quantize(KeepsWeights):
    """Quantizes the module in ``setup`` and calibrates it on a few train batches in ``on_train_start``.

    A checkpoint of the fit has everything: on resume, in ``test`` or in ``predict`` the quantizers are placed again and their
    scales come from the checkpoint, without another calibration. Calibration runs in evaluation mode without gradients, logs
    nothing, and leaves random numbers, the order of the data, and (without a correction) BatchNorm statistics as they were.

    Args:
        rules: preset or rules, as for :func:`lq.quantize_`.
        target: ``"tensorrt"`` or ``"onnxruntime"`` quantizes residual adds too, and has layers share scales, as
            :func:`lq.quantize_` says. For that the module runs once, on its ``example_input_array`` or what
            :meth:`calibration_step` gives it of a first batch; where there is neither, a warning says so, and inputs and
            weights of layers alone are quantized.
        method: how amax is chosen, for all or by patterns on names, as for :func:`lq.calibrating`.
        method_options: its options: ``percentile``, ``z_threshold``, ``power_of_two`` ...
        batches: train batches to calibrate on, on each rank.
        alpha: SmoothQuant's migration strength: a number in [0, 1], numbers by patterns on names, or ``"auto"``, as for
            :meth:`lq.RescalingCalibrator.rescale`; ``None`` does not rescale.
        corrections: what else to do, functions of :mod:`lq.corrections`, their options bound by ``functools.partial``. They run
            on the ``batches`` train batches, of which ``forward`` takes positional inputs, before calibration and in this order;
            ``weights_bias_correction_`` and then ``reestimate_batchnorm_`` run after it. :attr:`corrected` says what was done.
        excluded_modules: left out of rescaling, as for :class:`lq.RescalingCalibrator`.
        stages: run the module's whole validation as float, calibrated, rescaled and, after the fit, QAT; :attr:`stages` has the
            metrics, and loggers get them as ``<stage>/<metric>``.
        keep_best: put the best model back when the fit ends, of those after calibration, after rescaling, and at each validation:
            it is never worse than the calibrated one. :attr:`kept` says which it was. Each checkpoint has the best one so far.
        monitor: metric of the validation that decides; by default that of the fit's ModelCheckpoint or EarlyStopping.
        mode: whether ``"min"`` or ``"max"`` is good; likewise.
        fine_tune: ``False`` ends the fit before its first step: the model is calibrated and rescaled, and nothing is trained.
        dirpath: folder to leave the calibrated model in, as ``calibrated.ckpt``, and what calibration collected, as
            ``statistics.safetensors`` (:func:`lq.calib.save_statistics`): ``lq recalibrate`` tries other methods on them.
        recompute: train in the memory of float training, a little slower, or in less where it is compiled
            (:func:`lq.nn.recompute_`).

    Attributes:
        stages: metrics of each stage.
        kept: the stage that ``keep_best`` went back to; empty if that is the end of the fit.
        corrected: what each correction did, by name.
        rescaled: what SmoothQuant did.
        left: layers that it left as they are, and why.
        histograms: what calibration saw, by quantizer.
        methods: by which amax was chosen, by quantizer: what ``auto`` picked.

    Raises:
        ValueError: an argument out of range; rules that do not fit the module; bad calibration data.
        MisconfigurationException: ``learn_amax`` without an ``amax`` to start from; no calibration batch, or one that the
            module's ``forward`` does not take; the checkpoint of a float fit as ``ckpt_path``.
    """

    def __init__(
        self,
        rules: Rules = "int8",
        *,
        target: str | None = None,
        method: Method = "mse",
        method_options: dict[str, Any] | None = None,
        batches: int = 8,
        alpha: Alpha | None = 0.5,
        corrections: Sequence[Correction] = (),
        excluded_modules: Excluded | None = None,
        stages: bool = True,
        keep_best: bool = False,
        monitor: str | None = None,
        mode: str | None = None,
        fine_tune: bool = True,
        dirpath: str | Path | None = None,
        recompute: bool = False,
    ) -> None:
        check_target(target, resolve_rules(rules))
        check_options(method, method_options or {}, batches)
        if dirpath is not None:
            require_safetensors()
        if alpha is not None:
            check_alpha(alpha)
        if batches < 1:
            raise ValueError(f"`batches` is {batches}: calibration needs at least 1.")
        if mode not in (None, "min", "max"):
            raise ValueError(f"`mode` is {mode!r}: it must be 'min' or 'max'.")
        if keep_best and not stages:
            raise ValueError("`keep_best` is True, and `stages` False: the best one is found by validating the stages.")
        self.rules, self.target, self.method, self.method_options = rules, target, method, method_options or {}
        self.batches, self.alpha, self.excluded_modules = batches, alpha, excluded_modules
        self.validate_stages, self.dirpath = stages, dirpath
        self.keep_best, self.monitor, self.mode = keep_best, monitor, mode
        self.fine_tune, self.recompute = fine_tune, recompute
        self._fitting = False
        self._best: Best | None = None
        self._restored: dict[str, Any] = {}
        self.corrections = list(corrections)
        self.stages: dict[str, dict[str, float]] = {}
        self.corrected: dict[str, Corrections] = {}
        self.kept = ""
        self.rescaled: list[RescaledGroup] = []
        self.left: dict[str, str] = {}
        self.histograms: dict[str, Histogram] = {}
        self.methods: dict[str, str] = {}

    def calibration_step(self, pl_module: LightningModule, batch: Any) -> None:
        """Run the model on a calibration batch; for a ``target`` once before, in ``setup``. Override it for other batches.

        By default ``pl_module.forward`` gets: a batch that is a tensor; the first elements of a tuple or list, as many as it
        requires; those entries of a dict that it has parameters for. A module without a ``forward`` of its own runs
        ``training_step``, with logging muted.
        """
        feed(pl_module, batch)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        check_strategy(trainer)
        build(trainer, pl_module)
        if has_quantized_layers(pl_module):
            self._check_rules(pl_module)
        else:
            place_(trainer, pl_module, self.rules, self.target, self.calibration_step)
        if self._fitting:
            add_biases_(pl_module, self.corrections)
        if self.recompute:
            recompute_(pl_module)
        await_learned_(pl_module)
        if self._fitting:
            begin_averages_(trainer, pl_module)

    def _check_rules(self, pl_module: LightningModule) -> None:
        placed = rules_of(pl_module)
        if placed is not None and placed != resolve_rules(self.rules):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} is quantized by other rules than `rules`: give `rules=lq.rules_of(module)`, or take "
                "its quantizers out before with `lq.dequantize_(module)`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.fine_tune:
            self._end_before_the_first_step(trainer)
        self._look_for_best(trainer)
        pending = {name for name, quantizer in named_quantizers(pl_module) if quantizer.amax is None}
        if not pending:
            return
        try:
            with averaging_later(trainer, pl_module):
                self._prepare(trainer, pl_module)
            self._keep(trainer, pl_module)
        except BaseException:
            # half of it is nothing: the next fit does it all
            for name, quantizer in named_quantizers(pl_module):
                if name in pending:
                    quantizer.amax = None
            raise

    def _end_before_the_first_step(self, trainer: Trainer) -> None:
        least = {"min_epochs": trainer.min_epochs, "min_steps": trainer.min_steps}
        if asked := ", ".join(f"{name}={value}" for name, value in least.items() if value):
            raise MisconfigurationException(f"`fine_tune` is False, and the Trainer has {asked}: leave one of them out.")
        trainer.should_stop = True

    def _look_for_best(self, trainer: Trainer) -> None:
        if not self.keep_best:
            return
        if not trainer.enable_validation:
            raise MisconfigurationException("`keep_best` is True, but the fit has no validation to tell which model is best.")
        if averages(trainer):
            raise MisconfigurationException("`keep_best` is True, and WeightAveraging validates another model: use one of them.")
        self.kept = ""
        self._best = Best(*monitored(trainer, self.monitor, self.mode))
        if self._restored:
            self._best.load_state_dict(self._restored)
            self._restored = {}

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Float, calibrated, rescaled: with a look at each, if there is a validation."""
        self._validate(trainer, pl_module, "float")
        last = [c for c in self.corrections if function_of(c) in AFTERWARDS]
        first = [c for c in self.corrections if c not in last]
        if first:
            self.corrected = correct_float_(pl_module, self.rules, first, self._positional(trainer, pl_module))
        self._calibrate_and_rescale(trainer, pl_module)
        if last:
            with trainer.precision_plugin.forward_context():
                self.corrected |= correct_quantized_(pl_module, last, self._positional(trainer, pl_module))
            self._validate(trainer, pl_module, "corrected")

    def _calibrate_and_rescale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        calibrator = RescalingCalibrator(pl_module, excluded_modules=self.excluded_modules, inplace=True)
        # where no input is quantized there is nothing to make easier
        if self.alpha is None or not calibrator.layers:
            self._calibrate(trainer, pl_module)
            self._validate(trainer, pl_module, "calibrated")
            return
        with failing_together():
            self._run_batches(trainer, pl_module, "Collecting channel ranges", calibrator.collecting)
        if self.validate_stages and trainer.enable_validation:
            self._calibrate(trainer, pl_module)
            self._validate(trainer, pl_module, "calibrated")
        calibrator.rescale(self.alpha)
        self.rescaled, self.left = calibrator.groups, calibrator.left
        self._calibrate(trainer, pl_module)
        self._validate(trainer, pl_module, "rescaled")

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave behind what other methods need."""
        if self.dirpath is None:
            return
        folder = Path(self.dirpath)
        # Lightning asks no callback for what it has to say of weights only
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        trainer.strategy.save_checkpoint(checkpoint | origin_of(pl_module), folder / "calibrated.ckpt")
        if trainer.is_global_zero:
            save_statistics(pl_module, folder / "statistics.safetensors")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._best is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._best.offer(trainer, pl_module, f"step {trainer.global_step}", metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.fine_tune:
            self._validate(trainer, pl_module, "qat")
        last = next(reversed(self.stages), "")
        if self._best is not None and self._best.stage not in ("", last):
            self.kept = self._best.stage
            self._best.restore(pl_module)
            rank_zero_info(f"Kept the model of `{self.kept}`: {self._best.monitor} {self._best.value:.4f}.")
            self._validate(trainer, pl_module, "kept")
        self._best = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint |= origin_of(pl_module)
        if self._best is not None:
            checkpoint[BEST] = self._best.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._refuse_float(trainer, checkpoint)
        agreed(checkpoint.get(RULES), self.rules, "`ckpt_path`")
        if PLACEMENT in checkpoint:
            separate_as_placed_(pl_module, checkpoint[PLACEMENT]["shared"])
        # a test of the best checkpoint begins nothing anew
        self._restored = checkpoint.get(BEST, {}) if self._fitting else {}

    def _refuse_float(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        step = checkpoint.get("global_step")
        if self._fitting and step and not any("_quantizer." in name for name in checkpoint["state_dict"]):
            raise MisconfigurationException(
                f"`ckpt_path` {trainer.ckpt_path} is of a float fit, whose clock stands at step {step}: load its weights into "
                "the module before (`load_from_checkpoint`), and leave `ckpt_path` out."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING:
            self._warn_if_float(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        self._warn_if_float(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        self._warn_if_float(pl_module)

    def _warn_if_float(self, pl_module: LightningModule) -> None:
        missing = [name for name, quantizer in named_quantizers(pl_module) if quantizer.amax is None]
        if missing:
            rank_zero_warn(
                f"{len(missing)} quantizers have no amax and compute in float, `{missing[0]}` first: fit with Quantize "
                "before, or give the `ckpt_path` of such a fit."
            )

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with calibrating(pl_module, self.method, **self.method_options):
            self._run_batches(trainer, pl_module, "Calibrating")
        self.histograms = histograms(pl_module)
        self.methods = {n: q.calibrator.method for n, q in named_quantizers(pl_module) if q.calibrator.method is not None}
        if self.method == "auto":
            rank_zero_info("auto picked " + ", ".join(f"{self.methods[name]} for {name}" for name in self.histograms))

    def _positional(self, trainer: Trainer, pl_module: LightningModule) -> list[tuple[Any, ...]]:
        with untouched_data(trainer.train_dataloader) as loaders:
            return [positional(pl_module, batch) for batch in train_batches(trainer, pl_module, loaders, self.batches)]

    def _run_batches(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        description: str,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        seen = 0
        hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
        with untouched_data(trainer.train_dataloader) as loaders, trainer.precision_plugin.forward_context():
            batches = train_batches(trainer, pl_module, loaders, self.batches)
            for batch in tqdm(batches, description, total=self.batches, disable=hidden, leave=False):
                with around():
                    self.calibration_step(pl_module, batch)
                seen += 1
        if seen == 0 and trainer.world_size == 1:
            raise MisconfigurationException(
                "The train dataloader gave no batch to calibrate on: look at its length, `drop_last` and `limit_train_batches`."
            )

    def _validate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.validate_stages:
            return
        metrics = validate_stage(trainer)
        if self._best is not None and stage not in ("float", "kept"):
            self._best.offer(trainer, pl_module, stage, metrics)
        if metrics:
            self.stages[stage] = metrics
            rank_zero_info(f"{stage}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            for logger in trainer.loggers:
                logger.log_metrics({f"{stage}/{name}": value for name, value in metrics.items()}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"stages": self.stages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # a checkpoint of this fit that is tested afterwards knows less than is known here
        if self._fitting or not self.stages:
            self.stages = state_dict["stages"]
