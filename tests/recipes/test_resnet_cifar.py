"""ResNet-20: the paper's size, its checkpoints' names, and a run from a config."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lq.recipes.resnet_cifar import ResNetCifar
from processes import command


def test_size_and_names():
    model = ResNetCifar()
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 million: table 6 of the paper
    names = model.state_dict().keys()
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer3.2.bn2.running_var", "linear.bias"} <= set(names)
    assert len(names) == 19 * 6 + 2


def test_shortcuts_have_zeros_for_new_channels():
    model = ResNetCifar().eval()
    block = model.layer2[0]
    for norm in (block.bn1, block.bn2):
        norm.weight.data.zero_()
    x = torch.rand(1, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.slow
def test_experiment(tmp_path):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in range(10):
            place = tmp_path / "pictures" / split / str(label)
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")
    torch.save(ResNetCifar().state_dict(), tmp_path / "weights.pt")
    told = [
        *("experiment=cifar10_low_bits", "data.path=pictures", "data.cache=cache", "data.batch_size=30", "ckpt_path=weights.pt"),
        *("quant=w4a4", "export=onnx", "schedule.epochs=1", "logger=csv"),
        *("callbacks=distill", "callbacks.compile.disable=false", "+callbacks.compile.backend=eager"),
        *("calib.batches=1", "trainer.enable_progress_bar=false", "hydra.run.dir=out"),
    ]
    result = command(tmp_path, *told)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["agreement"] > 0.9
    rows = {line.split("|")[1].strip(): line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "|" in line}
    bits = {name: rows[name].split("|")[2].strip() for name in rows if name.endswith((".input", ".weight"))}
    assert (bits["conv1.input"], bits["linear.weight"], bits["layer1.0.conv1.input"]) == ("8", "8", "4")
