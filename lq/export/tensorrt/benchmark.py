"""How fast an engine is."""

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from lq.export.tensorrt.engine import Engine, Ready
from lq.nn.example import as_args


@dataclass(frozen=True)
class EngineLatency:
    """Times of one engine.

    Attributes:
        median_ms: median of the calls, in milliseconds.
        p99_ms: the time that 99 of 100 calls stay within.
        throughput: samples per second, of runs that are enqueued one behind the other.
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
    """Time an engine by CUDA events on its own stream: its kernels, without what Python does around a call.

    Args:
        engine: an INT8 engine.
        args: inputs, a tensor or a tuple, of which axis 0 of the first is the batch; they are in place before the first run.
        against: what to compare with, such as an FP16 engine of the float model. The two take turns, so that whatever else the
            GPU does meets both alike.
        repeats: timed runs of each, for the latency; and as many again for the throughput.
        warmup: runs of each before that.

    Raises:
        ValueError: ``repeats`` below 1; shapes beyond the engine's profiles.
        TypeError: another number of inputs than the engine has.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` is {repeats}: it must be at least 1.")
    tensors = as_args(args)
    engines = [engine] if against is None else [engine, against]
    times: list[list[float]] = [[] for _ in engines]
    with ExitStack() as stack:
        ready = [stack.enter_context(one.ready(one.named(*tensors))) for one in engines]
        for turn in range(warmup + repeats):
            for one, found in zip(ready, times, strict=True):
                elapsed = one.stream.milliseconds(one.enqueue)
                if turn >= warmup:
                    found.append(elapsed)
        together = [one.stream.milliseconds(partial(_enqueue, one, repeats)) for one in ready]
    runs = tensors[0].shape[0] * repeats
    latencies = [_latency(found, 1000 * runs / total) for found, total in zip(times, together, strict=True)]
    return EngineBenchmark(latencies[0], latencies[1] if against is not None else None)


def _enqueue(ready: Ready, repeats: int) -> None:
    for _ in range(repeats):
        ready.enqueue()


def _latency(times: list[float], throughput: float) -> EngineLatency:
    p99 = sorted(times)[max(0, -(-99 * len(times) // 100) - 1)]
    return EngineLatency(statistics.median(times), p99, throughput)
