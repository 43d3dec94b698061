"""The Triton kernels over latents and parameters in Triton's interpreter (run by test_triton.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import naive
import numpy as np
import oracles
import pytest
import torch

from attr_engine.kernels import launch, noised, precondition_, reference, v_loss
from attr_engine.kernels.launch import jit

if TYPE_CHECKING:
    import triton.language as tl

OBJECTIVES = ("v", "rectified_flow")
# The first has one channel and lies within a tile; of a few frames the loss may be a difference of almost equal numbers.
SHAPES = [(1, 1, 60), (3, 5, 37), (2, 64, 19), (2, 70, 9), (1, 3, 200)]


@jit
def _words(out, keys, first, BLOCK: tl.constexpr):
    """The four words of BLOCK counters from ``first`` under each key: ``out`` is ``[keys, 4, BLOCK]`` int64."""
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    counter = (tl.load(first + row) + place.to(tl.int64)).to(tl.uint32)
    words = tl.randint4x(tl.load(keys + row), counter)
    for n in tl.static_range(4):
        tl.store(out + (row * 4 + n) * BLOCK + place, words[n].to(tl.int64))


def test_philox_is_philox_bit_for_bit(rng):
    keys = oracles.keys(rng, 40)
    keys[:6] = torch.tensor([0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
    first = torch.from_numpy(rng.integers(0, 2**32 - 64, 40))
    first[:4] = torch.tensor([0, 2**31 - 32, 2**32 - 64, 2**31])
    out = torch.empty(40, 4, 64, dtype=torch.int64)
    _words[(40,)](out, keys, first, BLOCK=64)
    counters = first[:, None] + torch.arange(64)
    own = torch.stack(reference.philox(counters, keys[:, None]), dim=1)
    wide = np.zeros((40, 64, 4), dtype=np.uint64)
    wide[..., 0] = counters.numpy()
    independent = naive.philox4x32(wide, keys.numpy().view(np.uint64)[:, None]).transpose(0, 2, 1)
    assert torch.equal(out, own)
    assert np.array_equal(out.numpy(), independent.astype(np.int64))


def inputs(rng, dtype, shape):
    b, _, f = shape
    counted = torch.from_numpy(rng.random((b, f)) < 0.6)
    counted[:, 0] = True
    prediction, x = oracles.normal(rng, *shape, dtype=dtype), oracles.normal(rng, *shape, dtype=dtype)
    return prediction, x, oracles.keys(rng, b), torch.from_numpy(rng.random(b)), counted


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_the_references(shape, rng, measured):
    keys = oracles.keys(rng, shape[0])
    ones = torch.ones(shape[0], dtype=torch.float64)
    e = noised(torch.zeros(shape), keys, ones, "rectified_flow")  # nothing but noise
    wanted = reference.noise(keys, *shape[1:])
    other = e != wanted
    measured("noise not equal", other.double().mean())
    # Where the last bit of a float64 decides how a float32 is rounded, one element in 10^8, the neighbour is taken:
    # two such among 2432 are one in 10^9.
    assert other.sum() <= 1
    neighbours = torch.nextafter(wanted, e)
    assert torch.equal(e, neighbours)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_frames_gradient_and_mixing(shape, dtype, objective, rng, measured):
    arguments = inputs(rng, dtype, shape)
    out = v_loss(*arguments, objective, per_frame=True)
    wanted = oracles.loss(*arguments, objective)
    for name, mine, value in zip(("loss", "frames", "gradient"), out, wanted, strict=True):
        off = oracles.error(mine, value)
        measured(f"v_loss {name} {dtype}", off)
        assert off < 1e-6, name
    again = v_loss(*arguments, objective, per_frame=True)
    assert all(torch.equal(one, two) for one, two in zip(out, again, strict=True))
    short = v_loss(*arguments, objective, with_gradient=False)
    assert torch.equal(short[0], out[0]) and short[1].numel() == short[2].numel() == 0
    x_t = noised(*arguments[1:4], objective)
    off = oracles.error(x_t, oracles.mixed(*arguments[1:4], objective))
    # The interpreter cuts a bfloat16 off where a GPU rounds it.
    assert off < {torch.bfloat16: 6e-3, torch.float16: 5e-4}.get(dtype, 2e-7)


@pytest.mark.parametrize("how", oracles.STRIDES)
def test_strides_batches_and_padding_do_not_matter(how, rng):
    prediction, x, keys, t, counted = inputs(rng, torch.float32, (4, 6, 150))
    counted[:, 100:] = False
    whole = v_loss(prediction, x, keys, t, counted, "v", per_frame=True)
    mask = oracles.strided(counted, how) if how == "transposed" else counted
    out = v_loss(
        oracles.strided(prediction, how), oracles.strided(x, how), keys, t, mask, "v", per_frame=True
    )
    assert all(torch.equal(one, two) for one, two in zip(out, whole, strict=True))
    x_t = noised(oracles.strided(x, how), keys, t, "v")
    row = slice(2, 3)
    alone = v_loss(prediction[row, :, :100], x[row, :, :100], keys[row], t[row], counted[row, :100], "v")
    assert torch.allclose(alone[0], whole[0][row], rtol=1e-14)
    assert torch.equal(alone[2], whole[2][row, :, :100])
    assert torch.equal(noised(x[row, :, :100], keys[row], t[row], "v"), x_t[row, :, :100])


def test_rows_without_frames_have_no_mean_and_no_gradient(rng):
    prediction, x, keys, t, counted = inputs(rng, torch.float32, (3, 5, 37))
    counted[1] = False
    prediction[1] = float("nan")
    loss, frames, gradient = v_loss(prediction, x, keys, t, counted, "v", per_frame=True)
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert not frames[1].any() and not gradient[1].any() and gradient[0].any()


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("queries", [None, 3])
def test_preconditioning(dtype, queries, rng):
    lead = () if queries is None else (queries,)
    theta, gradient = oracles.normal(rng, *lead, 37, 41), oracles.normal(rng, *lead, 37, 41, dtype=dtype)
    fisher = oracles.normal(rng, 37, 41).square()
    wanted = theta.double() + 0.3 * gradient.double() / (fisher.double() + 0.05)
    assert oracles.error(precondition_(theta, gradient, fisher, 0.05, 0.3), wanted) < 3e-7
    cut = oracles.strided(theta, "sliced")
    before = cut.double()
    precondition_(cut, gradient, fisher, 0.05, 0.3)
    assert oracles.error(cut, before + 0.3 * gradient.double() / (fisher.double() + 0.05)) < 3e-7


def test_the_interpreter_is_on():
    assert launch.interpreting()
