"""What calibrators of a model collected, in a safetensors file: another method needs neither data nor a model run."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lq.calib.calibrator import Calibrator
from lq.calib.histogram import HistogramCalibrator
from lq.calib.max import MaxCalibrator

KINDS = {"max": MaxCalibrator, "histogram": HistogramCalibrator}


def save_statistics(model: nn.Module, path: str | Path) -> Path:
    """Write the statistics of all calibrators that saw data, under the short names of their quantizers.

    Args:
        model: holds quantizers.
        path: a file, by custom ``.safetensors``; it is written whole or, on any error, not at all.

    Raises:
        ValueError: no calibrator saw data.
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
    _require_safetensors()
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, owner in _owners(model):
        calibrator = _calibrator(owner)
        if statistics := calibrator.statistics():
            kind = next(kind for kind, cls in KINDS.items() if isinstance(calibrator, cls))
            about[name] = {"kind": kind, "shape": list(statistics.pop("shape"))}
            tensors |= {f"{name}.{state}": value.cpu().contiguous() for state, value in statistics.items()}
    if not tensors:
        raise ValueError(f"No calibrator of {type(model).__name__} saw data: calibrate before you save its statistics.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, {"calibrators": json.dumps(about)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_statistics(model: nn.Module, path: str | Path) -> None:
    """Give calibrators the statistics that :func:`save_statistics` wrote, in place; amax stays until it is computed anew.

    Args:
        model: the model they are of, or one with quantizers of the same names.
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind, or quantizers that the model does not have (named); then nothing is loaded.
    """
    _require_safetensors()
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
    owners = dict(_owners(model))
    if unknown := sorted(set(about) - set(owners)):
        raise ValueError(f"{path} has statistics of {', '.join(unknown[:5])} ({len(unknown)} in all), which the model has not.")
    for name, facts in about.items():
        states = {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.rpartition(".")[0] == name}
        old = _calibrator(owners[name])
        new = _like(old, facts["kind"], states).to(old.device)
        new.load_statistics({"shape": facts["shape"], **states})
        owners[name].calibrator = new


def _like(old: Calibrator, kind: str, states: dict[str, Tensor]) -> Calibrator:
    if kind == "max":
        return MaxCalibrator(old.num_bits, old.axis, old.unsigned)
    return HistogramCalibrator(old.num_bits, old.axis, old.unsigned, states["counts"].shape[1] // 2)


def _calibrator(owner: nn.Module) -> Calibrator:
    calibrator = owner.calibrator
    assert isinstance(calibrator, Calibrator)
    return calibrator


def _require_safetensors() -> None:
    if find_spec("safetensors") is None:
        raise ImportError('Statistics are kept by safetensors: pip install "lightning-lq[recipes]".')


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own a calibrator, by the short names of quantizers."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "calibrator", None), Calibrator):
            yield name.removesuffix("_quantizer"), module
