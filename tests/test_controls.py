"""Control rankings against naive numpy."""

import helpers
import naive
import numpy as np

from attr_engine.controls import channel_mean, control_scores, raw_latent_cosine

FRAMES = 12


def naive_cosine(tracks: helpers.ToyTracks, queries: helpers.ToyTracks) -> np.ndarray:
    mean = np.concatenate([x.astype(float) for x in tracks.raw], axis=1).mean(axis=1, keepdims=True)

    def vector(latent: np.ndarray) -> np.ndarray:
        out = np.zeros((latent.shape[0], FRAMES))
        out[:, : latent.shape[1]] = latent - mean
        return out.ravel()

    return np.array(
        [
            [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in map(vector, tracks.raw)]
            for a in map(vector, queries.raw)
        ]
    )


def test_channel_mean_counts_valid_frames_only(rng):
    tracks = helpers.make_tracks(rng, 130, 3, FRAMES)
    expected = np.concatenate([x.astype(float) for x in tracks.raw], axis=1).mean(axis=1)
    assert naive.relative_error(channel_mean(tracks, FRAMES), expected) < 1e-12


def test_cosine_of_raw_latents(rng):
    tracks, queries = helpers.make_tracks(rng, 130, 3, FRAMES), helpers.make_tracks(rng, 3, 3, FRAMES, "q")
    out = raw_latent_cosine(tracks, [(queries, i) for i in range(3)], FRAMES)
    assert np.abs(out - naive_cosine(tracks, queries)).max() < 1e-12
    itself = raw_latent_cosine(tracks, [(tracks, 5), (tracks, 99)], FRAMES)
    assert itself.argmax(axis=1).tolist() == [5, 99]
    assert np.abs(itself[[0, 1], [5, 99]] - 1).max() < 1e-12


def test_a_silent_track_has_cosine_zero(rng):
    tracks = helpers.ToyTracks(["a"], [np.ones((2, 4), np.float32)], [{}], np.zeros(2, np.float32))
    assert raw_latent_cosine(tracks, [(tracks, 0)], 4).tolist() == [[0.0]]


def test_every_control_says_what_its_name_says(rng):
    tracks, queries = helpers.make_tracks(rng, 20, 3, FRAMES), helpers.make_tracks(rng, 2, 3, FRAMES, "q")
    base = rng.random(20)
    sets = [(queries, 0), (queries, 1), (tracks, 3)]
    out = control_scores(tracks, sets, base, FRAMES, seed=5)
    assert list(out) == ["random", "duration", "training loss", "raw-latent cosine"]
    assert all(v.shape == (3, 20) and v.dtype == np.float64 for v in out.values())
    for row in range(3):
        assert (out["duration"][row] == [-x.shape[1] for x in tracks.raw]).all()
        assert (out["training loss"][row] == base).all()
    assert len(np.unique(out["random"])) == 60
    assert np.array_equal(out["random"], control_scores(tracks, sets, base, FRAMES, seed=5)["random"])
    assert not np.array_equal(out["random"], control_scores(tracks, sets, base, FRAMES, seed=6)["random"])
    out["duration"][0, 0] = out["training loss"][0, 0] = 99.0
    assert out["duration"][1, 0] != 99.0 and base[0] != 99.0, "rows are not views of one another"
