"""How a batch reaches a model outside of its own training loop."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lq.calib import Calibrator
from lq.nn.evaluating import evaluating
from lq.nn.example import Example, example_inputs

REMEDY = "Override `Quantize.calibration_step(pl_module, batch)` and run the model on the batch there."


def forward_arguments(forward: Callable[..., Any], batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for ``forward`` out of a batch.

    A tensor is the argument. Of a tuple or list, the first elements are: as many as ``forward`` requires, at least one (so
    that labels stay behind). Of a dict, the entries are that ``forward`` has parameters for; if there are none and ``forward``
    requires one argument, the dict itself is.

    Raises:
        MisconfigurationException: the batch has another type, or does not fit.

    >>> forward_arguments(lambda x: x, (1, 2)), forward_arguments(lambda ids, mask=None: ids, {"ids": 1, "labels": 2})
    (((1,), {}), ((), {'ids': 1}))
    """
    parameters = inspect.signature(forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        catches_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        kwargs = {k: v for k, v in batch.items() if catches_all or k in names}
        if not kwargs and len(required) == 1:
            args = (batch,)
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        args = tuple(batch[: max(1, len(required))])
    try:
        inspect.signature(forward).bind(*args, **kwargs)
    except TypeError as mismatch:
        raise MisconfigurationException(f"{_described(batch)} does not fit `forward`: {mismatch}. {REMEDY}") from None
    if not args and not kwargs:
        raise MisconfigurationException(f"{_described(batch)} has nothing that `forward` takes. {REMEDY}")
    return args, kwargs


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"A batch that is a mapping with the keys {list(batch)}"
    size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
    return f"A batch of type {type(batch).__name__}{size}"


def feed(pl_module: LightningModule, batch: Any) -> None:
    """Run the module's ``forward`` on a batch, or, if it has none of its own, its ``training_step`` with logging muted."""
    if has_forward(pl_module):
        args, kwargs = forward_arguments(pl_module.forward, batch)
        # compiled code would not see hooks that look at what comes in
        with remedied(f"{_described(batch)} failed in `forward`"), torch.compiler.set_stance("force_eager"):
            pl_module(*args, **kwargs)
        return
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimizes by hand in `training_step` and has no `forward` to calibrate with. {REMEDY}"
        )
    indices = [0] if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2) else []
    with muted(pl_module), remedied(f"{_described(batch)} failed in `training_step`"):
        pl_module.training_step(batch, *indices)


def has_forward(pl_module: LightningModule) -> bool:
    """Whether the module has a ``forward`` of its own."""
    return type(pl_module).forward is not LightningModule.forward


@contextmanager
def remedied(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Say what to do about errors that come of a batch in a form that the model does not expect, of these kinds too."""
    # a wrong number of elements to unpack is a ValueError; calibration has its own when all batches are through
    expected: tuple[type[Exception], ...] = (TypeError, ValueError, AttributeError, KeyError, IndexError, *kinds)
    try:
        yield
    except expected as error:
        first = next(iter(str(error).splitlines()), "")  # torch goes on with the signatures that it knows
        raise MisconfigurationException(f"{what}: {type(error).__name__}: {first}. {REMEDY}") from error


@contextmanager
def muted(pl_module: LightningModule) -> Iterator[None]:
    """Nothing is logged in the block, and the module's metrics are afterwards what they were."""
    metrics = [m for m in pl_module.modules() if isinstance(m, Metric) and not isinstance(m, Calibrator)]
    before = [(m, m._copy_state_dict(), m._update_count, m._computed) for m in metrics]
    loud = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict")}
    pl_module.__dict__.update(dict.fromkeys(loud, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name, own in loud.items():
            del pl_module.__dict__[name]
            if own is not None:  # muted by somebody else already
                pl_module.__dict__[name] = own
        for metric, states, count, computed in before:
            for name, value in states.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, computed


@contextmanager
def untouched_data(loaders: Any) -> Iterator[Any]:
    """Loaders to take a few batches from; afterwards the order of the data and all random numbers are as if none was taken."""
    found = [loader for loader in tree_leaves(loaders) if isinstance(loader, DataLoader)]
    states = [(g, g.get_state()) for loader in found for g in _generators(loader)]
    # a copy has workers of its own, so that persistent ones are not started, and advanced, before training
    copies = tree_map(lambda loader: _copy(loader) if isinstance(loader, DataLoader) else loader, loaders)
    with isolate_rng():
        try:
            yield copies
        finally:
            for generator, state in states:
                generator.set_state(state)


def _copy(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same data whose samplers are copies: they may keep random numbers of their own."""
    twin = copy.copy(loader)
    memo = {id(loader.dataset): loader.dataset, **{id(g): g for g in _generators(loader)}}
    for name in ("sampler", "batch_sampler"):
        if name in vars(loader):
            vars(twin)[name] = copy.deepcopy(vars(loader)[name], memo)
    return twin


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    sources = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return [g for s in sources if isinstance(g := getattr(s, "generator", None), torch.Generator)]


def example_of(trainer: Trainer, pl_module: LightningModule, step: Callable[[LightningModule, Any], None]) -> Example:
    """Inputs of one forward before anything runs: the module's ``example_input_array``, or what ``step`` takes of a first batch.

    Args:
        step: runs the module on a batch, as :meth:`lq.callbacks.Quantize.calibration_step` does.

    Raises:
        MisconfigurationException: there is no batch, or none that reaches ``forward`` and fits it.
    """
    if pl_module.example_input_array is not None:
        return example_inputs(pl_module)
    if not has_forward(pl_module):
        raise MisconfigurationException(f"{type(pl_module).__name__} has no `forward`.")
    loop = trainer._active_loop
    assert loop is not None
    with untouched_data(loop._data_source.dataloader()) as loaders:
        for batch, _, _ in CombinedLoader(loaders, "max_size_cycle" if trainer.training else "sequential"):
            with evaluating(pl_module):
                return first_inputs(pl_module, step, transferred(pl_module, batch))
    raise MisconfigurationException("The dataloader gave no batch.")


def first_inputs(pl_module: LightningModule, step: Callable[[LightningModule, Any], None], batch: Any) -> Example:
    """What the module's first forward takes when ``step`` runs it on a batch."""
    found: list[Example] = []
    hook = pl_module.register_forward_pre_hook(lambda module, *inputs: found.append(inputs), with_kwargs=True)
    try:
        step(pl_module, batch)
    finally:
        hook.remove()
    if not found:
        raise MisconfigurationException(f"`calibration_step` does not call {type(pl_module).__name__} itself.")
    return found[0]


def transferred(pl_module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """A batch as the steps of a module get it, which a Trainer is attached to: behind the hooks of it, or of its DataModule, that
    move batches to its device.
    """
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx)
    return pl_module._apply_batch_transfer_handler(batch, dataloader_idx=dataloader_idx)


def train_batches(trainer: Trainer, pl_module: LightningModule, loaders: Any, limit: int) -> Iterator[Any]:
    """The first batches of the train loaders, on the module's device and as its training step would get them."""
    # the fit's own way to combine several loaders
    mode: Any = getattr(trainer.fit_loop._combined_loader, "_mode", "max_size_cycle")
    batches = iter(CombinedLoader(loaders, mode))
    for batch, _, _ in itertools.islice(batches, int(min(limit, trainer.num_training_batches))):
        yield transferred(pl_module, trainer.precision_plugin.convert_input(batch))
