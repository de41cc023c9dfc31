"""How the benchmarks time: contenders by turns in one process, medians, ratios. Shared machines drift, ratios do not."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender, over ``rounds`` in which all take their turn, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            seconds[name].append(timed(run))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def reuse_memory() -> None:
    """Have glibc keep memory that was freed, as torch's allocator for GPUs does.

    By default it gives large tensors back, and the system hands out pages anew, filled with zeros, at each touch. A job has the
    same of ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`` in its environment.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)):
        raise OSError("Memory is not glibc's to keep here: leave `--reuse` out.")


def describe_machine() -> str:
    """What the figures were measured on."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"torch {torch.__version__}, {where}"
