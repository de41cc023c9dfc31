"""``quantize_(target="tensorrt")``: quantizers on residual adds, shared scales, and what happens to them later."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks import Quantize
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, QuantDescriptor, QuantRule
from lq.load import load_quantized
from lq.nn import TensorQuantizer
from lq.placed import Placement, placement_of
from lq.surgery import is_quantized, quantize_as_


class Block(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs)) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return F.relu(out)


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), Block(4, 4), Block(4, 8)).eval()


def placed(model: nn.Module, x: Tensor = IMAGES, rules: object = "int8") -> nn.Module:
    """Quantized for TensorRT, and calibrated."""
    lq.quantize_(model, rules, target="tensorrt", args=x)
    with lq.calibrating(model):
        model(x)
    return model


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in lq.named_quantizers(model) if not name.endswith("weight")}


# Residual adds


def test_shortcuts_are_quantized_and_nothing_else_changes():
    model = net()
    expected = model(IMAGES)
    lq.quantize_(model, target="tensorrt", args=IMAGES)
    assert torch.equal(model(IMAGES), expected)
    found = {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, TensorQuantizer)}
    shortcuts = {"2.conv2.residual_quantizer", "3.conv2.residual_quantizer"}
    assert {name for name in found if "residual" in name} == shortcuts
    assert {name for name in found if name not in shortcuts} == {
        f"{conv}.{role}_quantizer"
        for conv in ("0", "2.conv1", "2.conv2", "3.conv1", "3.conv2", "3.downsample.0")
        for role in ("input", "weight")
    }


EIGHT = QuantRule("*", INT8_INPUT, INT8_WEIGHT)
SIX = INT8_INPUT.replace(num_bits=6)


@pytest.mark.parametrize(
    ("rules", "bits"),
    [
        ([EIGHT], {"residual": [8, 8], "branch": [8, 8]}),
        ([EIGHT, QuantRule("*.residual", SIX)], {"residual": [6, 6], "branch": [8, 8]}),
        ([EIGHT, QuantRule("2.conv2.branch", SIX)], {"residual": [8, 8], "branch": [6, 8]}),
        ([EIGHT, QuantRule("*.branch"), QuantRule("3.conv2.residual")], {"residual": [8, None], "branch": [None, None]}),
        # the last that matches wins, and those of the layer are for its shortcut too
        ([QuantRule("*.residual", SIX), EIGHT], {"residual": [8, 8], "branch": [8, 8]}),
        ([EIGHT, QuantRule("3*conv2", SIX, INT8_WEIGHT)], {"residual": [8, 6], "branch": [8, 6]}),
        ([EIGHT, QuantRule("*.residual", SIX, types=("Linear",))], {"residual": [8, 8], "branch": [8, 8]}),
    ],
)
def test_a_rule_may_name_a_shortcut(rules, bits):
    model = lq.quantize_(net(), rules, target="onnxruntime", args=IMAGES)
    for role, expected in bits.items():
        found = [model[block].conv2.quantizers().get(role) for block in (2, 3)]
        assert [None if quantizer is None else quantizer.num_bits for quantizer in found] == expected
    with lq.calibrating(model):
        model(IMAGES)
    alike = quantize_as_(net(), rules, placement_of(model))
    assert {name: q.quant_desc for name, q in lq.named_quantizers(alike)} == {
        name: q.quant_desc for name, q in lq.named_quantizers(model)
    }
    alike.load_state_dict(model.state_dict())
    assert torch.equal(alike(IMAGES), model(IMAGES))


def test_without_a_target_there_are_no_shortcuts_to_name():
    with pytest.raises(ValueError, match=r"'\*.residual' matches no quantizable layer"):
        lq.quantize_(net(), [EIGHT, QuantRule("*.residual", SIX)])


def test_a_shortcut_below_zero_says_so():
    model = placed(net())
    model[3].conv2.residual_quantizer.quant_desc = INT8_INPUT.replace(unsigned=True)
    model[3].conv2.residual_quantizer.amax = 1.0
    with pytest.raises(ValueError, match="`unsigned` is True, but"):
        model(IMAGES)


def test_add_takes_the_quantized_shortcut():
    # by hand: the formula of the block with the quantizer in its place
    model = placed(net())
    block = model[3]
    x = model[:3](IMAGES)
    out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    shortcut = block.downsample(x)
    quantizer = block.conv2.residual_quantizer
    assert float(quantizer.amax) == pytest.approx(float(_float_shortcut().detach().abs().max()), rel=1e-6)
    assert not torch.equal(quantizer(shortcut), shortcut)
    assert torch.equal(block(x), F.relu(out + quantizer(shortcut)))


def _float_shortcut() -> Tensor:
    model = net()
    return model[3].downsample(model[:3](IMAGES))


def test_a_block_may_be_an_expression_and_its_main_path_may_be_nested():
    class Inverted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    model = placed(nn.Sequential(Inverted(), Inverted()).eval())
    assert "1.conv.3.residual_quantizer" in dict(model.named_modules(remove_duplicate=False))
    block = model[0]
    assert torch.equal(block(IMAGES), block.conv[3].residual_quantizer(IMAGES) + block.conv(IMAGES))


def test_onnx_runtime_has_both_operands_quantized():
    model = net()
    lq.quantize_(model, target="onnxruntime", args=IMAGES)
    with lq.calibrating(model):
        model(IMAGES)
    block = model[3]
    x = model[:3](IMAGES)
    out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    residual, branch = block.conv2.residual_quantizer, block.conv2.branch_quantizer
    assert float(branch.amax) != float(residual.amax)
    assert torch.equal(block(x), F.relu(branch(out) + residual(block.downsample(x))))
    lq.dequantize_(model)
    assert torch.equal(model(IMAGES), net()(IMAGES))


def test_shortcut_in_training_has_a_gradient():
    model = placed(net()).train()
    x = IMAGES.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())


def test_blocks_with_quantizers_of_their_own_are_left_alone():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.quantizer = nn.Conv2d(3, 3, 1), TensorQuantizer(QuantDescriptor())

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.quantizer(x)

    model = placed(nn.Sequential(Own()).eval())
    assert names(model) == {"0.conv.input", "0.quantizer"}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x))) + x


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.add(x, x.roll(1, 0))


class Behind(nn.Module):
    """A residual add behind something that is computed by itself."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Scaled(Behind):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.layers(x)


class Keyword(Behind):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.layers(x), other=x)


class Broadcast(Behind):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x.mean(dim=(2, 3), keepdim=True)


def conv() -> nn.Module:
    return nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Twice(), "`0.conv` runs several times"),
        (Between(), "another add runs between"),
        (Behind(conv(), nn.SiLU()), "SiLU stands between `0.layers.0` and the add"),
        (Behind(conv(), nn.GroupNorm(1, 3)), "GroupNorm stands between"),
        (Behind(nn.ConvTranspose2d(3, 3, 1)), "`0.layers.0` is a transposed convolution"),
        (Scaled(conv()), "mul stands between|__rmul__ stands between"),
        (Keyword(conv()), "what is added to `0.layers.*` has another shape, or is given by keyword"),
        (Broadcast(conv()), "what is added to `0.layers.*` has another shape, or is given by keyword"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_placed_is_named_and_left(block, reason):
    model = nn.Sequential(block).eval()
    with pytest.warns(UserWarning, match=rf"float for tensorrt \(`0`: {reason}.*QuantAdd"):
        lq.quantize_(model, target="tensorrt", args=IMAGES)
    assert not any("residual" in name for name in names(model))


@pytest.mark.filterwarnings("error")
def test_adds_that_no_convolution_feeds_are_nobodys_business():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = nn.Linear(6, 6), nn.Conv2d(3, 3, 1)
            self.place = nn.Parameter(torch.ones(3, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x + F.gelu(self.linear(self.conv(x) + self.place + 1))

    lq.quantize_(Encoder().eval(), target="tensorrt", args=IMAGES)


def test_a_block_that_runs_in_a_loop():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model = placed(Loop().eval())
    block = model.block
    once = block(IMAGES)
    assert torch.equal(model(IMAGES), block(once))
    # the range of both calls
    float_model = lq.dequantize_(copy.deepcopy(model)).block
    largest = max(IMAGES.abs().max(), float_model(IMAGES).abs().max())
    assert float(block.conv2.residual_quantizer.amax) == pytest.approx(float(largest.detach()))


def test_an_error_in_a_block_leaves_no_mode_behind():
    model = placed(net())
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5, 6, 6))
    with pytest.raises(RuntimeError):
        model[2](torch.randn(2, 4))
    x, y = torch.randn(3), torch.randn(3)
    assert torch.equal(x + y, torch.tensor([float(a) + float(b) for a, b in zip(x, y, strict=True)]))
    assert torch.equal(model(IMAGES), model(IMAGES))


# Shared scales


def test_what_takes_one_tensor_shares_a_quantizer():
    model = placed(net())
    # the shortcut of the first block is its first convolution's input; a pool between producer and consumer changes nothing
    assert model[2].conv2.residual_quantizer is model[2].conv1.input_quantizer
    assert model[3].downsample[0].input_quantizer is model[3].conv1.input_quantizer
    assert model[3].conv2.residual_quantizer is not model[3].conv1.input_quantizer


def test_concatenated_tensors_share_an_amax():
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.side, self.both = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            wide = self.stem(x)
            return self.both(torch.cat([F.max_pool2d(self.side(wide), 1), wide], 1))

    model = placed(Concat().eval())
    assert model.both.input_quantizer is model.side.input_quantizer
    assert model.stem.input_quantizer is not model.side.input_quantizer
    wide = lq.dequantize_(copy.deepcopy(model)).stem(IMAGES)
    side = lq.dequantize_(copy.deepcopy(model)).side(wide)
    assert float(model.both.input_quantizer.amax) == pytest.approx(float(torch.cat([wide, side]).detach().abs().max()), rel=1e-6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))) + x


def test_q_k_and_v_share_one_and_their_adds_stay():
    x = torch.randn(2, 5, 8)
    model = placed(Attention().eval(), x)
    assert model.q.input_quantizer is model.k.input_quantizer is model.v.input_quantizer
    assert names(model) == {"q.input", "out.input"}


def test_other_descriptors_are_not_shared():
    x = torch.randn(2, 5, 8)
    rules = [QuantRule("*", INT8_INPUT, INT8_WEIGHT), QuantRule("v", INT8_INPUT.replace(num_bits=4), INT8_WEIGHT)]
    model = placed(Attention().eval(), x, rules)
    assert model.q.input_quantizer is model.k.input_quantizer
    assert model.q.input_quantizer is not model.v.input_quantizer


def test_a_learned_range_is_one_parameter():
    x = torch.randn(2, 5, 8)
    learned = QuantDescriptor(amax=1.0, learn_amax=True)
    model = placed(Attention().eval(), x, [QuantRule("*", learned, INT8_WEIGHT)])
    ranges = [name for name, _ in model.named_parameters() if "clip" in name]
    assert {name.split(".")[0] for name in ranges} == {"q", "out"}
    model.train()(x).square().sum().backward()
    assert float(model.q.input_quantizer.clip.clip_value_max.grad) != 0


def test_smoothquant_takes_shared_quantizers_apart_where_it_inserts_factors():
    x = torch.randn(32, 5, 8) * torch.logspace(-1, 1, 8)
    model = Attention().eval()
    lq.quantize_(model, target="tensorrt", args=x)
    shared = model.q.input_quantizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrator = lq.RescalingCalibrator(model, inplace=True)
        calibrator(x)
        calibrator.rescale(alpha=0.5)
    assert model.q.input_quantizer.pre_quant_scale is not None
    expected = Attention().eval()
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    with lq.calibrating(model):
        model(x)
    # each has its own factor now, and the numbers are those that it had
    assert sum(q is shared for q in (model.q.input_quantizer, model.k.input_quantizer, model.v.input_quantizer)) <= 1
    again = Attention().eval()
    lq.quantize_(again, target="tensorrt", args=x)
    assert again.q.input_quantizer is again.k.input_quantizer
    for name, quantizer in lq.named_quantizers(model):
        if quantizer.pre_quant_scale is not None:
            again.get_submodule(name.removesuffix(".input")).input_quantizer.pre_quant_scale = torch.ones(8)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_values_that_differ_in_a_state_dict_are_not_made_one():
    model = placed(Attention().eval(), x := torch.randn(2, 5, 8))
    state = model.state_dict()
    state["k.input_quantizer._amax"] = 2 * state["k.input_quantizer._amax"]
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    assert float(other.k.input_quantizer.amax) == 2 * float(model.q.input_quantizer.amax)
    assert other.q.input_quantizer is other.v.input_quantizer is not other.k.input_quantizer
    assert torch.equal(other.q.input_quantizer.amax, model.q.input_quantizer.amax)
    model.load_state_dict(model.state_dict())
    assert model.q.input_quantizer is model.k.input_quantizer
    assert torch.isfinite(other(x)).all()


# Later


def test_copies_state_dicts_and_dequantize():
    model = placed(net())
    expected = model(IMAGES)
    twin = copy.deepcopy(model)
    twin[2].conv2.residual_quantizer.amax = 0.1
    assert torch.equal(model(IMAGES), expected)
    assert not torch.equal(twin(IMAGES), expected)
    loaded = lq.quantize_(net(), target="tensorrt", args=IMAGES)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(IMAGES), expected)
    lq.dequantize_(model)
    assert torch.equal(model(IMAGES), net()(IMAGES))
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    # and again
    assert torch.equal(placed(model)(IMAGES), expected)


def test_compiled_whole():
    model = placed(net())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES), atol=1e-6, rtol=1e-5)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.example_input_array = IMAGES[:1]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(module: LightningModule, folder: object, epochs: int, target: str = "tensorrt", **options: object) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Quantize(target=target, batches=2, keep_best=False)],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 3, 6, 6)), batch_size=4), **options)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_fit_trains_with_it_and_its_checkpoint_restores_it(tmp_path):
    module = Module()
    fit(module, tmp_path, 1).save_checkpoint(tmp_path / "model.ckpt")
    assert {"net.2.conv2.residual_quantizer._amax", "net.3.conv2.residual_quantizer._amax"} <= module.state_dict().keys()
    module.eval()
    loaded = load_quantized(Module(), tmp_path / "model.ckpt")
    assert torch.equal(loaded(IMAGES), module(IMAGES))
    resumed = Module()
    fit(resumed, tmp_path, 1, ckpt_path=tmp_path / "model.ckpt")
    assert torch.equal(resumed.eval()(IMAGES), module(IMAGES))


class Sample(Module):
    """No example, but a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_first_batch_is_example_enough_and_the_checkpoint_needs_none(tmp_path, target):
    module = Sample()
    fit(module, tmp_path, 1, target=target).save_checkpoint(tmp_path / "model.ckpt")
    roles = {"residual"} if target == "tensorrt" else {"residual", "branch"}
    assert {f"net.2.conv2.{role}" for role in roles} <= names(module)
    loaded = load_quantized(Sample(), tmp_path / "model.ckpt")
    assert torch.equal(loaded(IMAGES), module.eval()(IMAGES))
    assert placement_of(loaded) == placement_of(module)
    # without a Trainer's checkpoint the target has to be said
    torch.save(module.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="has quantized shortcuts, and does not say for which target: give `target`"):
        load_quantized(Sample(), tmp_path / "model.pt", "int8")
    loaded = load_quantized(Sample(), tmp_path / "model.pt", "int8", target=target, args=IMAGES[:1])
    assert torch.equal(loaded(IMAGES), module(IMAGES))
    with pytest.raises(TypeError, match="`model` exists already, and 'width' would be for its class"):
        load_quantized(Sample(), tmp_path / "model.ckpt", width=3)


class Blind(Sample):
    """No ``forward`` that an example could be for."""

    forward = LightningModule.forward

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()


def test_without_an_example_a_warning_says_what_is_left(tmp_path):
    module = Blind()
    with pytest.warns(UserWarning, match=r"Only inputs and weights .*Blind has no `forward`.*`example_input_array`, or"):
        fit(module, tmp_path, 1)
    assert names(module)
    assert placement_of(module) == Placement({}, [], [])


# Errors


@pytest.mark.parametrize(
    ("desc", "message"),
    [
        (QuantDescriptor(num_bits=16), "`num_bits=16`"),
        (QuantDescriptor(num_bits=(5, 2)), "E4M3"),
        (QuantDescriptor(num_bits=8, unsigned=True), "use 7 bits"),
        (QuantDescriptor(axis=1), "one scale per tensor"),
        (QuantDescriptor(block_size=2, axis=0, num_bits=4), "4-bit weights"),
    ],
)
def test_descriptors_without_kernels(desc, message):
    model = net()
    with pytest.raises(ValueError, match=rf"rule '\*' has `input`.*{message}"):
        lq.quantize_(model, [QuantRule("*", desc, INT8_WEIGHT)], target="tensorrt", args=IMAGES)
    assert not is_quantized(model)


def test_unknown_target_and_no_example():
    with pytest.raises(ValueError, match="`target` is 'tvm'"):
        lq.quantize_(net(), target="tvm", args=IMAGES)
    with pytest.raises(ValueError, match="`target` is 'trt'"):
        Quantize(target="trt")
    with pytest.raises(ValueError, match="TensorRT takes at most 8 bits"):
        Quantize([QuantRule("*", QuantDescriptor(num_bits=16))], target="tensorrt")
    with pytest.raises(ValueError, match="`target='tensorrt'` has the model run once: give `args`, or Sequential an `exa"):
        lq.quantize_(net(), target="tensorrt")


def test_a_run_that_fails_leaves_the_model_in_float():
    model = net()
    with pytest.raises(RuntimeError):
        lq.quantize_(model, target="tensorrt", args=torch.randn(1, 7, 4, 4))
    assert not is_quantized(model)
    assert type(model[0]) is nn.Conv2d
