"""What an engine does with the layers of its graph."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lq.export.placement import LayerPlacement, Precision, placement_report
from lq.export.tensorrt.engine import Engine

# Types of data as the inspector words them, "Thirty-two wide channel vectorized row major Int8 format." among them; all else is
# float.
TYPES: dict[str, Precision] = {"int8": "INT8", "fp8": "FP8", "e4m3": "FP8", "int4": "INT4"}
# Fields that name the type of a tensor, in the order of preference: TensorRT 11 has split the second one.
FIELDS = ("DataType", "Format/Datatype", "Format", "Type")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of the graph in the engine.

    Attributes:
        placement: what :func:`lq.export.placement_report` expects.
        precision: what it runs in: the type of the data that its kernel takes; ``None`` if no kernel bears its name.
        kernels: names of the engine's layers that it is part of.
    """

    placement: LayerPlacement
    precision: Precision | None
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class EngineReport:
    """An engine beside the graph that it was built of; ``print`` shows it.

    Attributes:
        layers: those of the placement report.
        reformats: names of kernels that only convert tensors.
    """

    layers: tuple[EngineLayer, ...]
    reformats: tuple[str, ...]

    @property
    def differing(self) -> tuple[EngineLayer, ...]:
        """Layers that run in another precision than was expected."""
        return tuple(layer for layer in self.layers if layer.precision not in (None, layer.placement.precision))

    def records(self) -> list[dict[str, Any]]:
        """The layers as dictionaries, for JSON or pandas."""
        return [{**asdict(layer.placement), "engine": layer.precision, "kernels": list(layer.kernels)} for layer in self.layers]

    def __str__(self) -> str:
        rows = [("layer", "operator", "expected", "engine", "kernels")]
        rows += [
            (
                layer.placement.name,
                layer.placement.op,
                layer.placement.precision,
                layer.precision or "-",
                ", ".join(layer.kernels),
            )
            for layer in self.layers
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*(text.ljust(n) for text, n in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows]
        found = f"{len(self.layers)} layers, {len(self.differing)} not as expected; {len(self.reformats)} reformats"
        return "\n".join([*lines, "", found])


def engine_report(plan: str | Path | Engine, onnx: str | Path) -> EngineReport:
    """Which layers of a graph really run in INT8, FP8 or INT4.

    An engine is built with details for its inspector by :func:`lq.export.build_engine`. A fused kernel has the names of its
    layers in its own ("a + b") and in its metadata ("[ONNX Layer: a]").

    Args:
        plan: the engine.
        onnx: the graph that it was built of.

    Raises:
        ImportError, RuntimeError, FileNotFoundError, ValueError: as :class:`Engine` and :func:`placement_report`.
    """
    engine = plan if isinstance(plan, Engine) else Engine(plan)
    kernels = engine.layers()
    parts = [_parts(kernel) for kernel in kernels]
    layers = []
    for placement in placement_report(onnx).layers:
        # a conversion is named after what it is for
        mine = [k for k, names in zip(kernels, parts, strict=True) if placement.name in names and not _converts(k)]
        layers.append(EngineLayer(placement, _precision(mine), tuple(str(kernel["Name"]) for kernel in mine)))
    reformats = tuple(str(kernel["Name"]) for kernel in kernels if _converts(kernel))
    return EngineReport(tuple(layers), reformats)


def _converts(kernel: dict[str, Any]) -> bool:
    return str(kernel.get("LayerType", "")).lower() == "reformat"


def _parts(kernel: dict[str, Any]) -> set[str]:
    """Names of the graph's nodes in one of the engine's layers."""
    from_metadata = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(kernel.get("Metadata", "")))
    return {*from_metadata, *re.split(r" \+ | \|\| ", str(kernel["Name"]))}


def _precision(kernels: list[dict[str, Any]]) -> Precision | None:
    """The lowest type that kernels take, as data or as a weight of their own."""
    if not kernels:
        return None
    tensors = [tensor for kernel in kernels for tensor in (*kernel.get("Inputs", []), kernel.get("Weights")) if tensor]
    types = [str(next((tensor[field] for field in FIELDS if field in tensor), "")) for tensor in tensors]
    found = {word for name in types for word in re.findall(r"[a-z]+[0-9][a-z0-9]*", name.lower())}
    return next((precision for name, precision in TYPES.items() if name in found), "float")
