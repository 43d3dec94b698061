"""The diagonal Fisher against a loop that squares ``p.grad`` of one (track, draw) pair at a time."""

import math

import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import DrawPlan, UserError, fit_fisher
from attr_engine.fisher import UNITS, Fisher, FisherSettings, combine, fisher_units, sum_unit
from attr_engine.memory import peak_bytes
from attr_engine.models.protocol import select_parameters
from attr_engine.unlearn import query_gradient

STABLE_AUDIO = [
    ("v", "prepend", 1),
    ("rectified_flow", "adaLN", 4),
    ("v", "adaLN", 1),
    ("rectified_flow", "prepend", 4),
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def compare(model, tracks, layers, plan, draws, masked, dtype) -> float:
    """Check values, coverage and bookkeeping; return the worst relative error."""
    fisher = fit_fisher(model, tracks, layers, plan, draws, masked)
    loop = naive.Loop(model, plan)
    expected = loop.fisher(naive.items(tracks, model.frames), draws, masked)
    naive.non_zero(expected)
    names = [n for n in loop.theta if naive.GROUPS[layers](n)]
    assert list(fisher.values) == names, "in the module's order, nothing left out, nothing added"
    assert (fisher.pairs, fisher.unused) == (len(tracks) * draws, ())
    assert all(v.dtype == dtype for v in fisher.values.values())
    worst = max(naive.relative_error(fisher.values[n], expected[n]) for n in names)
    mean = np.concatenate([expected[n].ravel() for n in names]).mean()
    assert math.isclose(fisher.mean(), mean, rel_tol=TOLERANCE[dtype])
    return worst


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("kind", ["track", "shared"])
@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
def test_fisher_is_the_mean_of_squared_per_sample_gradients(objective, kind, dtype, seed, rng, measured):
    model = helpers.ToyDenoiser(seed, objective, dtype)
    tracks = helpers.make_tracks(rng, 3, model.channels, model.frames)
    for masked in (False, True):
        worst = compare(model, tracks, ("all",), DrawPlan(seed, kind, 2), 4, masked, dtype)
        measured("relative_error", worst)
        assert worst < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("layers", naive.GROUPS, ids="+".join)
def test_fisher_of_every_layer_group(layers, dtype, seed, rng, measured):
    model = helpers.ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])), dtype)
    tracks = helpers.make_tracks(rng, 3, model.channels, model.frames)
    worst = compare(model, tracks, layers, DrawPlan(seed, "track", 2), 2, bool(rng.integers(2)), dtype)
    measured("relative_error", worst)
    assert worst < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("objective", "global_cond", "patch"), STABLE_AUDIO)
def test_fisher_of_a_stable_audio_model(objective, global_cond, patch, dtype, seed, rng, measured):
    pytest.importorskip("stable_audio_tools")
    model = helpers.tiny_stable_audio(seed, dtype, objective=objective, global_cond=global_cond, patch=patch)
    tracks = helpers.make_tracks(rng, 2, model.channels, model.frames)
    masked = bool(rng.integers(2))
    worst = compare(model, tracks, ("all",), DrawPlan(seed, "track", 2), 2, masked, dtype)
    measured("relative_error", worst)
    assert worst < TOLERANCE[dtype]


@pytest.mark.parametrize("global_cond", ["prepend", "adaLN"])
def test_activations_computed_again_change_nothing_but_the_memory(global_cond, seed, rng, measured):
    pytest.importorskip("stable_audio_tools")
    model = helpers.tiny_stable_audio(seed, torch.float64, global_cond=global_cond, depth=3)
    tracks, plan = helpers.make_tracks(rng, 3, model.channels, model.frames), DrawPlan(seed, replicates=2)
    plain = fit_fisher(model, tracks, ("all",), plan, 2, gradients="loop")
    most = peak_bytes(lambda: query_gradient(*gradient_of(model, tracks, plan)), torch.device("cpu"))
    model._checkpointing = True
    again = fit_fisher(model, tracks, ("all",), plan, 2, gradients="loop")
    worst = max(naive.relative_error(again.values[n], v) for n, v in plain.values.items())
    measured("relative_error", worst)
    assert worst < 1e-12
    peak = peak_bytes(lambda: query_gradient(*gradient_of(model, tracks, plan)), torch.device("cpu"))
    measured("peak, of the plain one", peak / most)
    assert peak < most
    with pytest.raises(UserError, match="--gradients loop"):
        fit_fisher(model, tracks, ("all",), plan, 2)


def gradient_of(model, tracks, plan):
    batch = tracks.batch([0], model.frames)
    return model, select_parameters(model, ("all",)), batch, range(16), plan, True, 16


def test_the_mask_decides_what_padding_does(seed, rng):
    model = helpers.ToyDenoiser(seed)
    tracks = helpers.make_tracks(rng, 3, model.channels, model.frames)
    plan = DrawPlan(seed, replicates=1)
    short = tracks.subset([1])
    masked, plain = (fit_fisher(model, short, ("all",), plan, 2, m).values for m in (True, False))
    assert any(not torch.allclose(masked[n], plain[n], rtol=1e-3) for n in masked)
    full = tracks.subset([0])
    masked, plain = (fit_fisher(model, full, ("all",), plan, 2, m).values for m in (True, False))
    assert all(torch.equal(masked[n], plain[n]) for n in masked)


def test_a_parameter_that_the_prediction_does_not_see_is_named(seed, rng):
    model = helpers.ToyDenoiser(seed)
    model.module.register_parameter("idle", torch.nn.Parameter(torch.ones(2, dtype=torch.float64)))
    fisher = fit_fisher(model, helpers.make_tracks(rng, 2, 3, 10), ("all",), DrawPlan(0, replicates=1), 1)
    assert fisher.unused == ("idle",)
    assert not fisher.values["idle"].any()


def test_a_frozen_parameter_of_the_group_is_refused_by_name(seed, rng):
    model = helpers.ToyDenoiser(seed)
    model.module.null_token.requires_grad_(False)
    tracks, plan = helpers.make_tracks(rng, 2, 3, 10), DrawPlan(0, replicates=1)
    with pytest.raises(UserError, match="null_token"):
        fit_fisher(model, tracks, ("all",), plan, 1)
    assert fit_fisher(model, tracks, ("transformer",), plan, 1).pairs == 2


def test_the_model_is_as_it_was(seed, rng):
    model = helpers.ToyDenoiser(seed)
    before = model.fingerprint
    fit_fisher(model, helpers.make_tracks(rng, 2, 3, 10), ("all",), DrawPlan(0, replicates=1), 1)
    assert model.fingerprint == before
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize("gradients", ["batch", "loop"])
def test_a_unit_continues_from_its_checkpoint_to_the_same_bits(seed, rng, tmp_path, monkeypatch, gradients):
    monkeypatch.setattr("attr_engine.fisher._SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    model = helpers.ToyDenoiser(seed, dtype=torch.float32)
    model.module.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
    tracks = helpers.make_tracks(rng, 6, 3, 10)
    settings = FisherSettings(("all",), DrawPlan(seed, replicates=2), 2, rows=2, gradients=gradients)
    unit = range(1, 5)
    whole, used = sum_unit(model, tracks, settings, unit)

    class Stopped(Exception):
        pass

    def stop(done: int) -> None:
        if done == 3:
            raise Stopped

    path = tmp_path / "so-far.safetensors"
    with pytest.raises(Stopped):
        sum_unit(model, tracks, settings, unit, path, "k", stop)
    seen: list[int] = []
    again, used_again = sum_unit(model, tracks, settings, unit, path, "k", seen.append)
    assert seen == [3, 4], "two tracks were in the checkpoint"
    assert used == used_again and "idle" not in used
    assert list(again) == list(whole)
    assert all(torch.equal(again[n], whole[n]) for n in whole)
    with pytest.raises(UserError, match="other settings"):
        sum_unit(model, tracks, settings, unit, path, "another")


@pytest.mark.parametrize(("tracks", "rows"), [(1, 2), (5, 4), (40, 2), (131, 16), (1000, 16)])
def test_units_are_few_hold_whole_passes_and_cover_every_track_once(tracks, rows):
    settings = FisherSettings(("all",), DrawPlan(0, replicates=2), 2, rows=rows)
    units = fisher_units(tracks, settings)
    assert [i for unit in units for i in unit] == list(range(tracks))
    assert 1 <= len(units) <= UNITS
    assert all(len(unit) % settings.step == 0 for unit in units[:-1])
    assert len({len(unit) for unit in units[:-1]}) <= 1


def test_the_sum_of_the_units_is_the_fisher(seed, rng):
    model = helpers.ToyDenoiser(seed, dtype=torch.float32)
    tracks = helpers.make_tracks(rng, 37, 3, 10)
    settings = FisherSettings(("all",), DrawPlan(seed, replicates=2), 2, rows=2)
    units = fisher_units(37, settings)
    assert len(units) > 3 and len(units[0]) > 1
    sums = {i: sum_unit(model, tracks, settings, units[i]) for i in rng.permutation(len(units))}
    by_units = combine((sums[i] for i in range(len(units))), 37 * 2)
    whole = fit_fisher(model, tracks, ("all",), settings.plan, 2, rows=2)
    assert all(torch.equal(by_units.values[n], v) for n, v in whole.values.items())
    loop = naive.Loop(model, settings.plan).fisher(naive.items(tracks, model.frames), 2, False)
    assert all(naive.relative_error(whole.values[n], v) < TOLERANCE[torch.float32] for n, v in loop.items())


def test_a_saved_fisher_comes_back_bit_for_bit_and_in_order(seed, rng, tmp_path):
    model = helpers.ToyDenoiser(seed)
    fisher = fit_fisher(model, helpers.make_tracks(rng, 2, 3, 10), ("all",), DrawPlan(0, replicates=1), 1)
    fisher.save(tmp_path / "f.safetensors", "k")
    again = Fisher.load(tmp_path / "f.safetensors", "k")
    assert list(again.values) == list(fisher.values)
    assert all(torch.equal(again.values[n], v) for n, v in fisher.values.items())
    assert (again.pairs, again.unused, again.mean()) == (fisher.pairs, fisher.unused, fisher.mean())
    with pytest.raises(UserError, match="other settings"):
        Fisher.load(tmp_path / "f.safetensors", "another")


def test_unusable_input_is_refused_by_name(seed, rng):
    model = helpers.ToyDenoiser(seed)
    tracks, plan = helpers.make_tracks(rng, 2, 3, 10), DrawPlan(0, replicates=4)
    with pytest.raises(UserError, match="Fisher draws is 6"):
        fit_fisher(model, tracks, ("all",), plan, 6)
    with pytest.raises(UserError, match="'t0' has 12 frames"):
        fit_fisher(model, helpers.make_tracks(rng, 2, 3, 12), ("all",), plan, 4)
    with pytest.raises(UserError, match="5 channels"):
        fit_fisher(model, helpers.make_tracks(rng, 2, 5, 10), ("all",), plan, 4)
    with torch.no_grad():
        model.module.null_token[0, 0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        fit_fisher(model, tracks, ("self_attn",), plan, 4)
