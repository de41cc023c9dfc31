"""Engines out of ONNX Q/DQ graphs, with TensorRT 10 and 11."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lq.staged import staged

Shape = Sequence[int]
# The smallest, the usual and the largest shape of each input.
Profile = Mapping[str, tuple[Shape, Shape, Shape]]

_LOGGER = logging.getLogger(__name__)


def require_tensorrt() -> ModuleType:
    """The module ``tensorrt``.

    Raises:
        ImportError: TensorRT is not installed.
        RuntimeError: torch sees no NVIDIA GPU.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise ImportError(
            'TensorRT is missing: engines need an NVIDIA GPU and `pip install "lightning-lq[tensorrt]"`.'
        ) from error
    if not torch.cuda.is_available():
        raise RuntimeError(
            "TensorRT needs an NVIDIA GPU, and torch sees none: install its driver and torch with CUDA, or use another machine."
        )
    module: ModuleType = tensorrt
    return module


def build_engine(
    onnx: str | Path,
    plan: str | Path,
    *,
    profiles: int | Profile | Sequence[Profile] | None = None,
    workspace: int | None = None,
    timing_cache: str | Path | None = None,
    optimization_level: int | None = None,
) -> Path:
    """Build a TensorRT engine and write it as a plan, for this GPU and this version of TensorRT.

    The network is strongly typed: what the graph says is what runs. Layers between Q and DQ run in their type; the others in that
    of the graph, so export with ``precision="fp16"`` for speed. (TensorRT 11 has no other networks; 10 is told so.)

    Args:
        onnx: what :func:`lq.export.to_onnx` wrote for ``target="tensorrt"``.
        plan: the file to write.
        profiles: shapes of inputs with free axes: the largest batch, where axis 0 alone is free (then any from 1 on will do, and
            kernels are chosen for the largest); or ``{input: (smallest, usual, largest)}``; or several of these, of which
            :class:`lq.export.Engine` takes the first that fits.
        workspace: bytes of scratch memory that kernels may use; ``None`` is the GPU's whole memory.
        timing_cache: a file of kernel timings, read if it exists and written afterwards: the next build takes a fraction of the
            time, and chooses the same kernels.
        optimization_level: 0 (fast build) to 5 (fast engine); ``None`` is TensorRT's own, 3.

    Returns:
        ``plan``. It is written whole or, on any error, not at all.

    Raises:
        ImportError, RuntimeError: no TensorRT, or no GPU (:func:`require_tensorrt`); or TensorRT found no engine (its messages).
        FileNotFoundError, IsADirectoryError, PermissionError: ``onnx`` is not there, or ``plan`` cannot be written.
        ValueError: a graph that TensorRT cannot read (its messages), ``profiles`` that do not fit the inputs, a timing cache of
            another GPU or version, or an ``optimization_level`` beyond 0 to 5.
    """
    trt = require_tensorrt()
    onnx, plan = Path(onnx), Path(plan)
    if not onnx.is_file():
        raise FileNotFoundError(f"`onnx` is {str(onnx)!r}, but there is no such file.")
    if optimization_level is not None and not 0 <= optimization_level <= 5:
        raise ValueError(f"`optimization_level` is {optimization_level}: it must be 0 (fast build) to 5 (fast engine).")
    log = make_log(trt)
    builder = trt.Builder(log)
    network = _parse(trt, builder, onnx, log)
    config = builder.create_builder_config()
    # what the engine's inspector tells
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    for profile in _profiles(network, profiles):
        _add_profile(builder, config, profile)
    if timing_cache is not None:
        _read_timing_cache(config, Path(timing_cache))
    with staged(plan) as file:
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise RuntimeError(f"TensorRT built no engine of {onnx}: {log.told()}")
        file.write_bytes(memoryview(serialized))
    if timing_cache is not None:
        with staged(Path(timing_cache)) as file:
            file.write_bytes(memoryview(config.get_timing_cache().serialize()))
    return plan


def make_log(trt: ModuleType) -> Any:
    """TensorRT's messages: to Python's ``logging``, and the errors to be shown in exceptions."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            kinds = trt.ILogger.Severity
            if severity in (kinds.INTERNAL_ERROR, kinds.ERROR):
                self.errors.append(message)
                _LOGGER.error(message)
            else:
                _LOGGER.log(logging.WARNING if severity == kinds.WARNING else logging.DEBUG, message)

        def told(self) -> str:
            return " ".join(self.errors[-5:]) or "it gave no reason; `logging.getLogger('lq.export')` at DEBUG shows more."

    return Log()


def _parse(trt: ModuleType, builder: Any, onnx: Path, log: Any) -> Any:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    # from the file, not from bytes: beside it may lie its weights
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = "; ".join(f"{error.node_name() or 'the graph'}: {error.desc()}" for error in errors) or log.told()
        raise ValueError(f"`onnx` is {str(onnx)!r}, which TensorRT cannot read: {told}")
    return network


# Shapes


def _profiles(network: Any, asked: int | Profile | Sequence[Profile] | None) -> list[Profile]:
    """Profiles that fit the inputs of the network; none where all shapes are fixed."""
    shapes = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    free = {name: shape for name, shape in shapes.items() if -1 in shape}
    if not free and asked is None:
        return []
    if asked is None:
        name, shape = next(iter(free.items()))
        raise ValueError(
            f"`profiles` is None, but {', '.join(f'`{n}` is {s}' for n, s in free.items())}: give the largest batch, as "
            f"`profiles=32`, or `{{{name!r}: (smallest, usual, largest)}}` with shapes of {len(shape)} axes."
        )
    if isinstance(asked, int):
        return [_of_batch(free, asked)]
    profiles = [asked] if isinstance(asked, Mapping) else list(asked)
    for profile in profiles:
        _check_profile(profile, shapes, free)
    return profiles


def _of_batch(free: dict[str, tuple[int, ...]], batch: int) -> Profile:
    if batch < 1:
        raise ValueError(f"`profiles` is {batch}: the largest batch must be at least 1.")
    for name, shape in free.items():
        if -1 in shape[1:]:
            raise ValueError(f"`profiles` is {batch}, a batch, but `{name}` is {shape}: give the shapes of this input.")
    return {name: ((1, *shape[1:]), (batch, *shape[1:]), (batch, *shape[1:])) for name, shape in free.items()}


def _check_profile(profile: Profile, shapes: dict[str, tuple[int, ...]], free: dict[str, tuple[int, ...]]) -> None:
    if unknown := profile.keys() - shapes.keys():
        raise ValueError(f"`profiles` has {sorted(unknown)}, but the inputs are {', '.join(shapes)}.")
    if missing := free.keys() - profile.keys():
        raise ValueError(f"`profiles` lacks {sorted(missing)}, whose shapes are free: give (smallest, usual, largest) of each.")
    for name, given in profile.items():
        shape = shapes[name]
        fits = len(given) == 3 and all(
            len(sizes) == len(shape) and all(n in (-1, size) for n, size in zip(shape, sizes, strict=True)) for sizes in given
        )
        if not fits or not all(low <= usual <= high for low, usual, high in zip(*given, strict=True)):
            raise ValueError(
                f"`profiles` has {given} for `{name}`, which is {shape}: give three shapes, (smallest, usual, largest), that "
                "agree with it where it is fixed."
            )


def _add_profile(builder: Any, config: Any, shapes: Profile) -> None:
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.items():
        profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
    if config.add_optimization_profile(profile) < 0:
        raise ValueError(f"`profiles` has {dict(shapes)}, which TensorRT does not take for this graph.")


def _read_timing_cache(config: Any, path: Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ValueError(f"`timing_cache` is {str(path)!r}, of another GPU or version of TensorRT: delete it, or give another.")
