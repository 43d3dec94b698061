"""Squared gradients on the CPU against float64 einsums."""

from importlib import import_module

import oracles
import pytest
import torch

from attr_engine.kernels import squared_gradient_

SHAPES = [(1, 1, 5, 7), (1, 23, 16, 9), (4, 1, 40, 33), (3, 7, 40, 33), (6, 129, 24, 65)]
module = import_module("attr_engine.kernels.squared_gradient")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
def test_it_is_the_sum_of_squares_of_per_sample_gradients(shape, dtype, rng, measured):
    b, t, o, i = shape
    g, a = oracles.normal(rng, b, t, o, dtype=dtype), oracles.normal(rng, b, t, i, dtype=dtype)
    weights = torch.from_numpy(rng.random(b))
    for w in (None, weights):
        fisher = torch.zeros(o, i, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        assert squared_gradient_(fisher, g, a, w) is fisher
        off = oracles.error(fisher, oracles.squared_gradient(g, a, w))
        measured(f"squared gradient {dtype}", off)
        assert off < (1e-14 if dtype == torch.float64 else oracles.BOUND)


@pytest.mark.parametrize("how", oracles.STRIDES)
@pytest.mark.parametrize("tokens", [1, 19])
def test_strides_do_not_matter_and_it_adds(how, tokens, rng):
    g, a = oracles.normal(rng, 3, tokens, 12), oracles.normal(rng, 3, tokens, 10)
    before = oracles.normal(rng, 12, 10).abs()
    fisher = oracles.strided(before.clone(), how)
    squared_gradient_(fisher, oracles.strided(g, how), oracles.strided(a, how), torch.ones(6)[::2])
    assert oracles.error(fisher, before.double() + oracles.squared_gradient(g, a)) < oracles.BOUND


@pytest.mark.parametrize("scratch", [1, 30, 100, 500, 4000, 10**6])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_size_of_the_buffer_changes_the_sum(scratch, weighted, rng):
    g, a = oracles.normal(rng, 7, 11, 13), oracles.normal(rng, 7, 11, 9)
    weights = torch.from_numpy(rng.random(7)) if weighted else None
    fisher = torch.zeros(13, 9)
    module.run_products(fisher, g, a, None if weights is None else weights.float(), scratch)
    assert oracles.error(fisher, oracles.squared_gradient(g, a, weights)) < oracles.BOUND


def test_the_buffer_is_bounded(rng):
    g, a = oracles.normal(rng, 64, 3, 300), oracles.normal(rng, 64, 3, 200)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and function.namespace == "aten":
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    fisher = torch.zeros(300, 200)
    with Watch():
        module.run_products(fisher, g, a, None, 2**16)
    assert oracles.error(fisher, oracles.squared_gradient(g, a)) < oracles.BOUND
    assert 0 < largest <= max(2**16, g.numel()), "64 gradients have 3.8 million elements"


def test_one_token_keeps_far_apart_scales(rng):
    g, a = oracles.normal(rng, 3, 1, 8), oracles.normal(rng, 3, 1, 6)
    fisher = torch.zeros(8, 6)
    squared_gradient_(fisher, g * 1e-25, a * 1e25)  # squares of either side alone are out of range
    assert oracles.error(fisher, oracles.squared_gradient(g * 1e-25, a * 1e25)) < oracles.BOUND


def test_nothing_to_add_changes_nothing():
    fisher = torch.full((4, 3), 2.0)
    for b, t in ((0, 5), (2, 0)):
        squared_gradient_(fisher, torch.zeros(b, t, 4), torch.zeros(b, t, 3))
    squared_gradient_(fisher, torch.zeros(2, 1, 4), torch.zeros(2, 1, 3))
    squared_gradient_(fisher, torch.zeros(2, 7, 4), torch.zeros(2, 7, 3))
    assert torch.equal(fisher, torch.full((4, 3), 2.0))


@pytest.mark.parametrize("dtype", oracles.HALVES)
def test_halves_are_added_in_float32(dtype):
    g, a = torch.ones(1, 4096, 2, dtype=dtype), torch.ones(1, 4096, 3, dtype=dtype)
    a[0, 0] = 2.0  # 4097 is neither a bfloat16 nor a float16
    fisher = torch.zeros(2, 3)
    squared_gradient_(fisher, g, a)
    assert torch.equal(fisher, torch.full((2, 3), 4097.0**2))


def test_the_same_call_gives_the_same_bits(rng):
    g, a = oracles.normal(rng, 5, 33, 70), oracles.normal(rng, 5, 33, 50)
    runs = [squared_gradient_(torch.zeros(70, 50), g, a) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_what_does_not_fit_is_refused():
    g, a, fisher = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"\[B, T, O\]"):
        squared_gradient_(fisher, g, a[:1])
    with pytest.raises(ValueError, match="fisher"):
        squared_gradient_(fisher.T, g, a)
    with pytest.raises(ValueError, match="weights"):
        squared_gradient_(fisher, g, a, torch.ones(3))
    with pytest.raises(TypeError, match="int64"):
        squared_gradient_(fisher, g.long(), a.long())
    with pytest.raises(TypeError, match="same"):
        squared_gradient_(fisher, g, a.double())
    with pytest.raises(TypeError, match="float16"):
        squared_gradient_(fisher.half(), g, a)
    with pytest.raises(TypeError, match="float64 fisher"):
        squared_gradient_(fisher, g.double(), a.double())
    with pytest.raises(ValueError, match="meta"):
        squared_gradient_(fisher, g, a.to("meta"))


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0])])
def test_it_is_a_well_formed_operation(weights):
    arguments = (torch.zeros(4, 5), torch.randn(2, 3, 4), torch.randn(2, 3, 5), weights)
    torch.library.opcheck(torch.ops.attr_engine.squared_gradient_.default, arguments)


def test_it_compiles_without_a_graph_break(rng):
    g, a = oracles.normal(rng, 3, 5, 6), oracles.strided(oracles.normal(rng, 3, 5, 7), "transposed")

    def twice(fisher, g, a):
        squared_gradient_(fisher, g * 2, a)
        return squared_gradient_(fisher, g, a) + 1

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    fisher = torch.zeros(6, 7)
    out = compiled(fisher, g, a)
    assert oracles.error(fisher, 5 * oracles.squared_gradient(g, a)) < oracles.BOUND
    assert torch.equal(out, fisher + 1)
