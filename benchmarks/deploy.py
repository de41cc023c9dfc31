"""What INT8 is worth in ONNX Runtime on the CPU: size and latency of a file in float and in INT8, and what runs in integers.

    python benchmarks/deploy.py [--models ResNet-50 MobileNetV2 BERT-base] [--batch 1] [--repeats 20] [--threads 1]
                                [--image-size 224] [--sequence 128] [--target onnxruntime]

Networks have random weights; random data calibrates the quantizers and gives BatchNorms their statistics. Both files come from
``lq.export.to_onnx(target="onnxruntime")``, quantizers stand where ``lq.quantize_(target=...)`` puts them. Columns:

- ``MB`` and ``ms``: of float and of INT8, and the ratio INT8 / float; below 1 INT8 wins. Latency is a median over ``--repeats``
  turns, in which both run once each. Ratios are what to compare between machines.
- ``int8 kernels``, ``float kernels``: nodes of the INT8 file after ONNX Runtime optimized it, by operator. A quantized layer
  among the float ones computes on dequantized codes: slower than in the float file, which has no Q and DQ to pay for.
- ``Q + DQ``: nodes that move between the two. A file that runs in integers throughout has one Q per input, one DQ per output.
- ``steps``: largest and mean difference to torch, in steps of the last layer (:func:`lq.export.verify`). ONNX Runtime rounds
  biases to int32, which flips single codes, and deep random networks amplify each flip on its way.

One thread by default: with more, the threads of the session that waits spin for a while, on the cores of the one that runs.
8-bit products need VNNI, AMX or Arm's dot products for their full speed: the first line says what the CPU has.
"""

import argparse
import copy
import re
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import torch
from networks import NETWORKS, WORDS, with_statistics
from timing import describe_machine
from torch import Tensor, nn

import lq
from lq.analysis.tables import Table
from lq.export import OnnxModel, compare_latency, to_onnx, verify
from lq.placement import TARGETS

# Samples that calibrate; as many as the batch has, if these are more.
SAMPLES = 8
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
COLUMNS = ["Model", "batch", "MB", "MB INT8", "MB ratio", "ms", "ms INT8", "ms ratio"]
COLUMNS += ["int8 kernels", "float kernels", "Q + DQ", "steps"]

INTEGER = re.compile(r"QLinear.*|QGemm|QAttention|.*MatMulInteger.*")
FLOAT = re.compile(r"(Fused)?(Conv|ConvTranspose|Gemm|MatMul)")


def describe_runtime(threads: int) -> str:
    """ONNX Runtime, and the instructions for 8-bit products that the CPU has, as Linux names them."""
    file = Path("/proc/cpuinfo")
    words = set(file.read_text().split()) if file.exists() else set()
    found = ", ".join(name for name in INSTRUCTIONS if name in words) or "none known"
    return f"onnxruntime {onnxruntime.__version__}, threads: {threads}, instructions for 8-bit products: {found}"


def sample(name: str, arguments: argparse.Namespace) -> Tensor:
    """Token ids or images, more than a batch of them."""
    count = max(SAMPLES, arguments.batch)
    if name.startswith("BERT"):
        return torch.randint(0, WORDS, (count, arguments.sequence))
    return torch.randn(count, 3, arguments.image_size, arguments.image_size)


def quantized(model: nn.Module, data: Tensor, target: str) -> nn.Module:
    """A calibrated copy."""
    copied = copy.deepcopy(model)
    lq.quantize_(copied, "int8", target=None if target == "none" else target, args=(data,))
    with torch.no_grad(), lq.calibrating(copied):
        copied(data)
    return copied


def optimized_operators(path: Path) -> Counter[str]:
    """Nodes by operator after ONNX Runtime's optimizations for this CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that what it saves serves this CPU only
    optimized = path.with_suffix(".optimized.onnx")
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(optimized, load_external_data=False).graph.node)


def listed(operators: Counter[str], pattern: re.Pattern[str]) -> str:
    """``3 QLinearConv, 1 QGemm``: operators that match, the most frequent first."""
    return ", ".join(f"{n} {name}" for name, n in operators.most_common() if pattern.fullmatch(name)) or "-"


def compared(values: tuple[float, float]) -> list[str]:
    """Float, INT8, and INT8 / float."""
    return [*(f"{value:.1f}" for value in values), f"{values[1] / values[0]:.2f}"]


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """A row of the table."""
    torch.manual_seed(0)
    data = sample(name, arguments)
    x = data[: arguments.batch]
    model = with_statistics(NETWORKS[name](), data)
    int8 = quantized(model, data, arguments.target)
    # two samples: a batch of one would fix its size
    paths = [to_onnx(m, data[:2], folder / f"{name}.{n}.onnx", target="onnxruntime") for n, m in (("f", model), ("q", int8))]
    sizes = [path.stat().st_size / 1e6 for path in paths]
    sessions = [OnnxModel(path, arguments.threads) for path in paths]
    latency = compare_latency(dict(zip(("float", "INT8"), sessions, strict=True)), x, arguments.repeats)
    operators = optimized_operators(paths[1])
    difference = verify(int8, paths[1], batches=[data[:2]]).onnxruntime.outputs[0]
    return [
        name,
        str(arguments.batch),
        *compared((sizes[0], sizes[1])),
        *compared((latency["float"], latency["INT8"])),
        listed(operators, INTEGER),
        listed(operators, FLOAT),
        str(operators["QuantizeLinear"] + operators["DequantizeLinear"]),
        f"{difference.max_steps:.1f}, {difference.mean_steps:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="that one operator may use")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--sequence", type=int, default=128, help="tokens for BERT, 512 at most")
    parser.add_argument("--target", choices=(*TARGETS, "none"), default="onnxruntime", help="for which quantizers are placed")
    arguments = parser.parse_args()
    print(f"{describe_machine()}; {describe_runtime(arguments.threads)}")
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, arguments, Path(folder)))
    table = Table("Float and INT8 in ONNX Runtime", COLUMNS, rows)
    print(f"\n{table.title}\n\n{table.markdown()}")


if __name__ == "__main__":
    main()
