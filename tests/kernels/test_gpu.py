"""The kernels on a GPU. ``python -m pytest -m gpu`` collects what needs one; it is skipped where there is none."""

from importlib import import_module

import oracles
import pytest
import torch

from attr_engine import kernels
from attr_engine.kernels import launch, table

squares = import_module("attr_engine.kernels.squared_gradient")
dots = import_module("attr_engine.kernels.query_dot")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not launch.have_triton(), reason="needs a GPU and Triton"
    ),
]
SHAPES = [(1, 1, 5, 7), (2, 100, 1536, 768), (5, 333, 200, 136), (2, 2585, 1536, 1536), (3, 600, 130, 257)]


def on_gpu(rng, *shape, dtype=torch.float32):
    return oracles.normal(rng, *shape, dtype=dtype).cuda()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("how", ["contiguous", "sliced", "transposed"])
def test_layers(shape, dtype, how, rng, measured):
    b, t, o, i = shape
    g, a = on_gpu(rng, b, t, o, dtype=dtype), on_gpu(rng, b, t, i, dtype=dtype)
    deltas = oracles.directions(rng, 3, g, a)
    square, dot = oracles.squared_gradient(g, a), oracles.query_dot(g, a, deltas)
    g, a = oracles.strided(g, how), oracles.strided(a, how)
    row = table.choose(launch.architecture(g.device), o, i, dtype, t)
    for parts in (1, 2):
        fisher = torch.zeros(o, i, device="cuda")
        squares.run_triton(fisher, g, a, None, row, parts=min(parts, b))
        again = torch.zeros_like(fisher)
        squares.run_triton(again, g, a, None, row, parts=min(parts, b))
        assert torch.equal(fisher, again)
        off = oracles.error(fisher, square)
        measured(f"squared gradient {dtype}", off)
        assert off < oracles.BOUND
    products = torch.zeros_like(fisher)
    squares.run_products(products, g, a, None, squares.GPU_SCRATCH)
    assert off <= max(2 * oracles.error(products, square), 2e-7)
    out = dots.run_triton(g, a, deltas, row)
    off = oracles.error(out, dot)
    measured(f"query dot {dtype}", off)
    assert off < oracles.BOUND and torch.equal(out, dots.run_triton(g, a, deltas, row))
    assert oracles.error(kernels.squared_gradient_(torch.zeros_like(fisher), g, a), square) < oracles.BOUND
    assert oracles.error(kernels.query_dot(g, a, deltas), dot) < oracles.BOUND


@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_rows_are_those_of_the_cpu(dtype, objective, rng, measured):
    shape = (3, 64, 700)
    x, prediction = oracles.normal(rng, *shape, dtype=dtype), oracles.normal(rng, *shape, dtype=dtype)
    keys, t = oracles.keys(rng, 3), torch.from_numpy(rng.random(3))
    counted = torch.arange(700) < torch.tensor([[700], [3], [0]])
    arguments = (prediction, x, keys, t, counted)
    there = [v.cpu() for v in kernels.v_loss(*(v.cuda() for v in arguments), objective, per_frame=True)]
    here = kernels.v_loss(*arguments, objective, per_frame=True)
    assert torch.allclose(there[0], here[0], rtol=1e-9, equal_nan=True)
    assert oracles.error(there[1], here[1]) < 1e-7 and oracles.error(there[2], here[2].double()) < 1e-7
    x_t = kernels.noised(x.cuda(), keys.cuda(), t.cuda(), objective).cpu()
    same = (x_t == kernels.noised(x, keys, t, objective)).double().mean()
    measured(f"noised equal {dtype}", same)
    assert same > 0.9999


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_steps_and_projections(dtype, rng, seed):
    theta, gradient = on_gpu(rng, 3, 100, 70), on_gpu(rng, 3, 100, 70, dtype=dtype)
    fisher = on_gpu(rng, 100, 70).square()
    wanted = theta.double() + 0.3 * gradient.double() / (fisher.double() + 0.05)
    assert oracles.error(kernels.precondition_(theta, gradient, fisher, 0.05, 0.3), wanted) < 3e-7
    g, a = on_gpu(rng, 3, 300, 128, dtype=dtype), on_gpu(rng, 3, 300, 96, dtype=dtype)
    for kind in ("gaussian", "rademacher"):
        p, q = (kernels.projection(kind, 16, n, seed, "cuda", dtype) for n in (128, 96))
        assert torch.equal(p.cpu(), kernels.projection(kind, 16, 128, seed, dtype=dtype))
        wanted = torch.einsum("ro,boi,si->brs", p.double(), oracles.per_sample(g, a), q.double())
        assert oracles.error(kernels.project(g, a, p, q), wanted) < oracles.BOUND
