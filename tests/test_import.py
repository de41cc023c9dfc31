import subprocess
import sys

OPTIONAL = [
    "hydra",
    "omegaconf",
    "wandb",
    "sklearn",
    "matplotlib",
    "rich",
    "markdown",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "onnxruntime",
    "tensorrt",
    "safetensors",
]


def test_import_needs_no_optional_package():
    # lightning and torchmetrics try some of them themselves, so they come first
    code = f"""
import sys, lightning.pytorch, torchmetrics
for name in {OPTIONAL}:
    sys.modules[name] = None
import lq
assert lq.callbacks.QuantizationAwareTraining()
assert all(hasattr(lq, name) for name in lq.__all__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_command_says_what_to_install():
    code = "import sys; sys.modules['hydra'] = None; sys.argv = ['lq']; from lq.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'pip install "lightning-lq[recipes,export]"' in result.stderr
