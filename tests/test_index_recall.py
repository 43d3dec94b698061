"""The recall of an index is that of whole gradients by a loop, depends on the seed alone, and falls where an index is poor."""

import json
from dataclasses import replace
from functools import partial

import helpers
import naive
import numpy as np
import pytest
from test_index import WHOLE, gradients, ridge_scores

from attr_engine import Attribution, UserError, index_recall
from attr_engine.features import AVERAGING
from attr_engine.index import META, IndexSettings, build_index
from attr_engine.index_recall import (
    draw_sample,
    recall,
    recall_against,
    sentences,
    whole_gradient,
    whole_scores,
)
from attr_engine.index_store import Maker


@pytest.fixture
def setting(seed, rng):
    model = helpers.ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])))
    tracks = helpers.make_tracks(rng, 12, model.channels, model.frames)
    return model, tracks, helpers.make_tracks(rng, 2, model.channels, model.frames, "q")


@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize("normalised", [False, True])
def test_the_exhaustive_answer_is_that_of_a_loop(normalised, averaging, setting, monkeypatch, measured):
    model, tracks, _ = setting
    s = replace(WHOLE, averaging=averaging, normalised=normalised, masked=normalised, rank=1)
    monkeypatch.setattr(index_recall, "TRACKS", 8)
    maker = Maker(model, s)
    sample = draw_sample(maker, len(tracks))
    assert len(sample.tracks) == 8 and sample.method == "ridge"
    some, whole = tracks.subset([int(i) for i in sample.tracks]), partial(whole_gradient, maker, tracks)
    phi, asked = gradients(model, some, s, "score"), gradients(model, some, s, "update")
    expected = ridge_scores(phi, asked[sample.probes], s)
    error = naive.relative_error(whole_scores(sample, whole, maker.settings.ridge), expected)
    measured("relative_error", error)
    assert error < 1e-8

    monkeypatch.setattr(index_recall, "BYTES", 3 * 4 * phi.shape[1])
    sample = draw_sample(maker, len(tracks))
    assert sample.method == "inner product" and len(sample.probes) == 3
    some, whole = tracks.subset([int(i) for i in sample.tracks]), partial(whole_gradient, maker, tracks)
    phi, asked = gradients(model, some, s, "score"), gradients(model, some, s, "update")
    if normalised:
        phi, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (phi, asked))
    found = whole_scores(sample, whole, maker.settings.ridge)
    assert naive.relative_error(found, asked[sample.probes] @ phi.T) < 1e-9


@pytest.mark.parametrize("room", [2**32, 2**16])  # ridge of 12 probes, inner products of several
def test_a_whole_index_gives_everything_back_and_a_poor_one_does_not(room, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(index_recall, "BYTES", room)
    model, tracks, _ = setting
    seen = []
    monkeypatch.setattr(index_recall, "recall", lambda *a: seen.append(a) or recall(*a))
    found = build_index(model, tracks, tmp_path / "whole", replace(WHOLE, width=0)).meta["recall"]
    assert found["k"] == 3 and found["tracks"] == 12 and found["probes"] > 8
    for name, (got, exact, k), tolerance in zip(("projection", "numbers"), seen, (1e-8, 1e-5), strict=True):
        assert naive.relative_error(got, exact) < tolerance
        # Scores that are off by e may exchange the last of the best with the next where these are 2e apart.
        best, off = -np.sort(-exact, axis=1), np.abs(got - exact).max(axis=1)
        assert found[name] >= 1 - (best[:, k - 1] - best[:, k] <= 2 * off).mean(), name
    poor = replace(WHOLE, projection="identity", rank=1, width=1, numbers="int8")
    # Of few probes a single poor index may be right by chance.
    found = [
        build_index(model, tracks, tmp_path / f"poor-{n}", replace(poor, seed=n)).meta["recall"]
        for n in range(4)
    ]
    assert all(np.mean([one[name] for one in found]) < 1 for name in ("projection", "numbers"))


def test_recall_is_of_the_tracks_that_the_index_would_give(setting, tmp_path):
    model, tracks, _ = setting
    s = replace(WHOLE, rank=2, projection="gaussian")
    index = build_index(model, tracks, tmp_path / "index", s)
    maker = Maker(model, s)
    sample = draw_sample(maker, 12)
    asked = maker(tracks, [int(i) for i in sample.tracks[sample.probes]], "update")
    whole = whole_scores(sample, partial(whole_gradient, maker, tracks), s.ridge)
    # In float64, as recall is: the scores of the index are float32, where two near ones may change places.
    exact = ridge_scores(maker(tracks, range(12), "score").numpy(), asked.numpy(), s)
    assert naive.relative_error(index.score(asked), exact) < 1e-5
    expected = recall(exact, whole, 3)
    assert index.meta["recall"]["projection"] == pytest.approx(expected)


def test_recall_counts_common_tracks(rng):
    a, b = rng.normal(size=(2, 5, 20))
    expected = [len(set(np.argsort(-x)[:4]) & set(np.argsort(-y)[:4])) / 4 for x, y in zip(a, b, strict=True)]
    assert recall(a, b, 4) == pytest.approx(np.mean(expected))


def test_recall_depends_on_the_seed_alone_and_is_kept(setting, tmp_path):
    model, tracks, _ = setting
    s = IndexSettings(("all",), draws=2, rank=1)
    first, second = (build_index(model, tracks, tmp_path / n, s) for n in "ab")
    kept = json.loads((tmp_path / "a" / META).read_text())["recall"]
    assert kept == first.meta["recall"] == second.meta["recall"]
    lines = sentences(kept, s.numbers)
    assert len(lines) == 3 and f"{kept['projection']:.3f}" in lines[0] and "float16" in lines[1]
    assert "kernel ridge" in lines[0] and "whole gradients" in lines[2]
    maker = Maker(model, s)
    others = [draw_sample(Maker(model, replace(s, seed=n)), 1000).tracks for n in (0, 1)]
    assert np.array_equal(draw_sample(maker, 1000).tracks, others[0]) and not np.array_equal(*others)


def test_an_index_is_the_same_whether_its_recall_is_measured_or_not(setting, tmp_path, monkeypatch):
    model, tracks, _ = setting
    with_it = build_index(model, tracks, tmp_path / "a", WHOLE)
    monkeypatch.setattr("attr_engine.index.whole_gradient", None)
    without = build_index(model, tracks, tmp_path / "b", WHOLE, recall=False)
    assert "recall" in with_it.meta and "recall" not in without.meta
    np.testing.assert_array_equal(with_it.features, without.features)
    assert (tmp_path / "a" / "solver.safetensors").read_bytes() == (
        tmp_path / "b" / "solver.safetensors"
    ).read_bytes()


def test_candidates_are_judged_by_an_exhaustive_run(setting, tmp_path, rng):
    model, tracks, queries = setting
    index = build_index(model, tracks, tmp_path / "index", IndexSettings(("all",), draws=2, rank=2))
    candidates = index.candidates(model, queries, 5)
    values = rng.normal(size=(4, 12))
    updates = [("q1", 0.1), ("q1", 0.2), ("q0", 0.1), ("q0", 0.2)]
    run = Attribution(
        list(tracks.ids), updates, {"a": -values, "b": values}, {"a": values, "b": values}, np.zeros(12), {},
        np.ones((4, 12), dtype=int),
    )  # fmt: skip
    found = recall_against(index, candidates, ["q0", "q1"], run, 3, "b", 0.2)
    expected = [len(set(candidates[q]) & set(np.argsort(-values[u])[:3])) / 3 for q, u in ((0, 3), (1, 1))]
    assert np.allclose(found, expected)
    everything = index.candidates(model, queries, 12)
    assert (recall_against(index, everything, ["q0", "q1"], run, 3) == 1).all()
    with pytest.raises(UserError, match="not of the same tracks"):
        recall_against(index, candidates, ["q0", "q1"], replace(run, tracks=list(tracks.ids)[::-1]), 3)
    with pytest.raises(UserError, match="the best 13 of 12"):
        recall_against(index, candidates, ["q0", "q1"], run, 13)
    with pytest.raises(UserError, match="2 rows of candidates of 1"):
        recall_against(index, candidates, ["q0"], run, 3)
    with pytest.raises(UserError, match="no scores for query 'q2'"):
        recall_against(index, candidates, ["q0", "q2"], run, 3)
