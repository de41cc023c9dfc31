"""Where quantizers are placed in a fit, and that a checkpoint, or a module, of other rules is told apart."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

import lq
from lq.callbacks import QuantizationAwareTraining, Quantize
from lq.descriptor import resolve_rules
from tiny import CLASSES, FEATURES, Tiny, dataset, loader, trainer


class Named(Tiny):
    """Shares a tensor between two layers; its batches are dicts whose keys ``forward`` does not know."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.net(x) + self.other(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["features"]), batch["class"])

    validation_step = None


def named_batches():
    x, y = dataset().tensors
    return DataLoader([{"features": a, "class": b} for a, b in zip(x, y, strict=True)], 4)


def test_a_calibration_step_also_serves_where_a_target_has_the_module_run(tmp_path):
    class Knowing(Quantize):
        def calibration_step(self, pl_module, batch):
            pl_module(batch["features"])

    model = Named()
    trainer(tmp_path, Knowing(target="tensorrt", alpha=None), max_epochs=1).fit(model, named_batches())
    assert model.other.input_quantizer is model.net[0].input_quantizer
    assert model.other.input_quantizer.amax > 0


def test_a_batch_that_nothing_takes_is_refused_with_the_remedy_also_with_a_target(tmp_path):
    with (
        pytest.warns(UserWarning, match="the module has to run once, and there is no example"),
        pytest.raises(MisconfigurationException, match=r"mapping with the keys .*calibration_step"),
    ):
        trainer(tmp_path, Quantize(target="tensorrt")).fit(Named(), named_batches())


def test_a_checkpoint_of_other_rules_is_refused(tmp_path):
    fit = trainer(tmp_path, QuantizationAwareTraining(), max_epochs=1)
    fit.fit(Tiny(), loader())
    fit.save_checkpoint(path := tmp_path / "int8.ckpt")
    for run in ("fit", "test"):
        with pytest.raises(ValueError, match=r"was quantized by .*num_bits=8.* not by .*num_bits=4"):
            getattr(trainer(tmp_path, QuantizationAwareTraining("w4a8")), run)(Tiny(), loader(), ckpt_path=path)
    with pytest.raises(ValueError, match=r"int8\.ckpt was quantized by .*`rules` as they were"):
        lq.load_quantized(Tiny(), path, "w4a8")
    with pytest.raises(ValueError, match=r"int8\.ckpt was quantized by 1 rules, not by these 2"):
        lq.load_quantized(Tiny(), path, [*resolve_rules("int8"), lq.QuantRule("net.0")])
    # the same rules in other words
    lq.load_quantized(Tiny(), path, resolve_rules("int8"))


def test_a_module_that_is_quantized_by_other_rules_is_refused(tmp_path):
    model = Tiny()
    trainer(tmp_path, Quantize(), max_epochs=1).fit(model, loader())
    trainer(tmp_path, Quantize("int8"), max_epochs=1).fit(model, loader())
    for module in (model, lq.quantize_(Tiny(), "int8")):
        with pytest.raises(MisconfigurationException, match=r"other rules than `rules`: give `rules=lq\.rules_of\(module\)`"):
            trainer(tmp_path, Quantize("w4a8")).fit(module, loader())
    fit = trainer(tmp_path, Quantize(lq.rules_of(model)), max_epochs=1)
    fit.fit(lq.quantize_(lq.dequantize_(copy.deepcopy(model)), lq.rules_of(model)), loader())


def test_quantizers_placed_by_hand_are_saved_with_their_own_rules(tmp_path):
    model = lq.quantize_(Tiny(), "w4a8")
    fit = trainer(tmp_path, Quantize("w4a8"), max_epochs=1)
    fit.fit(model, loader())
    fit.save_checkpoint(path := tmp_path / "w4a8.ckpt")
    assert dict(lq.named_quantizers(lq.load_quantized(Tiny(), path)))["net.0.weight"].num_bits == 4
    # only some of it, of which no list of rules for the whole speaks
    part = Tiny()
    lq.quantize_(part.net, "w4a8")
    fit = trainer(tmp_path, Quantize(), max_epochs=1)
    fit.fit(part, loader())
    fit.save_checkpoint(path)
    with pytest.raises(ValueError, match="does not say which rules"):
        lq.load_quantized(Tiny(), path)


class Shortcut(Tiny):
    def __init__(self):
        super().__init__()
        self.conv, self.example_input_array = nn.Conv1d(1, 1, 3, padding=1), torch.zeros(2, FEATURES)

    def forward(self, x):
        return self.net((x.unsqueeze(1) + self.conv(x.unsqueeze(1))).squeeze(1))


def test_a_checkpoint_with_more_quantizers_says_what_is_missing(tmp_path):
    fit = trainer(tmp_path, Quantize(target="tensorrt"), max_epochs=1)
    fit.fit(Shortcut(), loader())
    fit.save_checkpoint(path := tmp_path / "shortcut.ckpt")
    with pytest.raises(
        RuntimeError, match=r"amax for `conv\.residual` \(1 in all\), where nothing is quantized here: give `target`"
    ):
        trainer(tmp_path, Quantize()).test(Shortcut(), loader(), ckpt_path=path)
    with pytest.raises(ValueError, match=r"shortcut\.ckpt does not fit Tiny.* no module `conv`"):
        lq.load_quantized(Tiny(), path)


def test_loading_a_class_warns_of_nothing(tmp_path):
    fit = trainer(tmp_path, Quantize(), max_epochs=1)
    fit.fit(Tiny(), loader())
    fit.save_checkpoint(path := tmp_path / "int8.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lq.load_quantized(Tiny, path)
