"""Rescaling of transformers' own classes with random weights: exact, and folded where their graphs allow it."""

import pytest
import torch

import lq

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"input_ids": torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def whisper_encoder():
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    return WhisperEncoder(transformers.WhisperConfig(**sizes, max_source_positions=50, num_mel_bins=8))


def make(kind, **config):
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))


# name: model, inputs, and how many of its groups fold
CASES = {
    "vit": (lambda: make("ViT", **SIZES, image_size=32, patch_size=8), IMAGES, (6, 10)),
    "bert": (lambda: make("Bert", vocab_size=100, **SIZES), IDS, (2, 9)),
    "gpt2": (lambda: make("GPT2", vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=16), IDS, (6, 8)),
    "llama": (lambda: make("Llama", vocab_size=100, num_key_value_heads=2, **SIZES), IDS, (8, 8)),
    "t5": (
        lambda: make(
            "T5", vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        ),
        {**IDS, "decoder_input_ids": IDS["input_ids"]},
        (20, 21),
    ),
    "whisper": (whisper_encoder, {"input_features": torch.randn(2, 8, 100)}, (6, 10)),
    "resnet": (lambda: make("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]), IMAGES, (4, 7)),
    "mobilenet v2": (lambda: make("MobileNetV2", image_size=32, depth_multiplier=0.35), IMAGES, (0, 52)),
    "convnext": (lambda: make("ConvNext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=32), IMAGES, (3, 8)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", CASES)
def test_the_output_stays_and_factors_fold(name, dtype, tolerance):
    build, inputs, (folded, groups) = CASES[name]
    torch.manual_seed(0)
    model = build().eval().to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        before = model(**inputs)[0]
        calibrator = lq.RescalingCalibrator(model, kwargs=inputs)
        after = calibrator.rescale(0.7)(**inputs)[0]
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    assert [g.action for g in calibrator.groups].count("folded") == folded
    assert len(calibrator.groups) == groups
