"""The update of METHOD section 1 against the same formula, one draw and one batch-1 backward at a time."""

import math

import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import DrawPlan, UserError, fit_fisher
from attr_engine.fisher import Fisher
from attr_engine.models.protocol import select_parameters
from attr_engine.unlearn import query_gradient, unlearn_query
from attr_engine.updates import Update, applied

STABLE_AUDIO = [
    ("rectified_flow", "prepend", 1),
    ("v", "adaLN", 4),
    ("rectified_flow", "adaLN", 1),
    ("v", "prepend", 4),
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
PAPER = {"unit": "lr", "strength": 1e-3, "steps": 1, "damping": 0.1}
FOUR_STEPS = {"unit": "lr", "strength": 1e-3, "steps": 4, "damping": 1.0}
SIZE = {"unit": "size", "strength": 1e-2, "steps": 1, "damping": 0.1}
TWO_HALVES = {"unit": "size", "strength": 3e-2, "steps": 2, "damping": 0.01}
STRENGTHS = [PAPER, FOUR_STEPS, SIZE, TWO_HALVES]


def compare(model, rng, layers, plan, dtype, tracks=3, **settings) -> float:
    """Check one update in every respect; return its worst relative error."""
    training = helpers.make_tracks(rng, tracks, model.channels, model.frames)
    queries = helpers.make_tracks(rng, 2, model.channels, model.frames, "q")
    index, masked, rows = int(rng.integers(2)), bool(rng.integers(2)), int(rng.integers(1, 6))
    fisher = fit_fisher(model, training, layers, plan, 2)
    update = unlearn_query(
        model, queries, index, fisher, plan, len(training), draws=4, masked=masked, rows=rows, **settings
    )
    loop = naive.Loop(model, plan)
    expected_fisher = loop.fisher(naive.items(training, model.frames), 2, False)
    query = naive.items(queries, model.frames)[index]
    names = [n for n in loop.theta if naive.GROUPS[layers](n)]
    other, lr = loop.unlearned(
        query, expected_fisher, names, len(training), draws=4, masked=masked, **settings
    )
    expected = loop.delta(other)
    naive.non_zero({n: expected[n] for n in names})
    assert list(update.delta) == names
    assert (update.query, update.strength, update.unit) == (query.id, settings["strength"], settings["unit"])
    weights, moved = (
        math.sqrt(sum(float((x**2).sum()) for x in xs))
        for xs in ([loop.theta[n].detach().numpy() for n in names], expected.values())
    )
    assert math.isclose(update.lr, lr, rel_tol=TOLERANCE[dtype])
    assert math.isclose(update.size, moved / weights, rel_tol=TOLERANCE[dtype])
    worst = max(naive.relative_error(update.delta[n], expected[n]) for n in names)
    return worst


@pytest.mark.parametrize("settings", STRENGTHS, ids=["lr", "lr-4", "size", "size-2"])
@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_update_follows_the_formula(objective, settings, seed, rng, measured):
    for dtype, tolerance in TOLERANCE.items():
        model = helpers.ToyDenoiser(seed, objective, dtype)
        plan = DrawPlan(seed, str(rng.choice(["track", "shared"])), 2)
        worst = compare(model, rng, ("all",), plan, dtype, **settings)
        measured(dtype, worst)
        assert worst < tolerance


@pytest.mark.parametrize("layers", naive.GROUPS, ids="+".join)
def test_update_of_every_layer_group_follows_the_formula(layers, seed, rng, measured):
    for dtype, tolerance in TOLERANCE.items():
        model = helpers.ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])), dtype)
        worst = compare(model, rng, layers, DrawPlan(seed, "track", 2), dtype, **rng.choice(STRENGTHS))
        measured(dtype, worst)
        assert worst < tolerance


def test_without_damping_it_divides_by_the_fisher_itself(seed, rng, measured):
    model = helpers.ToyDenoiser(seed)
    settings = {"unit": "size", "strength": 1e-2, "steps": 1, "damping": 0.0}
    worst = compare(
        model, rng, ("cross_attn.to_kv",), DrawPlan(seed, replicates=2), torch.float64, 4, **settings
    )
    measured("relative_error", worst)
    assert worst < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("objective", "global_cond", "patch"), STABLE_AUDIO)
def test_update_of_a_stable_audio_model(objective, global_cond, patch, dtype, seed, rng, measured):
    pytest.importorskip("stable_audio_tools")
    model = helpers.tiny_stable_audio(seed, dtype, objective=objective, global_cond=global_cond, patch=patch)
    worst = compare(model, rng, ("all",), DrawPlan(seed, "track", 2), dtype, **TWO_HALVES)
    measured("relative_error", worst)
    assert worst < TOLERANCE[dtype]


@pytest.fixture
def setting(seed, rng):
    model = helpers.ToyDenoiser(seed)
    tracks, plan = helpers.make_tracks(rng, 3, model.channels, model.frames), DrawPlan(seed, replicates=2)
    return model, tracks, plan, fit_fisher(model, tracks, ("transformer",), plan, 2)


def test_theta_0_is_back_bit_for_bit_even_after_an_error(setting):
    model, tracks, plan, fisher = setting
    before = model.fingerprint
    update = unlearn_query(model, tracks, 0, fisher, plan, 3, steps=2, draws=2)
    assert model.fingerprint == before
    with pytest.raises(ZeroDivisionError), applied(model, update.delta):
        assert model.fingerprint != before
        raise ZeroDivisionError
    assert model.fingerprint == before


def test_a_bfloat16_model_is_accumulated_in_float32_and_put_back(seed, rng):
    model = helpers.ToyDenoiser(seed, dtype=torch.bfloat16)
    tracks, plan = helpers.make_tracks(rng, 3, 3, 10), DrawPlan(seed, replicates=2)
    fisher = fit_fisher(model, tracks, ("all",), plan, 2)
    before = model.fingerprint
    update = unlearn_query(model, tracks, 0, fisher, plan, 3, 1e-1, steps=2, draws=2)
    assert {v.dtype for v in (*fisher.values.values(), *update.delta.values())} == {torch.float32}
    assert 0.05 < update.size < 0.11
    with applied(model, update.delta):
        assert model.fingerprint != before
    assert model.fingerprint == before


def test_the_order_of_the_fisher_does_not_matter(setting):
    model, tracks, plan, fisher = setting
    turned = Fisher(dict(reversed(fisher.values.items())), fisher.pairs)
    a, b = (unlearn_query(model, tracks, 0, f, plan, 3, draws=2) for f in (fisher, turned))
    assert all(naive.relative_error(a.delta[n], b.delta[n]) < 1e-12 for n in a.delta)


def test_a_first_gradient_that_is_known_changes_nothing(setting):
    model, tracks, plan, fisher = setting
    first = query_gradient(
        model,
        select_parameters(model, ("transformer",)),
        tracks.batch([1], model.frames),
        range(2),
        plan,
        True,
        16,
    )
    a, b = (
        unlearn_query(model, tracks, 1, fisher, plan, 3, steps=2, draws=2, first_gradient=g)
        for g in (None, first)
    )
    assert (a.lr, a.size) == (b.lr, b.size)
    assert all(torch.equal(a.delta[n], b.delta[n]) for n in a.delta)


def test_strength_is_linear_in_one_step_and_its_units_agree(setting):
    model, tracks, plan, fisher = setting
    small, large = (unlearn_query(model, tracks, 0, fisher, plan, 3, s, draws=2) for s in (1e-3, 1e-1))
    by_lr = unlearn_query(model, tracks, 0, fisher, plan, 3, small.lr, "lr", draws=2)
    assert math.isclose(small.size, 1e-3, rel_tol=1e-12) and math.isclose(by_lr.size, 1e-3, rel_tol=1e-12)
    for n in small.delta:
        assert naive.relative_error(100 * small.delta[n], large.delta[n]) < 1e-12
        assert naive.relative_error(by_lr.delta[n], small.delta[n]) < 1e-12
    tenfold = unlearn_query(model, tracks, 0, fisher, plan, 30, small.lr, "lr", draws=2)
    assert math.isclose(tenfold.size, 1e-4, rel_tol=1e-12), "the paper's formula divides by N"


def test_unlearning_raises_the_loss_as_the_gradient_says(setting):
    model, tracks, plan, fisher = setting
    update = unlearn_query(model, tracks, 0, fisher, plan, 3, 1e-6, draws=4)
    first = query_gradient(
        model,
        select_parameters(model, ("transformer",)),
        tracks.batch([0], model.frames),
        range(4),
        plan,
        True,
        16,
    )
    rise = sum(float((update.delta[n] * g).sum()) for n, g in first.items())
    loop, query = naive.Loop(model, plan), naive.items(tracks, model.frames)[0]
    before = np.mean([loop.loss(query, "update", d, True).item() for d in range(4)])
    with applied(model, update.delta):
        after = np.mean([naive.Loop(model, plan).loss(query, "update", d, True).item() for d in range(4)])
    assert after > before
    assert math.isclose(after - before, rise, rel_tol=1e-2)


def test_every_step_has_fresh_draws(setting, monkeypatch):
    model, tracks, plan, fisher = setting
    seen = []
    plain = DrawPlan.key
    monkeypatch.setattr(DrawPlan, "key", lambda self, *a: seen.append(a) or plain(self, *a))
    unlearn_query(model, tracks, 1, fisher, plan, 3, steps=3, draws=4, rows=3)
    assert seen == [("update", "t1", d) for d in range(12)]


def test_a_saved_update_comes_back_bit_for_bit(setting, tmp_path):
    model, tracks, plan, fisher = setting
    update = unlearn_query(model, tracks, 0, fisher, plan, 3, draws=2)
    path = tmp_path / "u.safetensors"
    update.save(path, "k")
    again = Update.load(path, "k")
    assert {k: v for k, v in vars(again).items() if k != "delta"} == {
        k: v for k, v in vars(update).items() if k != "delta"
    }
    assert list(again.delta) == list(update.delta)
    assert all(torch.equal(again.delta[n], v) for n, v in update.delta.items())
    with pytest.raises(UserError, match="other settings"):
        Update.load(path, "another")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        Update.load(path, "k")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"unit": "volts"}, "volts"),
        ({"strength": 0.0}, "strength 0"),
        ({"strength": -1e-2}, "-0.01"),
        ({"strength": math.nan}, "nan"),
        ({"strength": math.inf}, "inf"),
        ({"steps": 0}, "0 steps"),
        ({"damping": -0.1}, "damping"),
        ({"damping": math.nan}, "damping"),
        ({"draws": 3}, "update draws is 3"),
    ],
)
def test_unusable_settings_are_refused_by_name(setting, settings, named):
    model, tracks, plan, fisher = setting
    with pytest.raises(UserError, match=named):
        unlearn_query(model, tracks, 0, fisher, plan, 3, **{"draws": 2, **settings})


def test_dividing_by_a_zero_fisher_is_refused_by_name(setting):
    model, tracks, plan, fisher = setting
    name = list(fisher.values)[2]
    values = {n: torch.zeros_like(v) if n == name else v for n, v in fisher.values.items()}
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        unlearn_query(model, tracks, 0, Fisher(values, 1), plan, 3, draws=2, damping=0.0)
    assert np.isfinite(unlearn_query(model, tracks, 0, Fisher(values, 1), plan, 3, draws=2).size)


def test_the_fisher_of_another_model_is_refused_by_name(setting):
    model, tracks, plan, fisher = setting
    for values in (
        {**fisher.values, "extra": torch.ones(1)},
        {n: v[..., :1] for n, v in fisher.values.items()},
    ):
        with pytest.raises(UserError, match="another model"):
            unlearn_query(model, tracks, 0, Fisher(values, 1), plan, 3, draws=2)
