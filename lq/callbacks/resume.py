"""A fit that was cut off, and one that was not, end in the same numbers."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lq.calib import gather


class ExactResume(Callback):
    """Keeps random numbers, and the place in the data, in the checkpoint: resuming repeats and leaves out nothing.

    Lightning restores weights, optimizers and loops. Resumed within an epoch it starts the data anew, unless the loader keeps a
    state of its own; and dropout, shuffling and augmentation draw other numbers than they would have. Here the order of the epoch
    is drawn once more, and the batches that were done are fetched and skipped.

    Works for checkpoints that are written when a batch, an epoch or a validation ends, on as many ranks as before, with any
    loader whose order comes from the random numbers of torch, NumPy and Python. Validation gives the numbers back that it draws.
    (A checkpoint of the last batch of an epoch resumes behind the validation of that epoch: Lightning does not catch up on it.)

    If the checkpoint to resume from was cut short when it was written, the error has a note that says so.
    """

    def __init__(self) -> None:
        # before the loaders of this epoch were started, and, in a first epoch, where that is long before the order is drawn, then
        self._epoch: dict[str, Any] = {}
        self._order: dict[str, Any] | None = None
        self._validation: dict[str, Any] | None = None
        self._later: dict[str, Any] | None = None
        self._started = self._between = False
        self._restored: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # what a test of a checkpoint left is not where this fit begins
        self._restored = []
        self._before_loaders(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_loaders(trainer)

    def _before_loaders(self, trainer: Trainer) -> None:
        # whoever asks for the number of steps has them started: a schedule in `configure_optimizers`
        if trainer.fit_loop._combined_loader is None:
            self._epoch, self._started = random_numbers(), True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, []
        if not restored:
            return
        if len(restored) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint is of {len(restored)} processes, and there are {trainer.world_size}: random numbers and the "
                "order of the data are not those of the fit that was cut off."
            )
            return
        mine = restored[trainer.global_rank]
        if (done := _batches_done(trainer)) and not _keeps_its_place(trainer):
            self._epoch, self._order = mine["epoch"], mine["order"]
            _start(trainer, self._epoch, self._order, done)
            _leave_out_quietly(trainer)
        elif done:  # loaders with a state may draw when they go on
            self._later = mine["now"]
        self._started = bool(done)
        set_random_numbers(mine["now"])
        if not done:
            self._epoch, self._order, self._between = mine["now"], None, not _keeps_its_place(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._between:
            # behind an epoch Lightning starts the loaders too early; behind the last batch of one, this hook is not called
            self._between = False
            if not _will_start(trainer):
                iter(_fetcher(trainer))
        elif not self._started:
            self._epoch, self._order = random_numbers(), None
        elif self._order is None and trainer.current_epoch == 0:
            self._order = random_numbers()
        self._started = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._between = False
        if self._later is not None:
            set_random_numbers(self._later)
            self._later = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._started = False
        if trainer.fit_loop.epoch_loop._should_check_val_fx(_fetcher(trainer)):
            self._validation = random_numbers()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation is not None and not trainer.sanity_checking:
            set_random_numbers(self._validation)
            self._validation = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        path = trainer.ckpt_path
        if path is not None and Path(path).is_file() and not zipfile.is_zipfile(path):
            exception.add_note(
                f"`ckpt_path` {path} is no whole checkpoint: it was cut short, or something else wrote it. Give the one before."
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._epoch:
            checkpoint[KEY] = gather({"epoch": self._epoch, "order": self._order, "now": random_numbers()})

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(KEY, [])


# Where a checkpoint has random numbers, in the order of ranks.
KEY = "lq_random_numbers"

# How Lightning, resumed from the batch before a validation, leaves that out.
LEFT_OUT = "increment_progress_to_evaluation_end"


def random_numbers() -> dict[str, Any]:
    """The state of all random number generators, as what ``torch.load(weights_only=True)`` loads."""
    states = _collect_rng_states()
    name, keys, *rest = states["numpy"]
    return {**states, "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest]}


def set_random_numbers(states: dict[str, Any]) -> None:
    """Go on from what :func:`random_numbers` gave.

    >>> before = random_numbers()
    >>> first = torch.rand(2)
    >>> set_random_numbers(before)
    >>> torch.equal(torch.rand(2), first)
    True
    """
    name, keys, *rest = states["numpy"]
    _set_rng_states({**states, "numpy": (name, keys.numpy().astype(np.uint32), *rest)})


def _fetcher(trainer: Trainer) -> Any:
    return trainer.fit_loop._data_fetcher


def _leave_out_quietly(trainer: Trainer) -> None:
    """Have a validation that is left out draw no random numbers: its loaders are started all the same."""
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    own = vars(loop)

    def quietly() -> None:
        del own[LEFT_OUT]
        with isolate_rng():
            getattr(loop, LEFT_OUT)()

    own[LEFT_OUT] = quietly


def _will_start(trainer: Trainer) -> bool:
    """Whether Lightning will yet start the loaders for this epoch."""
    return bool(trainer.current_epoch and not trainer.fit_loop.is_resuming and not trainer.fit_loop.epoch_loop.restarting)


def _keeps_its_place(trainer: Trainer) -> bool:
    """Whether the loaders have a state that Lightning restores."""
    return all(isinstance(loader, _Stateful) for loader in _fetcher(trainer).combined_loader.flattened)


def _batches_done(trainer: Trainer) -> int:
    """Train batches of the present epoch that are behind us; 0 when it is over."""
    loop = trainer.fit_loop.epoch_loop
    # a checkpoint that is written when a batch ends does not count it yet
    done = loop.batch_progress.current.completed + loop.restarted_on_train_batch_end
    return int(done) if done < trainer.num_training_batches else 0


def _start(trainer: Trainer, epoch: dict[str, Any], order: dict[str, Any] | None, batches: int) -> None:
    """Start the loaders as they were started in this epoch, and leave out the batches that are done."""
    fetcher = _fetcher(trainer)
    progress: Any = trainer.fit_loop.epoch_progress.current
    for loader in fetcher.combined_loader.flattened:
        _set_sampler_epoch(loader, progress.processed)
    set_random_numbers(epoch)
    iter(fetcher)
    if order is not None:
        set_random_numbers(order)
    for _ in range(batches):
        next(fetcher)
    fetcher.fetched -= batches  # Lightning adds them
