"""Features say what they are meant to, of each window alone."""

import sys

import numpy as np
import pytest
import soundfile
from audio_sets import RATE, audio_tracks

from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.latents.ingest import file_hash
from attr_engine.methods import METHODS, Workspace, parse
from attr_engine.methods.features import Features

librosa = pytest.importorskip("librosa", reason="librosa")
SR = Features.rate


def tone(hz: float, seconds: float = 2.0) -> np.ndarray:
    t = np.arange(round(seconds * SR)) / SR
    return (0.3 * sum(np.sin(2 * np.pi * hz * k * t) / k**2 for k in range(1, 5))).astype(np.float32)


def clicks(rng: np.random.Generator, per_minute: float, seconds: float = 6.0) -> np.ndarray:
    out = 1e-4 * rng.normal(size=round(seconds * SR))
    for at in np.arange(0.05, seconds - 0.1, 60 / per_minute):
        burst = rng.normal(size=round(0.03 * SR)) * np.exp(-np.linspace(0, 6, round(0.03 * SR)))
        out[round(at * SR) : round(at * SR) + len(burst)] += burst
    return (0.2 * out).astype(np.float32)


def test_a_row_is_finite_and_that_of_its_window_alone(rng):
    windows = rng.normal(size=(3, SR)).astype(np.float32)
    windows[1] = 0.0
    features = Features()
    found = features.embed(windows)
    assert found.shape == (3, 72) and found.dtype == np.float32 and np.isfinite(found).all()
    assert not found[1].any() and found[0].any()
    np.testing.assert_array_equal(features.embed(windows[2:]), found[2:])


@pytest.mark.parametrize("samples", [1, 100, 600, 3000])
def test_tiny_windows_and_odd_ones_are_finite(rng, samples):
    for x in (rng.normal(size=samples), np.ones(samples), np.full(samples, 1e-30), np.eye(1, samples)[0]):
        assert np.isfinite(Features().embed(x[None].astype(np.float32))).all()


def test_loudness_does_not_count(rng):
    x = clicks(rng, 100)[None] + tone(440, 6.0)
    features = Features()
    # By a power of two, which no rounding sees: the share of frames above their mean jumps where one of them passes it.
    np.testing.assert_array_equal(features.embed(x / 128), features.embed(x))


def test_harmony_is_the_pitch_class(rng):
    for key in rng.integers(45, 75, 4):
        chroma = Features().embed(tone(440 * 2 ** ((key - 69) / 12))[None])[0, :12]
        assert chroma.argmax() == key % 12


def test_rhythm_is_the_tempo(rng):
    edges = np.geomspace(30, 480, 21)
    for tempo in (72.0, 100.0, 140.0):
        bins = Features().embed(clicks(rng, tempo)[None])[0, 48:68]
        here = np.searchsorted(edges, tempo) - 1
        # Half the tempo, which has the same beats, is as good an answer.
        assert bins[here] > 0.5 and bins[here] == pytest.approx(max(bins[here - 1 :]), abs=0.25)
        assert bins[here] > 2 * bins[here + 2]


def test_a_softer_copy_that_starts_later_is_found(rng, tmp_path):
    tracks, queries = (
        audio_tracks(rng, tmp_path / "a", [1.0] * 6),
        audio_tracks(rng, tmp_path / "b", [1.0] * 2, "q"),
    )
    sounds = [clicks(rng, 60 + 40 * i, 8.0) + tone(200 + 67 * i, 8.0) for i in range(6)]
    changed = [0.3 * sounds[i][SR // 3 :] + 1e-6 * rng.normal(size=len(sounds[i]) - SR // 3) for i in (4, 1)]
    for kept, audio in ((tracks, sounds), (queries, changed)):
        for i, x in enumerate(audio):
            path = f"{kept.extra['root']}/{kept.info[i]['source']}"
            soundfile.write(path, x, SR)
            kept.info[i]["sha256"] = file_hash(path)
    found = (
        parse("features")[1]
        .fit(None, tracks, Workspace(tmp_path / "work"))
        .score([Query(queries, i, "") for i in (0, 1)])
    )
    assert found.shape == (2, 6) and found.argmax(axis=1).tolist() == [4, 1]
    assert METHODS["features"].kind == "black box" and RATE != SR


def test_without_librosa_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(UserError, match=r"features needs librosa: pip install 'attr-engine\[perturb\]'"):
        parse("features")[1].fit(None, None, None)
