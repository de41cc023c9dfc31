"""What export refuses: early, by name, and without a trace in the folder."""

import os
import sys

import pytest
import torch
from torch import Tensor, nn

import lq
from exported import calibrated
from lq.descriptor import INT4_BLOCKS, INT8_INPUT, INT8_WEIGHT, QuantDescriptor, QuantRule
from lq.export import to_onnx

X = torch.randn(4, 3)


def model(input: QuantDescriptor = INT8_INPUT, **weight: object) -> nn.Module:
    rules = [QuantRule("*", input, QuantDescriptor(axis=0).replace(**weight))]
    return calibrated(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), X.abs() if input.unsigned else X, rules=rules)


def uncalibrated() -> nn.Module:
    return lq.quantize_(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


def half_calibrated() -> nn.Module:
    built = model()
    built[2].input_quantizer.amax = None
    return built


def collecting() -> nn.Module:
    built = model()
    built[0].input_quantizer.enable_calib()
    built[0].input_quantizer.disable_quant()
    return built


REFUSED = {
    "uncalibrated": (uncalibrated, "`0.input`, `0.weight`, `2.input`, `2.weight` (4 of 4 quantizers) have no amax"),
    "half calibrated": (half_calibrated, "`2.input` (1 of 4 quantizers) have no amax"),
    "collecting": (collecting, "`0.input` (1 of 4 quantizers) have calibration enabled"),
    "integer codes": (
        lambda: model(INT8_INPUT.replace(fake_quant=False)),
        "`0.input`, `2.input` (2 of 4 quantizers) have `fake_quant=False`",
    ),
    "16 bit input": (
        lambda: model(INT8_INPUT.replace(num_bits=16)),
        "`0.input`, `2.input` (2 of 4 quantizers) have `num_bits=16`",
    ),
    "16 bit weight": (lambda: model(num_bits=16), "`0.weight`, `2.weight` (2 of 4 quantizers) have `num_bits=16`, signed"),
    "e5m2": (
        lambda: model(QuantDescriptor(num_bits=(5, 2))),
        "`0.input`, `2.input` (2 of 4 quantizers) have `num_bits=(5, 2)`, a float",
    ),
    "blocks of inputs": (
        lambda: calibrated(
            nn.Sequential(nn.Linear(256, 4)), torch.randn(2, 256), rules=[QuantRule("*", INT4_BLOCKS, INT8_WEIGHT)]
        ),
        "`0.input` (1 of 2 quantizers) have `block_size=128`",
    ),
    "two axes": (lambda: model(axis=(0, 1)), "`0.weight`, `2.weight` (2 of 4 quantizers) have an amax along 2 axes"),
    "half precision": (lambda: model().half(), "`0.weight` is torch.float16"),
}


@pytest.fixture
def no_export(monkeypatch):
    """The work has not begun when the error comes."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("exported before checking")

    monkeypatch.setattr(torch.onnx, "export", fail)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tmp_path, no_export):
    build, message = REFUSED[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is compared below, it is full of brackets
        to_onnx(build(), X, tmp_path / "model.onnx")
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_disabled_quantizers_are_not_asked(tmp_path):
    built = half_calibrated()
    built[2].input_quantizer.disable()
    to_onnx(built, X, tmp_path / "model.onnx")
    built[2].input_quantizer.enable()
    built[2].input_quantizer.disable_quant()
    to_onnx(built, X, tmp_path / "model.onnx")


def test_folder_must_exist(tmp_path, no_export):
    with pytest.raises(FileNotFoundError, match=r"the folder '.*missing' does not exist: create it"):
        to_onnx(model(), X, tmp_path / "missing" / "model.onnx")


def test_path_must_be_a_file(tmp_path, no_export):
    with pytest.raises(IsADirectoryError, match="give the name of a file"):
        to_onnx(model(), X, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_must_be_writable(tmp_path, no_export):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="nothing can be written there"):
        to_onnx(model(), X, tmp_path / "model.onnx")


def test_folder_that_refuses_a_file(tmp_path, no_export, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(PermissionError, match=r"nothing can be written there \(Permission denied\)"):
        to_onnx(model(), X, tmp_path / "model.onnx")


def test_dynamic_shapes(tmp_path, no_export):
    with pytest.raises(ValueError, match="`dynamic_shapes` is 'auto'"):
        to_onnx(model(), X, tmp_path / "model.onnx", dynamic_shapes="auto")


def test_target(tmp_path, no_export):
    with pytest.raises(ValueError, match="`target` is 'tvm': choose one of tensorrt, onnxruntime"):
        to_onnx(model(), X, tmp_path / "model.onnx", target="tvm")


class FixedBatch(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(4, 3))


def test_fixed_batch_names_the_remedy_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("an earlier export")
    with pytest.raises(Exception) as error:  # noqa: PT011  # torch's own, whatever its class
        to_onnx(FixedBatch(3, 2), X, path)
    assert any("dynamic_shapes=None" in note for note in error.value.__notes__)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "an earlier export"
    to_onnx(FixedBatch(3, 2), X, path, dynamic_shapes=None)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() != b"an earlier export"


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def half(model: object, path: object, **options: object) -> None:
        with open(str(path), "w") as file:  # noqa: PTH123
            file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr("onnx_ir.save", half)
    with pytest.raises(OSError, match="disk full"):
        to_onnx(model(), X, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_forward_does_not_take(tmp_path, no_export):
    for args, kwargs, message in (
        (None, None, "`args` is None: give the positional inputs"),
        ((X, X), None, "do not fit the `forward` of Sequential: too many positional arguments"),
        ((), None, "do not fit the `forward` of Sequential: missing a required argument: 'input'"),
        (X, {"mask": X}, "do not fit the `forward` of Sequential: got an unexpected keyword argument 'mask'"),
    ):
        with pytest.raises(TypeError, match=message):
            to_onnx(model(), args, tmp_path / "model.onnx", kwargs=kwargs)
    with pytest.raises(TypeError, match=r"`model` is 'model.onnx': it must be a torch.nn.Module"):
        to_onnx("model.onnx", X, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"`precision` is torch.float16: choose one of fp32, fp16, bf16"):
        to_onnx(model(), X, tmp_path / "model.onnx", precision=torch.float16)
    with pytest.raises(ValueError, match=r"`precision` is \['fp16'\]: choose one of"):
        to_onnx(model(), X, tmp_path / "model.onnx", precision=["fp16"])
    with pytest.raises(ValueError, match=r"`0.weight` \(8 in all\) is on `meta` and has no values: load the weights first"):
        to_onnx(model().to("meta"), X, tmp_path / "model.onnx")


def test_half_model_needs_the_precision(tmp_path):
    half = nn.Sequential(nn.Linear(3, 4)).half().eval()
    with pytest.raises(ValueError, match=r"`0.weight` is torch.float16, and the graph torch.float32: call `model.float"):
        to_onnx(half, X.half(), tmp_path / "model.onnx")
    to_onnx(half, X.half(), tmp_path / "model.onnx", precision="fp16")


@pytest.mark.parametrize(("weight", "precision", "says"), [({"num_bits": (4, 3)}, "fp32", "FP8"), ({}, "fp16", "half precision")])
def test_opset_says_what_it_is_needed_for(weight, precision, says, tmp_path, no_export):
    built = model(INT8_INPUT.replace(**weight), **weight)
    with pytest.raises(ValueError, match=f"`opset` is 17: QuantizeLinear has .*{says} from opset 19"):
        to_onnx(built, X, tmp_path / "model.onnx", precision=precision, opset=17)


def test_link_is_written_through(tmp_path):
    (tmp_path / "store").mkdir()
    link = tmp_path / "model.onnx"
    link.symlink_to(tmp_path / "store" / "model-1.onnx")
    assert to_onnx(model(), X, link) == link
    assert link.is_symlink()
    assert link.stat().st_size > 0
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["model-1.onnx"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_package(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'`{missing}` is missing.*pip install "lightning-lq\[export\]"'):
        to_onnx(model(), X, tmp_path / "model.onnx")


def test_export_is_quiet(tmp_path, recwarn, capfd):
    to_onnx(model(), X, tmp_path / "model.onnx")
    assert not [w for w in recwarn if "Deprecat" not in str(w.category)]
    assert capfd.readouterr() == ("", "")
