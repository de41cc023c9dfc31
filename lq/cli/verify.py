"""``lq verify``: does the graph of a run, and its engine, compute what its model does?"""

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from lq.cli.deploy import attach_, inputs
from lq.cli.outputs import prepare_folder, write_json
from lq.cli.plain import instantiate
from lq.export import placement_report, verify
from lq.export.difference import RuntimeDifference
from lq.load import load_quantized


def verify_run(cfg: DictConfig) -> dict[str, Any]:
    """Print how the graph of a run differs from its model on the validation data, and write it as ``verification.json``.

    Returns:
        What is in that file.
    """
    folder = Path(cfg.run)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"`run` is {str(folder)!r}, which has no config.yaml: give the output folder of an `lq` run.")
    ran = OmegaConf.load(folder / "config.yaml")
    onnx = Path(cfg.onnx or folder / f"{ran.quant.name}.onnx")
    if not onnx.is_file():
        raise FileNotFoundError(f"`onnx` is {str(onnx)!r}, but there is no such file: give the graph of this run.")
    output = prepare_folder(cfg)
    plan = Path(cfg.plan or onnx.with_suffix(".plan"))
    data: LightningDataModule = instantiate(ran.data)
    model: LightningModule = instantiate(ran.model)
    data.prepare_data()
    data.setup("fit")
    # a graph is verified on the CPU, wherever the run was
    attach_(Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False), model, data)
    if model.example_input_array is None:
        model.example_input_array = next(inputs(model, data))
    load_quantized(model, cfg.ckpt_path or folder / "checkpoints" / f"{ran.quant.name}.ckpt")
    batches = islice(inputs(model, data), cfg.batches)
    # runs of earlier versions do not say
    axis = ran.export.get("class_axis", 1)
    result = verify(model, onnx, plan if cfg.plan or plan.is_file() else None, batches=batches, class_axis=axis)
    print(result)
    runtimes = (result.onnxruntime, result.tensorrt)
    found = {
        "samples": result.samples,
        **{runtime.runtime: _figures(runtime) for runtime in runtimes if runtime is not None},
        "layers": [asdict(layer) for layer in result.layers],
        "placement": _placement(onnx, ran.export.target or "tensorrt"),
    }
    return write_json(found, output / "verification.json")


def _placement(onnx: Path, target: str) -> list[dict[str, Any]] | None:
    """What TensorRT would run in which precision, printed; ``None`` where the graph is laid out for another runtime."""
    if target != "tensorrt":
        print(f"placement: the graph is laid out for {target}, TensorRT's rules are not its own")
        return None
    report = placement_report(onnx)
    print(f"placement: {report.summary}")
    for layer in report.float_layers:
        print(f"  {layer.name} in float: {'; '.join(layer.reasons)}")
    return report.records()


def _figures(runtime: RuntimeDifference) -> dict[str, Any]:
    return {
        "agreement": runtime.agreement,
        "disagreements": runtime.disagreements,
        "worst_disagreement_steps": runtime.worst_disagreement_steps,
        "least_cosine": runtime.least_cosine,
        "outputs": [asdict(o) | {"max_steps": o.max_steps, "mean_steps": o.mean_steps} for o in runtime.outputs],
    }
