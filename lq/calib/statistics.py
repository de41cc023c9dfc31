"""What calibrators of a model collected, in a safetensors file: another method needs neither data nor a model run."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lq.calib.affine import AffineCalibrator
from lq.calib.calibrator import Calibrator
from lq.calib.held_out import HeldOutCalibrator
from lq.calib.histogram import HistogramCalibrator
from lq.calib.max import MaxCalibrator
from lq.staged import staged

KINDS: dict[str, type[Calibrator]] = {
    "affine": AffineCalibrator,
    "max": MaxCalibrator,
    "histogram": HistogramCalibrator,
    "held_out": HeldOutCalibrator,
}


def save_statistics(model: nn.Module, path: str | Path) -> Path:
    """Write the statistics of all calibrators that saw data, under the short names of their quantizers.

    Weights from which a step is learned have none: their amax came from the weights themselves.

    Args:
        model: holds quantizers.
        path: a file, by custom ``.safetensors``; it is written whole or, on any error, not at all.

    Raises:
        ValueError: no calibrator saw data.
        TypeError: a calibrator of another class than those of :mod:`lq.calib`.
        ImportError: safetensors is not installed.

    >>> import tempfile, torch, lq
    >>> model = lq.quantize_(nn.Sequential(nn.Linear(2, 2)))
    >>> with lq.calibrating(model, method="mse"):
    ...     _ = model(torch.tensor([[1.0, -3.0]]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = save_statistics(model, f"{folder}/stats.safetensors")
    ...     load_statistics(model, file)
    >>> _ = lq.load_calib_amax_(model, method="max")
    >>> model[0].input_quantizer.amax
    tensor(3.)
    """
    require_safetensors()
    from safetensors.torch import save_file

    path = Path(path)
    collected = {name: c for name, owner in _owners(model) if (c := _calibrator(owner)).collected}
    if not collected:
        raise ValueError(f"No calibrator of {type(model).__name__} saw data: calibrate before you save its statistics.")
    # of a learned step amax did not come from its calibrator, and another method would have nothing to go by
    told = {n: c for n, c in collected.items() if not (isinstance(c, MaxCalibrator) and c.method not in (None, "max"))}
    tensors = {
        f"{name}.{state}": value.cpu().contiguous()
        for name, calibrator in told.items()
        for state, value in calibrator.statistics().items()
        if isinstance(value, Tensor)
    }
    about = {name: _described(name, calibrator) for name, calibrator in told.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as file:
        save_file(tensors, file, {"calibrators": json.dumps(about)})
    return path


def _described(name: str, calibrator: Calibrator) -> dict[str, Any]:
    kinds = {cls: kind for kind, cls in KINDS.items()}
    if type(calibrator) not in kinds:
        known = ", ".join(cls.__name__ for cls in kinds)
        raise TypeError(f"`{name}` has a {type(calibrator).__name__}, and statistics are kept of {known}: use one of those.")
    return {
        "kind": kinds[type(calibrator)],
        "num_bits": calibrator.num_bits,
        "axis": calibrator.axis,
        "unsigned": calibrator.unsigned,
        "shape": calibrator.shape,
        "batches": calibrator.update_count,
    }


def read_statistics(path: str | Path) -> dict[str, Calibrator]:
    """Calibrators with the statistics that :func:`save_statistics` wrote, by the short names of their quantizers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind.
        ImportError: safetensors is not installed.
    """
    require_safetensors()
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file of statistics at {path}.")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("calibrators", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of statistics, or cut short: {error}.") from None
    if about is None:
        raise ValueError(f"{path} is a safetensors file, but none that `save_statistics` wrote.")
    states: dict[str, dict[str, Tensor]] = {name: {} for name in about}
    for key, value in tensors.items():
        name, _, state = key.rpartition(".")
        states[name][state] = value
    return {name: _restored(facts, states[name]) for name, facts in about.items()}


def _restored(facts: dict[str, Any], states: dict[str, Tensor]) -> Calibrator:
    num_bits, axis = (tuple(v) if isinstance(v, list) else v for v in (facts["num_bits"], facts["axis"]))
    options: dict[str, Any] = {} if facts["kind"] == "affine" else {"unsigned": facts["unsigned"]}
    if "counts" in states:
        options["num_bins"] = states["counts"].shape[-1] // 2
    calibrator = KINDS[facts["kind"]](num_bits, axis, **options)
    calibrator.load_statistics({"shape": facts["shape"], "batches": facts["batches"], **states})
    return calibrator


def load_statistics(model: nn.Module, path: str | Path) -> None:
    """Give calibrators the statistics that :func:`save_statistics` wrote, in place; amax stays until it is computed anew.

    Args:
        model: the model they are of, or one with quantizers of the same names and axes; their widths may differ.
        path: the file.

    Raises:
        FileNotFoundError, ImportError: as :func:`read_statistics`.
        ValueError: a file of another kind, or quantizers that the model does not have, or has with another axis (named); then
            nothing is loaded.
    """
    owners, calibrators = dict(_owners(model)), read_statistics(path)
    if unknown := sorted(set(calibrators) - set(owners)):
        raise ValueError(f"{path} has statistics of {', '.join(unknown[:5])} ({len(unknown)} in all), which the model has not.")
    for name, calibrator in calibrators.items():
        axis = _calibrator(owners[name]).axis
        if calibrator.axis != axis:
            raise ValueError(f"{path} has statistics of `{name}` with axis {calibrator.axis}, but its quantizer has axis {axis}.")
    for name, calibrator in calibrators.items():
        old = _calibrator(owners[name])
        # what they are for is the model's own business
        calibrator.num_bits, calibrator.unsigned = old.num_bits, old.unsigned
        owners[name].calibrator = calibrator.to(old.device)


def _calibrator(owner: nn.Module) -> Calibrator:
    calibrator = owner.calibrator
    assert isinstance(calibrator, Calibrator)
    return calibrator


def require_safetensors() -> None:
    """Raise ``ImportError`` with the remedy if safetensors is not installed."""
    if find_spec("safetensors") is None:
        raise ImportError('Statistics are kept by safetensors: pip install "lightning-lq[recipes]".')


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own a calibrator, by the short names of quantizers."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "calibrator", None), Calibrator):
            yield name.removesuffix("_quantizer"), module
