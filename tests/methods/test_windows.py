"""Windows cover the audio, the audio is that of the track, and embeddings on disk are whole or made again."""

import json

import numpy as np
import pytest
import soundfile
from audio_sets import RATE, Projection, audio_tracks

from attr_engine.errors import UserError
from attr_engine.latents.batch import Chosen
from attr_engine.latents.recordings import Recordings, track_audio
from attr_engine.methods.windows import Cut, cut_of, embed_audio, track_windows


def nothing(done: int, total: int) -> None:
    pass


def naive_windows(audio: np.ndarray, size: int, step: int) -> list[np.ndarray]:
    """Every window of its own, by the words of the docstring."""
    if len(audio) < size:
        return [np.array([audio[i % len(audio)] for i in range(size)])]
    out, at = [], 0
    while at + size <= len(audio):
        out.append(audio[at : at + size])
        last = at + size
        at += step
    return out if last == len(audio) else [*out, audio[-size:]]


def test_windows_are_those_of_a_loop(rng):
    for _ in range(60):
        samples, size, step = rng.integers(1, 300), rng.integers(1, 100), rng.integers(1, 60)
        audio = rng.normal(size=samples).astype(np.float32)
        found = np.concatenate(list(Cut(size / 100, step / 100).windows(audio, 100, "x")))
        np.testing.assert_array_equal(found, np.stack(naive_windows(audio, size, step)))


def test_audio_shorter_than_a_window_is_refused_where_the_window_is_the_users(rng):
    embedder, audio = Projection(0), rng.normal(size=RATE // 4).astype(np.float32)
    assert len(embed_audio(embedder, audio, cut_of(embedder, 0.0, 0.0, ""), "a")) == 1
    assert len(embed_audio(embedder, audio, cut_of(embedder, 0.3, 0.0, "repeat"), "a")) == 1
    for window, short in ((0.3, ""), (0.0, "refuse")):
        with pytest.raises(
            UserError, match=r"'a' lasts 0.25 s, a window 0\.[35] s: use window=0.25 or less, or short=repeat"
        ):
            embed_audio(embedder, audio, cut_of(embedder, window, 0.0, short), "a")


def test_what_is_not_said_is_the_embedders_own():
    embedder = Projection(0)
    assert cut_of(embedder, 0.0, 0.0, "") == Cut(0.5, 0.2, "repeat")
    assert cut_of(embedder, 1.0, 0.0, "") == Cut(1.0, 0.2, "refuse")
    assert cut_of(embedder, 0.1, 0.0, "repeat") == Cut(0.1, 0.1, "repeat")
    for bad in (
        (-1.0, 0.0, ""),
        (0.0, -1.0, ""),
        (float("nan"), 0.0, ""),
        (1e-9, 0.0, ""),
        (0.0, 0.0, "pad"),
    ):
        with pytest.raises(UserError, match="cannot be|use repeat or refuse"):
            cut_of(embedder, *bad)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ones((1, 3)), "gave .1, 3. for 2 windows of 'a'"),
        (np.ones(2), "one row a window"),
        (np.full((2, 3), np.nan), "not finite"),
        (np.ones((2, 3), dtype=int), "not finite"),
    ],
)
def test_an_embedding_that_is_none_is_refused(rng, monkeypatch, given, message):
    embedder = Projection(0)
    monkeypatch.setattr(embedder, "embed", lambda windows: given)
    with pytest.raises(UserError, match=message):
        embed_audio(embedder, rng.normal(size=RATE).astype(np.float32), Cut(0.5, 0.5), "a")


def test_the_audio_is_that_of_the_track(rng, tmp_path):
    tracks = audio_tracks(rng, tmp_path, [0.5, 0.7])
    for i in range(2):
        np.testing.assert_array_equal(track_audio(tracks, i, RATE), tracks.audio[i])
    assert len(track_audio(tracks, 0, 2 * RATE)) == RATE
    np.testing.assert_array_equal(track_audio(Chosen(tracks, [1]), 0, RATE), tracks.audio[1])


def test_windows_of_one_recording_are_read_once(rng, tmp_path, monkeypatch):
    from attr_engine.latents import recordings

    tracks = audio_tracks(rng, tmp_path, [1.0, 1.0, 1.0])
    for i, (start, seconds) in enumerate([(0.0, 0.4), (0.4, 0.4), (0.8, 0.4)]):
        tracks.info[i] = {**tracks.info[0], "parent": "p", "start": start, "seconds": seconds}
    reads = []
    monkeypatch.setattr(recordings, "read_audio", lambda *a: reads.append(a) or tracks.audio[0][None])
    reader = Recordings(RATE)
    found = [reader.audio(tracks, i)[0] for i in range(3)]
    assert len(reads) == 1 and [len(x) for x in found] == [3200, 3200, 1600]
    np.testing.assert_array_equal(np.concatenate(found), tracks.audio[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "../t1.wav"}, "no audio in"),
        ({"source": "a/../../t1.wav"}, "no audio in"),
        ({"source": "{folder}/t1.wav"}, "no audio in"),
        ({"source": "t1.txt"}, "no audio in"),
        ({"source": "t9.wav"}, "has no audio at .*t9.wav: put the audio there"),
        ({"source": "\0.wav"}, "has no audio at"),
        ({"source": "x" * 5000 + ".wav"}, "has no audio at"),
        ({"source": ""}, "does not say which audio"),
        ({"source": ["t1.wav"]}, "does not say which audio"),
        ({"sha256": None}, "does not say which audio"),
        ({"sha256": "0" * 64}, "t1.wav is not the file that the track 't1' was made from"),
        ({"parent": "p", "start": 5.0}, "said to start at 5.0 s"),
        ({"parent": "p", "start": -1.0}, "said to start at -1.0 s"),
        ({"parent": "p", "seconds": float("nan")}, "to last nan s"),
        ({"parent": "p", "seconds": "1"}, "to last 1 s"),
    ],
)
def test_a_hostile_manifest_reads_nothing(rng, tmp_path, change, message):
    tracks = audio_tracks(rng, tmp_path, [0.2, 0.2])
    change = {k: v.replace("{folder}", str(tmp_path)) if isinstance(v, str) else v for k, v in change.items()}
    tracks.info[1].update(change)
    with pytest.raises(UserError, match=message) as error:
        track_audio(tracks, 1, RATE)
    assert "'t1'" in str(error.value)


def test_tracks_without_audio_are_named(rng, tmp_path):
    tracks = audio_tracks(rng, tmp_path, [0.2])
    del tracks.extra
    with pytest.raises(
        UserError, match="does not say which audio the track 't0' was made from: ingest it from audio"
    ):
        track_audio(tracks, 0, RATE)


class Killed(BaseException):
    pass


def test_embeddings_are_kept_and_an_interrupted_call_goes_on(rng, seed, tmp_path):
    tracks = audio_tracks(rng, tmp_path / "audio", list(rng.uniform(0.1, 1.5, 40)))
    cut, embedder, seen = Cut(0.5, 0.2), Projection(seed), []
    expected = [embed_audio(embedder, a, cut, "x").astype(np.float64) for a in tracks.audio]

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 32:
            raise Killed

    with pytest.raises(Killed):
        track_windows(embedder, tracks, cut, False, tmp_path / "work", stop)
    assert seen == [(16, 40), (32, 40)]
    embedder.calls = 0
    found = track_windows(embedder, tracks, cut, False, tmp_path / "work", nothing)
    assert embedder.calls == sum(map(len, expected[32:]))
    for i, rows in enumerate(expected):
        mine = found.vectors[found.bounds[i] : found.bounds[i + 1]]
        assert np.abs(mine - rows / np.linalg.norm(rows, axis=1, keepdims=True)).max() < 1e-6
    again = track_windows(embedder, tracks, cut, False, tmp_path / "work", nothing)
    assert embedder.calls == sum(map(len, expected[32:]))
    np.testing.assert_array_equal(again.vectors, found.vectors)
    assert not list((tmp_path / "work").rglob("part-*"))


def test_what_they_are_made_of_is_in_the_key(rng, seed, tmp_path):
    tracks = audio_tracks(rng, tmp_path / "audio", [0.6, 0.6])
    cut, embedder = Cut(0.5, 0.2), Projection(seed)
    keys = {track_windows(embedder, tracks, cut, False, tmp_path, nothing).key}
    keys.add(track_windows(embedder, tracks, cut, True, tmp_path, nothing).key)
    keys.add(track_windows(embedder, tracks, Cut(0.5, 0.3), False, tmp_path, nothing).key)
    keys.add(track_windows(Projection(seed + 1), tracks, cut, False, tmp_path, nothing).key)
    soundfile.write(tmp_path / "audio" / "t1.wav", tracks.audio[0], RATE, subtype="FLOAT")
    tracks.info[1].update(sha256=tracks.info[0]["sha256"])  # other audio, the same latents
    keys.add(track_windows(embedder, tracks, cut, False, tmp_path, nothing).key)
    assert len(keys) == 5


def test_standardised_rows_are_those_of_a_loop(rng, seed, tmp_path):
    tracks = audio_tracks(rng, tmp_path / "audio", list(rng.uniform(0.1, 1.5, 20)))

    class Constant(Projection):
        def embed(self, windows: np.ndarray) -> np.ndarray:
            out = 5 + super().embed(windows)
            out[:, 2] = 0.3  # tells no window from another
            return out

    embedder, cut = Constant(seed), Cut(0.5, 0.2)
    raw = np.concatenate([embed_audio(embedder, a, cut, "x") for a in tracks.audio]).astype(np.float64)
    expected = np.zeros_like(raw)
    for column in set(range(7)) - {2}:
        mean = sum(raw[:, column]) / len(raw)
        expected[:, column] = (raw[:, column] - mean) / np.sqrt(sum((raw[:, column] - mean) ** 2) / len(raw))
    expected = np.stack([row / np.sqrt(row @ row) for row in expected])
    found = track_windows(embedder, tracks, cut, True, tmp_path / "work", nothing)
    assert np.abs(found.vectors - expected).max() < 1e-5
    assert found.scale[2] == 0


def test_damaged_files_are_named(rng, seed, tmp_path):
    tracks, embedder = audio_tracks(rng, tmp_path / "audio", [0.6]), Projection(seed)
    work = tmp_path / "work"
    track_windows(embedder, tracks, Cut(0.5, 0.2), False, work, nothing)
    (meta,), (vectors,) = work.rglob("windows.json"), work.rglob("vectors.npy")
    whole = vectors.read_bytes()
    for damaged in (whole[:-3], b"", b"\x93NUMPY\x01\x00"):
        vectors.write_bytes(damaged)
        with pytest.raises(UserError, match="delete it, it will be made again"):
            track_windows(embedder, tracks, Cut(0.5, 0.2), False, work, nothing)
    np.save(vectors, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="delete it, it will be made again"):
        track_windows(embedder, tracks, Cut(0.5, 0.2), False, work, nothing)
    vectors.write_bytes(whole)
    for change in ({"counts": [9]}, {"counts": "x"}, {"key": "other"}, {"centre": [0.0]}):
        before = meta.read_text()
        meta.write_text(json.dumps({**json.loads(before), **change}))
        with pytest.raises(UserError, match="delete it, it will be made again"):
            track_windows(embedder, tracks, Cut(0.5, 0.2), False, work, nothing)
        meta.write_text(before)
