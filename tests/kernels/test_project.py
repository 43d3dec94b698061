"""Projected per-sample gradients, and the projections themselves."""

from importlib import import_module

import naive
import numpy as np
import oracles
import pytest
import torch

from attr_engine.kernels import project, projection

module = import_module("attr_engine.kernels.project")


@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "identity", None])
def test_it_is_the_gradient_projected_on_both_sides(dtype, tokens, kind, rng, seed, measured):
    g, a = oracles.normal(rng, 5, tokens, 12, dtype=dtype), oracles.normal(rng, 5, tokens, 10, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    left = None if kind is None else projection(kind, 4, 12, seed, dtype=wide)
    right = projection("gaussian", 3, 10, seed + 1, dtype=dtype)
    out = project(g, a, left, right)
    full = torch.eye(12, dtype=torch.float64) if left is None else left.double()
    wanted = torch.einsum("ro,boi,si->brs", full, oracles.per_sample(g, a), right.double())
    assert (out.shape, out.dtype) == (wanted.shape, wide)
    off = oracles.error(out, wanted)
    measured(f"project {dtype}", off)
    assert off < (1e-14 if dtype == torch.float64 else oracles.BOUND)


@pytest.mark.parametrize("how", oracles.STRIDES)
@pytest.mark.parametrize("scratch", [1, 500, 2**22])
def test_strides_and_chunks_do_not_matter(how, scratch, rng, monkeypatch):
    monkeypatch.setattr(module, "SCRATCH", scratch)
    g, a, p, q = (oracles.normal(rng, *s) for s in ((5, 9, 8), (5, 9, 6), (4, 8), (3, 6)))
    out = project(*(oracles.strided(x, how) for x in (g, a, p, q)))
    wanted = torch.einsum("ro,boi,si->brs", p.double(), oracles.per_sample(g, a), q.double())
    assert oracles.error(out, wanted) < oracles.BOUND


def test_entries_are_philox_of_their_place(seed):
    rows, columns = 7, 5003  # more than one block
    gaussian = projection("gaussian", rows, columns, seed)
    wanted = naive.normals(seed % 2**64, columns, rows).T / np.sqrt(rows)
    assert np.abs(gaussian.numpy() - wanted).max() < 1e-6
    counter = np.zeros((rows * columns, 4), dtype=np.uint64)
    counter[:, 0] = np.arange(rows * columns)
    signs = (naive.philox4x32(counter, seed % 2**64)[:, 0] & 1) * 2.0 - 1.0
    rademacher = projection("rademacher", rows, columns, seed)
    assert np.array_equal(
        rademacher.numpy(), (signs / np.sqrt(rows)).astype(np.float32).reshape(rows, columns)
    )
    assert abs(signs.mean()) < 6 / np.sqrt(signs.size)
    assert torch.equal(projection("identity", 2, 3, seed), torch.tensor([[1.0, 0, 0], [0, 1, 0]]))


def test_a_seed_is_a_projection_and_another_seed_another(seed):
    for kind in ("gaussian", "rademacher"):
        one = projection(kind, 8, 50, seed)
        assert torch.equal(one, projection(kind, 8, 50, seed))
        assert not torch.equal(one, projection(kind, 8, 50, seed + 1))
        assert not torch.equal(one, projection(kind, 8, 50, -seed - 1))
        assert torch.equal(one.bfloat16(), projection(kind, 8, 50, seed, dtype=torch.bfloat16))


def test_inner_products_are_kept_on_average(rng, seed):
    x = oracles.normal(rng, 2, 40, dtype=torch.float64)
    for kind in ("gaussian", "rademacher"):
        values = [
            (p @ x[0]) @ (p @ x[1])
            for p in (projection(kind, 16, 40, seed + n, dtype=torch.float64) for n in range(400))
        ]
        spread = x[0].norm() * x[1].norm() * np.sqrt(3 / 16 / 400)
        assert abs(torch.stack(values).mean() - x[0] @ x[1]) < 6 * spread


def test_what_does_not_fit_is_refused():
    g, a, p, q = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 4), torch.zeros(2, 5)
    with pytest.raises(ValueError, match="out_matrix"):
        project(g, a, p.T, q)
    with pytest.raises(TypeError, match="in_matrix"):
        project(g, a, p, q.long())
    with pytest.raises(ValueError, match="meta"):
        project(g, a, p, q.to("meta"))
    with pytest.raises(ValueError, match="'sparse'"):
        projection("sparse", 2, 3, 0)
    with pytest.raises(ValueError, match="keeps the first"):
        projection("identity", 4, 3, 0)
    with pytest.raises(ValueError, match="counters"):
        projection("gaussian", 2**17, 2**16, 0)


def test_no_tokens_give_zeros():
    assert not project(torch.zeros(2, 0, 4), torch.zeros(2, 0, 5), torch.ones(2, 4), None).any()
    assert project(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5), None, None).shape == (0, 4, 5)


def test_it_is_a_well_formed_operation_and_compiles(rng):
    g, a, p = oracles.normal(rng, 2, 3, 4), oracles.normal(rng, 2, 3, 5), oracles.normal(rng, 2, 4)
    for arguments in ((g, a, p, None), (g, a, None, None)):
        torch.library.opcheck(torch.ops.attr_engine.project.default, arguments)
    compiled = torch.compile(lambda *x: project(*x, None) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(g, a, p), project(g, a, p, None) * 2)
