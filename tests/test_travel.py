"""Quantized models go where float models go: copies, pickles, files, other processes, averages."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lq
from lq.descriptor import QuantDescriptor, QuantRule

RULES = [
    *lq.descriptor.PRESETS["int8"],
    QuantRule("*", QuantDescriptor(amax=2.0, learn_amax=True), types="AvgPool2d"),
    QuantRule("*", None, QuantDescriptor(num_bits=4, axis=0, block_size=4), types="Embedding"),
]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)
        self.embedding, self.lstm = nn.Embedding(10, 8), nn.LSTM(8, 6)
        self.attention, self.up, self.head = nn.MultiheadAttention(6, 2), nn.ConvTranspose2d(4, 2, 2), nn.Linear(8, 3)

    def forward(self, x):
        image = self.up(self.pool(self.conv(x))).mean((2, 3))
        states, _ = self.lstm(self.embedding((x.abs() * 3).long().clamp(max=9)[:, 0, :4, 0]))
        attended, _ = self.attention(states, states, states)
        return self.head(torch.cat([image, attended.mean(1)], 1))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model, x = lq.quantize_(Model(), RULES), torch.randn(4, 3, 8, 8)
    with lq.calibrating(model):
        model(x)
    with torch.no_grad():
        return model, x, model(x)


def through_a_file(value, **kwargs):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **kwargs)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: through_a_file(m, weights_only=False),
    "average": lambda m: AveragedModel(m).module,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_compute_the_same_and_live_by_themselves(trained, name):
    model, x, expected = trained
    twin = COPIES[name](model)
    assert torch.equal(twin(x), expected)
    assert repr(twin) == repr(model)
    with torch.no_grad():
        for quantizer in (q for _, q in lq.named_quantizers(twin)):
            quantizer.amax = 2 * quantizer.amax
    assert torch.equal(model(x), expected)


def test_a_state_dict_loads_into_a_fresh_model_by_weights_only(trained):
    model, x, expected = trained
    fresh = lq.quantize_(Model(), RULES)
    fresh.load_state_dict(through_a_file(model.state_dict(), weights_only=True), strict=True)
    assert torch.equal(fresh(x), expected)


@pytest.mark.filterwarnings("ignore:.*no-op")
def test_a_state_dict_loads_on_any_device(trained):
    model, *_ = trained
    fresh = lq.quantize_(Model(), RULES).to("meta")
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert {q.amax.device.type for _, q in lq.named_quantizers(fresh)} == {"meta"}
    fresh.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert {q.amax.device.type for _, q in lq.named_quantizers(fresh)} == {"cpu"}


def test_keys_of_modelopt_load(trained):
    # its amax of blocks lies flat, its factor is that of an input channel
    weight = torch.randn(6, 8)
    model = lq.quantize_(
        nn.Sequential(nn.Linear(8, 6)), [QuantRule("*", QuantDescriptor(), QuantDescriptor(4, axis=0, block_size=4))]
    )
    blocks = weight.reshape(6, 2, 4)
    state = {
        "0.weight": weight,
        "0.bias": torch.zeros(6),
        "0.input_quantizer._amax": torch.tensor(2.0),
        "0.input_quantizer._pre_quant_scale": torch.rand(8),
        "0.weight_quantizer._amax": blocks.abs().amax(2).reshape(12, 1),
    }
    model.load_state_dict(state, strict=True)
    x = torch.randn(5, 8)
    expected = nn.functional.linear(
        lq.tensor_quant.fake_tensor_quant(x * state["0.input_quantizer._pre_quant_scale"], 2.0),
        lq.tensor_quant.fake_tensor_quant(blocks, blocks.abs().amax(2, keepdim=True), 4).reshape(6, 8),
    )
    assert torch.equal(model(x), expected)


def test_an_average_follows_the_weights(trained):
    model, *_ = trained
    average, moved = AveragedModel(model, use_buffers=True), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.1
        for _, quantizer in lq.named_quantizers(moved):
            quantizer.amax = 3 * quantizer.amax
    average.update_parameters(model)
    average.update_parameters(moved)
    torch.testing.assert_close(average.module.head.weight, model.head.weight + 0.05)
    torch.testing.assert_close(average.module.head.input_quantizer.amax, 2 * model.head.input_quantizer.amax)


def run(model, x, queue):
    with torch.no_grad():
        queue.put(model(x).numpy())


@pytest.mark.slow
def test_it_goes_to_a_process_that_is_spawned(trained):
    model, x, expected = trained
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=run, args=(model, x, queue))
    process.start()
    result = queue.get(timeout=120)
    process.join()
    torch.testing.assert_close(torch.from_numpy(result), expected)
