"""A stand-in for the parts of TensorRT's Python API that are used, strict about their order: an engine that doubles its input."""

import enum
import json
from pathlib import Path

import torch

__version__ = "10.99"


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.made = True


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = range(2)


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32 = range(4)


class _Tensor:
    def __init__(self, name, shape):
        self.name, self.shape = name, shape


class _Network:
    def __init__(self, flags):
        self.flags, self.parsed = flags, None

    @property
    def num_inputs(self):
        return len(self.parsed["inputs"])

    def get_input(self, i):
        return _Tensor(*list(self.parsed["inputs"].items())[i])


class _Error:
    def node_name(self):
        return "conv1/Conv"

    def desc(self):
        return "no such operator"


class OnnxParser:
    """Reads JSON instead of ONNX: ``{"inputs": {name: shape}, "build": bool}``."""

    def __init__(self, network, logger):
        assert isinstance(logger, ILogger)
        assert logger.made
        self.network, self.num_errors = network, 0

    def parse_from_file(self, path):
        try:
            self.network.parsed = json.loads(Path(path).read_text())
        except ValueError:
            self.num_errors = 1
            return False
        return True

    def get_error(self, i):
        assert i < self.num_errors
        return _Error()


class _Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, *shapes):
        assert all(isinstance(shape, tuple) for shape in shapes)
        self.shapes[name] = shapes


class _Cache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content + b"+timings"


class _Config:
    def __init__(self):
        self.profiling_verbosity, self.builder_optimization_level, self.pools, self.profiles, self.cache = None, 3, {}, [], None

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool.name] = size

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, content):
        return _Cache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return not cache.content.startswith(b"other")

    def get_timing_cache(self):
        return self.cache


class Builder:
    def __init__(self, logger):
        assert isinstance(logger, ILogger)
        self.logger = logger

    def create_network(self, flags):
        return _Network(flags)

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        if not network.parsed.get("build", True):
            self.logger.log(ILogger.Severity.ERROR, "no kernel for node conv1/Conv")
            return None
        free = {name for name, shape in network.parsed["inputs"].items() if -1 in shape}
        assert all(free <= profile.keys() for profile in config.profiles)
        assert config.profiles or not free, "a free shape needs a profile"
        plan = {
            "inputs": network.parsed["inputs"],
            "layers": network.parsed.get("layers", []),
            "profiles": config.profiles,
            "flags": network.flags,
            "verbosity": config.profiling_verbosity.name,
            "level": config.builder_optimization_level,
            "pools": config.pools,
        }
        return json.dumps(plan).encode()


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, content):
        try:
            return _Engine(json.loads(content))
        except ValueError:
            self.logger.log(ILogger.Severity.ERROR, "built by another version")
            return None


class _Engine:
    def __init__(self, plan):
        self.plan, self.names = plan, [*plan["inputs"], *(f"{name}_out" for name in plan["inputs"])]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), max(1, len(plan["profiles"]))

    def get_tensor_name(self, i):
        return self.names[i]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.plan["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType.INT32 if name.startswith("ids") else DataType.HALF

    def get_tensor_shape(self, name):
        return self.plan["inputs"][name.removesuffix("_out")]

    def get_tensor_profile_shape(self, name, profile):
        return self.plan["profiles"][profile][name]

    def create_execution_context(self):
        return _Context(self)

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, kind):
        assert kind is LayerInformationFormat.JSON
        return json.dumps({"Layers": self.plan["layers"]})


# Live tensors by the address that a context is given.
MEMORY = {}


class _Context:
    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses, self.streams = engine, 0, {}, {}, []

    def set_optimization_profile_async(self, profile, stream):
        self.profile, self.shapes = profile, {}
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.plan["profiles"][self.profile][name] if self.engine.plan["profiles"] else [shape] * 3
        self.shapes[name] = shape
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name):
        # that of an output is known once all inputs have theirs
        known = self.shapes.keys() >= self.engine.plan["inputs"].keys()
        return self.shapes[name.removesuffix("_out")] if known else (-1,)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert self.addresses.keys() == set(self.engine.names), "a tensor has no address"
        self.streams.append(stream)
        for name in self.engine.plan["inputs"]:
            source, target = MEMORY[self.addresses[name]], MEMORY[self.addresses[f"{name}_out"]]
            assert source.is_contiguous()
            torch.mul(source, 2, out=target)
        return True
