"""MUCS: fine-tuning against an autograd loop, its end, and the scores of what it leaves."""

import helpers
import naive
import numpy as np
import pytest
import torch
import unlearning

from attr_engine import DrawPlan, Settings, UserError
from attr_engine.jobs import Query
from attr_engine.methods import Workspace, mucs, parse
from attr_engine.methods.mucs import Mirroring, mirrored
from attr_engine.methods.unlearner import loss_and_gradient, null_loss, others, training_plan
from attr_engine.models.protocol import select_parameters

LAYERS = ("transformer",)


def world(seed, rng):
    tracks, queries = helpers.make_tracks(rng, 6, 3, 10), helpers.make_tracks(rng, 2, 3, 10, "q")
    return helpers.ToyDenoiser(seed), tracks, queries


@pytest.fixture
def unbounded(monkeypatch):
    """A toy that learned nothing is at the loss of an untrained network already."""
    monkeypatch.setattr(mucs, "null_loss", lambda *a: 1e3)


def by_loop(model, tracks, queries, forget, keep, null, how):
    """The same steps, a pair at a time: how many, and where they lead."""
    loop = naive.Loop(model, training_plan(how.seed))
    begin = naive.Loop(model, training_plan(how.seed))
    names, adam = list(select_parameters(model, LAYERS)), unlearning.Adam(how.lr)
    mine, theirs, steps = naive.items(queries, 10), naive.items(tracks, 10), 0
    for k in range(how.steps):
        numbers = range(k * how.batch, (k + 1) * how.batch)
        falling = [
            loop.loss(mine[forget[j % len(forget)]], "update", j // len(forget), how.masked) for j in numbers
        ]
        chosen = np.random.default_rng([how.seed, 5, k]).integers(len(keep), size=how.batch)
        kept = [loop.loss(theirs[keep[i]], "update", j, False) for i, j in zip(chosen, numbers, strict=True)]
        limit = torch.tensor(null, dtype=torch.float64)
        bounded = torch.stack([x if float(x.detach()) < null else limit for x in falling])
        if float(bounded.detach().mean()) >= how.stop * null:
            break
        steps += 1
        total = torch.stack(kept).mean() - how.weight * bounded.mean()
        unlearning.move(loop, adam.step(unlearning.gradient(loop, total)), names)
    return steps, {n: d for n, d in begin.delta(loop).items() if n in names}


@pytest.mark.parametrize("bound", ["far", "acts"])
@pytest.mark.parametrize("forget", [[1], [0, 1]])
def test_fine_tuning_is_that_of_a_loop(seed, rng, monkeypatch, bound, forget):
    model, tracks, queries = world(seed, rng)
    parameters, keep = select_parameters(model, LAYERS), [0, 2, 3, 5]
    # Not at 1: rounding would decide whether the mean of five bounds is the bound.
    how = Mirroring(weight=0.7, lr=1e-3, stop=0.999, steps=3, batch=5, seed=seed, rows=2)
    null = 1e3
    if bound == "acts":  # for some of the rows of the first step, not for all
        batch = queries.batch([forget[j % len(forget)] for j in range(5)], 10)
        draws = [j // len(forget) for j in range(5)]
        null, _ = loss_and_gradient(model, parameters, batch, draws, training_plan(seed), True, 2)
    monkeypatch.setattr(mucs, "null_loss", lambda *a: null)
    found = mirrored(model, parameters, queries, forget, tracks, keep, how)
    steps, expected = by_loop(model, tracks, queries, forget, keep, null, how)
    # All rows of a later step may be above those of the first: it ends there.
    assert found.steps == steps >= 1 and found.ended == (steps < 3) and found.null == 0.999 * null
    assert steps == 3 or bound == "acts"
    for name, value in found.delta.items():
        assert naive.relative_error(value, expected[name]) < 1e-6, name


def test_rows_a_pass_decide_nothing(seed, rng, unbounded):
    model, tracks, queries = world(seed, rng)
    parameters = select_parameters(model, LAYERS)
    a, b = (
        mirrored(
            model, parameters, queries, [0], tracks, range(6), Mirroring(steps=2, stop=1.0, seed=seed, rows=n)
        )
        for n in (3, 64)
    )
    for name in a.delta:
        assert naive.relative_error(a.delta[name], b.delta[name]) < 1e-6


def test_it_ends_where_the_query_is_forgotten(seed, rng, monkeypatch):
    model, tracks, queries = world(seed, rng)
    parameters, plan = select_parameters(model, LAYERS), training_plan(seed)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    start, _ = loss_and_gradient(model, parameters, queries.batch([0] * 8, 10), range(8), plan, True, 8)
    monkeypatch.setattr(mucs, "null_loss", lambda *a: 1.5 * start)
    how = Mirroring(weight=20.0, lr=3e-3, stop=0.9, steps=300, batch=8, seed=seed)
    found = mirrored(model, parameters, queries, [0], tracks, range(6), how)
    assert found.ended and 0 < found.steps < 300
    assert found.loss >= found.null == 0.9 * (1.5 * start)
    assert all(torch.equal(p, before[n]) for n, p in parameters.items())


def test_a_cap_that_is_met_is_reported_and_kept(seed, rng, tmp_path, unbounded):
    model, tracks, queries = world(seed, rng)
    work = Workspace(tmp_path, Settings(seed=seed, layers=LAYERS))
    method = parse("mucs:steps=1,batch=4,draws=4,stop=1.0")[1]
    with pytest.warns(UserWarning, match="'q0' was not unlearned after 1 steps.*Allow more steps"):
        first = method.fit(model, tracks, work).score([Query(queries, 0, "")])
    assert np.abs(first).max() > 0
    again = method.fit(model, tracks, work).score([Query(queries, 0, "")])
    np.testing.assert_array_equal(again, first)


def test_scores_are_the_skew_on_draws_that_tracks_share(seed, rng, tmp_path, monkeypatch, unbounded):
    model, tracks, queries = world(seed, rng)
    work = Workspace(tmp_path, Settings(seed=seed, layers=LAYERS, replicates=2))
    method = parse("mucs:steps=2,batch=4,draws=6,stop=1.0,lr=0.001")[1]
    asked = [Query(queries, 1, ""), Query(tracks, 2, "training track"), Query(queries, 0, "")]
    with pytest.warns(UserWarning, match="not unlearned"):
        fitted = method.fit(model, tracks, work)
        found = fitted.score(asked)
    loop = naive.Loop(model, DrawPlan(seed, "shared", 2))
    for row, query in zip(found, asked, strict=True):
        other = unlearning.moved(loop, fitted.unlearn(query).delta)
        effects = loop.effects(other, naive.items(tracks, 10), 6, False)
        assert naive.relative_error(row, naive.SCORES["skew"](effects).mean(axis=1)) < 1e-8
    monkeypatch.setattr(mucs, "mirrored", None)  # what is kept is not made again
    np.testing.assert_array_equal(method.fit(model, tracks, work).score(asked[1:2]), found[1:2])
    assert others(tracks, asked[1]) == [0, 1, 3, 4, 5] and others(tracks, asked[0]) == list(range(6))


@pytest.mark.parametrize("masked", [True, False])
def test_a_prediction_of_zero_has_the_mean_square_of_the_target(seed, rng, masked):
    model, tracks = helpers.ToyDenoiser(seed), helpers.make_tracks(rng, 3, 3, 10)
    loop, expected = naive.Loop(model, training_plan(seed)), []
    for item in naive.items(tracks, 10):
        n = item.valid if masked else 10
        expected += [float((loop.rows(item, "update", d)[1][:, :n] ** 2).mean()) for d in range(32)]
    found = null_loss(model, tracks, [0, 1, 2], training_plan(seed), masked, rows=5)
    assert found == pytest.approx(np.mean(expected), rel=1e-12)
    with pytest.raises(UserError, match="'untrained' is for models that have a config"):
        null_loss(model, tracks, [0], training_plan(seed), masked, "untrained")


def test_an_untrained_network_is_built_anew(seed, rng):
    pytest.importorskip("stable_audio_tools")
    tracks, plan = helpers.make_tracks(rng, 2, 3, 16), training_plan(seed)
    a, b = (helpers.tiny_stable_audio(x) for x in (1, 2))
    found = [null_loss(m, tracks, [0, 1], plan, True, "untrained") for m in (a, b)]
    # The conditioners are those of each model, and feed the network.
    assert found[0] == pytest.approx(found[1], rel=1e-2)
    assert null_loss(a, tracks, [0, 1], plan, True) == found[0]
    assert null_loss(a, tracks, [0, 1], plan, True, "zero") != pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [("stop=0", "a stop above 0"), ("batch=0", "at least one track and row"), ("lr=0", "a positive lr"), ("null=none", "null loss is")],
)  # fmt: skip
def test_unusable_options_are_named(seed, rng, tmp_path, options, message):
    model, tracks = helpers.ToyDenoiser(seed), helpers.make_tracks(rng, 3, 3, 10)
    fitted = parse(f"mucs:draws=4,{options}")[1].fit(model, tracks, Workspace(tmp_path, Settings(layers=LAYERS)))  # fmt: skip
    with pytest.raises(UserError, match=message):
        fitted.score([Query(tracks, 0, "")])


def test_draws_have_to_fill_the_replicates(seed, rng, tmp_path):
    model, tracks = helpers.ToyDenoiser(seed), helpers.make_tracks(rng, 3, 3, 10)
    with pytest.raises(UserError, match="number of score draws is 5"):
        parse("mucs:draws=5")[1].fit(model, tracks, Workspace(tmp_path, Settings(layers=LAYERS)))
