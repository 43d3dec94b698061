"""Groups are unlearned jointly, and ranked for every piece."""

import forks
import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import DrawPlan, UserError, attribute, fit_fisher, measure_effects, unlearn, unlearn_query
from attr_engine.models.protocol import select_parameters
from attr_engine.unlearn import group_gradient, query_gradient

OPTIONS = {"functions": ("loss_change", "displacement"), "self_influence": (), "groups": "artist", "steps": 1}
ARTISTS = ["ann", "bob", "ann", "cy", "bob", "ann"]


def make(seed, rng):
    model, tracks, _ = forks.make(seed)
    model = model.double_copy()
    for info, artist in zip(tracks.info, ARTISTS, strict=True):
        info["artist"] = artist
    return model, tracks, helpers.make_tracks(rng, 3, 3, 10, "q")


def test_a_group_of_tracks_has_the_mean_of_their_gradients(seed, rng, monkeypatch):
    model, tracks, _ = make(seed, rng)
    parameters, plan = select_parameters(model, ("all",)), DrawPlan(seed, replicates=2)
    more = (range(4), plan, True, 3)
    single = [query_gradient(model, parameters, tracks.batch([i], model.frames), *more) for i in (5, 0, 2)]
    for held in (64, 2, 1):
        monkeypatch.setattr(unlearn, "_TRACKS", held)
        together = group_gradient(model, parameters, tracks, (5, 0, 2), *more)
        for name, value in together.items():
            assert naive.relative_error(value, sum(g[name] for g in single) / 3) < 1e-11


def test_groups_are_ranked_by_what_unlearning_them_does_to_a_piece(seed, rng, tmp_path):
    """Against the same by hand: one joint update a group, the piece's loss before and after."""
    model, tracks, pieces = make(seed, rng)
    settings = forks.small(**OPTIONS)
    result = attribute(model, tracks, pieces, settings, tmp_path / "run")
    assert list(result.tracks) == ["ann", "bob", "cy"]
    assert result.updates == [(p, x) for p in pieces.ids for x in settings.strengths]
    plan = DrawPlan(settings.seed, settings.plan, settings.replicates)
    fisher = fit_fisher(model, tracks, settings.layers, plan, settings.fisher_draws)
    for g, name in enumerate(result.tracks):
        members = [i for i, artist in enumerate(ARTISTS) if artist == name]
        for s, strength in enumerate(settings.strengths):
            update = unlearn_query(
                model,
                tracks,
                members,
                fisher,
                plan,
                6,
                strength,
                draws=settings.update_draws,
                damping=settings.damping,
            )
            effects = measure_effects(
                model, pieces.batch(range(3), model.frames), [lambda u=update: u], plan, settings.score_draws
            )
            change = (effects.unlearned[0] - effects.base).mean(axis=1)
            found = [result.values["loss_change"][p * len(settings.strengths) + s, g] for p in range(3)]
            assert np.abs(found - change).max() < 1e-6 * np.abs(change).max()
    assert result.top(1, pieces.ids[0], "loss_change")[0].rank == 1


def test_a_group_of_one_is_that_track(seed, rng, tmp_path):
    model, tracks, _ = make(seed, rng)
    plan = DrawPlan(seed, replicates=2)
    fisher = fit_fisher(model, tracks, ("all",), plan, 2)
    one, alone = (unlearn_query(model, tracks, i, fisher, plan, 6, draws=4) for i in (3, [3]))
    assert all(torch.equal(one.delta[n], alone.delta[n]) for n in one.delta)


def test_other_members_are_another_run(seed, rng, tmp_path):
    model, tracks, pieces = make(seed, rng)
    settings = forks.small(**OPTIONS)
    attribute(model, tracks, pieces, settings, tmp_path / "run")
    tracks.info[3]["artist"] = "ann"
    with pytest.raises(UserError, match="belongs to other"):
        attribute(model, tracks, pieces, settings, tmp_path / "run")


def test_what_cannot_be_grouped_is_named(seed, rng, tmp_path):
    model, tracks, pieces = make(seed, rng)
    for changes, queries, named in (
        ({"groups": "label"}, pieces, "'t0' has no 'label'"),
        ({}, [pieces, pieces], "one set of queries"),
        ({"self_influence": ("t1",)}, pieces, "self-influence"),
    ):
        with pytest.raises(UserError, match=named):
            attribute(model, tracks, queries, forks.small(**{**OPTIONS, **changes}), tmp_path / "x")
