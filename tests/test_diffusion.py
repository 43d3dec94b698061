"""Draws: what they depend on, how they are spread, and the standard error that follows."""

import math
from itertools import product

import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine.diffusion import DrawPlan, noised_rows, standard_error
from attr_engine.errors import UserError

PURPOSES = ("fisher", "update", "score", "train")


def test_a_draw_is_named_by_seed_purpose_track_and_number():
    cases = list(product((0, 1, 11), PURPOSES, ("a", "b", "1", "a1"), range(8)))
    keys = {DrawPlan(seed).key(purpose, track, d) for seed, purpose, track, d in cases}
    assert len(keys) == len(cases), "no two draws share their noise"
    assert all(-(2**63) <= k < 2**63 for k in keys)
    shifts = {DrawPlan(s, replicates=4).timestep(p, i, d) for s, p, i, d in cases}
    assert len(shifts) == len(cases)
    assert DrawPlan(3).key("score", "a", 1) == DrawPlan(3).key("score", "a", 1)


def test_keys_do_not_change_between_versions():
    """A run that was begun by one version is carried on by the next one."""
    plan = DrawPlan(7, "track", 4)
    # blake2b of "5:noise1:75:score4:song1:0" and so on, little-endian, signed.
    assert plan.key("score", "song", 0) == -8069689790863572566
    assert plan.key("score", "song", 5) == -7272153787180908401
    assert DrawPlan(7, "shared", 4).key("score", "song", 5) == 7318399964235228419
    assert math.isclose(plan.timestep("score", "song", 5), 0.38694316184731536, rel_tol=1e-15)


def test_timesteps_follow_the_definition(seed):
    for kind, replicates in product(("track", "shared"), (1, 3, 4)):
        plan = DrawPlan(seed, kind, replicates)
        for purpose, track, d in product(PURPOSES, ("x", "ÿ", ""), (*range(9), 1000, 100_001)):
            difference = plan.timestep(purpose, track, d) - naive.time_of(plan, purpose, track, d)
            assert abs(difference - round(difference)) < 1e-10
            assert plan.key(purpose, track, d) % 2**64 == naive.key_of(plan, purpose, track, d)


def test_the_shared_plan_does_not_see_the_track_and_the_track_plan_does(seed):
    shared, own = DrawPlan(seed, "shared"), DrawPlan(seed, "track")
    for purpose, d in product(PURPOSES, range(5)):
        assert shared.key(purpose, "a", d) == shared.key(purpose, "b", d)
        assert shared.timestep(purpose, "a", d) == shared.timestep(purpose, "b", d)
        assert own.key(purpose, "a", d) != own.key(purpose, "b", d)
        assert own.timestep(purpose, "a", d) != own.timestep(purpose, "b", d)


@pytest.mark.parametrize("replicates", [1, 4])
def test_every_prefix_of_every_replicate_is_spread_over_the_interval(replicates, seed):
    plan = DrawPlan(seed, replicates=replicates)
    for track, r in product(("a", "b"), range(replicates)):
        t = np.array([plan.timestep("score", track, r + replicates * k) for k in range(600)])
        assert (t >= 0).all() and (t < 1).all()
        for n in range(1, len(t) + 1):
            points = np.sort(t[:n])
            gaps = np.diff(np.append(points, points[0] + 1))
            # Three-gap theorem for the golden ratio: no gap is above (1 + 2 / sqrt 5) / n.
            assert gaps.max() * n < 1.8945
            assert gaps.min() * n > 0.38
            place = np.arange(n)
            discrepancy = max((points - place / n).max(), ((place + 1) / n - points).max())
            assert discrepancy * n < 1.5 + 0.5 * math.log(n), "random points would have sqrt(n)"


def test_replicates_have_shifts_of_their_own(seed):
    plan = DrawPlan(seed, replicates=8)
    first = sorted(plan.timestep("score", "a", d) for d in range(8))
    gaps = np.diff(first)
    assert (gaps > 0).all()
    assert gaps.std() > 1e-3, "independent shifts are not an even grid"


def test_the_shifts_of_many_tracks_are_uniform(seed):
    plan = DrawPlan(seed)
    t = np.sort([plan.timestep("score", f"track {i}", 0) for i in range(4000)])
    assert np.abs(t - (np.arange(4000) + 0.5) / 4000).max() < 3 / math.sqrt(4000)


@pytest.mark.parametrize(("draws", "replicates"), [(0, 1), (-4, 4), (6, 4), (1, 2), (3, 2)])
def test_draws_that_do_not_fill_the_replicates_are_refused(draws, replicates):
    with pytest.raises(UserError, match=rf"the number of score draws is {draws}\b.*{replicates} replicates"):
        DrawPlan(replicates=replicates).check(draws, "the number of score draws")


def test_draws_that_fill_the_replicates_are_taken():
    for draws, replicates in ((1, 1), (4, 4), (12, 4), (7, 1)):
        DrawPlan(replicates=replicates).check(draws, "draws")


@pytest.mark.parametrize(
    ("settings", "named"), [({"kind": "batch"}, "'batch'"), ({"replicates": 0}, "not 0")]
)
def test_unknown_plans_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        DrawPlan(**settings)


def test_standard_error_is_that_of_the_replicate_means(rng):
    values = rng.normal(size=(2, 3, 12))
    for replicates in (2, 3, 4, 6):
        means = np.stack([values[..., r::replicates].mean(axis=-1) for r in range(replicates)])
        expected = np.sqrt(((means - means.mean(0)) ** 2).sum(0) / (replicates - 1) / replicates)
        assert naive.relative_error(standard_error(values, replicates), expected) < 1e-12
    assert np.isnan(standard_error(values, 1)).all() and standard_error(values, 1).shape == (2, 3)
    assert not standard_error(np.ones((2, 8)), 4).any()


def test_standard_error_is_honest_about_smooth_functions(seed):
    """Of the mean of a smooth function of t: near the true error, which is far below that of random points."""
    truth, draws, replicates = 2 / math.pi, 32, 4
    values = np.array(
        [
            [
                math.sin(math.pi * DrawPlan(seed, replicates=replicates).timestep("score", f"{i}", d))
                for d in range(draws)
            ]
            for i in range(1000)
        ]
    )
    actual = math.sqrt(((values.mean(axis=1) - truth) ** 2).mean())
    claimed = math.sqrt((standard_error(values, replicates) ** 2).mean())
    assert 0.8 < claimed / actual < 1.25
    assert claimed < 0.5 * values.std() / math.sqrt(draws)


@pytest.mark.parametrize("objective", ["v", "rectified_flow"])
@pytest.mark.parametrize("masked", [True, False])
def test_rows_are_made_as_the_formulas_say(objective, masked, seed, rng):
    model = helpers.ToyDenoiser(seed, objective)
    tracks = helpers.make_tracks(rng, 4, 3, 10)
    plan = DrawPlan(seed, replicates=2)
    order = [2, 0, 3]
    pairs = [(int(i), int(d)) for i, d in zip(rng.integers(0, 3, 9), rng.integers(0, 50, 9), strict=True)]
    rows = noised_rows(model, tracks.batch(order, 10), pairs, plan, "train", masked)
    items = naive.items(tracks, 10)
    for row, (i, d) in enumerate(pairs):
        item = items[order[i]]
        t = naive.time_of(plan, "train", item.id, d)
        e = naive.normals(naive.key_of(plan, "train", item.id, d), 3, 10).astype(np.float32).astype(float)
        alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
        x_t, target = (
            (alpha * item.latent + sigma * e, alpha * e - sigma * item.latent)
            if objective == "v"
            else ((1 - t) * item.latent + t * e, e - item.latent)
        )
        assert math.isclose(rows.t[row], t, rel_tol=1e-12)
        assert naive.relative_error(rows.x_t[row], x_t) < 1e-12
        assert naive.relative_error(rows.target[row], target) < 1e-12
        assert rows.counted[row].tolist() == [f < item.valid or not masked for f in range(10)]
        assert torch.equal(rows.conditioning[row], model.conditioning([item.conditioning])[0])


@pytest.mark.parametrize("kind", ["track", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_the_same_bits_in_any_batch_and_order(kind, dtype, seed, rng):
    model = helpers.ToyDenoiser(seed, dtype=dtype)
    tracks = helpers.make_tracks(rng, 16, 3, 10)
    plan = DrawPlan(seed, kind, 2)

    def all_rows(size: int, order: list[int]) -> dict[tuple[str, int], tuple[torch.Tensor, ...]]:
        out = {}
        for k in range(0, 16, size):
            batch = tracks.batch(order[k : k + size], 10)
            pairs = [(i, d) for i in range(len(batch.ids)) for d in range(4)]
            rows = noised_rows(model, batch, pairs, plan, "score", True)
            for row, (i, d) in enumerate(pairs):
                out[batch.ids[i], d] = rows.x_t[row], rows.t[row], rows.target[row], rows.counted[row]
        return out

    alone = all_rows(1, list(range(16)))
    assert len(alone) == 64
    for size in (3, 16):
        again = all_rows(size, list(rng.permutation(16)))
        assert all(torch.equal(a, b) for name in alone for a, b in zip(alone[name], again[name], strict=True))


def test_the_shared_plan_gives_every_track_the_same_noise_frame_by_frame(seed, rng):
    model = helpers.ToyDenoiser(seed, "rectified_flow")
    batch = helpers.make_tracks(rng, 2, 3, 10).batch([0, 1], 10)
    rows = noised_rows(model, batch, [(0, 3), (1, 3)], DrawPlan(seed, "shared"), "score", False)
    noise = rows.target + batch.latents.double()
    assert naive.relative_error(noise[0], noise[1]) < 1e-14
    assert rows.t[0] == rows.t[1]
