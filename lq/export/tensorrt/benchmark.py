"""How fast an engine is."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lq.export.tensorrt.engine import Engine
from lq.nn.example import as_args


@dataclass(frozen=True)
class EngineLatency:
    """Times of one engine.

    Attributes:
        median_ms: median of the calls, in milliseconds.
        p99_ms: the time that 99 of 100 calls stay within.
        throughput: samples per second, over all calls.
    """

    median_ms: float
    p99_ms: float
    throughput: float


@dataclass(frozen=True)
class EngineBenchmark:
    """An engine, and another one that took turns with it.

    Attributes:
        engine: times of the engine.
        against: times of the other, if there was one.
    """

    engine: EngineLatency
    against: EngineLatency | None

    @property
    def ratio(self) -> float:
        """Median of the engine over that of the other: below 1 it is faster; NaN without another."""
        return float("nan") if self.against is None else self.engine.median_ms / self.against.median_ms


def benchmark_engine(
    engine: Engine, args: Any, *, against: Engine | None = None, repeats: int = 200, warmup: int = 20
) -> EngineBenchmark:
    """Time an engine by CUDA events, from the caller's stream back to it.

    Args:
        engine: an INT8 engine.
        args: inputs, a tensor or a tuple, of which axis 0 of the first is the batch; they are moved to the GPU before.
        against: what to compare with, such as an FP16 engine of the float model. The two take turns, so that whatever else the
            GPU does meets both alike.
        repeats: timed calls of each.
        warmup: calls of each before that.

    Raises:
        ValueError: ``repeats`` below 1.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` is {repeats}: it must be at least 1.")
    tensors = tuple(x.to(engine.device) for x in as_args(args))
    engines = {"engine": engine} | ({} if against is None else {"against": against})
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(warmup + repeats):
        for name, one in engines.items():
            elapsed = _milliseconds(one, tensors)
            if turn >= warmup:
                times[name].append(elapsed)
    batch = tensors[0].shape[0]
    return EngineBenchmark(_latency(times["engine"], batch), _latency(times["against"], batch) if against is not None else None)


def _milliseconds(call: Callable[..., Any], tensors: tuple[Tensor, ...]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call(*tensors)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _latency(times: list[float], batch: int) -> EngineLatency:
    p99 = sorted(times)[max(0, -(-99 * len(times) // 100) - 1)]
    return EngineLatency(statistics.median(times), p99, 1000 * batch * len(times) / sum(times))
