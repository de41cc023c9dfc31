"""Fits that go from more bits to fewer."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lq
from lq.callbacks import ExactResume, ProgressiveBits, Quantize, SettleWeights
from lq.progressive import changing_widths, widths_of
from tiny import Tiny, loader, trainer

LSQ = lq.QuantDescriptor(2, learn_amax="lsq")
RULES = [
    lq.QuantRule("*", LSQ, LSQ.replace(axis=0, narrow_range=False, normalize=True)),
    lq.QuantRule("net.0", lq.QuantDescriptor(8), lq.QuantDescriptor(8, axis=0)),
]
STAGES = {"0": 4, "0.5 epochs": 3, "1 epoch": 2}


class Watch(Callback):
    def __init__(self):
        self.bits, self.amax = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        head = pl_module.net[4]
        self.bits.append((head.input_quantizer.num_bits, head.weight_quantizer.num_bits, widths_of(pl_module)["net.0.weight"]))
        self.amax.append(head.input_quantizer.amax.item())


def fit(folder, *callbacks, ckpt_path=None, stages=STAGES, model=None, quantize=None, **options):
    seed_everything(0, verbose=False)
    model = model or Tiny()
    given = [ExactResume(), ProgressiveBits(stages, batches=3), quantize or Quantize(RULES, alpha=None, stages=False), *callbacks]
    fitting = trainer(folder, *given, **options)
    fitting.fit(model, loader(shuffle=True), loader(), ckpt_path=ckpt_path)
    return model, fitting


def test_widths_come_down_in_the_parameters_that_the_optimizer_has(tmp_path):
    watch = Watch()
    model, fitting = fit(tmp_path, watch)
    assert watch.bits == [(4, 4, 8)] * 4 + [(3, 3, 8)] * 4 + [(2, 2, 8)] * 8
    # fewer codes, and a smaller range for them
    assert watch.amax[4] < watch.amax[3]
    assert watch.amax[8] < watch.amax[7]
    known = {id(p) for group in fitting.optimizers[0].param_groups for p in group["params"]}
    assert id(model.net[4].weight_quantizer._amax) in known
    again = Watch()
    trainer(tmp_path, again, max_epochs=1).fit(model, loader())
    assert set(again.bits) == {(2, 2, 8)}


def test_an_amax_that_the_descriptor_gives_stays():
    model = lq.quantize_(nn.Sequential(nn.Linear(4, 2)), [lq.QuantRule("*", lq.QuantDescriptor(8, amax=6.0))])
    with changing_widths(model, {"0.input": 4}):
        model(torch.randn(8, 4))
    assert (model[0].input_quantizer.num_bits, model[0].input_quantizer.amax) == (4, 6.0)


def test_a_new_amax_is_that_of_a_calibration():
    torch.manual_seed(0)
    model = lq.quantize_(
        Tiny().eval(), [lq.QuantRule("*", lq.QuantDescriptor(4), lq.QuantDescriptor(4, calib_method="histogram"))]
    )
    x = torch.cat([batch[0] for batch in loader()])
    with lq.calibrating(model, "mse"):
        model(x)
    with changing_widths(model, {"net.0.input": 2, "net.0.weight": 2}):
        model(x)
    wanted = lq.quantize_(Tiny(), [lq.QuantRule("*", lq.QuantDescriptor(2), lq.QuantDescriptor(2, calib_method="histogram"))])
    wanted.load_state_dict(model.state_dict())
    with lq.calibrating(wanted, "mse"):
        wanted(x)
    for role in ("input", "weight"):
        assert model.net[0].quantizers()[role].amax == wanted.net[0].quantizers()[role].amax
    assert model.net[4].input_quantizer.num_bits == 4


@pytest.mark.parametrize("step", [3, 4, 5, 8, 11])
def test_a_fit_that_was_cut_off_ends_the_same(tmp_path, step):
    keep = ModelCheckpoint(tmp_path / "all", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path, keep, enable_checkpointing=True)[0].state_dict()
    resumed = fit(tmp_path, ckpt_path=tmp_path / "all" / f"step={step}.ckpt")[0].state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


class Fails(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise KeyError


def test_after_an_error_widths_are_those_of_the_descriptors_but_in_a_checkpoint_of_it(tmp_path):
    model, saving = Tiny(), ModelCheckpoint(tmp_path, "on_error", save_on_exception=True)
    with pytest.raises(KeyError):
        fit(tmp_path, Fails(), saving, model=model, enable_checkpointing=True)
    saved = tmp_path / "on_error.ckpt"
    assert torch.load(saved, weights_only=True)["callbacks"]["ProgressiveBits"] == {"width": 4}
    assert widths_of(model) == {"net.0.input": 8, "net.0.weight": 8, "net.4.input": 2, "net.4.weight": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": {0: 2, 5: 4}}, "give widths from 8 down to 2"),
        ({"bits": {0: 1}}, "give widths from 8 down to 2"),
        ({"bits": {3: 4}}, "the first stage begins at 0"),
        ({"bits": {0: 4, "later": 2}}, "`bits` is 'later'"),
        ({"batches": 0}, "`batches` is 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveBits(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": {0: 4, 0.5: 3}}, r"`bits` ends with 3, and `net.4.input` has 2 \(2 quantizers are narrower\)"),
        ({"stages": {0: 4, "1 epoch": 3, 2: 2}}, "give them in their order"),
        ({"stages": {0: 4, 16: 2}}, "begins at step 16, and the fit has 16"),
        ({"quantize": Quantize(RULES, alpha=None, keep_best=True, monitor="val_acc", mode="max")}, "`keep_best` is True"),
    ],
)
def test_what_would_end_with_other_bits_is_refused(tmp_path, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, **options)


def test_codes_are_not_frozen_before_the_last_stage(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"`schedule\.settle_after`"):
        fit(tmp_path, SettleWeights(freeze=0.1))
    fit(tmp_path, SettleWeights(freeze=0.1, after="1 epoch"))
