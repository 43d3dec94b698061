"""Tail patches against a step that autograd alone took on a copy of the model."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import ToyDenoiser, make_tracks

from attr_engine.cli import main
from attr_engine.diffusion import DrawPlan, losses, noised_rows
from attr_engine.errors import UserError
from attr_engine.evaluation import Case
from attr_engine.jobs import Query
from attr_engine.latents import MemoryTracks
from attr_engine.retrain import JUDGE_SEED
from attr_engine.tailpatch import RANDOM, descent_step, loss_falls, tail_table

DRAWS = 8


@pytest.fixture
def sets(seed, rng):
    model = ToyDenoiser(seed)
    return model, make_tracks(rng, 6, 3, 10), make_tracks(rng, 2, 3, 10, "q")


def asked(queries):
    return [Query(queries, i, "query") for i in range(len(queries))]


def mean_loss(model, tracks, i, purpose, masked):
    pairs = [(0, d) for d in range(DRAWS)]
    plan = DrawPlan(JUDGE_SEED, "shared", 1)
    return losses(
        model, noised_rows(model, tracks.batch([i], model.frames), pairs, plan, purpose, masked)
    ).mean()


def naive_fall(model, tracks, queries, q, i, size):
    """A copy of the model, torch's own optimiser, and the losses before and after."""
    other = copy.copy(model)
    other.module = copy.deepcopy(model.module)
    parameters = list(other.module.parameters())
    before = float(mean_loss(other, queries, q, "score", True).detach())
    mean_loss(other, tracks, i, "update", False).backward()
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    weights = torch.cat([p.detach().flatten() for p in parameters]).norm()
    torch.optim.SGD(parameters, lr=float(size * weights / norm)).step()
    return 100 * (before - float(mean_loss(other, queries, q, "score", True).detach())) / before


def test_falls_are_those_of_a_step_of_sgd(sets, rng):
    model, tracks, queries = sets
    kept = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    wanted, size = rng.random((2, 6)) < 0.6, float(rng.uniform(1e-3, 1e-2))
    wanted[0, 0] = True
    found = loss_falls(model, tracks, asked(queries), wanted, size, DRAWS, rows=3)
    assert np.array_equal(np.isnan(found), ~wanted)
    for q, i in zip(*np.nonzero(wanted), strict=True):
        assert found[q, i] == pytest.approx(naive_fall(model, tracks, queries, q, int(i), size), rel=1e-6, abs=1e-9)  # fmt: skip
    assert all(torch.equal(p, kept[name]) for name, p in model.module.named_parameters())


def test_a_step_on_the_query_itself_helps_it_most_and_the_table_says_so(seed, rng):
    # Long pieces, all frames valid: what is counted of a query and of a track is then the same.
    model = ToyDenoiser(seed)
    latents = [rng.normal(size=(3, 10)).astype(np.float32) * 1.5 + rng.normal() for _ in range(8)]
    given = [{"seconds_total": 5.0 + i, "lead": i} for i in range(8)]
    tracks = MemoryTracks([f"t{i}" for i in range(8)], latents, given)
    queries = MemoryTracks([f"q{i}" for i in range(4)], latents[:4], given[:4])
    own = np.eye(4, 8)
    found = loss_falls(model, tracks, asked(queries), np.ones((4, 8), bool), 1e-3, 32)
    itself = found[own > 0]
    assert (itself > 0).all()
    assert (itself > np.array([found[q][own[q] == 0].mean() for q in range(4)])).all()
    targets = [Query(tracks, 5, "training track")]  # is left out
    methods = {"right": np.vstack([own, own[:1]]), "wrong": -np.vstack([found, found[:1]])}
    case = Case(tracks, asked(queries) + targets, methods)
    rows = {row[0]: row[1:] for row in tail_table(case, model, 1, 1e-3, 32).rows}
    assert list(rows) == ["right", "wrong", RANDOM]
    assert rows["right"][0] == pytest.approx(itself.mean(), abs=1e-4)
    assert rows["wrong"][0] == pytest.approx(found.min(axis=1).mean(), abs=1e-4)
    for name in ("right", "wrong"):
        fall, low, high, more, less_low, less_high = rows[name]
        assert low <= fall <= high and less_low <= more <= less_high
        assert more == pytest.approx(fall - rows[RANDOM][0], abs=2e-4)
    assert rows["wrong"][3] <= 0 <= rows["right"][0]
    assert rows[RANDOM][3:] == ["", "", ""]


def test_every_step_has_the_same_length(sets):
    model, tracks, _ = sets
    parameters = dict(model.module.named_parameters())
    weights = torch.cat([p.detach().flatten() for p in parameters.values()]).norm()
    for i in (0, 1):
        step = descent_step(model, parameters, tracks, i, 2e-3, DRAWS)
        assert float(torch.cat([x.flatten() for x in step.values()]).norm() / weights) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("k", "size", "message"),
    [(0, 1e-3, "from 1 to 6"), (7, 1e-3, "from 1 to 6"), (1, 0.0, "positive size")],
)
def test_what_cannot_be_patched_is_refused(sets, k, size, message):
    model, tracks, queries = sets
    with pytest.raises(UserError, match=message):
        tail_table(Case(tracks, asked(queries), {"m": np.zeros((2, 6))}), model, k, size, DRAWS)


def test_queries_that_are_training_tracks_alone_are_refused(sets):
    model, tracks, _ = sets
    with pytest.raises(UserError, match="no training tracks"):
        tail_table(Case(tracks, [Query(tracks, 0, "training track")], {"m": np.zeros((1, 6))}), model, 1)


def test_a_track_without_a_gradient_is_named(sets):
    model, tracks, _ = sets
    with torch.no_grad():
        model.module.transformer.project_out.weight.zero_()
    blind = {name: p for name, p in model.module.named_parameters() if "project_in" in name}
    with pytest.raises(UserError, match=r"'t2' has norm 0\.0"):
        descent_step(model, blind, tracks, 2, 1e-3, DRAWS)


def test_the_command_adds_the_table_where_it_is_asked_for(sets, rng, tmp_path, monkeypatch, capsys):
    model, tracks, queries = sets
    case = Case(tracks, asked(queries), {"m": rng.normal(size=(2, 6))})
    monkeypatch.setattr("attr_engine.cli_judge._case", lambda args: (case, model))
    for more in ([], ["--tail-patch", "2"]):
        assert main(["evaluate", "run", "--out", str(tmp_path), *more]) == 0
        titles = [table["title"] for table in json.loads((tmp_path / "evaluation.json").read_text())]
        assert ("Tail patch: a step on each of the top 2" in titles) == bool(more)
    assert main(["evaluate", "run", "--out", str(tmp_path), "--tail-patch", "0"]) == 2
    assert "use from 1 to 6" in capsys.readouterr().err
