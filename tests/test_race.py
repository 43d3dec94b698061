"""A race finds the top k of exhaustive scoring, and says what it took."""

import numpy as np
import pytest

from attr_engine.effects import Effects
from attr_engine.race import Part, Race, Tally

R = 4


def make_part(rng, tracks, updates, draws, levels, noise):
    """Losses that change by a level of each track, and noise of each draw."""
    shape = (len(updates), len(tracks), len(draws))
    base = rng.normal(size=shape[1:])
    change = levels[np.ix_(updates, tracks)][..., None] + noise * rng.normal(size=shape)
    return Part(np.asarray(tracks), list(updates), draws, Effects(base, base + change, change**2))


def test_a_tally_is_the_mean_over_all_draws_and_the_error_of_the_replicates(rng):
    levels = rng.normal(size=(2, 6))
    parts = [
        make_part(rng, range(6), range(2), range(8), levels, 1.0),
        make_part(rng, [4, 1], [1], range(8, 16), levels, 1.0),
    ]
    tally = Tally.of(parts, "loss_change", 2, 7, R)
    for u in range(2):
        for i in range(7):
            values = [
                float(x)
                for part in parts
                if u in part.updates and i in part.tracks
                for x in (part.effects.unlearned - part.effects.base)[
                    list(part.updates).index(u), list(part.tracks).index(i)
                ]
            ]
            assert tally.draws[u, i] == len(values)
            if not values:
                assert np.isnan(tally.means[u, i]) and np.isnan(tally.errors[u, i])
                continue
            means = [np.mean(values[r::R]) for r in range(R)]
            assert np.isclose(tally.means[u, i], np.mean(values), rtol=1e-12)
            assert np.isclose(tally.errors[u, i], np.std(means, ddof=1) / np.sqrt(R), rtol=1e-9)


def run(rng, race, levels, noise, first=4):
    """One update's race on fresh draws; returns means and draws."""
    tracks = len(levels)
    tally = Tally.of(
        [make_part(rng, range(tracks), [0], range(first), levels[None], noise)], "loss_change", 1, tracks, R
    )
    while groups := race.next(tally.means, tally.errors, tally.draws[0]):
        for there, chosen in groups.items():
            draws = range(there, min(2 * there, race.most))
            tally.add(make_part(rng, chosen, [0], draws, levels[None], noise), "loss_change")
    return tally.means[0], tally.draws[0]


def recall(means, levels, k):
    return len({*np.argsort(-means)[:k]} & {*np.argsort(-levels)[:k]}) / k


def test_a_race_finds_nearly_what_all_draws_would_at_a_small_part_of_them(rng):
    """Scores of many levels, noise of half their spread: averaged over ten races, so that no single border decides."""
    race, found, exhaustive = Race(20, 0.95, 256, 0.1), [], []
    for _ in range(10):
        levels = rng.gamma(2.0, size=1000)
        means, draws = run(rng, race, levels, 1.0)
        assert draws.sum() <= 0.1 * 256 * 1000 and draws.min() == 4 and draws.max() > 32
        found.append(recall(means, levels, 20))
        exhaustive.append(recall(levels + rng.normal(size=1000) / 16, levels, 20))
    assert np.mean(found) > 0.97 * np.mean(exhaustive)


def test_without_noise_nobody_gets_a_second_round(rng):
    _, draws = run(rng, Race(20, 0.95, 256, 1.0), rng.permutation(500) * 1.0, 1e-6)
    assert (draws == 4).all()


def test_no_more_than_the_share_is_taken_and_the_nearest_to_the_border_come_first(rng):
    levels = rng.normal(size=400) * 0.01  # nothing can be decided
    race = Race(10, 0.95, 64, 0.1)
    means, draws = run(rng, race, levels, 1.0)
    assert 0.09 * 64 * 400 < draws.sum() <= 0.1 * 64 * 400
    means = np.arange(100.0)
    groups = Race(50, 0.95, 64, (400 + 40) / 6400).next(
        means[None], np.full((1, 100), 100.0), np.full(100, 4)
    )
    assert list(groups) == [4] and sorted(groups[4]) == list(range(45, 55))


def test_decided_tracks_get_no_more_draws_and_those_that_come_back_do():
    means = np.array([9.0, 8.0, 3.0, 2.9, 1.0])
    errors, draws = np.array([0.1, 0.1, 0.3, 0.3, 0.1]), np.array([4, 4, 8, 8, 4])
    race = Race(3, 0.95, 64, 1.0)
    assert {n: list(t) for n, t in race.next(means[None], errors[None], draws).items()} == {8: [2, 3]}
    means[4] = 2.8
    assert {n: list(t) for n, t in race.next(means[None], errors[None], draws).items()} == {4: [4], 8: [2, 3]}


def test_what_has_all_its_draws_gets_no_more_and_few_tracks_need_no_race():
    means, errors = np.array([1.0, 0.9, 0.8]), np.ones(3)
    assert not Race(2, 0.95, 8, 1.0).next(means[None], errors[None], np.full(3, 8))
    assert {
        n: list(t) for n, t in Race(2, 0.95, 12, 1.0).next(means[None], errors[None], np.full(3, 8)).items()
    } == {8: [0, 1, 2]}
    assert not Race(3, 0.95, 64, 1.0).next(means[None], errors[None], np.full(3, 4))
    means[0] = np.nan
    assert not Race(2, 0.95, 64, 1.0).next(means[None], errors[None], np.full(3, 4))


@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_an_interval_is_as_wide_as_the_confidence_asks(confidence):
    from statistics import NormalDist

    means, errors, draws = np.array([5.0, 1.0, 0.0]), np.full(3, 1.0), np.full(3, 4)
    near = Race(1, confidence, 64, 1.0).undecided(means, errors, draws)
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * np.sqrt(2)
    assert np.allclose(near, np.array([4.0, 4.0, 5.0]) / reach)


def test_updates_that_are_measured_together_share_their_draws(rng):
    levels = rng.normal(size=(2, 300))
    errors, draws = np.full((2, 300), 0.3), np.full(300, 4)
    race = Race(5, 0.95, 64, 1.0)
    single = [{*race.next(levels[[u]], errors[[u]], draws)[4]} for u in range(2)]
    assert {*race.next(levels, errors, draws)[4]} == single[0] | single[1]
