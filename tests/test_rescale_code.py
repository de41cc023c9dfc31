"""Whatever a model's own code does between its layers, rescaling leaves its float output as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lq

E = 8
FLIP = torch.arange(E).flip(0)


def changed_view(m, x):
    h = m.a(x)
    h[..., :4].add_(1.0)
    return m.b(F.relu(h))


def scaled_view(m, x):
    h = m.a(x)
    h.view(-1, E).mul_(2.0)
    return m.b(h)


def kept(m, x):
    m.keep = m.a(x)
    return m.b(F.relu(m.keep)) + m.keep.sum()


def as_number(m, x):
    h = m.n(x)
    return m.b(h) * h[0, 0, 3].item()


def as_list(m, x):
    h = m.n(x)
    return m.b(h) * torch.tensor(h[0, 0].tolist()).sum()


def branch(m, x):
    h = m.n(x)
    return m.b(h) if bool((h.abs() > 1e2).any()) else m.b(h) * 2


def returned(m, x):
    h = m.n(x)
    return {"y": m.b(h), "h": [h]}


def own_operand(m, x):
    h = m.a(x)
    return m.b(h * h.mean(-1, keepdim=True))


def its_own_values(m, x):
    h = m.a(x)
    return m.b(F.scaled_dot_product_attention(x, h, h))


def values_by_name(m, x):
    h = m.a(x)
    return m.b(F.scaled_dot_product_attention(value=x, query=h, key=h))


def added_in_place(m, x):
    h = m.a(x)
    h += x
    return m.b(h)


def gated_in_place(m, x):
    h = m.a(x)
    h *= x.sigmoid()
    return m.b(h)


def set_item(m, x):
    h = m.a(x)
    h[:, 0] = 1.0
    return m.b(h)


def set_all(m, x):
    h = torch.zeros_like(x)
    h[:] = m.a(x)
    return m.b(h)


def out(m, x):
    h = torch.empty_like(x)
    torch.mul(m.a(x), 2.0, out=h)
    return m.b(h)


def copied(m, x):
    return m.b(torch.empty_like(x).copy_(m.a(x)))


def data(m, x):
    h = m.a(x)
    h.data.add_(1.0)
    return m.b(h)


def statistics(m, x):
    h = m.n(x)
    return m.b(h) / h.var()


def parts(m, x):
    a, b = m.a(x).chunk(2, -1)
    return m.c(a) + m.d(b)


def swapped(m, x):
    a, b = m.a(x).chunk(2, -1)
    return m.b(torch.cat([b, a], -1))


def doubled(m, x):
    h = m.a(x)
    return m.e(torch.cat([h, h], -1))


CODE = {
    **{f.__name__: f for f in (changed_view, scaled_view, kept, as_number, as_list, branch, returned, own_operand)},
    **{f.__name__: f for f in (its_own_values, values_by_name, added_in_place, gated_in_place, set_item, set_all, out, copied)},
    **{f.__name__: f for f in (data, statistics, parts, swapped, doubled)},
    "relu_": lambda m, x: m.b(m.a(x).relu_()),
    "masked": lambda m, x: m.b(m.a(x).masked_fill(x > 0, 3.0)),
    "where": lambda m, x: m.b(torch.where(x > 0, m.a(x), torch.ones_like(x))),
    "clamp": lambda m, x: m.b(m.a(x).clamp(max=1)),
    "pad": lambda m, x: m.b(F.pad(m.a(x), (0, 0, 1, 1), value=2.0)),
    "cumsum": lambda m, x: m.b(m.a(x).cumsum(1)),
    "mean": lambda m, x: m.b(m.a(x).mean(1)),
    "softmax": lambda m, x: m.b(m.a(x).softmax(-1)),
    "glu": lambda m, x: m.c(F.glu(m.a(x))),
    "einsum": lambda m, x: m.b(torch.einsum("bij,jk->bik", m.a(x), torch.eye(E, dtype=x.dtype))),
    "left operand": lambda m, x: m.b(m.a(x) @ torch.ones(E, E, dtype=x.dtype)),
    "both operands": lambda m, x: m.b(m.a(x).mT @ m.a2(x)),
    "values": lambda m, x: m.b(F.scaled_dot_product_attention(query=x, key=x, value=m.a(x))),
    "bmm": lambda m, x: m.b(torch.bmm(x @ torch.ones(E, 5, dtype=x.dtype), m.a(x))),
    "denominator": lambda m, x: m.b(x / m.a(x)),
    "numerator": lambda m, x: m.b(m.a(x) / (x.abs() + 1)),
    "rounded quotient": lambda m, x: m.b(torch.div(m.a(x), 2, rounding_mode="floor")),
    "square": lambda m, x: m.b(m.a(x).square()),
    "rolled": lambda m, x: m.b(m.a(x).roll(1, -1)),
    "flipped": lambda m, x: m.b(m.a(x).flip(-1)),
    "gathered": lambda m, x: m.b(m.a(x).gather(-1, FLIP.expand(2, 5, E))),
    "indexed": lambda m, x: m.b(m.a(x)[..., FLIP]),
    "selected": lambda m, x: m.b(m.a(x).index_select(-1, FLIP)),
    "by mask": lambda m, x: m.b(m.a(x)[x[..., 0] > 0]),
    "sorted": lambda m, x: m.b(m.a(x).sort(-1).values),
    "top": lambda m, x: m.c(m.a(x).topk(4, -1).values),
    "stacked": lambda m, x: m.b(torch.stack([m.a(x), m.a2(x)], 1)),
    "joined with the input": lambda m, x: m.e(torch.cat([m.a(x), x], -1)),
    "prelu": lambda m, x: m.b(m.p(m.a(x).mT).mT),
    "negative slope": lambda m, x: m.b(F.leaky_relu(m.a(x), -0.5)),
    "layer twice": lambda m, x: m.b(m.n(x)) + m.b(m.n(x) * 2),
    "norm twice": lambda m, x: m.b(m.n(m.n(x))),
    "checkpointed": lambda m, x: checkpoint(lambda y: m.b(F.relu(m.a(y))), x, use_reentrant=False),
    "numpy": lambda m, x: m.b(torch.from_numpy(m.a(x).detach().numpy())),
    "function of a norm": lambda m, x: m.b(F.rms_norm(x, (E,), m.w)),
    "its weight elsewhere": lambda m, x: m.b(F.layer_norm(x, (E,), m.w)) * m.w.sum(),
    "a weight twice": lambda m, x: m.b(x * m.w * m.w),
    "expanded": lambda m, x: m.b(m.a(x[:, :1]).expand(2, 5, E)),
    "strided": lambda m, x: m.b(m.a(x).as_strided((2, 5, E), (5 * E, E, 1))),
    "heads": lambda m, x: m.b(m.a(x).unflatten(-1, (2, 4)).mT.flatten(-2)),
    "a part elsewhere": lambda m, x: m.b(m.n(x)) + m.n(x)[..., :1],
    "pooled channels": lambda m, x: m.c(F.max_pool1d(m.a(x), 2)),
    "normalized": lambda m, x: m.b(F.normalize(m.a(x), dim=-1)),
    "abs": lambda m, x: m.b(m.a(x).abs()),
    "negated": lambda m, x: m.b(-m.a(x)),
}


class Model(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.code = code
        self.a, self.a2, self.b = (nn.Linear(E, E) for _ in range(3))
        self.c, self.d, self.e = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(16, 3)
        self.n, self.p, self.w = nn.LayerNorm(E), nn.PReLU(E), nn.Parameter(torch.rand(E) + 0.5)
        for parameter in (self.n.weight, self.n.bias, self.p.weight):
            nn.init.normal_(parameter)

    def forward(self, x):
        return self.code(self, x)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("name", CODE)
def test_the_output_stays_on_the_batch_that_was_seen_and_on_others(name, alpha):
    torch.manual_seed(0)
    model = Model(CODE[name]).double().eval()
    loud = torch.ones(E, dtype=torch.float64)
    loud[3] = 40
    first, second = (loud * torch.randn(2, 5, E, dtype=torch.float64) for _ in range(2))
    batches = [first, second, 0.01 * first, -first]
    with torch.no_grad():
        before = [model(x.clone()) for x in batches]
        rescaled = lq.RescalingCalibrator(model, args=(first.clone(),)).rescale(alpha)
        for x, expected in zip(batches, before, strict=True):
            for found, wanted in zip(tree_leaves(rescaled(x.clone())), tree_leaves(expected), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10 * wanted.abs().max().item())
