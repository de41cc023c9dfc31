"""What is left of layers' outputs in a quantized model, correction by correction."""

from collections.abc import Mapping

from lq.analysis.tables import Table, decibels_text
from lq.corrections import Corrections

# The name of the model's own output.
OUTPUT = ""
# The stage before any correction.
PLAIN = "quantized"

# How columns and legends call the corrections.
LABELS = {
    "activation_channel_equalization": "channels evened out",
    "relu_unbound_correction": "ReLUs bound",
    "input_scaling": "input scaled",
    "shift_negative_activation_correction": "shifted",
    "weights_bias_correction": "bias corrected",
    "reestimate_batchnorm": "BatchNorm estimated anew",
}

# SQNR in dB by stage, and there by layer.
StagesSqnr = Mapping[str, Mapping[str, float]]


def label(stage: str) -> str:
    """A stage in words: each has all corrections of those before.

    >>> label("quantized"), label("input_scaling")
    ('quantized', '+ input scaled')
    """
    return stage if stage == PLAIN else f"+ {LABELS.get(stage, stage)}"


def layers_of(sqnr: StagesSqnr) -> list[str]:
    """Layers in their order, without the model's output."""
    return list(dict.fromkeys(layer for stage in sqnr.values() for layer in stage if layer != OUTPUT))


def sqnr_table(sqnr: StagesSqnr) -> Table:
    """A row for each layer and for the model, a column for each stage.

    >>> print(sqnr_table({"quantized": {"fc": 20.0, "": 12.5}}).markdown())
    | Layer | quantized |
    | --- | ---: |
    | fc | 20.0 |
    | model | 12.5 |
    """
    rows = [
        [layer or "model", *(decibels_text(found.get(layer)) for found in sqnr.values())] for layer in [*layers_of(sqnr), OUTPUT]
    ]
    return Table("SQNR of outputs (dB)", ["Layer", *map(label, sqnr)], rows)


def correction_table(corrected: Mapping[str, Corrections], left: Mapping[str, str] | None = None) -> Table:
    """What each correction did, and what it left; ``left`` is what calibration left."""
    rows = []
    for name, found in corrected.items():
        rows += [[LABELS.get(name, name), applied.name, applied.detail] for applied in found.applied]
        rows += [[LABELS.get(name, name), where or "model", f"left: {why}"] for where, why in found.left.items()]
    rows += [["calibrated", name, f"left: {why}"] for name, why in (left or {}).items()]
    return Table("Corrections", ["Correction", "Layer", "What"], rows)
