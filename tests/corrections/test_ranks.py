"""Two ranks with a part of the data each correct as one process does with all of it."""

import datetime

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lq
from lq.corrections import shift_negative_activation_correction_, weights_bias_correction_
from processes import start_ranks


def batches():
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(n, 3, 6, 6, generator=generator) for n in (4, 2, 7)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3))


def corrected(share):
    model = network()
    shift_negative_activation_correction_(model, share, ratio=0.9)
    lq.quantize_(model, [lq.QuantRule("*", lq.QuantDescriptor(8), lq.QuantDescriptor(3))])
    with lq.calibrating(model):
        for x in share:
            model(x)
    weights_bias_correction_(model, share)
    return model.state_dict()


def message(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return None


def of_quantized(share):
    weights_bias_correction_(quantized(), share)


def quantized():
    model = lq.quantize_(network(), "int8_weight_only")
    with lq.calibrating(model):
        pass
    return model


def work(rank, folder):
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    torch.set_num_threads(1)
    mine = batches()[rank::2]
    broken = [*mine, mine[0] * float("nan")] if rank else mine
    found = {
        "state": corrected(mine),
        "no batches": message(of_quantized, mine if rank else []),
        "NaN": message(of_quantized, broken),
        "NaN to shift": message(shift_negative_activation_correction_, network(), broken),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_ranks_agree_with_one_process_on_all_batches(ranks):
    one = corrected(batches())
    for key, value in one.items():
        assert torch.equal(ranks[0]["state"][key], ranks[1]["state"][key])
        torch.testing.assert_close(ranks[0]["state"][key], value, rtol=1e-6, atol=1e-6)
    alone = corrected(batches()[:1])
    assert not torch.allclose(one["2.bias"], alone["2.bias"], atol=1e-4)


@pytest.mark.parametrize("question", ["no batches", "NaN", "NaN to shift"])
def test_all_ranks_fail_together(ranks, question):
    assert all(found[question] for found in ranks)
