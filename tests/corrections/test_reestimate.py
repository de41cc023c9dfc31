"""BatchNorm statistics that are estimated anew."""

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.corrections import reestimate_batchnorm_, reestimating_batchnorm


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    )
    lq.quantize_(model, [lq.QuantRule("*", None, lq.QuantDescriptor(2, axis=0, narrow_range=False))])
    with lq.calibrating(model):
        model(torch.randn(2, 3, 8, 8))
    return model


def batches(number=3):
    return [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) + i,) for i in range(number)]


def test_they_are_the_average_of_the_batches_through_quantized_weights():
    model = net().train()
    model[3].eval()  # a mode of its own
    expected = []
    for (x,) in batches():
        y = model[0](x).detach().double().numpy()
        expected.append((y.mean((0, 2, 3)), y.var((0, 2, 3), ddof=1)))
    state = torch.get_rng_state()
    before = (model[1].running_mean.clone(), model[1].running_var.clone())
    done = reestimate_batchnorm_(model, batches())
    assert torch.equal(torch.get_rng_state(), state)
    mean, variance = (np.mean(values, axis=0) for values in zip(*expected, strict=True))
    np.testing.assert_allclose(model[1].running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(model[1].running_var.numpy(), variance, rtol=1e-5)
    assert model[1].num_batches_tracked == 3
    far, ratio = np.abs(mean - before[0].numpy()).max(), (variance + 1e-5) / (before[1].numpy() + 1e-5)
    told = f"mean moved by up to {far:.3g}, variance multiplied by {ratio.min():.3g} to {ratio.max():.3g}"
    assert [a.name for a in done.applied] == ["1", "5"]
    assert done.applied[0].detail == told
    # twice is once
    again = reestimate_batchnorm_(model, [x for (x,) in batches()])
    assert again.applied == []
    assert again.left == {"1": "no batch changed it", "5": "no batch changed it"}
    assert (model[1].momentum, model[1].training, model[3].training, model[4].training) == (0.1, True, False, True)
    assert all(p.grad is None for p in model.parameters())


def test_what_goes_wrong_changes_nothing():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="BatchNorm statistics are not finite"):
        reestimate_batchnorm_(model, [*batches(1), (torch.full((4, 3, 8, 8), torch.nan),)])
    for none in ([], iter([])):
        with pytest.raises(ValueError, match="No batch reached a BatchNorm"):
            reestimate_batchnorm_(model, none)
    with pytest.raises(RuntimeError, match="channels"):
        reestimate_batchnorm_(model, [*batches(1), (torch.ones(1, 2, 8, 8),)])
    with pytest.raises(ValueError, match="No batch reached"), reestimating_batchnorm(model):
        pass  # no forward
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model[1].momentum == 0.1
    with pytest.raises(ValueError, match="Linear has no BatchNorm to estimate"):
        reestimate_batchnorm_(nn.Linear(2, 2), [])


def test_in_inference_mode_the_model_can_train_afterwards():
    model = net().train()
    with torch.inference_mode():
        reestimate_batchnorm_(model, batches(1))
    model(*batches(1)[0]).square().mean().backward()
