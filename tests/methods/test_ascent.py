"""Gradient ascent and random labelling against loops."""

import helpers
import naive
import numpy as np
import pytest
import torch
import unlearning

from attr_engine import DrawPlan, Settings, UserError, unlearn_query
from attr_engine.jobs import Query
from attr_engine.latents.batch import stable_text
from attr_engine.methods import Workspace, ascent, parse
from attr_engine.methods.ascent import ascend, relabelled, shuffled, wrong_labels
from attr_engine.methods.unlearner import null_loss, training_plan
from attr_engine.models.protocol import select_parameters

LAYERS = ("transformer",)


class Identity:
    """A curvature that changes no gradient."""

    def __init__(self, parameters):
        self._shapes = {n: p.shape for n, p in parameters.items()}

    def shapes(self):
        return self._shapes

    def precondition(self, gradient, damping):
        return dict(gradient)


def world(seed, rng):
    tracks, queries = helpers.make_tracks(rng, 6, 3, 10), helpers.make_tracks(rng, 2, 3, 10, "q")
    return helpers.ToyDenoiser(seed), tracks, queries


@pytest.fixture
def unbounded(monkeypatch):
    """A toy that learned nothing is at the loss of an untrained network already."""
    monkeypatch.setattr(ascent, "null_loss", lambda *a: np.inf)


@pytest.mark.parametrize("forget", [[1], [1, 0]])
def test_ascent_is_unlearning_with_the_identity(seed, rng, unbounded, forget):
    model, _, queries = world(seed, rng)
    parameters, plan = select_parameters(model, LAYERS), DrawPlan(seed, replicates=2)
    found = ascend(model, parameters, queries, forget, plan, 0.03, 3, 4, True, rows=3)
    update = unlearn_query(
        model, queries, forget, Identity(parameters), plan, 17, 0.03, "size", 3, 4, 0.0, True, rows=5
    )
    assert found.steps == 3
    assert found.size(parameters) == pytest.approx(update.size, rel=1e-9)
    for name, value in found.delta.items():
        assert naive.relative_error(value, update.delta[name]) < 1e-9


def test_draws_that_are_forgotten_have_no_gradient(seed, rng, monkeypatch):
    """Against a loop that leaves them out."""
    model, _, queries = world(seed, rng)
    parameters, plan = select_parameters(model, LAYERS), DrawPlan(seed, replicates=2)
    loop, item = naive.Loop(model, plan), naive.items(queries, 10)[0]
    each = [float(loop.loss(item, "update", d, True).detach()) for d in range(4)]
    bound = float(np.median(each))
    monkeypatch.setattr(ascent, "null_loss", lambda *a: bound)
    found = ascend(model, parameters, queries, [0], plan, 0.02, 1, 4, True)
    expected = {n: 0.0 for n in parameters}
    for d in range(4):
        if each[d] < bound:
            for n, g in loop.gradient(item, "update", d, True).items():
                if n in parameters:
                    expected[n] = expected[n] + g
    length = np.sqrt(sum(np.square(g).sum() for g in expected.values()))
    weights = np.sqrt(sum(float(p.detach().square().sum()) for p in parameters.values()))
    for name, value in found.delta.items():
        assert naive.relative_error(value, expected[name] * 0.02 * weights / length) < 1e-9
    assert found.loss == pytest.approx(np.minimum(each, bound).mean(), rel=1e-12)


def test_ascent_ends_where_nothing_is_left(seed, rng, monkeypatch):
    model, _, queries = world(seed, rng)
    parameters, plan = select_parameters(model, LAYERS), DrawPlan(seed, replicates=2)
    monkeypatch.setattr(ascent, "null_loss", lambda *a: 1e-9)
    found = ascend(model, parameters, queries, [0], plan, 0.02, 3, 4, True)
    assert found.steps == 0 and not any(d.any() for d in found.delta.values())


def test_ascent_raises_the_loss_of_the_query(seed, rng, unbounded):
    """On the step's own draws, by its length times that of the gradient; on others only as a rule."""
    model, _, queries = world(seed, rng)
    parameters, plan = select_parameters(model, LAYERS), DrawPlan(seed, replicates=2)
    found = ascend(model, parameters, queries, [0], plan, 1e-7, 1, 8, True)
    loop, item = naive.Loop(model, plan), naive.items(queries, 10)[0]
    other = unlearning.moved(loop, found.delta)
    each = [[x.loss(item, "update", d, True) for d in range(8)] for x in (loop, other)]
    before, after = (torch.stack(x).mean() for x in each)
    gradient = unlearning.gradient(loop, before)
    slope = np.sqrt(sum(np.square(gradient[n]).sum() for n in parameters))
    length = np.sqrt(sum(float(d.square().sum()) for d in found.delta.values()))
    # Half the curvature times the square of a length of about 1e-6 is left out.
    assert float((after - before).detach()) == pytest.approx(length * slope, rel=1e-3)


def test_a_shuffle_has_as_few_fixed_points_as_can_be(rng):
    for _ in range(300):
        n = int(rng.integers(1, 12))
        labels = [str(x) for x in rng.integers(0, rng.integers(1, 6), n)]
        found = shuffled(labels, rng)
        assert sorted(found) == list(range(n))
        most = max(labels.count(x) for x in labels)
        fixed = sum(labels[i] == labels[j] for i, j in enumerate(found))
        assert fixed == max(0, 2 * most - n)
    seen = {tuple(shuffled(list("abc"), rng)) for _ in range(60)}
    assert seen == {(1, 2, 0), (2, 0, 1)}


def test_wrong_labels_come_from_elsewhere_where_there_is_one(rng):
    own, pool = [{"a": 1}] * 3, [{"a": 1}, {"a": 2}, {"a": 3}]
    assert all(x in pool[1:] for x in wrong_labels(own, pool, rng))
    assert wrong_labels(own, own, rng) == own
    mixed = [{"a": 1}, {"a": 2}, {"a": 1}, {"a": 4}]
    for _ in range(20):
        found = wrong_labels(mixed, pool, rng)
        assert all(a != b for a, b in zip(found, mixed, strict=True))
        assert sorted(map(stable_text, found)) == sorted(map(stable_text, mixed))


@pytest.mark.parametrize("forget", [[1], [4, 0, 2]])
def test_relabelling_is_that_of_a_loop(seed, rng, forget):
    tracks = helpers.make_tracks(rng, 6, 3, 10)
    model = helpers.ToyDenoiser(seed)
    parameters = select_parameters(model, LAYERS)
    found = relabelled(model, parameters, tracks, forget, tracks, 3, 1e-3, 4, True, seed, rows=3)
    loop, begin = (naive.Loop(model, training_plan(seed)) for _ in range(2))
    adam, items = unlearning.Adam(1e-3), naive.items(tracks, 10)
    few = np.random.default_rng([seed, 6]).choice(6, 6, replace=False)
    for k in range(3):
        rows = [(items[forget[j % len(forget)]], j // len(forget)) for j in range(4 * k, 4 * k + 4)]
        right = [item.conditioning for item, _ in rows]
        wrong = wrong_labels(
            right, [tracks.conditioning[i] for i in few], np.random.default_rng([seed, 7, k])
        )
        assert all(a != b for a, b in zip(right, wrong, strict=True))
        losses = [
            loop.loss(naive.Item(item.id, item.latent, item.valid, label), "update", d, True)
            for (item, d), label in zip(rows, wrong, strict=True)
        ]
        step = adam.step(unlearning.gradient(loop, torch.stack(losses).mean()))
        unlearning.move(loop, step, list(parameters))
    expected = begin.delta(loop)
    for name, value in found.delta.items():
        assert naive.relative_error(value, expected[name]) < 1e-6, name


def test_one_conditioning_cannot_be_shuffled(seed, rng):
    tracks = helpers.make_tracks(rng, 3, 3, 10)
    same = helpers.ToyTracks(tracks.ids, tracks.raw, [{"seconds_total": 1.0, "lead": 1}] * 3, tracks.silence)
    model = helpers.ToyDenoiser(seed)
    with pytest.raises(UserError, match="no track has another conditioning than 't0'"):
        relabelled(model, select_parameters(model, LAYERS), same, [0], same, 1, 1e-3, 4, True, seed)


@pytest.mark.parametrize("kind", ["track", "shared"])
@pytest.mark.parametrize(
    "name",
    [
        "ascent:steps=2",
        "ascent:score=displacement",
        "relabel:steps=2,batch=3",
        "relabel:steps=1,score=skew",
    ],
)
def test_scores_are_those_of_a_loop(seed, rng, tmp_path, unbounded, name, kind):
    model, tracks, queries = world(seed, rng)
    s = Settings(
        seed=seed, layers=LAYERS, replicates=2, plan=kind, score_draws=4, update_draws=4, unit_tracks=4
    )
    fitted = parse(name)[1].fit(model, tracks, Workspace(tmp_path, s))
    asked = [Query(queries, 1, ""), Query(tracks, 2, "training track")]
    found = fitted.score(asked)
    loop, function = naive.Loop(model, DrawPlan(seed, kind, 2)), fitted.function
    for row, query in zip(found, asked, strict=True):
        other = unlearning.moved(loop, fitted.unlearn(query).delta)
        effects = loop.effects(other, naive.items(tracks, 10), 4, False)
        assert naive.relative_error(row, naive.SCORES[function](effects).mean(axis=1)) < 1e-7
    alone = parse(name)[1].fit(model, tracks, Workspace(tmp_path / "alone", s)).score(asked[1:])
    np.testing.assert_allclose(alone, found[1:], rtol=1e-9, atol=1e-12 * np.abs(found).max())
    assert not list(tmp_path.glob("*.update.*"))


def test_the_null_loss_is_finite_and_options_are_checked(seed, rng, tmp_path):
    model, tracks = helpers.ToyDenoiser(seed), helpers.make_tracks(rng, 3, 3, 10)
    assert 0 < null_loss(model, tracks, [0], training_plan(0), True) < np.inf
    work = Workspace(tmp_path, Settings(layers=LAYERS))
    with pytest.raises(UserError, match="scores are by 'influence'"):
        parse("ascent:score=influence")[1].fit(model, tracks, work)
    with pytest.raises(UserError, match="strength -1"):
        parse("ascent:strength=-1")[1].fit(model, tracks, work).score([Query(tracks, 0, "")])
    with pytest.raises(UserError, match="relabelling with 0 rows"):
        parse("relabel:batch=0")[1].fit(model, tracks, work).score([Query(tracks, 0, "")])
