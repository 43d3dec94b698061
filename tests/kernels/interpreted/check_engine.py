"""Fisher, updates, scores and influences with every operation in Triton's interpreter, against the float64 loop of ``naive``.

The models are float32, so that K1 to K4 all run as kernels; that they do is counted, not believed.
"""

from collections import Counter

import helpers
import naive
import pytest
import torch

from attr_engine import DrawPlan, Settings, attribute, fit_fisher, measure_effects
from attr_engine.diffusion import ROW_FUNCTIONS, noised_rows
from attr_engine.effects import frame_effects
from attr_engine.influence import measure_influence
from attr_engine.models.protocol import select_parameters
from attr_engine.score import SCORE_FUNCTIONS
from attr_engine.unlearn import unlearn_query

BOUND = 1e-4  # as for float32 elsewhere


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel was launched."""
    from triton.runtime.interpreter import InterpretedFunction

    found = Counter()
    plain = InterpretedFunction.__getitem__

    def counted(self, grid):
        found[self.fn.__name__] += 1
        return plain(self, grid)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", counted)
    return found


def model_of(kind, seed):
    if kind == "toy":
        return helpers.ToyDenoiser(
            seed, "rectified_flow", torch.float32, channels=2, frames=6, dim=4, depth=1
        )
    pytest.importorskip("stable_audio_tools")
    return helpers.tiny_stable_audio(seed, torch.float32, objective="v", global_cond=kind, patch=1)


@pytest.mark.parametrize("kind", ["toy", "prepend", "adaLN"])
def test_the_whole_engine_equals_the_loop(kind, seed, rng, launched, measured):
    model, plan = model_of(kind, seed), DrawPlan(seed, "track", 2)
    training = helpers.make_tracks(rng, 3, model.channels, model.frames)
    loop, items = naive.Loop(model, plan), naive.items(training, model.frames)
    batch, parameters = training.batch(range(3), model.frames), select_parameters(model, ("all",))

    fisher = fit_fisher(model, training, ("all",), plan, 2, rows=4)
    assert launched["_squared_gradient_kernel"] and launched["_noised_kernel"] and launched["_v_loss_kernel"]
    expected = loop.fisher(items, 2, False)
    naive.non_zero(expected)
    worst = {"Fisher": max(naive.relative_error(fisher.values[n], e) for n, e in expected.items())}

    names = list(fisher.values)
    updates, others = {}, {}
    for name, function in ROW_FUNCTIONS.items():
        updates[name] = unlearn_query(model, training, 0, fisher, plan, 3, draws=2, function=function)
        others[name], _ = loop.unlearned(items[0], expected, names, 3, 1e-2, "size", 1, 2, 0.1, True, name)
        delta = loop.delta(others[name])
        worst[f"update {name}"] = max(naive.relative_error(updates[name].delta[n], delta[n]) for n in names)
    assert launched["_precondition_kernel"]

    effects = measure_effects(model, batch, [lambda: updates["loss"]], plan, 2, True, rows=4)
    wanted = loop.effects(others["loss"], items, 2, True)
    worst["base"] = naive.relative_error(effects.base, wanted["base"])
    worst["unlearned"] = naive.relative_error(effects.unlearned[0], wanted["unlearned"])
    worst["displacement"] = naive.relative_error(effects.displacement[0], wanted["displacement"])
    for name, function in ROW_FUNCTIONS.items():
        found, _ = measure_influence(
            model, parameters, batch, [lambda u=updates[name]: u], plan, 2, True, function=function
        )
        want = loop.influence(others[name], items, 2, True, name)
        worst[f"influence {name}"] = naive.relative_error(found[0], want)
    assert launched["_query_dot_kernel"]
    for name, value in worst.items():
        measured(f"{name} {kind}", value)
    assert max(worst.values()) < BOUND, worst


def test_a_bfloat16_model_is_as_far_from_float64_as_without_the_kernels(
    seed, rng, launched, monkeypatch, measured
):
    model, plan = (
        helpers.ToyDenoiser(seed, "v", torch.bfloat16, channels=2, frames=6, dim=4, depth=1),
        DrawPlan(seed, "track", 2),
    )
    training = helpers.make_tracks(rng, 3, model.channels, model.frames)
    exact = fit_fisher(model.double_copy(), training, ("all",), plan, 2)
    by_kernels = fit_fisher(model, training, ("all",), plan, 2)
    assert launched["_squared_gradient_kernel"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plain = fit_fisher(model, training, ("all",), plan, 2)

    def distance(fisher):
        a, b = (torch.cat([f.values[n].flatten().double() for n in exact.values]) for f in (fisher, exact))
        return float((a - b).norm() / b.norm())

    measured("with the kernels", distance(by_kernels))
    measured("without", distance(plain))
    assert distance(by_kernels) < 1.1 * distance(plain) + 1e-3


def test_frames_average_to_the_losses(seed, rng):
    model, plan = model_of("toy", seed), DrawPlan(seed, "track", 2)
    tracks = helpers.make_tracks(rng, 3, model.channels, model.frames)
    fisher = fit_fisher(model, tracks, ("all",), plan, 2)
    update, batch = (
        unlearn_query(model, tracks, 1, fisher, plan, 3, draws=2),
        tracks.batch(range(3), model.frames),
    )
    assert noised_rows(model, batch, [(0, 0)], plan, "score", True).target is None
    effects = measure_effects(model, batch, [lambda: update], plan, 2)
    frames = frame_effects(model, batch, update, plan, 2)
    change = (effects.unlearned - effects.base)[0].mean(axis=1)
    assert naive.relative_error(frames["loss_change"].mean(axis=1), change, 1e-2) < 1e-6
    assert (
        naive.relative_error(frames["displacement"].mean(axis=1), effects.displacement[0].mean(axis=1)) < 1e-5
    )


@pytest.mark.parametrize("shape", [(1, 6), (2, 6), (3, 4)])
def test_a_run_equals_a_run_without_the_kernels(shape, seed, rng, monkeypatch):
    channels, frames = shape
    model = helpers.ToyDenoiser(seed, "v", torch.float32, channels=channels, frames=frames, dim=4, depth=1)
    tracks = helpers.make_tracks(rng, 4, channels, frames)
    settings = Settings(
        self_influence=("t1",), replicates=2, fisher_draws=2, update_draws=2, score_draws=2,
        functions=tuple(SCORE_FUNCTIONS), layers=("transformer",),
    )  # fmt: skip
    first = attribute(model, tracks, settings=settings)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    second = attribute(model, tracks, settings=settings)
    for name in SCORE_FUNCTIONS:
        assert naive.relative_error(first.values[name], second.values[name], 1e-2) < BOUND


@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_noised_rows_are_those_of_a_cpu(objective, seed, rng, monkeypatch):
    model, plan = helpers.ToyDenoiser(seed, objective), DrawPlan(seed)
    batch = helpers.make_tracks(rng, 2, model.channels, model.frames).batch(range(2), model.frames)
    rows = [noised_rows(model, batch, [(0, 0), (1, 3)], plan, "score", True)]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    rows.append(noised_rows(model, batch, [(0, 0), (1, 3)], plan, "score", True))
    assert rows[0].target is None and rows[1].target is not None
    assert naive.relative_error(rows[0].x_t, rows[1].x_t) < 1e-6
