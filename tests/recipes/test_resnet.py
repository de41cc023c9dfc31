"""The tutorial's ResNet with residual quantizers, and the tutorial itself."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn")

from lq.nn import TensorQuantizer
from lq.recipes.resnet import Bottleneck, ResNet, resnet8, resnet50


def test_the_nets_have_the_papers_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in resnet50().parameters()) == 25_557_032
        assert sum(p.numel() for p in resnet8().parameters()) == 77_754


@pytest.mark.parametrize("make", [resnet8, lambda **kw: ResNet(Bottleneck, (1, 2), width=4, channels=1, num_classes=5, **kw)])
def test_float_weights_load_and_the_disabled_net_is_the_float_one(make):
    floating, quantized = make(), make(quantize=True)
    quantized.load_state_dict(floating.state_dict(), strict=True)
    x = torch.randn(2, 1, 16, 16)
    blocks = sum(hasattr(m, "downsample") for m in floating.modules())
    names = [name for name, m in quantized.named_modules() if isinstance(m, TensorQuantizer)]
    assert sum(name.endswith("residual_quantizer") for name in names) == blocks
    with torch.no_grad():
        assert not torch.equal(quantized.eval()(x), floating.eval()(x))
        for module in quantized.modules():
            if isinstance(module, TensorQuantizer):
                module.disable()
        assert torch.equal(quantized(x), floating(x))


def test_checkpoints_of_nvidias_tutorial_load():
    """Names as pytorch-quantization and the tutorial's ``resnet.py`` have them."""
    with torch.device("meta"):
        net = resnet50(quantize=True)
    net.to_empty(device="cpu")
    saved = {name: torch.zeros(()).expand(value.shape) for name, value in net.state_dict().items()}
    layers = {name: m.weight for name, m in net.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    for name, weight in layers.items():
        saved[f"{name}._input_quantizer._amax"] = torch.tensor(2.64)
        saved[f"{name}._weight_quantizer._amax"] = torch.ones(len(weight), *[1] * (weight.dim() - 1))
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        saved |= {f"layer{stage}.{i}.residual_quantizer._amax": torch.tensor(1.5 + i) for i in range(blocks)}
    net.load_state_dict(saved, strict=True)
    assert len(layers) == 54
    assert net.conv1.input_quantizer.amax == pytest.approx(2.64)
    assert net.layer3[2].residual_quantizer.amax == 3.5
    assert net.fc.weight_quantizer.amax.shape == (1000, 1)


def test_the_shortcut_is_what_the_residual_quantizer_sees():
    net = resnet8(quantize=True).eval()
    block = net.layer2[0]
    seen = []
    block.residual_quantizer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        block(x)
        assert torch.equal(seen[0], block.downsample(x))


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    pytest.importorskip("onnxscript")
    code = f"from lq.recipes.resnet_tutorial import main; print(main({str(tmp_path / 'net.onnx')!r}, 6, 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    accuracy = eval(done.stdout.splitlines()[-1])
    steps = ["percentile", "mse", "entropy", "percentile 99.99"]
    assert list(accuracy) == ["float", *(f"calibrated, {s}" for s in steps), "fine-tuned"]
    assert accuracy["float"] > 95
    assert accuracy["fine-tuned"] > accuracy["float"] - 1
    assert all(v > accuracy["float"] - 3 for v in accuracy.values())
    assert (tmp_path / "net.onnx").stat().st_size > 77_000
    assert "layer1.0.residual_quantizer  : TensorQuantizer(8bit fake per-tensor amax=" in done.stdout
