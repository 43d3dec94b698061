"""The Triton kernels over layers in Triton's interpreter (run by test_triton.py with TRITON_INTERPRET=1)."""

from importlib import import_module

import oracles
import pytest
import torch

from attr_engine.kernels import launch, query_dot, squared_gradient_, table

squares = import_module("attr_engine.kernels.squared_gradient")
dots = import_module("attr_engine.kernels.query_dot")
# B, T, O, I: one sample, T below a tile, T and the sides not multiples of the tiles of 16 x 32 x 16.
SHAPES = [(1, 1, 5, 7), (1, 3, 16, 32), (4, 17, 33, 40), (3, 37, 24, 64), (7, 16, 8, 16)]


def test_the_interpreter_is_on():
    import triton

    assert launch.interpreting() and triton.knobs.runtime.interpret


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_squared_gradients(shape, dtype, rng, measured, monkeypatch):
    b, t, o, i = shape
    g, a = oracles.normal(rng, b, t, o, dtype=dtype), oracles.normal(rng, b, t, i, dtype=dtype)
    weights = torch.from_numpy(rng.random(b))
    for w in (None, weights):
        for parts in (None, 1, 3):
            fisher = torch.zeros(o, i)
            if parts is None:
                squared_gradient_(fisher, g, a, w)
            else:
                narrow = None if w is None else w.float()
                squares.run_triton(fisher, g, a, narrow, table.INTERPRETED, parts=min(parts, b))
            off = oracles.error(fisher, oracles.squared_gradient(g, a, w))
            measured(f"squared gradient {dtype}", off)
            assert off < oracles.BOUND


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_query_dots(shape, dtype, rng, measured):
    b, t, o, i = shape
    g, a = oracles.normal(rng, b, t, o, dtype=dtype), oracles.normal(rng, b, t, i, dtype=dtype)
    deltas = oracles.directions(rng, 3, g, a)
    wanted = oracles.query_dot(g, a, deltas)
    off = oracles.error(query_dot(g, a, deltas), wanted)
    measured(f"query dot {dtype}", off)
    assert off < oracles.BOUND
    parts = [dots.run_triton(g, a, deltas, table.INTERPRETED, parts=p) for p in range(1, min(b, 3) + 1)]
    assert all(torch.equal(parts[0], p) for p in parts)


@pytest.mark.parametrize("how", oracles.STRIDES)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_strides_are_passed(how, dtype, rng):
    g, a = oracles.normal(rng, 3, 19, 24, dtype=dtype), oracles.normal(rng, 3, 19, 40, dtype=dtype)
    deltas, before = oracles.normal(rng, 2, 24, 40), oracles.normal(rng, 24, 40).abs()
    other = [oracles.strided(x, how) for x in (g, a, deltas)]
    for parts in (1, 3):
        fisher = oracles.strided(before.clone(), how)
        weights = torch.ones(6)[::2]
        squares.run_triton(fisher, other[0], other[1], weights, table.INTERPRETED, parts=parts)
        assert oracles.error(fisher, before.double() + oracles.squared_gradient(g, a)) < oracles.BOUND
    assert oracles.error(query_dot(*other), oracles.query_dot(g, a, deltas)) < oracles.BOUND


def test_every_way_of_reading_was_taken():
    halves = torch.zeros(2, 16, 32, dtype=torch.float16)
    assert launch.reading(halves, halves) == "descriptor"
    assert launch.reading(halves[..., :5], halves) == "descriptor"
    odd = torch.zeros(2, 16, 5, dtype=torch.float16)
    assert launch.reading(odd, odd) == "strided"
    assert launch.reading(halves, halves.float()[..., ::2]) == "strided"
    assert launch.reading(halves[:, :1].expand(2, 16, 32), halves) == "pointer"
    assert launch.reading(halves.float(), halves.float()) == "pointer"


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_the_same_call_gives_the_same_bits(dtype, rng):
    g, a = oracles.normal(rng, 5, 19, 24, dtype=dtype), oracles.normal(rng, 5, 19, 40, dtype=dtype)
    deltas = oracles.normal(rng, 2, 24, 40)
    first = squared_gradient_(torch.zeros(24, 40), g, a), query_dot(g, a, deltas)
    again = squared_gradient_(torch.zeros(24, 40), g, a), query_dot(g, a, deltas)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    alone = torch.cat([query_dot(g[b : b + 1], a[b : b + 1], deltas) for b in range(5)])
    assert torch.equal(alone, first[1]), "a sample's scores do not depend on its batch"


def test_samples_without_gradient_add_nothing(rng):
    g, a = oracles.normal(rng, 4, 9, 16), oracles.normal(rng, 4, 9, 32)
    g[2] = 0
    fisher = squared_gradient_(torch.zeros(16, 32), g, a)
    some = [0, 1, 3]
    assert oracles.error(fisher, oracles.squared_gradient(g[some], a[some])) < oracles.BOUND
    assert not query_dot(g, a, torch.ones(2, 16, 32))[2].any()


@pytest.mark.parametrize("dtype", oracles.HALVES)
def test_halves_are_added_in_float32(dtype):
    g, a = torch.ones(1, 4096, 2, dtype=dtype), torch.ones(1, 4096, 3, dtype=dtype)
    a[0, 0] = 2.0
    assert torch.equal(squared_gradient_(torch.zeros(2, 3), g, a), torch.full((2, 3), 4097.0**2))
