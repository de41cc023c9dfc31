"""Weights that oscillate: against algorithm 1 of the paper, written by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.functional.oscillation import Oscillation, damping_loss, follow_
from lq.oscillation import Oscillations, damp_


def layer(bits=3, amax=1.5, **fields):
    torch.manual_seed(0)
    desc = lq.QuantDescriptor(bits, axis=0, narrow_range=False, **fields)
    model = lq.quantize_(nn.Sequential(nn.Linear(6, 4)), [lq.QuantRule("*", None, desc)])
    model[0].weight_quantizer.amax = torch.full((4, 1), amax)
    return model


def algorithm_1(steps, momentum, thresholds):
    """NumPy: codes of each step in, held codes and frequencies out."""
    first = steps[0]
    last, turn, f, mean = first.copy(), np.zeros_like(first), np.zeros(first.shape), first.astype(float)
    frozen = np.zeros(first.shape, bool)
    for codes, threshold in zip(steps[1:], thresholds, strict=True):
        codes = np.where(frozen, last, codes)
        for i in np.ndindex(codes.shape):
            delta = codes[i] - last[i]
            oscillates = delta != 0 and turn[i] != 0 and np.sign(delta) != turn[i]
            f[i] = momentum * oscillates + (1 - momentum) * f[i]
            mean[i] = momentum * codes[i] + (1 - momentum) * mean[i]
            turn[i] = np.sign(delta) if delta else turn[i]
            if f[i] > threshold and not frozen[i]:
                frozen[i], codes[i] = True, np.rint(mean[i])
        last = codes
    return last, f, frozen


def test_frequencies_and_frozen_codes_are_those_of_the_paper():
    rng = np.random.default_rng(0)
    steps, thresholds = rng.integers(-2, 3, (40, 50)), np.linspace(0.3, 0.1, 39)
    # some hardly ever change
    steps[1:, :20] = np.where(rng.random((39, 20)) < 0.9, steps[0, :20], steps[1:, :20])
    state = Oscillation.of(torch.from_numpy(steps[0]))
    for codes, threshold in zip(steps[1:], thresholds, strict=True):
        held = follow_(state, torch.from_numpy(codes), 0.1, threshold)
    codes, frequency, frozen = algorithm_1(steps, 0.1, thresholds)
    assert 5 < frozen.sum() < 50
    np.testing.assert_array_equal(state.frozen.numpy(), frozen)
    np.testing.assert_array_equal(held.numpy(), codes)
    np.testing.assert_allclose(state.frequency.numpy(), frequency, atol=1e-6)


def test_damping_pulls_to_the_centre_of_the_bin_and_leaves_what_is_clipped():
    x = torch.tensor([0.4, 0.6, -1.9, -2.3, 1.4, 1.7], dtype=torch.float64, requires_grad=True)
    amax = torch.tensor(1.5)  # codes -4 to 3, steps of 0.5
    loss = damping_loss(x, amax, 3, narrow_range=False)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, 2 * torch.tensor([-0.1, 0.1, 0.1, 0, -0.1, 0], dtype=torch.float64))
    torch.testing.assert_close(loss, torch.tensor(0.04, dtype=torch.float64))


@pytest.mark.parametrize("normalize", [False, True, "center"])
def test_damping_is_a_gradient_for_every_weight(normalize):
    model = layer(normalize=normalize)
    weight, quantizer = model[0].weight, model[0].weight_quantizer
    weight.grad = torch.ones_like(weight)
    with torch.no_grad():
        x = weight - weight.mean(1, keepdim=True) if normalize == "center" else weight
        amax = quantizer.amax * (x.square().mean(1, keepdim=True).sqrt() if normalize else 1.0)
        inside = (x <= amax) & (x >= -amax / 3 * 4)
        expected = 1 + 0.3 * 2 * torch.where(inside, x - quantizer(weight), 0.0)
    damp_(model, 0.3)
    torch.testing.assert_close(weight.grad, expected)
    damp_(model, 0.3, [])
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("normalize", [False, True, "center"])
def test_a_frozen_weight_keeps_its_code_wherever_the_scale_goes(normalize):
    model = layer(bits=2, normalize=normalize, learn_amax="lsq")
    weight, quantizer = model[0].weight, model[0].weight_quantizer
    with torch.no_grad():
        quantizer._amax.fill_(1.0 if normalize else 0.4)
        weight[0, :3] = torch.tensor([0.1, 0.3, 0.3])
        oscillations = Oscillations(model, momentum=0.5)
        start = weight.clone()
        for value in (0.3, 0.1, 0.3, 0.1):
            weight.copy_(start)
            weight[0, 0] = value
            oscillations.update_(threshold=0.6)
        (state,) = oscillations.states.values()
        assert state.frozen.sum() == 1
        assert state.frozen[0, 0]
        assert oscillations.frozen == 1 / 24
        assert oscillations.frequent() == 1 / 24
        held = state.codes[0, 0].item()
        for factor, drift in ((0.9, 0.05), (1.3, -0.05)):
            quantizer._amax.mul_(factor)
            weight[0, 0] += drift if normalize else 100 * drift  # what an optimizer would like
            oscillations.update_(threshold=0.6)
            values, spread = quantizer.centered(weight) if normalize else (weight, 1.0)
            # a spread is that of the weights before this one was put back
            assert (values / (quantizer.amax * spread))[0, 0].item() == pytest.approx(held, abs=0.2 if normalize else 1e-6)


def test_it_goes_on_from_a_checkpoint_and_leaves_others_alone():
    model = layer(bits=2, amax=0.4)
    other = copy.deepcopy(model)
    oscillations = Oscillations(model)
    with torch.no_grad():
        for i in range(6):
            model[0].weight.add_(0.2 * (-1) ** i)
            oscillations.update_(0.015)
    assert oscillations.frozen > 0
    again = Oscillations(other)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(oscillations.state_dict())
    with torch.no_grad():
        for net, tracker in ((model, oscillations), (other, again)):
            net[0].weight.add_(0.2)
            tracker.update_(0.015)
    assert torch.equal(model[0].weight, other[0].weight)
    model[0].weight.requires_grad_(False)
    assert not Oscillations(model).states
    assert not Oscillations(layer(bits=16)).states
    assert not Oscillations(lq.dequantize_(other)).states
    with pytest.raises(ValueError, match="`momentum` is 0"):
        Oscillations(model, momentum=0)
