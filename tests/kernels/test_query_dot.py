"""Query dot products on the CPU against float64 einsums."""

from importlib import import_module

import oracles
import pytest
import torch

from attr_engine.kernels import query_dot, query_dot_low_rank

SHAPES = [(1, 1, 5, 7, 1), (1, 23, 16, 9, 4), (4, 1, 40, 33, 2), (3, 7, 40, 33, 5), (6, 129, 24, 65, 17)]
module = import_module("attr_engine.kernels.query_dot")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
def test_it_is_the_inner_product_with_every_direction(shape, dtype, rng, measured):
    b, t, o, i, k = shape
    g, a = oracles.normal(rng, b, t, o, dtype=dtype), oracles.normal(rng, b, t, i, dtype=dtype)
    deltas = oracles.directions(rng, k, g, a)
    out = query_dot(g, a, deltas)
    assert (out.shape, out.dtype) == ((b, k), deltas.dtype)
    off = oracles.error(out, oracles.query_dot(g, a, deltas))
    measured(f"query dot {dtype}", off)
    assert off < (1e-13 if dtype == torch.float64 else oracles.BOUND)


@pytest.mark.parametrize("how", oracles.STRIDES)
@pytest.mark.parametrize("tokens", [1, 19])
def test_strides_do_not_matter(how, tokens, rng):
    g, a, deltas = (oracles.normal(rng, *s) for s in ((3, tokens, 12), (3, tokens, 10), (4, 12, 10)))
    out = query_dot(*(oracles.strided(x, how) for x in (g, a, deltas)))
    assert oracles.error(out, oracles.query_dot(g, a, deltas)) < oracles.BOUND


@pytest.mark.parametrize("scratch", [1, 30, 100, 500, 4000, 10**6])
def test_no_size_of_the_buffer_changes_the_result(scratch, rng):
    g, a, deltas = (oracles.normal(rng, *s) for s in ((7, 11, 13), (7, 11, 9), (5, 13, 9)))
    assert (
        oracles.error(module.run_products(g, a, deltas, scratch), oracles.query_dot(g, a, deltas))
        < oracles.BOUND
    )


@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
@pytest.mark.parametrize("tokens", [1, 33])
def test_low_rank_directions_are_their_products(dtype, tokens, rng, measured):
    g, a = oracles.normal(rng, 3, tokens, 12, dtype=dtype), oracles.normal(rng, 3, tokens, 10, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, v = oracles.normal(rng, 5, 12, 2, dtype=wide), oracles.normal(rng, 5, 10, 2, dtype=wide)
    out = query_dot_low_rank(g, oracles.strided(a, "gapped"), oracles.strided(u, "transposed"), v)
    off = oracles.error(out, oracles.query_dot(g, a, u.double() @ v.double().mT))
    measured(f"query dot low rank {dtype}", off)
    assert out.dtype == wide
    assert off < (1e-13 if dtype == torch.float64 else oracles.BOUND)


def test_halved_directions_are_read_as_they_are(rng):
    g, a = oracles.normal(rng, 2, 5, 8), oracles.normal(rng, 2, 5, 6)
    deltas = oracles.normal(rng, 3, 8, 6, dtype=torch.bfloat16)
    assert oracles.error(query_dot(g, a, deltas), oracles.query_dot(g, a, deltas)) < oracles.BOUND


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 129])
def test_partial_sums_are_all_added(count, rng):
    partial = oracles.normal(rng, count, 2, 3)
    assert oracles.error(module.ordered_sum(partial), partial.double().sum(0)) < 1e-7


def test_nothing_gives_zeros():
    assert torch.equal(
        query_dot(torch.zeros(2, 0, 4), torch.zeros(2, 0, 3), torch.ones(5, 4, 3)), torch.zeros(2, 5)
    )
    assert query_dot(torch.zeros(2, 3, 4), torch.zeros(2, 3, 3), torch.ones(0, 4, 3)).shape == (2, 0)
    assert query_dot(torch.zeros(0, 3, 4), torch.zeros(0, 3, 3), torch.ones(5, 4, 3)).shape == (0, 5)


def test_what_does_not_fit_is_refused():
    g, a, deltas = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(6, 4, 5)
    with pytest.raises(ValueError, match=r"\[B, T, O\]"):
        query_dot(g, a[:, :2], deltas)
    with pytest.raises(ValueError, match=r"\[K, 4, 5\]"):
        query_dot(g, a, deltas.mT)
    with pytest.raises(TypeError, match="int64"):
        query_dot(g, a, deltas.long())
    with pytest.raises(ValueError, match="meta"):
        query_dot(g, a, deltas.to("meta"))
    with pytest.raises(ValueError, match=r"\[K, O, R\]"):
        query_dot_low_rank(g, a, torch.zeros(2, 4, 3), torch.zeros(2, 5, 2))


def test_they_are_well_formed_operations():
    g, a = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    torch.library.opcheck(torch.ops.attr_engine.query_dot.default, (g, a, torch.randn(6, 4, 5)))
    low_rank = (g, a, torch.randn(6, 4, 2), torch.randn(6, 5, 2))
    torch.library.opcheck(torch.ops.attr_engine.query_dot_low_rank.default, low_rank)


def test_it_compiles_without_a_graph_break(rng):
    g, a, deltas = (oracles.normal(rng, *s) for s in ((3, 5, 6), (3, 5, 7), (2, 6, 7)))

    def both(g, a, deltas):
        return query_dot(g * 2, a, deltas) + query_dot_low_rank(g, a, deltas[..., :3], deltas.mT[..., :3])

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(g, a, deltas), both(g, a, deltas))
