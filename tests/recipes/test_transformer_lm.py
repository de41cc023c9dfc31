"""The language model: its text, its positions, that it sees no future, its perplexity, and runs from its config."""

import json
import math

import onnx
import pytest
import torch
from lightning import Trainer

import lq
from lq.recipes.transformer_lm import PIECE, PythonTopicsDataModule, TransformerLM, Windows, manual, rotate
from processes import command

TINY = {"layers": 2, "width": 32, "heads": 2, "hidden": 64}


def data(**kwargs):
    found = PythonTopicsDataModule(limit=11 * PIECE, **kwargs)
    found.setup("fit")
    return found


def trainer(**kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **quiet, **kwargs)


def test_windows_are_followed_by_the_next_bytes():
    windows = Windows("abcdefgh", 3)
    assert [(bytes(x.tolist()), bytes(y.tolist())) for x, y in windows] == [(b"abc", b"bcd"), (b"def", b"efg")]
    # a byte more, and there is something behind the second window; none stands alone
    assert [len(Windows(text, 3)) for text in ("abc", "abcd", "abcdef", "abcdefg")] == [0, 1, 1, 2]
    assert windows[0][0].dtype == torch.int64


def test_what_is_held_out_is_in_no_train_text():
    text = manual()
    assert text == manual()
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 1000
    found = data()
    train, held_out = (bytes(split.bytes.tolist()).decode() for split in (found.train_set, found.val_set))
    assert held_out == text[9 * PIECE : 10 * PIECE]
    assert train == text[: 9 * PIECE] + text[10 * PIECE : 11 * PIECE]
    # what a cut leaves at both ends apart
    assert not [p for p in held_out.split("\n\n")[1:-1] if len(p) > 40 and p in train]


def test_rotary_positions_turn_complex_numbers():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    angles = torch.outer(torch.arange(5), 10_000.0 ** (-torch.arange(4) / 4)).double()
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    found = rotate(x, angles.cos(), angles.sin())
    assert torch.allclose(found, torch.cat([expected.real, expected.imag], dim=-1))


def test_a_prediction_sees_what_is_before_it_and_where():
    torch.manual_seed(0)
    model = TransformerLM(**TINY, max_length=16).eval()
    tokens = torch.randint(0, 256, (1, 16))
    other = tokens.clone()
    other[0, 10] = (other[0, 10] + 1) % 256
    with torch.no_grad():
        logits, changed, shorter = model(tokens), model(other), model(tokens[:, :7])
    assert logits.shape == (1, 16, 256)
    assert torch.equal(logits[:, :10], changed[:, :10])
    assert (logits[:, 10:] != changed[:, 10:]).any(dim=2).all()
    assert torch.allclose(logits[:, :7], shorter, atol=1e-6)
    # the same bytes in another order
    swapped = tokens[:, [1, 0, *range(2, 16)]]
    assert not torch.allclose(model(swapped)[:, -1], logits[:, -1], atol=1e-6)


def test_size():
    assert (
        sum(p.numel() for p in TransformerLM().parameters()) == 4 * (4 * 128**2 + 3 * 128 * 512 + 2 * 128) + 2 * 256 * 128 + 128
    )


def test_it_learns_and_perplexity_is_per_byte():
    torch.manual_seed(0)
    model, text = TransformerLM(**TINY, lr=1e-2), data(batch_size=32)
    (before,) = trainer().validate(model, datamodule=text, verbose=False)
    assert before["val_perplexity"] == pytest.approx(256, rel=0.02)
    fit = trainer(max_epochs=4)
    fit.fit(model, datamodule=text)
    assert fit.optimizers[0].param_groups[0]["lr"] < 1e-4
    assert [g["weight_decay"] for g in fit.optimizers[0].param_groups] == [0.1, 0.0]
    # by hand: each byte that has one before it in its window, all alike
    with torch.no_grad():
        parts = [(model.eval()(x[None])[0].log_softmax(-1), y) for x, y in text.val_set]
    likelihoods = torch.stack([logs.gather(1, y[:, None]).squeeze(1) for logs, y in parts])
    assert likelihoods.shape == (len(text.val_set), 128)
    assert fit.callback_metrics["val_perplexity"].item() == pytest.approx(math.exp(-likelihoods.mean()), rel=1e-4)
    assert fit.callback_metrics["val_perplexity"] < 40


def test_int8_graph_takes_other_batches_and_lengths(tmp_path):
    torch.manual_seed(0)
    model = TransformerLM(**{**TINY, "layers": 1}).eval()
    tokens = torch.randint(0, 256, (4, 128))
    calibrator = lq.RescalingCalibrator(model, inplace=True, args=(tokens,))
    calibrator(tokens)
    calibrator.rescale(alpha=0.5)
    # norms, values and gates take all factors in
    assert [group.action for group in calibrator.groups] == ["folded"] * 5
    lq.quantize_(model, "int8", target="tensorrt", args=tokens)
    with lq.calibrating(model, method="mse"):
        model(tokens)
    shapes = {"tokens": {0: "batch", 1: "length"}}
    path = lq.export.to_onnx(model, tokens, tmp_path / "lm.onnx", dynamic_shapes=shapes)
    for size in ((3, 17), (1, 1)):
        found = lq.export.verify(model, path, batches=[torch.randint(0, 256, size)], class_axis=-1)
        assert found.predictions.shape == size
        assert found.onnxruntime.agreement == 1


@pytest.mark.slow
def test_experiment(tmp_path):
    told = [
        *("experiment=transformer_lm", "quant=w4a16", "quant.weight.block_size=32", f"data.limit={11 * PIECE}"),
        *("data.batch_size=64", "float_epochs=1", "calib.batches=1", "schedule.keep_best=true", "export.latency_batch=4"),
        *("model.layers=1", "model.width=32", "model.hidden=64", "model.heads=2"),
        *("logger=none", "trainer.enable_progress_bar=false", "hydra.run.dir=out"),
    ]
    result = command(tmp_path, *told)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["onnxruntime/val_perplexity"] == pytest.approx(metrics["qat/val_perplexity"], rel=1e-3)
    assert metrics["agreement"] > 0.99
    assert metrics["w4a16/bytes"] < 0.8 * metrics["float/bytes"]
    assert "transformer_lm: float to w4a16" in result.stdout
    # of all bytes, not of all windows
    assert f"of {128 * len(data().val_set)} predictions" in result.stdout
    graph = onnx.load(tmp_path / "out" / "w4a16.onnx").graph
    assert [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", "length"]
    codes = [t for t in graph.initializer if t.name.endswith("weight_quantized")]
    assert {t.data_type for t in codes} == {onnx.TensorProto.INT4}
    assert len(codes) == 8
