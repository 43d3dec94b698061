"""Embeddings, similarity, and targets by k-means."""

import json

import helpers
import numpy as np
import pytest

from attr_engine import UserError
from attr_engine.embed import EMBEDDINGS, embedding, k_means, pick_targets, similarity


def write(folder, values, ids):
    folder.mkdir(exist_ok=True)
    np.save(folder / "clap.npy", values)
    (folder / "ids.json").write_text(json.dumps(ids))
    return str(folder / "clap.npy")


def alone(n: int) -> list[frozenset[int]]:
    return [frozenset([i]) for i in range(n)]


def test_latent_statistics_are_of_valid_frames_and_standardised(rng):
    tracks = helpers.make_tracks(rng, 70, 3, 11)
    found = embedding("latent-statistics", tracks)
    rows = []
    for latent in tracks.raw:
        wide = [[float(x) for x in channel] for channel in latent]
        means = [sum(channel) / len(channel) for channel in wide]
        spreads = [
            (sum((x - m) ** 2 for x in channel) / len(channel)) ** 0.5
            for channel, m in zip(wide, means, strict=True)
        ]
        rows.append(means + spreads)
    raw = np.array(rows)
    assert np.allclose(found.values, (raw - raw.mean(axis=0)) / raw.std(axis=0), rtol=1e-9, atol=1e-9)
    assert found.of_latents is not None
    assert np.allclose(found.of_latents(tracks.raw[:5]), found.values[:5], rtol=1e-9, atol=1e-9)


def test_what_is_the_same_in_all_tracks_does_not_count(rng):
    latents = [np.stack([rng.normal(size=4), np.full(4, 0.1)]).astype(np.float32) for _ in range(5)]
    tracks = helpers.ToyTracks([f"t{i}" for i in range(5)], latents, [{}] * 5, np.zeros(2, np.float32))
    values = embedding("latent-statistics", tracks).values
    assert values.shape == (5, 4) and not values[:, 1].any() and not values[:, 3].any()
    assert np.allclose(values[:, [0, 2]].std(axis=0), 1)


def test_vectors_of_a_file_are_put_into_the_order_of_the_tracks(rng, tmp_path):
    tracks = helpers.make_tracks(rng, 6, 3, 11)
    ids, values = ["other", *tracks.ids], rng.normal(size=(7, 4)).astype(np.float32)
    order = rng.permutation(7)
    path = write(tmp_path / "x", values[order], [ids[i] for i in order])
    found = embedding(path, tracks)
    assert np.array_equal(found.values, values[1:].astype(np.float64)) and found.of_latents is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda v, i: (v[:, 0], i), "one row an id"),
        (lambda v, i: (v.astype(np.int64), i), "floating-point"),
        (lambda v, i: (v[:-1], i), "one row an id"),
        (lambda v, i: (v[:-1], i[:-1]), "'t5'"),
        (lambda v, i: (v * np.array([[1.0]] * 5 + [[0.0]]), i), "'t5' is zero or not finite"),
        (lambda v, i: (np.where(np.arange(6)[:, None] == 2, np.nan, v), i), "'t2' is zero or not finite"),
        (lambda v, i: (v, {"a": 1}), "not a JSON list"),
        (lambda v, i: (v, [*i[:-1], i[0]]), "different texts"),
        (lambda v, i: (np.array([[{}]] * 6, dtype=object), i), "objects"),
    ],
)
def test_a_file_that_cannot_serve_is_refused(spoil, words, rng, tmp_path):
    tracks = helpers.make_tracks(rng, 6, 3, 11)
    path = write(tmp_path / "x", *spoil(rng.normal(size=(6, 4)), list(tracks.ids)))
    with pytest.raises(UserError, match=words):
        embedding(path, tracks)


def test_an_unknown_embedding_and_missing_files_are_named(rng, tmp_path):
    tracks = helpers.make_tracks(rng, 2, 3, 11)
    with pytest.raises(UserError, match="unknown embedding 'clap': use latent-statistics"):
        embedding("clap", tracks)
    with pytest.raises(UserError, match="nothing.npy"):
        embedding(str(tmp_path / "nothing.npy"), tracks)
    np.save(tmp_path / "lone.npy", np.ones((2, 2)))
    with pytest.raises(UserError, match="ids.json"):
        embedding(str(tmp_path / "lone.npy"), tracks)
    assert list(EMBEDDINGS) == ["latent-statistics"]


def test_similarity_is_the_cosine(rng):
    values = rng.normal(size=(9, 4))
    values[3] = 0
    expected = [
        a @ values[5] / (np.linalg.norm(a) * np.linalg.norm(values[5])) if a.any() else 0 for a in values
    ]
    assert np.allclose(similarity(values, 5), expected, atol=1e-12)


def test_k_means_finds_clusters_that_are_far_apart(rng, seed):
    centres = 100.0 * np.stack([rng.permutation(6)[:3] for _ in range(5)] + [np.full(3, -9.0)])
    centres = np.unique(centres, axis=0)
    which = np.concatenate([np.arange(len(centres)), rng.integers(len(centres), size=60)])
    # So near their centre that k-means++ picks one of a cluster that has its centre but once in 1e11 runs.
    values = centres[which] + 1e-5 * rng.normal(size=(len(which), 3))
    found = k_means(values, len(centres), seed)
    expected = np.stack([values[which == k].mean(axis=0) for k in range(len(centres))])
    assert np.allclose(
        np.array(sorted(found.tolist())), np.array(sorted(expected.tolist())), rtol=0, atol=1e-10
    )


def test_targets_are_different_deterministic_and_change_with_the_seed(rng, seed):
    values = rng.normal(size=(60, 4))
    found = [pick_targets(values, 12, s, alone(60)) for s in (seed, seed, *range(8))]
    assert found[0] == found[1]
    assert len({tuple(x) for x in found[2:]}) > 1
    for chosen in found:
        assert len(set(chosen)) == 12 and chosen == sorted(chosen) and set(chosen) <= set(range(60))


def test_one_of_a_track_and_its_copies_is_picked_at_most(rng, seed):
    values = np.repeat(rng.normal(size=(10, 4)), 2, axis=0)
    copies = [frozenset([i - i % 2, i - i % 2 + 1]) for i in range(20)]
    chosen = pick_targets(values, 10, seed, copies)
    assert len({i // 2 for i in chosen}) == 10
    with pytest.raises(UserError, match="11 targets of 10 different"):
        pick_targets(values, 11, seed, copies)


def test_more_targets_than_different_tracks_are_refused(rng, seed):
    with pytest.raises(UserError, match="0 targets"):
        pick_targets(rng.normal(size=(4, 2)), 0, seed, alone(4))
    with pytest.raises(UserError, match="only 1 different tracks"):
        pick_targets(np.ones((4, 2)), 2, seed, alone(4))
