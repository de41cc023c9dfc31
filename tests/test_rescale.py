import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import lq
from lq.functional.smooth import smooth_factors


def outliers(*shape, channel=1, dim=1, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x.select(dim, channel).mul_(50)
    return x


def rescaled(model, x, alpha=0.5, **options):
    calibrator = lq.RescalingCalibrator(model, **options)
    calibrator(x)
    return calibrator.rescale(alpha=alpha), calibrator


def actions(calibrator):
    return {group.consumers: (group.action, group.producer) for group in calibrator.groups}


def test_factors_are_the_papers():
    x, w = np.array([16.0, 3.0, 0.5]), np.array([0.25, 2.0, 1.0])
    for alpha in (0.0, 0.3, 1.0):
        expected = x**alpha / w ** (1 - alpha)
        ours = smooth_factors(torch.tensor(x), torch.tensor(w), alpha)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6)


def test_dead_channels_get_one_and_factors_are_bounded():
    factors = smooth_factors(torch.tensor([0.0, 1.0, 1e30, 1e-30]), torch.tensor([1.0, 0.0, 1.0, 1.0]), 1.0)
    torch.testing.assert_close(factors, torch.tensor([1.0, 1.0, 1e4, 1e-4]))


class Net(nn.Module):
    """Norms that fold, directly and through ReLU and pooling, and layers where nothing folds."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.norm = nn.LayerNorm(6)
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        y = self.bn2(self.conv2(x))
        x = self.conv3(F.relu(x + y))
        x = self.norm(x.mean(dim=(2, 3)))
        return self.last(torch.tanh(self.q(x)) * self.k(x))


def trained(model):
    """Statistics and affines that are not the identity."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(0.5, 2)
            m.running_mean.normal_()
        if isinstance(m, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_float_output_stays(dtype, tolerance, alpha):
    torch.manual_seed(0)
    model, x = trained(Net()).to(dtype), outliers(4, 3, 8, 8, dtype=dtype)
    before = model(x)
    after, _ = rescaled(model, x, alpha)
    torch.testing.assert_close(after(x), before, rtol=tolerance, atol=tolerance * before.abs().max().item())


def test_factors_fold_where_only_layers_take_them_and_are_inserted_elsewhere():
    _, calibrator = rescaled(trained(Net()), outliers(4, 3, 8, 8))
    assert actions(calibrator) == {
        ("q", "k"): ("folded", "norm"),
        ("conv1",): ("inserted", ""),
        ("conv2",): ("inserted", ""),  # bn1 feeds the residual add as well
        ("conv3",): ("inserted", ""),
        ("last",): ("folded", "k"),  # the other operand of the gate
    }


def test_a_norm_folds_through_relu_and_pooling():
    model = trained(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    )
    x = outliers(2, 3, 4, 4)
    after, calibrator = rescaled(model, x)
    assert actions(calibrator)[("4",)] == ("folded", "1")
    torch.testing.assert_close(after(x), model(x))
    assert type(after[4]) is nn.Conv2d


@pytest.mark.parametrize("between", [nn.GELU(), nn.Sigmoid(), nn.Softmax(-1)])
def test_nothing_folds_through_what_does_not_let_a_factor_pass(between):
    model = nn.Sequential(nn.LayerNorm(4), between, nn.Linear(4, 2))
    x = outliers(3, 4)
    after, calibrator = rescaled(model, x)
    assert actions(calibrator)[("2",)][0] == "inserted"
    torch.testing.assert_close(after(x), model(x))


def test_a_norm_whose_channels_are_not_the_layers_does_not_fold():
    model = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Linear(5, 2)))
    x = outliers(2, 3, 5, 5)
    after, calibrator = rescaled(model, x)
    assert actions(calibrator) == {("1",): ("inserted", "")}
    torch.testing.assert_close(after(x), model(x))


def test_layers_with_one_input_share_a_factor_and_the_ranges_are_reported():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    x = outliers(8, 4)
    _, calibrator = rescaled(model, x, alpha=1.0)
    (group,) = calibrator.groups
    assert group.channels == 4
    assert group.input_amax[0] == pytest.approx(model[0](x).abs().max().item())
    assert group.input_amax[1] == pytest.approx(1.0)
    assert group.weight_amax[0] == pytest.approx(model[1].weight.abs().max().item())


def test_int8_error_goes_down_on_outlier_channels():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)), outliers(256, 32)
    wanted = model(x)

    def sqnr(quantized):
        lq.quantize_(quantized)
        with lq.calibrating(quantized):
            quantized(x)
        return 10 * torch.log10(wanted.square().sum() / (quantized(x) - wanted).square().sum())

    after, _ = rescaled(model, x)
    assert sqnr(after) > sqnr(model) + 5


def test_shared_weights_and_layers_called_twice():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head, self.twice = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.twice(torch.tanh(self.twice(self.embed(ids)))))

    model, ids = Tied(), torch.tensor([[0, 1], [3, 4]])
    after, calibrator = rescaled(model, ids)
    assert actions(calibrator) == {("twice",): ("inserted", "")}
    assert after.head.weight is after.embed.weight
    torch.testing.assert_close(after(ids), model(ids))


def test_norms_without_affine_do_not_fold():
    model, x = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)), outliers(3, 4)
    after, calibrator = rescaled(model, x)
    assert actions(calibrator) == {("1",): ("inserted", "")}
    torch.testing.assert_close(after(x), model(x))


def test_inplace_has_torchs_meaning():
    x = outliers(3, 4)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    after, _ = rescaled(model, x)
    assert after is not model
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    after, _ = rescaled(model, x, inplace=True)
    assert after is model
    assert not torch.equal(model[1].weight, before["1.weight"])


@pytest.mark.parametrize("excluded", [nn.Linear, "1", "[13]", "instance"])
def test_excluded_modules_are_left(excluded):
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    excluded = model[1] if excluded == "instance" else excluded
    calibrator = lq.RescalingCalibrator(model, excluded_modules=[excluded], args=(outliers(3, 4),))
    if excluded in (nn.Linear, "[13]"):
        with pytest.raises(ValueError, match="nothing to rescale"):
            calibrator.rescale()
    else:
        calibrator.rescale()
        assert actions(calibrator) == {("3",): ("inserted", "")}


USES = {
    "transposed": lambda y: y.mT.sum(),
    "T": lambda y: y.T.sum(),
    "data": lambda y: y.data.sum(),
    "cast": lambda y: y.type(torch.float64).sum().float(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_norm_that_feeds_something_else_too_does_not_fold(use):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.norm(x)
            return self.layer(y) + use(y * 1.0) + use(y)

    model, x = Two(), outliers(3, 4)
    after, calibrator = rescaled(model, x, 0.8)
    assert actions(calibrator) == {("layer",): ("inserted", "")}
    torch.testing.assert_close(after(x), model(x), rtol=1e-4, atol=1e-4)


def test_weights_that_are_computed_or_used_elsewhere_are_left():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(4, 3)
            self.pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.3)

        def forward(self, x):
            return F.linear(self.down(self.pruned(x)), self.down.weight.t())

    model, x = Tied(), outliers(3, 4)
    before = model(x)
    calibrator = lq.RescalingCalibrator(model, args=(x,), inplace=True)
    with pytest.raises(ValueError, match="nothing to rescale"):
        calibrator.rescale()
    assert torch.equal(model(x), before)


def test_an_input_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(input=x)

    after, _ = rescaled(Keyword(), outliers(3, 4))
    assert after.layer.input_quantizer.pre_quant_scale is not None


def test_in_a_quantized_model_layers_with_float_inputs_are_left():
    model = lq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), [lq.QuantRule("2", lq.QuantDescriptor())])
    _, calibrator = rescaled(model, outliers(3, 4))
    assert actions(calibrator) == {("2",): ("inserted", "")}


def test_rescaling_twice_composes():
    model, x = trained(Net()).double(), outliers(4, 3, 8, 8, dtype=torch.float64)
    once, _ = rescaled(model, x, 0.5)
    twice, _ = rescaled(once, x, 0.9)
    torch.testing.assert_close(twice(x), model(x), rtol=1e-10, atol=1e-10)


def test_a_quantized_model_must_be_calibrated_again():
    model, x = lq.quantize_(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))), outliers(3, 4)
    with lq.calibrating(model):
        model(x)
    after, _ = rescaled(model, x)
    assert all(q.amax is None for _, q in lq.named_quantizers(after))


def test_inserted_factors_survive_quantizing_checkpoints_and_dequantizing(tmp_path):
    model, x = trained(Net()), outliers(4, 3, 8, 8)
    after, _ = rescaled(model, x)
    lq.quantize_(after)
    torch.testing.assert_close(after(x), model(x), rtol=1e-4, atol=1e-4)
    torch.save(after.state_dict(), tmp_path / "w.pt")
    fresh = lq.quantize_(Net()).eval()
    fresh.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    torch.testing.assert_close(fresh(x), after(x), rtol=0, atol=0)
    assert type(lq.dequantize_(after).conv1) is nn.Conv2d
    torch.testing.assert_close(after(x), model(x), rtol=1e-4, atol=1e-4)


def test_modes_and_hooks_are_restored():
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout())
    calibrator = lq.RescalingCalibrator(model, inplace=True)
    calibrator(outliers(3, 4))
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# Bad input


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range(alpha):
    model = nn.Linear(4, 2)
    calibrator = lq.RescalingCalibrator(model, args=(outliers(3, 4),))
    with pytest.raises(ValueError, match="alpha"):
        calibrator.rescale(alpha=alpha)


def test_no_batch():
    with pytest.raises(ValueError, match="at least one batch"):
        lq.RescalingCalibrator(nn.Linear(4, 2)).rescale()


def test_nan_in_the_data_names_the_layer_and_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 2))
    calibrator = lq.RescalingCalibrator(model, args=(torch.full((2, 4), float("nan")),), inplace=True)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"NaN or Inf.*0"):
        calibrator.rescale()
    assert torch.equal(model[0].weight, before)


def test_a_second_rescale():
    calibrator = lq.RescalingCalibrator(nn.Linear(4, 2), args=(outliers(3, 4),))
    calibrator.rescale()
    with pytest.raises(RuntimeError, match="already"):
        calibrator.rescale()


@pytest.mark.parametrize("excluded", [nn.Conv2d, nn.Linear(1, 1), "nothing.*"])
def test_an_excluded_module_that_is_not_there(excluded):
    with pytest.raises(ValueError, match="excluded_modules"):
        lq.RescalingCalibrator(nn.Linear(4, 2), excluded_modules=[excluded])
