"""Statistics of the judges against scipy, closed forms and planted cases."""

import itertools

import numpy as np
import pytest

from attr_engine import judge
from attr_engine.errors import UserError
from attr_engine.evaluate import average_precision

stats = pytest.importorskip("scipy.stats")


def test_spearman_is_scipys_with_ties(rng):
    a, b = rng.integers(0, 6, (5, 40)).astype(float), rng.normal(size=(5, 40))
    for x, y, found in zip(a, b, judge.spearman(a, b), strict=True):
        assert found == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(judge.spearman(np.ones((1, 9)), rng.normal(size=(1, 9)))[0])


def test_lds_of_the_true_influences_is_one_and_of_their_opposite_minus_one(rng):
    truth, kept = rng.normal(size=(4, 30)), rng.random((20, 30)) < 0.5
    kept[:, :5] = np.arange(20)[:, None] >> np.arange(5) & 1  # no two subsets are the same, which would tie
    losses = -(truth @ kept.T.astype(float)).T
    assert judge.lds(truth, kept, losses) == pytest.approx(np.ones(4))
    assert judge.lds(-truth, kept, losses) == pytest.approx(-np.ones(4))
    assert judge.lds(3 * truth, kept, np.exp(losses)) == pytest.approx(np.ones(4))


def test_lds_refuses_what_does_not_fit(rng):
    with pytest.raises(UserError, match="do not fit"):
        judge.lds(rng.normal(size=(2, 5)), np.ones((9, 5), bool), np.zeros((9, 3)))
    with pytest.raises(UserError, match="at least 3"):
        judge.lds(rng.normal(size=(2, 5)), np.ones((2, 5), bool), np.zeros((2, 2)))


def test_the_ceiling_is_what_a_perfect_prediction_of_noisy_losses_reaches(rng):
    """Signal and noise of known size: reliability of the mean of two seeds and the correlation with it, by simulation.

    Spearman's rho of normal numbers that correlate by r is 6 / pi arcsin(r / 2), and its standard deviation over n is 0.69 / sqrt(n) at
    r = 0.61 (two seeds), which is 0.31 / sqrt(n) of what is attainable, and 0.29 / sqrt(n) at r = 0.87 (a perfect prediction):
    the series in r of David, Kendall and Stuart (1951). Spearman and Brown's formula, which is Pearson's, is 0.0023 off.
    """
    signal, noise = rng.normal(size=(40000, 3)), 0.8
    losses = signal + noise * rng.normal(size=(2, 40000, 3))
    found = judge.ceiling(losses)
    perfect = judge.spearman(signal.T, losses.mean(axis=0).T)
    assert found.attainable == pytest.approx(perfect, abs=0.0023 + 7 * (0.31 + 0.29) / 200)
    expected = 6 / np.pi * np.arcsin(0.5 / (1 + noise**2))
    assert found.seeds == pytest.approx(np.full(3, expected), abs=7 * 0.69 / 200)
    with pytest.raises(UserError, match="at least 2"):
        judge.ceiling(losses[:1])


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says(rng):
    covered = 0
    for k in range(600):
        found = judge.bootstrap(rng.normal(1.0, 2.0, 30), seed=k)
        covered += found.low <= 1.0 <= found.high
    # Student's t puts the coverage of 1.96 deviations at 0.936: 8 to 80 of 600 are missed in all but one of 1e9 runs.
    assert 8 <= 600 - covered <= 80


def test_a_bootstrap_leaves_out_what_was_not_measured(rng):
    values = rng.normal(size=20)
    assert judge.bootstrap(np.append(values, np.nan)) == judge.bootstrap(values)
    assert judge.bootstrap(np.array([np.nan])).count == 0


def test_the_interval_of_a_rate_is_wilsons(rng):
    count = int(rng.integers(5, 300))
    hits = int(rng.integers(0, count + 1))
    found = judge.share(hits, count)
    known = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-12)


def test_ignored_tracks_neither_help_nor_hurt(rng):
    names = [f"t{i}" for i in range(12)]
    for _ in range(20):
        order = rng.permutation(12)
        scores = np.empty(12)
        scores[order] = -np.arange(12.0)
        relevant, ignored = frozenset(names[:3]), frozenset(names[:6])
        left = [i for i in range(12) if i < 3 or i >= 6]
        expected = average_precision(scores[left], [names[i] for i in left], relevant)
        assert judge.precision_without(scores, names, relevant, ignored) == expected


def test_collapse_is_seen_where_every_query_has_one_answer_and_not_where_answers_differ(rng):
    one = judge.collapse(np.tile(rng.normal(size=50), (8, 1)) + 1e-9 * rng.normal(size=(8, 50)))
    assert (one.correlation, one.first_energy, one.hub_share) == pytest.approx((1, 1, 1), abs=1e-3)
    other = judge.collapse(rng.normal(size=(40, 400)))
    assert abs(other.correlation) < 0.05 and other.first_energy < 0.1
    # Binomial(40, 10 / 400) for each of 400 tracks: 14 hits or more of any are one in 1e10 runs.
    assert other.hub_share < 14 / 40
    with pytest.raises(UserError, match="several queries"):
        judge.collapse(rng.normal(size=(1, 5)))


def test_the_hub_is_the_track_that_most_queries_name(rng):
    scores = rng.normal(size=(10, 2000))  # so many that no other is named 7 times by chance
    scores[:7, 23] += 100
    found = judge.collapse(scores, k=3)
    assert found.hub == 23 and found.hub_share >= 0.7


def test_copies_share_the_best_of_their_ranks(rng):
    names, scores = ["a", "b", "c", "d"], np.array([[0.0, 3.0, 2.0, 1.0], [1.0, 0.5, 4.0, 2.0]])
    alone = {n: frozenset([n]) for n in names}
    pair = {**alone, "a": frozenset("ab"), "b": frozenset("ab")}
    assert judge.self_ranks(scores, names, ["a", "c"], alone).tolist() == [4, 1]
    assert judge.self_ranks(scores, names, ["a", "c"], pair).tolist() == [1, 1]
    for row in itertools.permutations([1.0, 2.0, 3.0, 4.0]):
        assert judge.self_ranks(np.array([row]), names, ["d"], alone)[0] == 1 + sum(x > row[3] for x in row)
