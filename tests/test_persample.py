"""A batch's per-sample gradients are those of single rows, for every way in which a model can use a parameter."""

from types import SimpleNamespace

import helpers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attr_engine import DrawPlan, UserError, fit_fisher
from attr_engine.influence import row_dots
from attr_engine.persample import Factors, add_squares, check_against_loop, per_sample_backward

WIDTH, TOKENS = 6, 7


class Net(nn.Module):
    """Parameters by keyword, used by a function of (self, x ``[B, T, D]``)."""

    def __init__(self, use, **parameters):
        super().__init__()
        for name, value in parameters.items():
            if isinstance(value, nn.Module):
                setattr(self, name, value)
            else:
                setattr(self, name, nn.Parameter(torch.as_tensor(value, dtype=torch.float64)))
        self.use = use
        helpers.liven(self.double())

    def forward(self, x):
        return self.use(self, x)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def attention(net, x):
    q, k, v = net.qkv(x).chunk(3, dim=-1)
    return F.scaled_dot_product_attention(q, k, v)


def repeated(x, n):
    return x.transpose(1, 2).repeat_interleave(n, dim=1)


USES = {
    "linear": lambda: Net(lambda n, x: n.a(x), a=nn.Linear(WIDTH, 5)),
    "linear without bias": lambda: Net(lambda n, x: n.a(x), a=nn.Linear(WIDTH, 5, bias=False)),
    "linear, two axes": lambda: Net(lambda n, x: n.a(x[:, 0]), a=nn.Linear(WIDTH, 5)),
    "linear, four axes": lambda: Net(lambda n, x: n.a(x[:, None].expand(-1, 2, -1, -1)), a=nn.Linear(WIDTH, 5)),
    "linear, strided input": lambda: Net(lambda n, x: n.a(x.transpose(1, 2)), a=nn.Linear(TOKENS, 5)),
    "linear, rows merged with tokens": lambda: Net(lambda n, x: n.a(x.flatten(0, 1)).unflatten(0, (len(x), -1)), a=nn.Linear(WIDTH, 5)),
    "fused qkv": lambda: Net(attention, qkv=nn.Linear(WIDTH, 3 * WIDTH)),
    "named slices of a weight": lambda: Net(
        lambda n, x: F.linear(x, n.w[:3], n.b[:3]) * F.linear(x, n.w[3:], n.b[3:]), w=randn(6, WIDTH), b=randn(6)
    ),
    "functional linear": lambda: Net(lambda n, x: F.linear(x, n.w), w=randn(4, WIDTH)),
    "used twice": lambda: Net(lambda n, x: n.a(torch.tanh(n.a(x))), a=nn.Linear(WIDTH, WIDTH)),
    "used twice, other lengths": lambda: Net(lambda n, x: n.a(x).mean(1) + n.a(x[:, :1]).sum(1), a=nn.Linear(WIDTH, 3)),
    "used as layer and as factor": lambda: Net(lambda n, x: n.a(x) @ n.a.weight, a=nn.Linear(WIDTH, WIDTH)),
    "bias elsewhere": lambda: Net(lambda n, x: n.a(x) + n.a.bias * x[..., :3], a=nn.Linear(WIDTH, 3)),
    "convolution 1x1": lambda: Net(lambda n, x: n.c(x.transpose(1, 2)), c=nn.Conv1d(WIDTH, 4, 1)),
    "convolution": lambda: Net(lambda n, x: n.c(x.transpose(1, 2)), c=nn.Conv1d(WIDTH, 4, 3, padding=1)),
    "strided and dilated convolution": lambda: Net(
        lambda n, x: n.c(x.transpose(1, 2)), c=nn.Conv1d(WIDTH, 4, 3, stride=2, padding=2, dilation=2, bias=False)
    ),
    "grouped convolution": lambda: Net(lambda n, x: n.c(x.transpose(1, 2)), c=nn.Conv1d(WIDTH, 4, 3, groups=2)),
    "depthwise convolution": lambda: Net(lambda n, x: n.c(x.transpose(1, 2)), c=nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)),
    "convolution used twice": lambda: Net(
        lambda n, x: n.c(n.c(x.transpose(1, 2))), c=nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=3)
    ),
    "layer norm": lambda: Net(lambda n, x: n.a(x), a=nn.LayerNorm(WIDTH)),
    "rms norm": lambda: Net(lambda n, x: n.a(x), a=nn.RMSNorm(WIDTH)),
    "gain-only layer norm": lambda: Net(
        lambda n, x: F.layer_norm(x, (WIDTH,), weight=n.g, bias=torch.zeros(WIDTH).double()), g=randn(WIDTH)
    ),
    "gain through a cast": lambda: Net(lambda n, x: F.layer_norm(x, (WIDTH,), weight=n.g.to(torch.float64) + 1), g=randn(WIDTH)),
    "layer scale": lambda: Net(lambda n, x: x + n.s * torch.tanh(x), s=randn(WIDTH)),
    "group norm": lambda: Net(lambda n, x: n.a(x.transpose(1, 2)), a=nn.GroupNorm(2, WIDTH)),
    "embedding": lambda: Net(lambda n, x: n.e((x[..., 0] > 0).long() + 1), e=nn.Embedding(4, 5)),
    "memory tokens": lambda: Net(lambda n, x: torch.cat([n.m.expand(len(x), -1, -1), x], 1), m=randn(2, WIDTH)),
    "one token for all": lambda: Net(lambda n, x: torch.cat([n.m.expand(len(x), -1, -1), x], 1), m=randn(1, 1, WIDTH)),
    "repeated token": lambda: Net(lambda n, x: torch.cat([n.m.repeat(len(x), 2, 1), x], 1), m=randn(1, 1, WIDTH)),
    "scale, shift, gate": lambda: Net(
        lambda n, x: (lambda a, b, c: (x * (1 + a) + b) * torch.sigmoid(1 - c))(
            *(n.p + x.mean(1).repeat(1, 3)).unsqueeze(1).chunk(3, dim=-1)
        ),
        p=randn(3 * WIDTH),
    ),
    "fourier features": lambda: Net(lambda n, x: torch.cat([(x @ n.w.T).cos(), (x @ n.w.T).sin()], -1), w=randn(3, WIDTH)),
    # The offset keeps all terms of a gradient positive: a single number that cancels has no relative error.
    "scalar": lambda: Net(lambda n, x: x.abs() * n.a.exp() + n.b, a=randn(()), b=[20.0]),
    "parameter minus parameter": lambda: Net(lambda n, x: x * (n.a - n.b), a=randn(WIDTH), b=randn(WIDTH)),
    "einsum": lambda: Net(lambda n, x: torch.einsum("btd,de->bte", x, n.w), w=randn(WIDTH, 3)),
    "where": lambda: Net(lambda n, x: torch.where(x > 0, x * n.a, n.b), a=randn(WIDTH), b=randn(WIDTH)),
    "prelu": lambda: Net(lambda n, x: F.prelu(x.transpose(1, 2), n.a), a=randn(WIDTH)),
}  # fmt: skip


class Model:
    """What per_sample_backward needs of a denoiser; the number of a row is a random function of the output."""

    def __init__(self, net, x):
        self.module, self.x, self.mix = net, x, {}

    def objective(self, _, rows):
        out = self.module(self.x[rows.index])
        if "w" not in self.mix:
            self.mix["w"] = randn(len(self.x), *out.shape[1:])
        return (out * self.mix["w"][rows.index]).flatten(1).sum(1) + 0.3 * out.flatten(1).square().sum(1)

    def rows(self, index):
        return SimpleNamespace(t=torch.zeros(len(index)), index=list(index))


def squares(model, parameters, index):
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    emitted = []

    def sink(name, gradient):
        emitted.append(name)
        add_squares(total[name], gradient)

    used = per_sample_backward(model, parameters, model.rows(index), sink, model.objective)
    assert sorted(emitted) == sorted(used), "each parameter once"
    return total, used


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("use", USES)
def test_squares_of_a_batch_are_those_of_single_rows(use, batch, seed, measured):
    torch.manual_seed(seed)
    net = USES[use]()
    model, parameters = Model(net, randn(batch, TOKENS, WIDTH)), dict(net.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    directions = {name: randn(3, *p.shape) for name, p in parameters.items()}
    dots = torch.zeros(batch, 3, dtype=torch.float64)
    for i in range(batch):
        number = model.objective(None, model.rows([i])).sum()
        for name, g in zip(parameters, torch.autograd.grad(number, list(parameters.values())), strict=True):
            expected[name] += g.square()
            dots[i] += (directions[name] * g).reshape(3, -1).sum(dim=1)
    found = row_dots(model, parameters, model.rows(range(batch)), directions, model.objective)
    assert float((found - dots).norm() / dots.norm()) < 1e-11
    total, used = squares(model, parameters, range(batch))
    assert used == set(parameters)
    for name, want in expected.items():
        assert want.any(), "zeros would be compared with zeros"
        error = float((total[name] - want).norm() / want.norm())
        measured("relative_error", error)
        assert error < 1e-12, name
    assert all(p.grad is None for p in parameters.values())


def test_a_part_of_the_parameters_is_the_same_part_of_all(seed):
    torch.manual_seed(seed)
    net = Net(
        lambda n, x: n.b(torch.tanh(n.a(x * n.g))), a=nn.Linear(WIDTH, 4), b=nn.Linear(4, 3), g=randn(WIDTH)
    )
    model, parameters = Model(net, randn(3, TOKENS, WIDTH)), dict(net.named_parameters())
    whole, _ = squares(model, parameters, range(3))
    for name in parameters:
        part, used = squares(model, {name: parameters[name]}, range(3))
        assert used == {name} and torch.equal(part[name], whole[name])


def test_a_parameter_that_is_not_used_is_not_named(seed):
    torch.manual_seed(seed)
    net = Net(lambda n, x: n.a(x), a=nn.Linear(WIDTH, 4), idle=randn(3))
    model, parameters = Model(net, randn(3, TOKENS, WIDTH)), dict(net.named_parameters())
    total, used = squares(model, parameters, range(3))
    assert used == {"a.weight", "a.bias"} and not total["idle"].any()


def test_no_ordinary_weight_gradient_is_computed(seed):
    # A product over rows and tokens of the weight's shape would be one; the only products of the backward pass are g W.
    torch.manual_seed(seed)
    net = Net(lambda n, x: n.b(torch.tanh(n.a(x))), a=nn.Linear(WIDTH, 4), b=nn.Linear(4, 3))
    model, parameters = Model(net, randn(3, TOKENS, WIDTH)), dict(net.named_parameters())
    with torch.profiler.profile(record_shapes=True) as profile:
        per_sample_backward(model, parameters, model.rows(range(3)), lambda *_: None, model.objective)
    shapes = [
        event.input_shapes
        for event in profile.events()
        if event.name in ("aten::mm", "aten::addmm", "aten::bmm")
    ]
    assert shapes and not any(
        len(s) >= 2 and len(s[-2]) > 1 and len(s[-1]) > 1 and (s[-2][-2], s[-1][-1]) in ((4, WIDTH), (3, 4))
        for s in shapes
    )


REFUSED = {
    "statistics over the batch": lambda: Net(lambda n, x: n.a(x) - x.mean(0).sum() * n.g, a=nn.Linear(WIDTH, WIDTH), g=randn(WIDTH)),
    "rows not first": lambda: Net(lambda n, x: n.a(x.permute(1, 0, 2)[:3]).permute(1, 0, 2), a=nn.Linear(WIDTH, 4)),
    "written into": lambda: Net(lambda n, x: x * torch.zeros(WIDTH).double().copy_(n.g), g=randn(WIDTH)),
    "read out": lambda: Net(lambda n, x: x * float(n.g.sum()) * n.g, g=randn(WIDTH)),
}  # fmt: skip


@pytest.mark.parametrize("use", REFUSED)
def test_what_is_not_covered_is_refused_by_name(use, seed):
    torch.manual_seed(seed)
    net = REFUSED[use]()
    model, parameters = Model(net, randn(4, TOKENS, WIDTH)), dict(net.named_parameters())

    def make(pairs):
        return model.rows([i for i, _ in pairs])

    with pytest.raises(
        UserError,
        match=r"(g|a\.\w+) (is used by|in a batch|sees an input)|gradients of (g|a\.\w+) in a batch",
    ):
        check_against_loop(model, parameters, make, [(i, 0) for i in range(4)], model.objective)


def test_factors_give_the_gradient_of_a_linear_layer(seed):
    torch.manual_seed(seed)
    g, a = randn(3, 1, TOKENS, 4), randn(3, 1, TOKENS, WIDTH)
    expected = torch.einsum("bjto,bjti->boi", g, a)
    assert torch.allclose(Factors(g, a).gradient(torch.Size([4, WIDTH])), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(
    "variant",
    [
        {}, {"num_memory_tokens": 3}, {"global_cond_type": "adaLN"}, {"attn_kwargs": {"qk_norm": "ln"}},
        {"attn_kwargs": {"qk_norm": "l2"}}, {"attn_kwargs": {"differential": True}}, {"conformer": True},
        {"layer_scale": True}, {"patch_size": 2},
    ],
    ids=lambda v: next(iter(v), "plain"),
)  # fmt: skip
def test_every_variant_of_the_stable_audio_transformer_is_covered(variant, dtype, seed, rng):
    pytest.importorskip("stable_audio_tools")
    model = helpers.tiny_stable_audio(seed, dtype, **variant)
    tracks = helpers.make_tracks(rng, 2, model.channels, model.frames)
    plan = DrawPlan(seed, replicates=2)
    batch = fit_fisher(model, tracks, ("all",), plan, 2, gradients="batch")
    loop = fit_fisher(model, tracks, ("all",), plan, 2, gradients="loop")
    assert batch.unused == loop.unused
    largest = max(float(v.max()) for v in loop.values.values())
    for name, want in loop.values.items():
        # what is zero but for rounding (a bias of keys before a softmax) is measured against the largest
        error = float((batch.values[name] - want).norm() / (want.norm() + 1e-7 * largest))
        assert error < (1e-9 if dtype == torch.float64 else 1e-3), name
