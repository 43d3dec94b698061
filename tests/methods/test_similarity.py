"""The score is the largest cosine of any two windows, by a loop over all of them in float64."""

import numpy as np
import pytest
from audio_sets import Projection, audio_tracks

from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.methods import Workspace
from attr_engine.methods.similarity import fit_similarity
from attr_engine.methods.windows import cut_of, embed_audio


def naive_scores(embedder, tracks, queries, cut, centre=0.0, scale=1.0) -> np.ndarray:
    def rows(audio):
        return (embed_audio(embedder, audio, cut, "x").astype(np.float64) - centre) * scale

    out = np.full((len(queries.audio), len(tracks.audio)), -2.0)
    for q, a in enumerate(queries.audio):
        for i, b in enumerate(tracks.audio):
            for x in rows(a):
                for y in rows(b):
                    out[q, i] = max(out[q, i], x @ y / np.sqrt(x @ x) / np.sqrt(y @ y))
    return out


@pytest.mark.parametrize("standardised", [False, True])
def test_scores_are_those_of_a_loop(rng, seed, tmp_path, standardised):
    tracks = audio_tracks(rng, tmp_path / "a", list(rng.uniform(0.2, 1.6, 18)))
    queries = audio_tracks(rng, tmp_path / "b", [0.3, 0.9, 1.4], "q")
    embedder, work = Projection(seed), Workspace(tmp_path / "work")
    fitted = fit_similarity(embedder, tracks, work, standardised=standardised)
    found = fitted.score([Query(queries, i, "") for i in range(3)] + [Query(tracks, 4, "")])
    assert found.dtype == np.float64 and found.shape == (4, 18)
    cut = cut_of(embedder, 0.0, 0.0, "")
    more = (fitted.windows.centre, fitted.windows.scale) if standardised else ()
    expected = naive_scores(embedder, tracks, queries, cut, *more)
    assert np.abs(found[:3] - expected).max() < 1e-6
    assert found[3].argmax() == 4 and abs(found[3, 4] - 1) < 1e-6
    alone = fitted.score([Query(queries, 1, "")])
    np.testing.assert_array_equal(alone[0], found[1])
    group = fitted.score([Query(queries, 0, "", "both", (0, 2))])
    np.testing.assert_allclose(group[0], found[[0, 2]].max(axis=0), atol=1e-6)


def test_the_nearest_tracks_are_the_best_scores(rng, seed, tmp_path):
    tracks = audio_tracks(rng, tmp_path / "a", list(rng.uniform(0.2, 1.6, 30)))
    queries = audio_tracks(rng, tmp_path / "b", [1.2], "q")
    fitted = fit_similarity(Projection(seed), tracks, Workspace(tmp_path / "work"), hop=0.05)
    scores = fitted.score([Query(queries, 0, "")])[0]
    found, values = fitted.nearest(Query(queries, 0, ""), 5)
    assert len(set(found)) == 5
    np.testing.assert_allclose(values, scores[found], atol=1e-6)
    np.testing.assert_allclose(values, np.sort(scores)[:-6:-1], atol=1e-6)  # two may be equal in float32
    assert len(fitted.nearest(Query(queries, 0, ""), 99)[0]) == 30


def test_a_short_query_and_a_missing_one_are_named(rng, seed, tmp_path):
    tracks = audio_tracks(rng, tmp_path / "a", [1.0, 1.0])
    queries = audio_tracks(rng, tmp_path / "b", [0.5, 1.0], "q")
    fitted = fit_similarity(Projection(seed), tracks, Workspace(tmp_path / "work"), window=0.8)
    with pytest.raises(UserError, match="'q0' lasts 0.5 s, a window 0.8 s: use window=0.5 or less"):
        fitted.score([Query(queries, 0, "")])
    (tmp_path / "b" / "q1.wav").unlink()
    with pytest.raises(UserError, match="the query 'q1' has no audio at"):
        fitted.score([Query(queries, 1, "")])
