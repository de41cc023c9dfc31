"""What post-training quantization did, layer by layer."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lq.analysis.outputs import OUTPUT, correction_table, layers_of, sqnr_table
from lq.analysis.quantizer_stats import LayerRow
from lq.analysis.tables import Table, layer_table
from lq.corrections import Corrections
from lq.descriptor import QuantRule
from lq.ptq.config import QuantizationConfig

if TYPE_CHECKING:
    import rich.console


@dataclass(frozen=True)
class PtqReport:
    """What was done and what it was worth. ``print`` shows Markdown, rich's ``print`` tables, :meth:`figure` draws.

    Attributes:
        config: what was asked for.
        rules: which quantizers there are, with those that need no sign: :func:`lq.load_quantized` takes them with a state dict.
        quantizers: threshold, method and SQNR of each.
        sqnr: of each layer's output in dB, by stage: ``"quantized"`` without corrections, then with each that is switched on, by
            the names of the config's fields. ``""`` is the model's output. A correction may change what a layer gives in float
            (the next one undoes it): each stage is compared with its own float model.
        corrections: what each did, and what it left.
        left: quantizers that have no threshold and let their input pass, and why.
    """

    config: QuantizationConfig
    rules: list[QuantRule]
    quantizers: list[LayerRow]
    sqnr: dict[str, dict[str, float]]
    corrections: dict[str, Corrections]
    left: dict[str, str]

    @property
    def output_sqnr(self) -> dict[str, float]:
        """SQNR of the model's output in dB, by stage."""
        return {stage: found[OUTPUT] for stage, found in self.sqnr.items()}

    def records(self) -> list[dict[str, Any]]:
        """A dictionary for each layer, and for the model's output: for JSON and pandas."""
        return [
            {
                "layer": layer,
                "sqnr_db": {stage: found.get(layer) for stage, found in self.sqnr.items()},
                "quantizers": [asdict(row) for row in self.quantizers if layer and row.name.rpartition(".")[0] == layer],
                "corrections": {name: done for name, found in self.corrections.items() if (done := _details(found, layer))},
            }
            for layer in [*layers_of(self.sqnr), OUTPUT]
        ]

    def tables(self) -> list[Table]:
        """SQNR of outputs, quantizers, and what the corrections did."""
        tables = [sqnr_table(self.sqnr), layer_table(self.quantizers)]
        done = correction_table(self.corrections, self.left)
        return [*tables, done] if done.rows else tables

    def figure(self, path: str | Path) -> Path:
        """Draw the SQNR of layers, stage by stage, as PNG."""
        from lq.analysis.figures import save_outputs

        return save_outputs(self.sqnr, Path(path))

    def __str__(self) -> str:
        return "\n\n".join(f"{table.title}\n\n{table.markdown()}" for table in self.tables())

    def __rich__(self) -> "rich.console.Group":
        from rich.console import Group

        return Group(*self.tables())


def _details(found: Corrections, layer: str) -> list[str]:
    return [applied.detail for applied in found.applied if applied.name == layer]
