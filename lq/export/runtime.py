"""ONNX models in ONNX Runtime on the CPU, called with tensors and timed."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.export._require import require
from lq.nn.example import as_args

# ONNX Runtime's names of types that NumPy has.
FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


class OnnxModel:
    """An ONNX file as a function of tensors: ``outputs = OnnxModel("model.onnx")(x)``.

    With its optimizations ONNX Runtime computes in integers, with biases rounded to int32, which moves values that lie close to
    the border between two codes. Without them the graph runs node by node, as it is written. What changes more than that is left
    out (seen in 1.32): in FP8 graphs Relus would be dropped, with fewer than 8 bits biases be rounded to coarse steps, and
    inputs of layers with 4-bit weights be rounded to int8.

    Args:
        path: the file, or a serialized graph.
        threads: threads that one operator may use; ``None`` is one for each core.
        optimize: let ONNX Runtime rewrite the graph for its kernels.

    Attributes:
        path: the file, if there is one.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        session: the ``onnxruntime.InferenceSession``.

    Raises:
        ImportError: the extra ``export`` is not installed.
        FileNotFoundError: there is no such file.
        ValueError: ONNX Runtime cannot load it.
    """

    def __init__(self, path: str | Path | bytes, threads: int | None = None, *, optimize: bool = True) -> None:
        require("onnx", "onnxruntime")
        import onnxruntime

        self.optimize = optimize
        self.path = None if isinstance(path, bytes) else Path(path)
        if self.path is not None and not self.path.is_file():
            raise FileNotFoundError(f"`path` is {str(path)!r}, but there is no such file.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = threads or 0
        # 1: products in float32
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            if not optimize:
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            graph = path if isinstance(path, bytes) else str(path)
            providers, wrong = ["CPUExecutionProvider"], _wrong_optimizers(path)
            self.session = onnxruntime.InferenceSession(graph, options, providers=providers, disabled_optimizers=wrong)
        except Exception as error:
            # which of its operators it names first, and whether with the type, is by chance
            remedy = " (bfloat16 is not for the CPU: export in fp32 or fp16.)" if "NOT_IMPLEMENTED" in str(error) else ""
            raise ValueError(f"`path` is {self._name!r}, which ONNX Runtime cannot load: {error}{remedy}") from error
        self.inputs: tuple[str, ...] = tuple(i.name for i in self.session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self.session.get_outputs())
        self._types = {i.name: FLOATS.get(i.type) for i in self.session.get_inputs()}

    @property
    def _name(self) -> str:
        return "a serialized graph" if self.path is None else str(self.path)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs for ``tensors``, which go to the inputs in their order; all on the CPU."""
        if len(tensors) != len(self.inputs):
            raise TypeError(
                f"{self._name} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), but {len(tensors)} are given: "
                "give what the model was exported with, without labels."
            )
        return self.run(dict(zip(self.inputs, tensors, strict=True)))

    def run(self, feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Outputs for tensors by the name of the input; what is floating there comes in the precision of the graph."""
        arrays = {name: self._array(name, tensor) for name, tensor in feed.items()}
        return tuple(torch.from_numpy(array) for array in self.session.run(None, arrays))

    def _array(self, name: str, tensor: Tensor) -> Any:
        dtype = self._types.get(name) if tensor.is_floating_point() else None
        return tensor.detach().to("cpu", dtype).contiguous().numpy()

    def __repr__(self) -> str:
        return f"OnnxModel({self._name!r})"


def _wrong_optimizers(path: str | Path | bytes) -> list[str]:
    """Names of ONNX Runtime's optimizers that change what a graph computes."""
    import onnx

    model = onnx.load_from_string(path) if isinstance(path, bytes) else onnx.load(path, load_external_data=False)
    clipped = {node.output[0] for node in model.graph.node if node.op_type == "Clip"}
    few_bits = any(node.op_type == "QuantizeLinear" and node.input[0] in clipped for node in model.graph.node)
    has_fp8 = any(constant.data_type == onnx.TensorProto.FLOAT8E4M3FN for constant in model.graph.initializer)
    # one rounds biases to the product of both steps, which is coarse where those are; others take FP8 for codes that begin at 0
    return ["WeightBiasQuantization"] * few_bits + ["ReluQuantRewrite", "ClipQuantRewrite"] * has_fp8


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
