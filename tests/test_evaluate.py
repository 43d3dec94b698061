"""Measures of a ranking against the sentences that define them."""

import math

import numpy as np
import pytest

from attr_engine.evaluate import average_precision, clusters, parents_of, recall_at, self_rank


def ranking(scores: np.ndarray, tracks: list[str]) -> list[str]:
    return [
        name
        for _, _, name in sorted(
            (-s, i, name) for i, (s, name) in enumerate(zip(scores, tracks, strict=True))
        )
    ]


def cases(rng):
    """Rankings of every size, half of them full of ties."""
    for _ in range(200):
        n = int(rng.integers(1, 30))
        tracks = [f"t{i}" for i in range(n)]
        scores = rng.integers(0, 4, n).astype(float) if rng.random() < 0.5 else rng.normal(size=n)
        yield scores, tracks, set(rng.choice(tracks, rng.integers(1, n + 1), replace=False))


def test_average_precision_is_the_mean_of_the_precisions(rng):
    for scores, tracks, relevant in cases(rng):
        order = ranking(scores, tracks)
        precisions = [
            sum(name in relevant for name in order[: r + 1]) / (r + 1)
            for r, name in enumerate(order)
            if name in relevant
        ]
        expected = sum(precisions) / len(relevant)
        assert math.isclose(average_precision(scores, tracks, relevant), expected, rel_tol=1e-12)


def test_recall_counts_the_relevant_among_the_first(rng):
    for scores, tracks, relevant in cases(rng):
        for k in (1, 3, 10, 100):
            expected = len(relevant & set(ranking(scores, tracks)[:k])) / min(k, len(relevant))
            assert math.isclose(recall_at(k, scores, tracks, relevant), expected, rel_tol=1e-12)


def test_rank_of_oneself_is_that_of_the_best_copy(rng):
    for scores, tracks, cluster in cases(rng):
        order = ranking(scores, tracks)
        assert self_rank(scores, tracks, cluster) == 1 + min(order.index(name) for name in cluster)


def test_a_perfect_ranking_has_one_and_the_worst_is_known():
    tracks = list("abcdef")
    assert average_precision(-np.arange(6.0), tracks, {"a", "b"}) == 1.0
    assert math.isclose(average_precision(np.arange(6.0), tracks, {"a", "b"}), (1 / 5 + 2 / 6) / 2)
    assert recall_at(2, -np.arange(6.0), tracks, {"a", "b"}) == 1.0
    assert recall_at(2, np.arange(6.0), tracks, {"a", "b"}) == 0.0
    assert self_rank(np.arange(6.0), tracks, {"a"}) == 6


def test_nothing_relevant_is_not_a_number():
    assert math.isnan(average_precision(np.arange(3.0), list("abc"), set()))
    assert math.isnan(average_precision(np.arange(3.0), list("abc"), {"z"}))
    assert math.isnan(recall_at(2, np.arange(3.0), list("abc"), set()))


@pytest.mark.parametrize(
    ("info", "parents"),
    [
        ({}, set()),
        ({"parents": None}, set()),
        ({"parents": ""}, set()),
        ({"parents": "a"}, {"a"}),
        ({"parents": "a;b;a"}, {"a", "b"}),
        ({"parents": ["a", 7]}, {"a", "7"}),
    ],
)
def test_parents_are_read_from_a_text_or_a_list(info, parents):
    assert parents_of(info) == parents


def test_exact_copies_of_a_family_are_one_cluster_and_variations_are_not():
    info = [
        {"family": "x", "relation": "original"},
        {"family": "x", "relation": "exact copy"},
        {"family": "x", "relation": "transposed"},
        {"family": "y", "relation": "original"},
        {"relation": "exact copy"},
        {},
    ]
    assert clusters(list("abcdef"), info) == {
        "a": {"a", "b"}, "b": {"a", "b"}, "c": {"c"}, "d": {"d"}, "e": {"e"}, "f": {"f"},
    }  # fmt: skip
