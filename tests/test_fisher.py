"""The diagonal Fisher against a loop that squares ``p.grad`` of one (track, draw) pair at a time."""

import math

import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import DrawPlan, UserError, fit_fisher
from attr_engine.fisher import Fisher
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
def test_fisher_continues_from_its_checkpoint_to_the_same_bits(seed, rng, tmp_path, monkeypatch, gradients):
    monkeypatch.setattr("attr_engine.fisher._SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    model = helpers.ToyDenoiser(seed, dtype=torch.float32)
    model.module.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
    tracks, plan = helpers.make_tracks(rng, 4, 3, 10), DrawPlan(seed, replicates=2)
    whole = fit_fisher(model, tracks, ("all",), plan, 2, rows=2, gradients=gradients)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stopped

    path = tmp_path / "so-far.safetensors"
    with pytest.raises(Stopped):
        fit_fisher(model, tracks, ("all",), plan, 2, checkpoint=path, key="k", progress=stop, rows=2,
                   gradients=gradients)  # fmt: skip
    seen: list[int] = []
    again = fit_fisher(
        model, tracks, ("all",), plan, 2, checkpoint=path, key="k", progress=lambda d, _: seen.append(d), rows=2,
        gradients=gradients,
    )  # fmt: skip
    assert seen == [2, 3, 4], "two tracks were in the checkpoint"
    assert (again.unused, again.pairs, again.mean()) == (whole.unused, whole.pairs, whole.mean())
    assert list(again.values) == list(whole.values)
    assert all(torch.equal(again.values[n], whole.values[n]) for n in whole.values)
    with pytest.raises(UserError, match="other settings"):
        fit_fisher(model, tracks, ("all",), plan, 2, checkpoint=path, key="another")


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
