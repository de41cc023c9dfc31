"""ONNX models in ONNX Runtime on the CPU, called with tensors and timed."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.export._require import require
from lq.export.inputs import as_args


class OnnxModel:
    """An ONNX file as a function of tensors: ``outputs = OnnxModel("model.onnx")(x)``.

    Args:
        path: the file.
        threads: threads that one operator may use; ``None`` is one for each core.

    Attributes:
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        session: the ``onnxruntime.InferenceSession``.

    Raises:
        ImportError: the extra ``export`` is not installed.
        FileNotFoundError: there is no such file.
        ValueError: ONNX Runtime cannot load it.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        require("onnxruntime")
        import onnxruntime

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"`path` is {str(path)!r}, but there is no such file.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(f"`path` is {str(path)!r}, which ONNX Runtime cannot load: {error}") from error
        self.inputs: tuple[str, ...] = tuple(i.name for i in self.session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self.session.get_outputs())

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs for ``tensors``, which go to the inputs in their order; all on the CPU."""
        if len(tensors) != len(self.inputs):
            raise TypeError(
                f"{self.path.name} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), but {len(tensors)} are given: "
                "give what the model was exported with, without labels."
            )
        return self.run(dict(zip(self.inputs, tensors, strict=True)))

    def run(self, feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Outputs for tensors by the name of the input."""
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in feed.items()}
        return tuple(torch.from_numpy(array) for array in self.session.run(None, arrays))

    def __repr__(self) -> str:
        return f"OnnxModel({str(self.path)!r})"


def compare_latency(models: Mapping[str, Callable[..., Any]], args: Any, repeats: int = 50, warmup: int = 5) -> dict[str, float]:
    """Median time of a call of each model, in milliseconds.

    The models take turns, so that whatever else the machine does meets all of them alike.

    Args:
        models: :class:`OnnxModel`, torch modules on the CPU, or any other function of ``args``, by name.
        args: positional inputs, a tensor or a tuple.
        repeats: timed calls of each model.
        warmup: calls of each before that.

    >>> sorted(compare_latency({"relu": torch.relu, "exp": torch.exp}, torch.ones(2), repeats=3))
    ['exp', 'relu']
    """
    if repeats < 1:
        raise ValueError(f"`repeats` is {repeats}: it must be at least 1.")
    args = as_args(args)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(warmup + repeats):
            for name, model in models.items():
                start = time.perf_counter()
                model(*args)
                if turn >= warmup:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def latency(model: Callable[..., Any], args: Any, repeats: int = 50, warmup: int = 5) -> float:
    """Median time of a call of one model, in milliseconds; arguments as :func:`compare_latency`."""
    return compare_latency({"": model}, args, repeats, warmup)[""]
