"""The damped step on the CPU."""

from importlib import import_module

import oracles
import pytest
import torch

from attr_engine.kernels import precondition_

module = import_module("attr_engine.kernels.precondition")


def wanted(gradient, fisher, damping, step):
    increment = step * gradient.double() / (fisher.double() + damping)
    assert increment.norm() > 0
    return increment


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("queries", [None, 1, 4])
@pytest.mark.parametrize("dtype", [*oracles.DTYPES, torch.float64])
def test_it_adds_the_damped_step(shape, queries, dtype, rng, measured):
    lead = () if queries is None else (queries,)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theta, gradient = (
        torch.zeros((*lead, *shape), dtype=wide),
        oracles.normal(rng, *lead, *shape, dtype=dtype),
    )
    fisher = oracles.normal(rng, *shape, dtype=wide).square()
    increment = wanted(gradient, fisher, 0.05, -0.3)
    assert precondition_(theta, gradient, fisher, 0.05, -0.3) is theta
    off = oracles.error(theta, increment)
    measured(f"precondition {dtype}", off)
    assert off < (1e-15 if dtype == torch.float64 else 4e-7)


@pytest.mark.parametrize("how", oracles.STRIDES)
@pytest.mark.parametrize("scratch", [1, 10, 2**18])
def test_strides_and_blocks_do_not_matter(how, scratch, rng, monkeypatch):
    monkeypatch.setattr(module, "SCRATCH", scratch)
    theta, gradient, fisher = (oracles.normal(rng, *s) for s in ((3, 8, 6), (3, 8, 6), (8, 6)))
    fisher = fisher.square()
    value = theta.double() + wanted(gradient, fisher, 0.1, 0.2)
    plain = precondition_(theta.clone(), gradient, fisher, 0.1, 0.2)
    out = precondition_(*(oracles.strided(x.clone(), how) for x in (theta, gradient, fisher)), 0.1, 0.2)
    assert torch.equal(out, plain)
    assert oracles.error(out, value) < 3e-7


def test_what_does_not_fit_is_refused():
    theta = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="fisher"):
        precondition_(theta, theta, torch.zeros(3), 0.1, 1.0)
    with pytest.raises(TypeError, match="float16"):
        precondition_(theta.half(), theta, theta, 0.1, 1.0)
    with pytest.raises(TypeError, match="int64"):
        precondition_(theta, theta.long(), theta, 0.1, 1.0)
    with pytest.raises(ValueError, match="meta"):
        precondition_(theta, theta, theta.to("meta"), 0.1, 1.0)


def test_nothing_stays_nothing():
    assert precondition_(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(4), 0.1, 1.0).shape == (0, 4)
    assert precondition_(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(0), 0.1, 1.0).shape == (2, 0)


def test_it_is_a_well_formed_operation_and_compiles(rng):
    theta, gradient, fisher = (
        torch.zeros(2, 3, 4),
        oracles.normal(rng, 2, 3, 4),
        oracles.normal(rng, 3, 4).abs(),
    )
    torch.library.opcheck(
        torch.ops.attr_engine.precondition_.default, (theta.clone(), gradient, fisher, 0.1, 2.0)
    )
    compiled = torch.compile(
        lambda a, b, c: precondition_(a, b, c, 0.1, 2.0) + 1, fullgraph=True, backend="aot_eager"
    )
    out = compiled(theta, gradient, fisher)
    assert torch.equal(theta, precondition_(torch.zeros(2, 3, 4), gradient, fisher, 0.1, 2.0))
    assert torch.equal(out, theta + 1) and theta.any()
