"""`QuantLSTM` and `QuantLSTMCell` against torch's own in float, and against the textbook on each sequence when quantized."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

import lq
from lq.descriptor import QuantDescriptor
from lq.functional.amax import compute_amax
from lq.functional.fake_quant import fake_tensor_quant
from lq.nn import QuantLSTM, QuantLSTMCell

LSTMS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True, "bidirectional": True},
}
# lengths of the sequences
LAYOUTS = {"one sequence": [6], "batch": [6, 6, 6], "packed": [6, 4, 4], "packed in any order": [2, 6, 4]}


@pytest.fixture(params=LSTMS)
def floating(request):
    return nn.LSTM(5, 4, **LSTMS[request.param]).double()


@pytest.fixture
def quantized(floating):
    """The quantized LSTM of the state and the arguments of the float one."""
    names = ("num_layers", "bias", "batch_first", "bidirectional", "proj_size")
    lstm = QuantLSTM(5, 4, **{n: getattr(floating, n) for n in names}, dtype=torch.float64)
    lstm.load_state_dict(floating.state_dict(), strict=True)
    return lstm


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=["from zeros", "from a state"])
def call(request, layout, floating):
    """Sequences; the input that is made of them; their states ``(layers, sequences, features)``; ``hx`` that is made of those."""
    sequences = [torch.randn(n, 5).double() for n in LAYOUTS[layout]]
    count = floating.num_layers * (2 if floating.bidirectional else 1)
    h, c = (torch.randn(count, len(sequences), n).double() for n in (floating.proj_size or 4, 4))
    if request.param == "from zeros":
        return sequences, laid_out(sequences, layout, floating.batch_first), (0 * h, 0 * c), None
    hx = (h[:, 0], c[:, 0]) if layout == "one sequence" else (h, c)
    return sequences, laid_out(sequences, layout, floating.batch_first), (h, c), hx


def laid_out(sequences, layout, batch_first):
    if "packed" in layout:
        return pack_sequence(sequences, enforce_sorted=layout == "packed")
    return sequences[0] if layout == "one sequence" else torch.stack(sequences, dim=0 if batch_first else 1)


def taken_apart(output, state, layout, batch_first):
    """Output of each sequence, and the final states of all."""
    if layout == "one sequence":
        return [output], [s.unsqueeze(1) for s in state]
    return unpack_sequence(output) if "packed" in layout else output.unbind(0 if batch_first else 1), state


def tensors(result):
    output, state = result
    return (output.data if isinstance(output, PackedSequence) else output, *state)


def textbook(weights, x, h, c, quantize):
    """Output and final states of one sequence ``(steps, features)``, by the equations that the page of ``nn.LSTM`` gives.

    ``quantize(role, value)`` stands wherever a tensor is to be quantized.
    """
    states, final_h, final_c = list(zip(h, c, strict=True)), [], []
    for layer in range(sum(name.startswith("weight_ih") and "reverse" not in name for name in weights)):
        outputs = []
        for s in [f"l{layer}", f"l{layer}_reverse"]:
            if f"weight_ih_{s}" not in weights:
                continue
            w_ih, w_hh, *w_hr = (quantize(n, weights[n]) for n in (f"weight_{k}_{s}" for k in ("ih", "hh", "hr")) if n in weights)
            bias = weights.get(f"bias_ih_{s}", 0) + weights.get(f"bias_hh_{s}", 0)
            h_t, c_t = states.pop(0)
            hidden = {}
            for t in sorted(range(len(x)), reverse="reverse" in s):
                gates = w_ih @ quantize(f"input_{s}", x[t]) + w_hh @ quantize(f"hidden_{s}", h_t) + bias
                i, f, g, o = gates.split(4)
                c_t = torch.sigmoid(f) * c_t + torch.sigmoid(i) * torch.tanh(g)
                h_t = torch.sigmoid(o) * torch.tanh(c_t)
                if w_hr:
                    h_t = w_hr[0] @ quantize(f"projection_{s}", h_t)
                hidden[t] = h_t
            outputs.append(torch.stack([hidden[t] for t in range(len(x))]))
            final_h.append(h_t)
            final_c.append(c_t)
        x = torch.cat(outputs, 1)
    return x, torch.stack(final_h), torch.stack(final_c)


def textbooks(module, call, quantize):
    """Outputs of every sequence alone, and the final states of all."""
    sequences, _, (h, c), _ = call
    weights = dict(module.named_parameters())
    results = [textbook(weights, x, h[:, n], c[:, n], quantize) for n, x in enumerate(sequences)]
    outputs, final_h, final_c = zip(*results, strict=True)
    return outputs, torch.stack(final_h, 1), torch.stack(final_c, 1)


def switch(module, *methods):
    for quantizer in module.quantizers().values():
        for method in methods:
            getattr(quantizer, method)()


def set_amax(module):
    """Give every quantizer an amax that clips; return them by role."""
    ranges = {"input": 1.5, "hidden": 0.25, "projection": 0.2}
    for role, quantizer in module.quantizers().items():
        weight = module.weights().get(role)
        quantizer.amax = ranges[role.split("_")[0]] if weight is None else 0.9 * compute_amax(weight, 0)
    return {role: quantizer.amax.clone() for role, quantizer in module.quantizers().items()}


def rounded(amax):
    def quantize(role, value):
        return fake_tensor_quant(value, amax[role])

    return quantize


# Quantized


def test_quantized_it_is_the_textbook_on_each_sequence_and_so_are_the_gradients(quantized, call, layout):
    amax = set_amax(quantized)
    expected, *final = textbooks(quantized, call, rounded(amax))
    outputs, state = taken_apart(*quantized(call[1], call[3]), layout, quantized.batch_first)
    compared = [*zip(outputs, expected, strict=True), *zip(state, final, strict=True)]
    for ours, theirs in compared:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    factors = [torch.randn_like(theirs) for _, theirs in compared]
    ours, theirs = (
        torch.autograd.grad(sum((v * f).sum() for v, f in zip(values, factors, strict=True)), list(quantized.parameters()))
        for values in zip(*compared, strict=True)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.count_nonzero()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_every_quantizer_has_a_role_of_its_own(floating, quantized):
    suffixes = [f"l{n}{way}" for n in range(floating.num_layers) for way in ["", "_reverse"][: 1 + floating.bidirectional]]
    kinds = ["input", "hidden", "weight_ih", "weight_hh", *["projection", "weight_hr"][: 2 * bool(floating.proj_size)]]
    assert set(quantized.quantizers()) == {f"{kind}_{suffix}" for kind in kinds for suffix in suffixes}
    assert set(quantized.weights()) == {name for name, _ in floating.named_parameters() if "weight" in name}


def test_descriptors_reach_inputs_and_weights():
    four, six = QuantDescriptor(num_bits=4), QuantDescriptor(num_bits=6, axis=0)
    lstm = QuantLSTM(5, 4, 2, proj_size=3, quant_desc_input=four, quant_desc_weight=six)
    cell = QuantLSTMCell(5, 4, quant_desc_input=four, quant_desc_weight=six)
    for module in (lstm, cell):
        for role, quantizer in module.quantizers().items():
            assert quantizer.quant_desc == (six if "weight" in role else four)
    assert {q.quant_desc for role, q in QuantLSTM(5, 4).quantizers().items() if "weight" in role} == {QuantDescriptor(axis=0)}


# In float


def test_disabled_it_is_torchs_own_bit_for_bit(floating, quantized, call, monkeypatch):
    switch(quantized, "disable")
    monkeypatch.delattr(QuantLSTM, "_layers")  # the fused kernel computes, and no loop over time
    _, x, _, hx = call
    ours, theirs = tensors(quantized(x, hx)), tensors(floating(x, hx))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    gradients = (torch.autograd.grad(v[0].square().sum(), m.parameters()) for v, m in ((ours, quantized), (theirs, floating)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_collecting_it_is_close_to_torchs_own_and_takes_the_statistics_of_the_sequences(floating, quantized, call):
    switch(quantized, "disable_quant", "enable_calib")
    _, x, _, hx = call
    result, expected = quantized(x, hx), floating(x, hx)
    for ours, theirs in zip(tensors(result), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert ours.is_contiguous() or not theirs.is_contiguous()
    if isinstance(x, PackedSequence):
        for ours, theirs in zip(result[0][1:], expected[0][1:], strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    seen = {}

    def look(role, value):
        axis = 0 if "weight" in role else None
        seen[role] = torch.maximum(seen.get(role, torch.zeros(())), compute_amax(value, axis).float())
        return value

    with torch.no_grad():
        textbooks(floating, call, look)
    for role, quantizer in quantized.quantizers().items():
        quantizer.load_calib_amax()
        torch.testing.assert_close(quantizer.amax, seen[role], rtol=1e-6, atol=0)


def test_a_factor_on_the_input_acts_even_where_nothing_is_quantized():
    lstm, x = QuantLSTM(5, 4), torch.randn(6, 3, 5)
    switch(lstm, "disable")
    expected = lstm(2 * x)[0]
    lstm.input_l0_quantizer.pre_quant_scale = torch.tensor(2.0)
    torch.testing.assert_close(lstm(x)[0], expected)


def test_dropout_acts_between_layers_while_training():
    lstm, x = QuantLSTM(5, 4, num_layers=2, dropout=1.0), torch.randn(6, 3, 5)
    second = QuantLSTM(4, 4)
    second.load_state_dict({n.replace("l1", "l0"): p for n, p in lstm.state_dict().items() if "l1" in n}, strict=True)
    expected = second(torch.zeros(6, 3, 4))[0]
    assert expected.count_nonzero()
    output, (h, _) = lstm(x)
    assert torch.equal(output, expected)
    lstm.eval()
    assert not torch.equal(lstm(x)[0], expected)
    assert torch.equal(lstm(x)[1][0][0], h[0]), "nothing is dropped from the input"
    assert torch.equal(lstm(x)[0], lstm(x)[0])


def test_an_empty_batch_is_torchs_own():
    lstm = QuantLSTM(5, 4, batch_first=True)
    set_amax(lstm)
    assert [v.shape for v in tensors(lstm(torch.randn(0, 6, 5)))] == [(0, 6, 4), (1, 0, 4), (1, 0, 4)]


@pytest.mark.parametrize(
    ("x", "h", "c"),
    [
        ((6, 3, 5), (1, 1, 4), (1, 3, 4)),
        ((6, 3, 5), (1, 3, 4), (1, 1, 4)),
        ((6, 3, 5), (3, 4), (3, 4)),
        ((6, 5), (1, 1, 4), (1, 1, 4)),
        ((6, 3, 6), None, None),
        ((6, 3, 2, 5), None, None),
        ((5,), None, None),
    ],
)
@pytest.mark.parametrize("quantizes", [True, False])
def test_shapes_that_do_not_fit_are_refused_as_by_torch(x, h, c, quantizes):
    lstm = QuantLSTM(5, 4)
    switch(lstm, "enable" if quantizes else "disable")
    with pytest.raises((RuntimeError, ValueError), match=r"Expected (hidden|input)|dimensions|also be|input_size"):
        lstm(torch.randn(x), None if h is None else (torch.randn(h), torch.randn(c)))


def test_a_packed_state_for_one_sequence_is_refused():
    packed = pack_sequence([torch.randn(6, 5), torch.randn(4, 5)])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 4\)"):
        QuantLSTM(5, 4)(packed, (torch.randn(1, 1, 4), torch.randn(1, 1, 4)))


def test_padding_is_never_seen():
    model = lq.quantize_(nn.Sequential(nn.LSTM(5, 4, num_layers=2, bidirectional=True)))
    x, lengths = torch.rand(6, 3, 5), torch.tensor([2, 6, 4])
    quiet = pack_padded_sequence(x, lengths, enforce_sorted=False)
    x[2:, 0] = x[4:, 2] = 1e6
    loud = pack_padded_sequence(x, lengths, enforce_sorted=False)
    with lq.calibrating(model):
        model(loud)
    assert all(q.amax.max() <= 1 for _, q in lq.named_quantizers(model))
    output, _ = pad_packed_sequence(model(loud)[0])
    assert torch.equal(output, pad_packed_sequence(model(quiet)[0])[0])
    assert not output[2:, 0].any()


# The cell


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("x", "hx"), [((3, 5), None), ((3, 5), (3, 4)), ((5,), None), ((5,), (4,))])
def test_the_cell_is_the_textbook_when_quantized_and_torchs_own_in_float(x, hx, bias, monkeypatch):
    floating, cell = nn.LSTMCell(5, 4, bias).double(), QuantLSTMCell(5, 4, bias).double()
    cell.load_state_dict(floating.state_dict(), strict=True)
    x, hx = torch.randn(x).double(), None if hx is None else (torch.randn(hx).double(), torch.randn(hx).double())
    amax = set_amax(cell)
    h, c = hx or (torch.zeros(*x.shape[:-1], 4).double(),) * 2
    weights = {f"{n}_l0": p for n, p in cell.named_parameters()}
    rows = zip(*(v.reshape(-1, v.shape[-1]) for v in (x, h, c)), strict=True)
    quantize = rounded({f"{role}_l0": value for role, value in amax.items()})
    expected = [textbook(weights, x[None], h[None], c[None], quantize) for x, h, c in rows]
    ours = cell(x, hx)
    for n, state in enumerate(ours, start=1):
        assert state.shape == (*x.shape[:-1], 4)
        torch.testing.assert_close(state.reshape(-1, 4), torch.cat([e[n] for e in expected]), rtol=1e-9, atol=1e-12)
    for gradients in zip(
        torch.autograd.grad(ours[0].sum() + ours[1].sum(), list(cell.parameters())),
        torch.autograd.grad(sum(e[1].sum() + e[2].sum() for e in expected), list(cell.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    switch(cell, "disable_quant", "enable_calib")
    for ours, theirs in zip(cell(x, hx), floating(x, hx), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert cell.input_quantizer.calibrator.compute_amax() == x.abs().max().float()
    assert cell.hidden_quantizer.calibrator.compute_amax() == h.abs().max().float()
    switch(cell, "disable")
    monkeypatch.delattr("lq.nn.rnn.lstm_step")
    assert all(torch.equal(a, b) for a, b in zip(cell(x, hx), floating(x, hx), strict=True))


@pytest.mark.parametrize(("x", "h", "c"), [((3, 5), (1, 4), (3, 4)), ((3, 5), (3, 4), (1, 4)), ((2, 3, 5), (2, 4), (2, 4))])
def test_the_cell_refuses_shapes_that_do_not_fit(x, h, c):
    with pytest.raises(ValueError, match="do not fit"):
        QuantLSTMCell(5, 4)(torch.randn(x), (torch.randn(h), torch.randn(c)))


# In a model


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True, proj_size=3)
        self.cell, self.head = nn.LSTMCell(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        states, _ = self.lstm(x)
        state = self.cell(states[:, 0])
        return self.head(self.cell(states[:, -1], state)[0])


@pytest.fixture
def calibrated():
    model, x = lq.quantize_(Recurrent().eval()), torch.randn(3, 6, 5)
    with lq.calibrating(model):
        model(x)
    return model, x


def test_quantize_calibrate_train_and_back():
    model = Recurrent()
    before, x = {n: v.clone() for n, v in model.state_dict().items()}, torch.randn(3, 6, 5)
    expected = model(x)
    lq.quantize_(model)
    assert [type(m) for m in (model.lstm, model.cell)] == [QuantLSTM, QuantLSTMCell]
    assert torch.equal(model(x), expected), "float until calibrated"
    with lq.calibrating(model):
        model(x)
    quantizers = dict(lq.named_quantizers(model))
    assert len(quantizers) == 4 * 6 + 4 + 2
    assert all(q.amax is not None for q in quantizers.values())
    assert {tuple(q.amax.shape) for n, q in quantizers.items() if "weight_hh" in n} == {(16, 1)}
    assert not torch.equal(model(x), expected)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in model.parameters())
    lq.dequantize_(model)
    assert [type(m) for m in model.children()] == [nn.LSTM, nn.LSTMCell, nn.Linear]
    Recurrent().load_state_dict(model.state_dict(), strict=True)
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_is_on_its_own(calibrated, copied):
    model, x = calibrated
    twin, expected = copied(model), model(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.lstm.hidden_l0_quantizer.amax = 9.0
    assert not twin(x).any()
    assert torch.equal(model(x), expected)
    for module in (twin.lstm, model.lstm):  # the weights that the fused kernel takes moved along
        switch(module, "disable")
        assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))


def test_half_precision_goes_in_and_out(calibrated):
    model, x = calibrated
    expected = model(x)
    assert (model.bfloat16()(x.bfloat16()) - expected).abs().max() < 0.05
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_mixed_precision_trains(calibrated):
    model, x = calibrated
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    output.float().square().sum().backward()
    assert (output - model(x)).abs().max() < 0.05
    assert all(p.grad.isfinite().all() and p.grad.count_nonzero() for p in model.parameters())


@pytest.mark.slow
def test_it_compiles_and_where_dynamo_lets_it_without_a_break_once_for_any_batch(calibrated):
    model, x = calibrated
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(allow_rnn=True, error_on_recompile=True):
        for batch in (3, 7):
            x = torch.randn(batch, 6, 5)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_it_is_exported_by_torch_for_any_batch(calibrated):
    model, x = calibrated
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for batch in (1, 7):
        x = torch.randn(batch, 6, 5)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.slow
def test_it_is_exported_to_onnx_for_any_batch(calibrated, tmp_path):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, x = calibrated
    path = lq.export.to_onnx(model, x, tmp_path / "model.onnx")
    codes = [i for i in onnx.load(path).graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 2]
    assert len(codes) == 4 * 3 + 2 + 1, "every weight is int8, once"
    session = ort.InferenceSession(path)
    x = torch.randn(7, 6, 5)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=1e-5)
        with lq.surgery.unquantized(model):
            assert (expected - model(x)).abs().max() > 1e-4


def test_under_autocast_all_results_have_the_dtype_that_torchs_have():
    x = torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        (output, (h, c)), (expected, states) = (lstm(x) for lstm in (QuantLSTM(3, 5), torch.nn.LSTM(3, 5)))
    assert output.dtype == expected.dtype == torch.bfloat16
    assert [h.dtype, c.dtype] == [state.dtype for state in states]


def test_a_sequence_of_no_steps_is_refused_as_by_torch():
    for lstm in (torch.nn.LSTM(3, 5), QuantLSTM(3, 5)):
        with pytest.raises(RuntimeError):
            lstm(torch.randn(0, 2, 3))


def test_names_that_are_not_there_are_not_there():
    lstm = QuantLSTM(2, 2)
    assert not hasattr(lstm, "_input_quantizer")
    assert getattr(lstm, "_weight_quantizer", None) is None
