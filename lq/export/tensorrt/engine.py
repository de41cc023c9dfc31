"""TensorRT engines as functions of tensors."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lq.export.tensorrt.build import make_log, require_tensorrt

# TensorRT's names of types that torch has.
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


class _OwnStream:
    """A CUDA stream beside the caller's."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        return int(self.stream.cuda_stream)

    @contextmanager
    def between(self, inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[None]:
        """What the block enqueues runs after what the caller has enqueued so far, and before what it enqueues next."""
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield
        caller.wait_stream(self.stream)
        # memory must not be given to others while the other stream still works on it
        for tensors, stream in ((inputs, self.stream), (outputs, caller)):
            for tensor in tensors:
                tensor.record_stream(stream)

    def milliseconds(self, work: Callable[[], None]) -> float:
        """How long the GPU is busy with what ``work`` enqueues on this stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(self.stream)
        work()
        end.record(self.stream)
        end.synchronize()
        return float(start.elapsed_time(end))


@dataclass(frozen=True)
class Ready:
    """An engine whose inputs and outputs are in their places: ``enqueue`` runs it, and does nothing else.

    Attributes:
        outputs: where the engine writes, in order.
        enqueue: has the engine run on ``stream``, and returns at once.
        stream: the engine's own.
    """

    outputs: tuple[Tensor, ...]
    enqueue: Callable[[], None]
    stream: _OwnStream


class Engine:
    """A plan as a function of tensors: ``outputs = Engine("model.plan")(x)``.

    Work is enqueued on a CUDA stream of its own, in order with the caller's stream, so calls return at once and nothing has to be
    synchronized by hand. Calls from several threads take turns.

    Args:
        plan: what :func:`lq.export.build_engine` wrote, on this GPU and with this version of TensorRT.
        device: the GPU.

    Attributes:
        path: the file.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.

    Raises:
        ImportError, RuntimeError: no TensorRT, or no GPU.
        FileNotFoundError: there is no such file.
        ValueError: TensorRT cannot load it.
    """

    def __init__(self, plan: str | Path, device: str | torch.device = "cuda") -> None:
        trt = require_tensorrt()
        self.path, self.device = Path(plan), _numbered(torch.device(device))
        if not self.path.is_file():
            raise FileNotFoundError(f"`plan` is {str(plan)!r}, but there is no such file: build it with `build_engine`.")
        self._log = make_log(trt)
        # lives as long as the engine
        self._runtime = trt.Runtime(self._log)
        with torch.cuda.device(self.device):
            self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            raise ValueError(
                f"`plan` is {str(plan)!r}, which TensorRT {trt.__version__} cannot load on this GPU: build it here. "
                + self._log.told()
            )
        with torch.cuda.device(self.device):
            self._context = self._engine.create_execution_context()
        self._stream, self._lock, self._trt = _OwnStream(self.device), threading.Lock(), trt
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs: tuple[str, ...] = tuple(name for name in names if is_input[name])
        self.outputs: tuple[str, ...] = tuple(name for name in names if not is_input[name])
        self._dtypes = {name: _dtype(trt, self._engine.get_tensor_dtype(name)) for name in names}
        self._profile = 0

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs, on the GPU, for ``tensors``, which go to the inputs in their order."""
        return self.run(self.named(*tensors))

    def named(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Tensors by the names of the inputs that they go to, in their order."""
        if len(tensors) != len(self.inputs):
            raise TypeError(
                f"{self.path.name} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), but {len(tensors)} are given."
            )
        return dict(zip(self.inputs, tensors, strict=True))

    def run(self, feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Outputs for tensors by the name of the input; they may be on any device, and floating ones in any precision.

        Raises:
            ValueError: inputs that the engine does not have, or lacks; shapes beyond its profiles.
            TypeError: integers of another type than the engine's.
        """
        with self.ready(feed) as ready:
            ready.enqueue()
        return ready.outputs

    @contextmanager
    def ready(self, feed: Mapping[str, Tensor]) -> Iterator[Ready]:
        """Have inputs and outputs in place inside the block, for one run or many; raises what :meth:`run` does."""
        if feed.keys() != set(self.inputs):
            missing = [f"{name!r} is missing" for name in self.inputs if name not in feed]
            unknown = [f"{name!r} is unknown" for name in feed if name not in self.inputs]
            told = ", ".join(missing + unknown)
            raise ValueError(f"{self.path.name} takes {', '.join(self.inputs)}, but of what is given {told}.")
        outputs: list[Tensor] = []
        with self._lock, self._stream.between([t for t in feed.values() if t.device == self.device], outputs):
            inputs = {name: self._prepared(name, tensor) for name, tensor in feed.items()}
            self._choose_profile(inputs)
            for name, tensor in inputs.items():
                self._set_shape(name, tensor)
                self._context.set_tensor_address(name, tensor.data_ptr())
            outputs += [self._output(name) for name in self.outputs]
            yield Ready(tuple(outputs), self._enqueue, self._stream)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise RuntimeError(f"{self.path.name} failed: {self._log.told()}")

    def layers(self) -> list[dict[str, Any]]:
        """What the engine's inspector says of each layer: name, type, inputs and outputs with their formats."""
        inspector = self._engine.create_engine_inspector()
        told = json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        # without details an engine has names only
        return [layer if isinstance(layer, dict) else {"Name": layer} for layer in told["Layers"]]

    def __repr__(self) -> str:
        return f"Engine({str(self.path)!r})"

    def _prepared(self, name: str, tensor: Tensor) -> Tensor:
        dtype = self._dtypes[name]
        if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
            raise TypeError(f"`{name}` is {tensor.dtype}, but {self.path.name} takes {dtype}.")
        return tensor.detach().to(self.device, dtype).contiguous()

    def _choose_profile(self, inputs: dict[str, Tensor]) -> None:
        """Switch to the first profile that all shapes lie in, unless they lie in the present one."""
        number = self._engine.num_optimization_profiles
        fitting = [i for i in range(number) if all(self._fits(name, t.shape, i) for name, t in inputs.items())]
        if not fitting:
            shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
            ranges = [{name: self._range(name, i) for name in inputs} for i in range(number)]
            raise ValueError(
                f"The inputs of {self.path.name} are {shapes}, but it was built for (smallest, usual, largest) of {ranges}: "
                "build it with other `profiles`."
            )
        if self._profile not in fitting:
            self._profile = fitting[0]
            self._context.set_optimization_profile_async(self._profile, self._stream.handle)

    def _range(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        fixed = tuple(self._engine.get_tensor_shape(name))
        if -1 not in fixed:
            return (fixed,) * 3
        return tuple(tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, profile))

    def _fits(self, name: str, shape: torch.Size, profile: int) -> bool:
        low, _, high = self._range(name, profile)
        return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def _set_shape(self, name: str, tensor: Tensor) -> None:
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            raise ValueError(f"`{name}` is {tuple(tensor.shape)}, which {self.path.name} does not take: {self._log.told()}")

    def _output(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if -1 in shape:
            raise ValueError(f"The shape of output `{name}` is {shape}: it depends on data, which is not supported here.")
        output = torch.empty(shape, dtype=self._dtypes[name], device=self.device)
        self._context.set_tensor_address(name, output.data_ptr())
        return output


def _numbered(device: torch.device) -> torch.device:
    """``cuda`` as the GPU that it is: tensors say ``cuda:0``."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def _dtype(trt: ModuleType, dtype: Any) -> torch.dtype:
    # an older version may lack some
    known = {getattr(trt.DataType, name): ours for name, ours in DTYPES.items() if hasattr(trt.DataType, name)}
    if dtype not in known:
        raise ValueError(f"The engine has a tensor of type {dtype}, which torch does not have.")
    return known[dtype]
