"""Every operation under ``torch.compile(fullgraph=True)`` with the default compiler, in one graph."""

import shutil

import oracles
import pytest
import torch

from attr_engine import kernels


def everything(theta, fisher, x, keys, t, counted, weight, deltas, out_matrix):
    g, a = x.mT, kernels.noised(x, keys, t, "v").mT
    kernels.squared_gradient_(fisher, g, a * 2)
    tau = kernels.query_dot(g, a, deltas) + kernels.query_dot_low_rank(
        g, a, deltas[..., :2], deltas[..., 1:3]
    )
    loss, frames, gradient = kernels.v_loss(a.mT * weight, x, keys, t, counted, "v", per_frame=True)
    kernels.precondition_(theta, gradient, fisher.sum() + x[0].square(), 0.1, 0.5)
    return tau, loss, frames, kernels.project(g, a, out_matrix, None), (loss * tau[:, 0]).sum()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_all_operations_in_one_graph(rng):
    b, c, f = 3, 6, 11
    # A weight an element: of six long sums that almost cancel, another order of adding is more than 1e-6.
    weight = torch.ones(c, f, requires_grad=True)
    arguments = (
        oracles.normal(rng, b, c, f),
        oracles.keys(rng, b),
        torch.from_numpy(rng.random(b)),
        torch.ones(b, f, dtype=torch.bool),
        weight,
        oracles.normal(rng, 4, c, c),
        oracles.normal(rng, 2, c),
    )
    results = []
    for function in (everything, torch.compile(everything, fullgraph=True)):
        theta, fisher = torch.zeros(b, c, f), torch.ones(c, c)
        out = function(theta, fisher, *arguments)
        (of_weight,) = torch.autograd.grad(out[-1], weight)
        results.append([theta, fisher, of_weight, *(value.detach() for value in out)])
    for plain, compiled in zip(*results, strict=True):
        assert plain.norm() > 0
        assert oracles.error(compiled, plain.double()) < 1e-6
