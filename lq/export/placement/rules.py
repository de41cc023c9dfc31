"""What TensorRT asks of a Q/DQ graph, rule by rule, each with the place in NVIDIA's documentation that says so.

TensorRT's documentation has one page on Q/DQ graphs, "Explicit Quantization" (up to TensorRT 10 a part of "Working with
Quantized Types", before that of "Working with INT8"). What it leaves open is taken from the references of the operators and of
the C++ interface, and from answers of NVIDIA to issues.
"""

from dataclasses import dataclass

GUIDE = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html"
OPERATOR = "https://docs.nvidia.com/deeplearning/tensorrt/operators/docs/Dequantize.html"
LAYER = "https://docs.nvidia.com/deeplearning/tensorrt/api/c_api/classnvinfer1_1_1_i_dequantize_layer.html"

RECOMMENDATIONS = "Explicit Quantization, Q/DQ Layer-Placement Recommendations"
PROCESSING = "Explicit Quantization, TensorRT Processing of Q/DQ Networks"
ONNX = "Explicit Quantization, ONNX Support"
WEIGHT_ONLY = "Explicit Quantization, Weight-Only Quantization"


@dataclass(frozen=True)
class Rule:
    """One thing that TensorRT asks for.

    Attributes:
        id: a short name that stays.
        says: what is asked, and what for.
        section: the page of NVIDIA's documentation and the section there.
        url: where that is.
    """

    id: str
    says: str
    section: str
    url: str = GUIDE


@dataclass(frozen=True)
class Finding:
    """A rule that a layer breaks.

    Attributes:
        rule: which.
        reason: what was found, with names and values.
        blocks: whether the layer runs in float for it; else it costs kernels around the layer only.
    """

    rule: Rule
    reason: str
    blocks: bool = True


# What a layer takes

INPUT_NOT_QUANTIZED = Rule(
    "input-not-quantized",
    "Quantize the input of Conv, ConvTranspose and GEMMs: with the weight alone quantized they compute in float.",
    RECOMMENDATIONS,
)
WEIGHT_NOT_QUANTIZED = Rule(
    "weight-not-quantized",
    "Quantize the weight of Conv, ConvTranspose and GEMMs, and not their input alone.",
    RECOMMENDATIONS,
)
OPERAND_NOT_QUANTIZED = Rule(
    "operand-not-quantized",
    "Quantize both operands of a MatMul or an Add, or neither: a layer is quantized when all of its inputs are.",
    PROCESSING,
)
WEIGHT_NOT_CONSTANT = Rule(
    "weight-not-constant",
    "Q/DQ of a weight starts at an initializer or a Constant: TensorRT quantizes it when it builds the engine.",
    "Explicit Quantization, Quantized Weights",
)
OP_BETWEEN = Rule(
    "op-between",
    "Nothing but what commutes with quantization stands between DequantizeLinear and its layer, or a layer and QuantizeLinear.",
    PROCESSING,
)
CONCAT_SCALES = Rule(
    "concat-scales",
    "What Concat joins has one scale: TensorRT moves Q/DQ past an operator only where scales are equal.",
    "Explicit Quantization, Q/DQ Limitations",
)
MIXED_TYPES = Rule(
    "mixed-types",
    "All quantized inputs of a layer have one type: there are no kernels of INT8 with FP8 or INT4.",
    PROCESSING,
)
FLOAT_TYPES = Rule(
    "float-types",
    "All scales around a layer have one float type: it is that of what DequantizeLinear gives, and a layer takes one type.",
    "Operators, Dequantize, Data Types",
    OPERATOR,
)
BIAS_QUANTIZED = Rule(
    "bias-quantized",
    "Leave the bias in float: DequantizeLinear takes no INT32, and kernels add the bias to their accumulators.",
    "Operators, Dequantize, Data Types",
    OPERATOR,
)

# Scales, zero points, codes

PER_CHANNEL_ACTIVATION = Rule(
    "per-channel-activation",
    "Activations have one scale per tensor; only weights may have one per channel.",
    RECOMMENDATIONS,
)
WEIGHT_AXIS = Rule(
    "weight-axis",
    "A weight has one scale per tensor or per output channel: axis 0 of Conv and of Gemm with transB, the last one of MatMul. "
    "ConvTranspose has them per input channel, axis 0 too (NVIDIA/TensorRT issues 1694 and 2380).",
    ONNX,
)
SCALE_NOT_CONSTANT = Rule(
    "scale-not-constant",
    "Scales are constants when the engine is built.",
    "Operators, Dequantize, Inputs",
    OPERATOR,
)
SCALE_NOT_POSITIVE = Rule(
    "scale-not-positive",
    "Scales are finite and above 0.",
    "C++ API, IDequantizeLayer",
    LAYER,
)
PAIR_SCALES = Rule(
    "pair-scales",
    "QuantizeLinear and the DequantizeLinear behind it have one scale and zero point: else they multiply the tensor.",
    "ONNX operators, DequantizeLinear",
    "https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html",
)
ZERO_POINT = Rule(
    "zero-point",
    "Zero points are 0: TensorRT's quantization is symmetric.",
    "Operators, Dequantize, Inputs",
    OPERATOR,
)
SIGNED_CODES = Rule(
    "signed-codes",
    "Integer codes are signed: INT8, or INT4 in weights; there is no UINT8.",
    "Operators, Dequantize, Data Types",
    OPERATOR,
)
FP8_FORMAT = Rule("fp8-format", "FP8 is FLOAT8E4M3FN: TensorRT reads no other of ONNX's formats.", ONNX)
OPSET = Rule("opset", "FP8 needs opset 19, INT4 opset 21.", ONNX)
INT4_BLOCKS = Rule(
    "int4-blocks",
    "INT4 weights have a scale per block of 64 or 128 values.",
    "Working with Quantized Types, Quantization Granularities",
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html",
)
INT4_GEMM = Rule("int4-gemm", "INT4 is for constant weights of Gemm and MatMul, whose input stays in float.", WEIGHT_ONLY)

# What comes after a layer

SHORTCUT_NOT_QUANTIZED = Rule(
    "shortcut-not-quantized",
    "Quantize the shortcut of a residual Add: then it runs inside the convolution before it, else that hands on float.",
    RECOMMENDATIONS,
)
OUTPUT_NOT_QUANTIZED = Rule(
    "output-not-quantized",
    "An operator without weights that takes codes must give codes: quantize its output too.",
    RECOMMENDATIONS,
)
SPLIT_FUSION = Rule(
    "split-fusion",
    "No Q/DQ between a layer and its BatchNormalization, activation or Add: they become one kernel only if they touch.",
    RECOMMENDATIONS,
)
UNFOLDED_BATCHNORM = Rule(
    "unfolded-batchnorm",
    "Fold BatchNormalization before export: TensorRT itself fuses it with Conv alone (for ConvTranspose see NVIDIA/TensorRT "
    "issue 3412), and only with nothing in between.",
    RECOMMENDATIONS,
)
QDQ_FORMAT = Rule(
    "qdq-format",
    "Quantized models have QuantizeLinear and DequantizeLinear around float operators: TensorRT cannot import QLinearConv, "
    "QLinearMatMul, ConvInteger and MatMulInteger.",
    ONNX,
)

RULES: dict[str, Rule] = {rule.id: rule for rule in list(globals().values()) if isinstance(rule, Rule)}
