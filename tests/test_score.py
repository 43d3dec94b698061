"""Losses, displacements and scores under an update against one forward a draw; and what the numbers mean."""

import math
from dataclasses import replace

import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import SCORE_FUNCTIONS, DrawPlan, UserError, fit_fisher, measure_effects, scores
from attr_engine.diffusion import ROW_FUNCTIONS, work_dtype
from attr_engine.effects import Effects, frame_effects
from attr_engine.influence import measure_influence
from attr_engine.models.protocol import select_parameters
from attr_engine.score import FIRST_ORDER
from attr_engine.unlearn import unlearn_query

STABLE_AUDIO = [
    ("v", "prepend", 4),
    ("rectified_flow", "adaLN", 1),
    ("v", "adaLN", 4),
    ("rectified_flow", "prepend", 1),
]
MASKS = [(False, False), (True, False), (False, True), (True, True)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def compare(model, rng, layers, plan, mask_update, mask_score, tracks=4, draws=4) -> dict[str, float]:
    """Two queries end to end by both ways; worst relative error of every number, by name."""
    training = helpers.make_tracks(rng, tracks, model.channels, model.frames)
    queries = helpers.make_tracks(rng, 2, model.channels, model.frames, "q")
    fisher = fit_fisher(model, training, layers, plan, 2, mask_score)
    updates = {
        function: [
            unlearn_query(
                model, queries, i, fisher, plan, tracks, draws=4, masked=mask_update,
                function=ROW_FUNCTIONS[function],
            )
            for i in range(2)
        ]
        for function in ROW_FUNCTIONS
    }  # fmt: skip
    loads = {name: [lambda u=u: u for u in held] for name, held in updates.items()}
    order = rng.permutation(tracks)
    batch, rows = training.batch(list(order), model.frames), int(rng.integers(1, 8))
    effects = measure_effects(model, batch, loads["loss"], plan, draws, mask_score, rows)
    parameters = select_parameters(model, layers)
    influence = {
        name: measure_influence(
            model, parameters, batch, held, plan, draws, mask_score, rows, ROW_FUNCTIONS[name]
        )[0]
        for name, held in loads.items()
    }
    effects = replace(effects, influence=influence)
    loop = naive.Loop(model, plan)
    items = naive.items(training, model.frames)
    expected_fisher = loop.fisher(items, 2, mask_score)
    names = [n for n in loop.theta if naive.GROUPS[layers](n)]
    expected = []
    for query in naive.items(queries, model.frames):
        other, _ = loop.unlearned(query, expected_fisher, names, tracks, 1e-2, "size", 1, 4, 0.1, mask_update)
        ordered = [items[i] for i in order]
        expected.append(loop.effects(other, ordered, draws, mask_score))
        for function in ROW_FUNCTIONS:
            other, _ = loop.unlearned(
                query, expected_fisher, names, tracks, 1e-2, "size", 1, 4, 0.1, mask_update, function
            )
            found = loop.influence(other, ordered, draws, mask_score, function)
            expected[-1][f"influence {function}"] = found
    worst = {
        "base": naive.relative_error(effects.base, expected[0]["base"]),
        "unlearned": naive.relative_error(effects.unlearned, [e["unlearned"] for e in expected]),
        "displacement per draw": naive.relative_error(
            effects.displacement, [e["displacement"] for e in expected]
        ),
    }
    assert set(naive.SCORES) == set(SCORE_FUNCTIONS)
    table = scores(effects, list(naive.SCORES), plan.replicates)
    for name, function in naive.SCORES.items():
        per_draw = np.array([function(e) for e in expected])  # [U, N, D]
        value, error = table[name]
        # A difference of float32 losses is no better than the losses: a change of less than a hundredth of
        # them is measured against that hundredth.
        losses = {
            "loss_change": 1e-2 * effects.base.max(),
            "skew": 1e-2,
            "displacement": 0.3 * per_draw.max(),
            "influence": 0.3 * np.abs(per_draw).max(),
            "norm_influence": 0.3 * np.abs(per_draw).max(),
        }
        floor = losses[name] if work_dtype(model) == torch.float32 else 0.0
        for u in range(2):  # a strong query must not hide the error of a weak one
            worst[f"{name} {u}"] = naive.relative_error(value[u], per_draw[u].mean(axis=-1), floor)
        replicates = np.array(
            [per_draw[..., r :: plan.replicates].mean(axis=-1) for r in range(plan.replicates)]
        )
        spread = np.sqrt(((replicates - replicates.mean(axis=0)) ** 2).sum(axis=0) / (plan.replicates - 1))
        worst[f"{name} error"] = naive.relative_error(error, spread / math.sqrt(plan.replicates), floor)
    return worst


@pytest.mark.parametrize("masks", MASKS, ids=lambda m: f"MU{m[0]:d}ML{m[1]:d}")
@pytest.mark.parametrize("kind", ["track", "shared"])
@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_every_score_follows_its_formula(objective, kind, masks, seed, rng, measured):
    for dtype, tolerance in list(TOLERANCE.items())[: 2 if masks == (True, False) else 1]:
        model = helpers.ToyDenoiser(seed, objective, dtype)
        worst = compare(model, rng, ("all",), DrawPlan(seed, kind, 2), *masks)
        for name, value in worst.items():
            measured(f"{name} {dtype}", value)
        assert max(worst.values()) < tolerance, worst


@pytest.mark.parametrize("layers", naive.GROUPS, ids="+".join)
def test_every_layer_group_scores_by_the_formula(layers, seed, rng, measured):
    for dtype, tolerance in TOLERANCE.items():
        model = helpers.ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])), dtype)
        worst = compare(model, rng, layers, DrawPlan(seed, "track", 2), True, False)
        for name, value in worst.items():
            measured(f"{name} {dtype}", value)
        assert max(worst.values()) < tolerance, worst


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("objective", "global_cond", "patch"), STABLE_AUDIO)
def test_scores_of_a_stable_audio_model(objective, global_cond, patch, dtype, seed, rng, measured):
    pytest.importorskip("stable_audio_tools")
    model = helpers.tiny_stable_audio(seed, dtype, objective=objective, global_cond=global_cond, patch=patch)
    worst = compare(model, rng, ("all",), DrawPlan(seed, "track", 2), True, False, tracks=3, draws=2)
    for name, value in worst.items():
        measured(f"{name} {dtype}", value)
    assert max(worst.values()) < TOLERANCE[dtype], worst


@pytest.fixture
def setting(seed, rng):
    model = helpers.ToyDenoiser(seed)
    tracks, plan = helpers.make_tracks(rng, 5, model.channels, model.frames), DrawPlan(seed, replicates=2)
    fisher = fit_fisher(model, tracks, ("all",), plan, 2)
    updates = [unlearn_query(model, tracks, i, fisher, plan, 5, draws=4) for i in (0, 3)]
    return model, tracks, plan, updates


def test_updates_do_not_disturb_each_other_nor_the_model(setting):
    model, tracks, plan, (a, b) = setting
    before, batch = model.fingerprint, tracks.batch(range(5), model.frames)
    both = measure_effects(model, batch, [lambda: a, lambda: b], plan, 2)
    turned = measure_effects(model, batch, [lambda: b, lambda: a], plan, 2)
    none = measure_effects(model, batch, [], plan, 2)
    assert model.fingerprint == before
    assert np.array_equal(both.unlearned, turned.unlearned[::-1])
    assert np.array_equal(both.displacement, turned.displacement[::-1])
    assert np.array_equal(both.base, none.base)
    assert none.unlearned.shape == none.displacement.shape == (0, 5, 2)


def test_more_draws_keep_the_draws_that_were_there(setting):
    model, tracks, plan, (a, _) = setting
    batch = tracks.batch(range(5), model.frames)
    few, many = (measure_effects(model, batch, [lambda: a], plan, d, rows=1) for d in (2, 6))
    assert np.array_equal(many.base[:, :2], few.base)
    assert np.array_equal(many.unlearned[..., :2], few.unlearned)
    assert np.array_equal(many.displacement[..., :2], few.displacement)


def test_an_update_of_nothing_scores_exactly_zero(setting):
    model, tracks, plan, (a, _) = setting
    zero = type(a)(a.query, 0.0, "size", {n: torch.zeros_like(v) for n, v in a.delta.items()}, 0.0, 0.0)
    effects = measure_effects(model, tracks.batch(range(5), model.frames), [lambda: zero], plan, 2)
    for value, error in scores(effects, [n for n in SCORE_FUNCTIONS if n not in FIRST_ORDER], 2).values():
        assert not value.any() and not error.any()


def test_frames_average_to_the_scores(setting):
    model, tracks, plan, (a, _) = setting
    batch = tracks.batch(range(5), model.frames)
    table = scores(measure_effects(model, batch, [lambda: a], plan, 4), ["displacement", "loss_change"], 2)
    frames = frame_effects(model, batch, a, plan, 4)
    for name, (value, _) in table.items():
        assert frames[name].shape == (5, model.frames)
        assert naive.relative_error(frames[name].mean(axis=1), value[0]) < 1e-12


def test_larger_means_more_responsible():
    base = np.full((2, 1), 1.0)
    moved = np.array([[[0.4], [0.1]]])
    effects = Effects(base, np.array([[[1.5], [1.1]]]), moved, {"loss": moved, "squared_norm": moved})
    for name in SCORE_FUNCTIONS:
        value = scores(effects, [name], 1)[name][0]
        assert value[0, 0] > value[0, 1] > 0


def test_unusable_settings_are_refused_by_name(setting):
    model, tracks, plan, (a, _) = setting
    batch = tracks.batch(range(5), model.frames)
    with pytest.raises(UserError, match="score draws is 3"):
        measure_effects(model, batch, [lambda: a], plan, 3)
    with pytest.raises(UserError, match="'cosine'"):
        scores(measure_effects(model, batch, [lambda: a], plan, 2), ["cosine"], 2)
    with pytest.raises(UserError, match="measure_influence"):
        scores(measure_effects(model, batch, [lambda: a], plan, 2), ["norm_influence"], 2)
