"""Searches against sorting everything in float64."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from attr_engine.errors import UserError
from attr_engine.methods import search
from attr_engine.methods.search import Exact, approximate, nearest_tracks, recall, track_recall, track_scores
from attr_engine.methods.windows import TrackWindows, unit


def make_windows(rng, tracks, width=8, most=9) -> TrackWindows:
    bounds = np.concatenate([[0], np.cumsum(rng.integers(1, most, tracks))])
    centres = np.repeat(rng.normal(size=(tracks, width)), np.diff(bounds), axis=0)
    return TrackWindows(unit(centres + 0.5 * rng.normal(size=centres.shape)), bounds, "made")


def whole(vectors, last) -> np.ndarray:
    """Unit vectors in whole numbers, and one component more: float32 products are sums of 256 a b and ``last``, below 2^24 and so
    without rounding. With 1 on one side and the numbers of at most 256 rows on the other no two are equal, and their order is one.
    """
    rows = 16 * np.rint(16 * vectors)
    return np.column_stack([rows, np.broadcast_to(last, len(rows))]).astype(np.float32)


def whole_windows(rng, tracks) -> TrackWindows:
    made = make_windows(rng, tracks)
    return replace(made, vectors=whole(made.vectors, rng.permutation(len(made.vectors))))


def naive_track_scores(query, windows) -> np.ndarray:
    out = []
    for first, last in zip(windows.bounds, windows.bounds[1:], strict=False):
        out.append(
            max(
                float(x @ y)
                for x in query.astype(np.float64)
                for y in windows.vectors[first:last].astype(np.float64)
            )
        )
    return np.array(out)


@pytest.mark.parametrize("k", [1, 7, 150])
def test_exact_search_is_a_sort(rng, monkeypatch, k):
    monkeypatch.setattr(search, "_ROWS", 64)
    vectors = whole(unit(rng.normal(size=(150, 5))), rng.permutation(150))
    queries = whole(unit(rng.normal(size=(3, 5))), 1)
    values, rows = Exact(vectors).nearest(queries, k)
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    assert rows.tolist() == np.argsort(-scores, axis=1)[:, :k].tolist()
    np.testing.assert_array_equal(values, np.take_along_axis(scores, rows, 1))


def test_track_scores_are_those_of_a_loop(rng, monkeypatch):
    monkeypatch.setattr(search, "_ROWS", 16)  # tracks lie across blocks
    windows, query = make_windows(rng, 40), unit(rng.normal(size=(3, 8)))
    assert np.abs(track_scores(query, windows) - naive_track_scores(query, windows)).max() < 1e-6


def test_nearest_tracks_are_the_best_scores(rng):
    for _ in range(20):
        windows, query = whole_windows(rng, 30), whole(unit(rng.normal(size=(int(rng.integers(1, 5)), 8))), 1)
        expected = naive_track_scores(query, windows)
        for k in (1, 4, 30, 50):
            tracks, scores = nearest_tracks(query, windows, k, Exact(windows.vectors))
            assert tracks.tolist() == np.argsort(-expected)[:k].tolist()
            np.testing.assert_array_equal(scores, expected[tracks])


def test_one_window_of_the_query_does_not_hide_what_another_one_finds(rng):
    """Twenty windows of track 0 lie at the first query window, and track 1 beside them; the second one's best are worse."""
    vectors = unit(
        np.concatenate([np.tile([1.0, 0, 0], (20, 1)), [[1, 0.1, 0]], [[0, 1, 2.0]], [[0, 1, 3.0]]])
    )
    windows = TrackWindows(vectors, np.array([0, 20, 21, 22, 23]), "made")
    tracks, _ = nearest_tracks(unit(np.array([[1.0, 0, 0], [0, 1, 0]])), windows, 2, Exact(vectors))
    assert tracks.tolist() == [0, 1]


def test_what_a_searcher_does_not_find_is_left_out(rng):
    windows = whole_windows(rng, 10)

    class Half:
        def nearest(self, queries, k):
            values, rows = Exact(windows.vectors[: windows.bounds[5]]).nearest(queries, k)
            missing = ((0, 0), (0, k - rows.shape[1]))
            least = np.finfo(np.float32).min
            return np.pad(values, missing, constant_values=least), np.pad(rows, missing, constant_values=-1)

    query = whole(unit(rng.normal(size=(2, 8))), 1)
    tracks, _ = nearest_tracks(query, windows, 10, Half())
    assert tracks.tolist() == np.argsort(-naive_track_scores(query, windows)[:5]).tolist()


def test_recall_counts_what_was_found():
    assert recall(np.array([[1, 2], [3, -1]]), np.array([[2, 1], [4, 3]])) == 0.75


def test_the_recall_of_tracks_is_of_what_nearest_tracks_answers(rng):
    windows = whole_windows(rng, 30)
    queries = whole(unit(rng.normal(size=(7, 8))), 1)
    half, shares = Exact(windows.vectors[: windows.bounds[15]]), []
    for query in queries:
        scores = naive_track_scores(query[None], windows)
        shares.append(len(set(np.argsort(-scores)[:5]) & set(np.argsort(-scores[:15])[:5])) / 5)
    assert track_recall(half, windows, queries, 5) == pytest.approx(np.mean(shares), abs=1e-12)
    assert track_recall(Exact(windows.vectors), windows, queries, 50) == 1.0


def test_without_faiss_there_is_a_sentence(rng, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    windows = make_windows(rng, 10)
    with pytest.raises(UserError, match=r"needs faiss: pip install 'attr-engine\[search\]'"):
        approximate(windows, "ivf", tmp_path, windows.vectors[:4])


@pytest.mark.parametrize("kind", search.KINDS)
def test_an_approximate_index_says_what_it_finds_and_is_kept(rng, tmp_path, kind):
    pytest.importorskip("faiss")
    windows = make_windows(rng, 400)
    held = unit(windows.vectors[rng.integers(0, len(windows.vectors), 60)] + 0.2 * rng.normal(size=(60, 8)))
    index = approximate(windows, kind, tmp_path, held, k=5, least=0.9)
    truth = Exact(windows.vectors).nearest(held, 5)[1]
    found = index.nearest(held, 5)[1]
    assert recall(found[::2], truth[::2]) >= 0.9
    assert index.meta["recall"] == pytest.approx(recall(found[1::2], truth[1::2]))
    shares = [np.intersect1d(nearest_tracks(q[None], windows, 5, index)[0], np.argsort(-track_scores(q[None], windows))[:5]).size / 5
              for q in held[1::2]]  # fmt: skip
    assert index.meta["track_recall"] == pytest.approx(np.mean(shares)) and np.mean(shares) > 0.5

    def no_build(*args):
        raise AssertionError("built again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_build", no_build)
        again = approximate(windows, kind, tmp_path, held, k=5, least=0.9)
    assert again.meta == index.meta
    np.testing.assert_array_equal(again.nearest(held, 5)[1], found)
    tracks, scores = nearest_tracks(held[:2], windows, 3, again)
    # Of a window of the track, not always its best: that one may be among those that are not found.
    for track, score in zip(tracks, scores, strict=True):
        rows = windows.vectors[windows.bounds[track] : windows.bounds[track + 1]].astype(np.float64)
        assert np.abs(rows @ held[:2].T - score).min() < 1e-6
    assert len(set(tracks)) == 3 and (scores <= track_scores(held[:2], windows)[tracks] + 1e-6).all()


def test_a_search_that_cannot_be_is_refused(rng, tmp_path):
    pytest.importorskip("faiss")
    windows = make_windows(rng, 50)
    for kind, held, k in (("pq", 4, 2), ("ivf", 1, 2), ("ivf", 4, 0), ("ivf", 4, 9999)):
        with pytest.raises(UserError, match="cannot be: use ivf or hnsw"):
            approximate(windows, kind, tmp_path, windows.vectors[:held], k=k)
