"""Corrections in a fit: they do what they do alone, on the fit's batches, and a checkpoint has what they changed."""

import copy
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks import Quantize
from lq.corrections import (
    activation_channel_equalization_,
    input_scaling_,
    reestimate_batchnorm_,
    relu_unbound_correction_,
    shift_negative_activation_correction_,
    weights_bias_correction_,
)
from tiny import trainer

ALL = [
    activation_channel_equalization_,
    relu_unbound_correction_,
    input_scaling_,
    partial(shift_negative_activation_correction_, ratio=1.0),
    weights_bias_correction_,
    reestimate_batchnorm_,
]


class Net(LightningModule):
    """BatchNorm, a ReLU between layers with uneven channels, a GELU, and layers without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.head = nn.Linear(8, 16), nn.Linear(16, 4, bias=False)
        with torch.no_grad():
            self.a.weight *= torch.logspace(-1, 1, 8).view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3))
        return self.head(nn.functional.gelu(self.c(x)))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.randint(4, (16,), generator=generator)


def data() -> DataLoader:
    return DataLoader(TensorDataset(*images()), batch_size=4)


def fit(tmp_path, callback: Quantize, model: Net | None = None, epochs: int = 1, **kwargs) -> Net:
    torch.manual_seed(0)
    model = model or Net()
    trainer(tmp_path, callback, max_epochs=epochs).fit(model, data(), **kwargs)
    return model


class Remember(Quantize):
    """Has what the module was before its first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.found = copy.deepcopy(pl_module.state_dict())


def test_statistics_are_estimated_behind_biases_and_not_those_that_are_held(tmp_path):
    callback = Quantize(corrections=[reestimate_batchnorm_, weights_bias_correction_])
    fit(tmp_path, callback)
    assert list(callback.corrected) == ["weights_bias_correction", "reestimate_batchnorm"]

    held = Net()
    held.norm.eval()
    with pytest.raises(ValueError, match="Net has no BatchNorm to estimate"):
        fit(tmp_path, Quantize(corrections=[reestimate_batchnorm_]), model=held)
    assert torch.equal(held.norm.running_mean, torch.zeros(8))


@pytest.mark.parametrize("target", [None, "tensorrt"])
def test_corrections_of_a_fit_are_those_of_the_functions(tmp_path, target):
    callback = Remember("int8", corrections=ALL, alpha=None, batches=4, method="max", target=target)
    model = fit(tmp_path, callback)
    torch.manual_seed(0)
    alone, batches = Net().eval(), [(x,) for x in images()[0].split(4)]
    done = {}
    for correction in ALL[:-2]:
        options = {"fold": False} if correction is activation_channel_equalization_ else {}
        done[len(done)] = correction(alone, batches, **options)
    lq.quantize_(alone, "int8", target=target, args=batches[0])
    with lq.calibrating(alone):
        for batch in batches:
            alone(*batch)
    for correction in ALL[-2:]:
        done[len(done)] = correction(alone, batches)
    assert list(callback.corrected) == [
        "activation_channel_equalization",
        "relu_unbound_correction",
        "input_scaling",
        "shift_negative_activation_correction",
        "weights_bias_correction",
        "reestimate_batchnorm",
    ]
    assert [*callback.corrected.values()] == [*done.values()]
    assert all(found.applied for found in callback.corrected.values())
    expected = alone.state_dict()
    assert callback.found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(callback.found[name], value, msg=lambda told, name=name: f"{name}: {told}")
    assert isinstance(model.norm, nn.BatchNorm2d)
    x = images()[0]
    assert torch.equal(model.eval()(x), model(x))


def test_the_optimizer_knows_the_new_biases(tmp_path):
    model = fit(tmp_path, Quantize(corrections=[weights_bias_correction_]))
    known = {id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(model.a.bias), id(model.head.bias)} <= known
    assert Net().head.bias is None


def test_a_fit_goes_on_from_its_checkpoint_and_the_model_is_built_from_it(tmp_path):
    model = fit(tmp_path, Quantize(corrections=ALL))
    model.trainer.save_checkpoint(path := tmp_path / "half.ckpt")
    whole = fit(tmp_path, Quantize(corrections=ALL), epochs=2)
    again = Quantize(corrections=ALL)
    resumed = fit(tmp_path, again, epochs=2, ckpt_path=path)
    assert again.corrected == {}
    state = resumed.state_dict()
    assert state.keys() == whole.state_dict().keys()
    x = images()[0]
    torch.testing.assert_close(resumed.eval()(x), whole.eval()(x))
    loaded = lq.load_quantized(Net(), path)
    torch.testing.assert_close(loaded(x), lq.load_quantized(Net, path)(x))
    tested = Net()
    trainer(tmp_path, Quantize(corrections=ALL)).predict(tested, DataLoader(x, batch_size=16), ckpt_path=path)
    assert torch.equal(tested.eval()(x), loaded(x))


def test_a_correction_that_fails_leaves_a_module_that_can_be_fitted(tmp_path):
    def fails(model, batches):
        raise RuntimeError("no")

    model = Net()
    with pytest.raises(RuntimeError, match="no"):
        fit(tmp_path, Quantize(corrections=[fails]), model=model)
    assert all(q.amax is None for _, q in lq.named_quantizers(model))
    fit(tmp_path, Quantize(), model=model)
    assert all(q.amax is not None for _, q in lq.named_quantizers(model))


def test_forward_by_keyword_only_is_refused(tmp_path):
    class Keyword(Net):
        def forward(self, *, x: Tensor) -> Tensor:
            return super().forward(x)

        def training_step(self, batch):
            return self(x=batch["x"]).sum()

    rows = DataLoader([{"x": x} for x in images()[0]], batch_size=4)
    with pytest.raises(MisconfigurationException, match="`forward` takes x by keyword only, and corrections run it by position"):
        trainer(tmp_path, Quantize(corrections=[input_scaling_], target=None), max_epochs=1).fit(Keyword(), rows)
