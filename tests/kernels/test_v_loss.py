"""Noise, loss and gradient in one pass, on the CPU, against numpy in float64 and against the reference's bits."""

from importlib import import_module

import numpy as np
import oracles
import pytest
import torch

from attr_engine.kernels import noised, reference, v_loss

normal = import_module("attr_engine.kernels.normal")
noising = import_module("attr_engine.kernels.noised")
OBJECTIVES = ("v", "rectified_flow")


def inputs(rng, dtype=torch.float32, shape=(3, 5, 37)):
    b, c, f = shape
    x, prediction = oracles.normal(rng, *shape, dtype=dtype), oracles.normal(rng, *shape, dtype=dtype)
    counted = torch.from_numpy(rng.random((b, f)) < 0.6)
    counted[:, 0] = True
    return prediction, x, oracles.keys(rng, b), torch.from_numpy(rng.random(b)), counted


@pytest.mark.parametrize("channels", [1, 5, 64, 70])
@pytest.mark.parametrize("first", [0, 1, 2**20, 2**32 - 300])
def test_blocks_of_noise_are_the_references_noise(channels, first, rng):
    key = oracles.keys(rng, 1)
    block = normal.noise_block(key[0], first, 300)
    words = reference.philox(torch.arange(first, first + 300), key)
    uniform = [reference._uniform(word) for word in words[:2]]
    wanted = torch.sqrt(-2 * uniform[0].clamp_min(1e-7).log()) * torch.cos(2 * np.pi * uniform[1])
    assert torch.equal(block, wanted.float())
    if first == 0:
        whole = normal.noise_block(key[0], 0, channels * 40)
        assert torch.equal(whole.view(40, channels).T, reference.noise(key, channels, 40)[0])


@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mixing_is_the_references_and_the_formula(dtype, objective, rng, measured):
    _, x, keys, t, _ = inputs(rng, dtype)
    x_t = noised(x, keys, t, objective)
    wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = reference.mix(wide, reference.noise(keys, *x.shape[1:]), t, objective).to(dtype)
    assert torch.equal(x_t, wanted)
    off = oracles.error(x_t, oracles.mixed(x, keys, t, objective))
    measured(f"noised {dtype}", off)
    assert off < {torch.bfloat16: 3e-3, torch.float16: 4e-4}.get(dtype, 2e-7)


@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_frames_and_gradient_are_the_formulas(dtype, objective, rng, measured):
    arguments = inputs(rng, dtype)
    loss, frames, gradient = v_loss(*arguments, objective, per_frame=True)
    wanted = oracles.loss(*arguments, objective)
    assert (wanted[2].flatten(1).norm(dim=1) > 0).all()
    assert loss.dtype == frames.dtype == torch.float64
    for name, out, value in zip(
        ("loss", "frames", "gradient"), (loss, frames, gradient), wanted, strict=True
    ):
        off = oracles.error(out, value)
        measured(f"v_loss {name} {dtype}", off)
        assert off < 1e-6, name


@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_references_to_the_rounding_of_a_float64(dtype, objective, rng):
    prediction, x, keys, t, counted = inputs(rng, dtype)
    prediction.requires_grad_()
    wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    target = reference.v_target(wide, reference.noise(keys, *x.shape[1:]), t, objective)
    wanted = reference.per_draw_loss(prediction, target, counted)
    loss = v_loss(prediction, x, keys, t, counted, objective)[0]
    assert ((loss - wanted) / wanted).abs().max() < 1e-12
    factors = torch.from_numpy(rng.normal(size=3))
    (mine,) = torch.autograd.grad((loss * factors).sum(), prediction)
    (theirs,) = torch.autograd.grad((wanted * factors).sum(), prediction)
    assert theirs.norm() > 0 and mine.dtype == dtype
    bound = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 5e-7, torch.float64: 1e-14}[dtype]
    assert oracles.error(mine, theirs.double()) < bound


def test_the_frames_can_be_differentiated(rng):
    prediction, x, keys, t, counted = inputs(rng, torch.float64)
    prediction.requires_grad_()
    factors = torch.from_numpy(rng.normal(size=counted.shape))
    loss, frames, _ = v_loss(prediction, x, keys, t, counted, "v", per_frame=True)
    (mine,) = torch.autograd.grad(loss.sum() + (frames * factors).sum(), prediction)
    target = reference.v_target(x, reference.noise(keys, *x.shape[1:]), t, "v")
    squares = (prediction - target).square().mean(1) * counted
    wanted = reference.per_draw_loss(prediction, target, counted).sum() + (squares * factors).sum()
    assert oracles.error(mine, torch.autograd.grad(wanted, prediction)[0]) < 1e-14


def test_rows_without_frames_have_no_mean_and_no_gradient(rng):
    prediction, x, keys, t, counted = inputs(rng)
    counted[1] = False
    prediction[1] = float("inf")
    loss, frames, gradient = v_loss(prediction, x, keys, t, counted, "v", per_frame=True)
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert not frames[1].any() and not gradient[1].any() and gradient[0].any()


def test_what_is_not_counted_may_be_anything(rng):
    prediction, x, keys, t, counted = inputs(rng)
    whole = v_loss(prediction, x, keys, t, counted, "v", per_frame=True)
    spoiled = prediction.masked_fill(~counted[:, None], float("nan"))
    for mine, theirs in zip(v_loss(spoiled, x, keys, t, counted, "v", per_frame=True), whole, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("how", oracles.STRIDES)
def test_strides_batches_and_padding_do_not_matter(how, rng):
    prediction, x, keys, t, counted = inputs(rng, shape=(4, 6, 50))
    counted[:, 30:] = False
    whole = v_loss(prediction, x, keys, t, counted, "v", per_frame=True)
    mask = oracles.strided(counted, how) if how == "transposed" else counted
    out = v_loss(
        oracles.strided(prediction, how), oracles.strided(x, how), keys, t, mask, "v", per_frame=True
    )
    for mine, theirs in zip(out, whole, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-14, atol=0)
    x_t = noised(oracles.strided(x, how), keys, t, "v")
    assert torch.equal(x_t, noised(x, keys, t, "v"))
    row = slice(2, 3)
    alone = v_loss(prediction[row, :, :30], x[row, :, :30], keys[row], t[row], counted[row, :30], "v")
    assert torch.allclose(alone[0], whole[0][row], rtol=1e-14)
    assert torch.equal(alone[2], whole[2][row, :, :30])
    assert torch.equal(noised(x[row, :, :30], keys[row], t[row], "v"), x_t[row, :, :30])


def test_blocks_do_not_change_a_bit(rng, monkeypatch):
    arguments = inputs(rng, shape=(2, 6, 50))
    whole, x_t = v_loss(*arguments, "v", per_frame=True), noised(*arguments[1:4], "v")
    monkeypatch.setattr(normal, "CPU_BLOCK", 6 * 7)
    for mine, theirs in zip(v_loss(*arguments, "v", per_frame=True), whole, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(noised(*arguments[1:4], "v"), x_t)


def test_noise_is_never_stored(rng):
    prediction, x, keys, t, counted = inputs(rng, shape=(2, 64, 2584))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and function.namespace == "aten":
                sizes.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        noising._noised_torch(x, x, keys, normal.mixing_factors(t, "v", False, x.device, torch.float32))
    assert max(sizes) == x.untyped_storage().nbytes() and sorted(set(sizes))[-2] <= 8 * normal.CPU_BLOCK


def test_without_a_gradient_there_is_none(rng):
    arguments = inputs(rng)
    loss, frames, gradient = v_loss(*arguments, "v", with_gradient=False)
    assert torch.equal(loss, v_loss(*arguments, "v")[0])
    assert frames.shape == (3, 0) and gradient.numel() == 0
    prediction = arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match="with_gradient"):
        v_loss(prediction, *arguments[1:], "v", with_gradient=False)[0].sum().backward()


def test_what_does_not_fit_is_refused(rng):
    prediction, x, keys, t, counted = inputs(rng)
    with pytest.raises(ValueError, match="'epsilon'"):
        noised(x, keys, t, "epsilon")
    with pytest.raises(ValueError, match=r"\[B, C, F\]"):
        noised(x, keys[:2], t, "v")
    with pytest.raises(ValueError, match="counters"):
        noised(torch.zeros(1, 1, 1).expand(1, 2**16, 2**16 + 1), keys[:1], t[:1], "v")
    with pytest.raises(TypeError, match="int64"):
        noised(x, keys.double(), t, "v")
    with pytest.raises(ValueError, match="do not fit"):
        v_loss(prediction[..., 1:], x, keys, t, counted, "v")
    with pytest.raises(TypeError, match="bool"):
        v_loss(prediction, x, keys, t, counted.float(), "v")
    with pytest.raises(ValueError, match="prediction only"):
        v_loss(prediction, x.requires_grad_(), keys, t, counted, "v")


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_they_are_well_formed_operations(per_frame, with_gradient, rng):
    prediction, x, keys, t, counted = inputs(rng)
    if with_gradient:
        prediction.requires_grad_()
    arguments = (prediction, x, keys, t, counted, "v", per_frame, with_gradient)
    torch.library.opcheck(torch.ops.attr_engine.v_loss.default, arguments)
    torch.library.opcheck(torch.ops.attr_engine.noised.default, (x, keys, t, "rectified_flow"))
    torch.library.opcheck(
        torch.ops.attr_engine.noised.default, (oracles.strided(x, "transposed"), keys, t, "v")
    )


def test_it_compiles_without_a_graph_break(rng):
    prediction, x, keys, t, counted = inputs(rng)
    weight = torch.ones(5, 1, requires_grad=True)

    def step(weight, x, keys, t, counted):
        return v_loss(noised(x, keys, t, "v") * weight, x, keys, t, counted, "v")[0].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        value = function(weight, x, keys, t, counted)
        results.append((value.detach(), torch.autograd.grad(value, weight)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][1].norm() > 0
