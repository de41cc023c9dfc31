"""Rescaling of torch's own attention and encoders, which read the weights of their layers and never call them."""

import copy

import pytest
import torch
from torch import nn

import lq

E = 8
FOLDED, INSERTED = "folded", "inserted"


def tokens(length=5):
    x = torch.randn(2, length, E, dtype=torch.float64)
    x[..., 3] *= 50
    return x


def encoder(activation="relu", norm_first=True, layers=1, **options):
    layer = nn.TransformerEncoderLayer(E, 2, 16, activation=activation, norm_first=norm_first, batch_first=True)
    return nn.TransformerEncoder(layer, layers, **{"enable_nested_tensor": not norm_first, **options})


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), nn.MultiheadAttention(E, 2, **{"batch_first": True, **options})

    def forward(self, x):
        h = self.norm(x)
        return self.attention(h, h, h, need_weights=False)[0]


class Cross(nn.Module):
    """Queries from one tensor, keys and values from another."""

    def __init__(self, **options):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), nn.MultiheadAttention(E, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(self.norm(x[:, :2]), x, value=x)[0]


class Peeking(Attention):
    """Other code takes the weight too."""

    def forward(self, x):
        return super().forward(x) + nn.functional.linear(x, self.attention.in_proj_weight[:E])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True)

    def forward(self, x):
        x = self.attention(x, x, x)[0]
        return self.attention(x, x, x)[0]


NORM = {("attention",): (FOLDED, "norm")}
VALUES = {("attention.out_proj",): (FOLDED, "attention")}
CASES = {
    "self": (Attention, {**NORM, **VALUES}),
    "sequence first": (lambda: Attention(batch_first=False), {**NORM, **VALUES}),
    "no bias": (lambda: Attention(bias=False), {**NORM, **VALUES}),
    # what is appended to the values is a parameter of its own
    "bias_kv": (lambda: Attention(add_bias_kv=True), {**NORM, ("attention.out_proj",): (INSERTED, "")}),
    "zeros": (lambda: Attention(add_zero_attn=True), {**NORM, ("attention.out_proj",): (INSERTED, "")}),
    "cross": (Cross, {("attention",): (INSERTED, ""), ("attention.out_proj",): (INSERTED, "")}),
    "other widths": (lambda: Cross(kdim=E, vdim=E), None),
    "another reader": (Peeking, {("attention.out_proj",): (INSERTED, "")}),
    "twice": (Twice, {("attention",): (INSERTED, ""), ("attention.out_proj",): (INSERTED, "")}),
    "pre-LN": (
        encoder,
        {
            ("layers.0.self_attn",): (FOLDED, "layers.0.norm1"),
            ("layers.0.self_attn.out_proj",): (FOLDED, "layers.0.self_attn"),
            ("layers.0.linear1",): (FOLDED, "layers.0.norm2"),
            ("layers.0.linear2",): (FOLDED, "layers.0.linear1"),
        },
    ),
    "post-LN": (
        lambda: encoder("gelu", norm_first=False),
        {
            ("layers.0.self_attn",): (INSERTED, ""),
            ("layers.0.self_attn.out_proj",): (FOLDED, "layers.0.self_attn"),
            ("layers.0.linear1",): (INSERTED, ""),
            ("layers.0.linear2",): (INSERTED, ""),
        },
    ),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_the_output_stays_also_on_the_fused_path(name, alpha, grad):
    build, expected = CASES[name]
    torch.manual_seed(0)
    model, x = build().double().eval(), tokens()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0, 0.3)
    with torch.set_grad_enabled(grad):
        before = model(x)
        calibrator = lq.RescalingCalibrator(model, args=(x,))
        after = calibrator.rescale(alpha)(x)
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12 * before.abs().max().item())
    found = {group.consumers: (group.action, group.producer) for group in calibrator.groups}
    if alpha == 0.5 and expected is not None:
        assert found == expected


def test_the_model_is_left_as_it_was():
    model = encoder(norm_first=False)
    state, switches = copy.deepcopy(model.state_dict()), [vars(m).copy() for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    calibrator = lq.RescalingCalibrator(model.float(), args=(tokens().float(),), inplace=True)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == [set(s) for s in switches]
    assert model.layers[0].activation_relu_or_gelu == 1
    assert model.use_nested_tensor
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not calibrator.left


def test_padding_masks_and_nested_tensors():
    model, x = encoder(norm_first=False, layers=2).eval(), tokens().float()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=mask)
        rescaled = lq.RescalingCalibrator(model, args=(x,), kwargs={"src_key_padding_mask": mask}).rescale(0.5)
        after = rescaled(x, src_key_padding_mask=mask)
    torch.testing.assert_close(after[~mask], before[~mask], rtol=1e-5, atol=1e-5)


def test_a_rescaled_encoder_goes_through_a_quantized_life():
    model, x = encoder("gelu", norm_first=False).eval(), tokens().float()
    with torch.no_grad():
        before = model(x)
        rescaled = lq.RescalingCalibrator(model, args=(x,)).rescale("auto")
        lq.quantize_(rescaled)
        with lq.calibrating(rescaled):
            rescaled(x)
        assert (rescaled(x) - before).norm() < 0.1 * before.norm()
        # and back: factors that were inserted go into the weights again
        back = lq.dequantize_(rescaled)
        assert [type(x) for x in back.modules()] == [type(x) for x in model.modules()]
        torch.testing.assert_close(back(x), before, rtol=1e-4, atol=1e-5)


def test_alpha_is_looked_for_at_the_projections():
    """A known case: the weight that meets the loud channel is tiny, so moving all of it costs nothing."""
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(4, 16, E)
    with torch.no_grad():
        model.norm.weight[2] = 100.0
        model.attention.in_proj_weight[:, 2] /= 100
        calibrator = lq.RescalingCalibrator(model, args=(x,))
        calibrator.rescale("auto")
    group = next(g for g in calibrator.groups if g.consumers == ("attention",))
    assert group.alpha > 0.2
    assert group.input_amax[1] < group.input_amax[0] / 5


def test_in_a_quantized_model_attention_must_be_calibrated_again():
    model, x = Attention().eval(), tokens().float()
    lq.quantize_(model)
    with lq.calibrating(model):
        model(x)
    rescaled = lq.RescalingCalibrator(model, args=(x,)).rescale(0.5)
    assert all(q.amax is None for _, q in lq.named_quantizers(rescaled))
    torch.testing.assert_close(rescaled(x), lq.dequantize_(model)(x), rtol=1e-4, atol=1e-4)
