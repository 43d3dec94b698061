"""Tracks and pieces in an embedding of audio, against a plain loop; what cannot be heard is refused."""

import sys

import hearing
import helpers
import numpy as np
import pytest
import soxr
import torch

from attr_engine import UserError
from attr_engine.forget import forget
from attr_engine.forget_settings import Removal
from attr_engine.frechet import frechet_distance, pieces
from attr_engine.heard import any_embedding, audio_embedding, decoder

# Pieces of tracks may be shorter than a window.
OWN = "embedding:callable=hearing:loud,rate=4000,window=0.1,hop=0.1,short=repeat"


@pytest.fixture
def world(seed, rng):
    return hearing.Singer(seed), helpers.make_tracks(rng, 18, 3, 10)


def by_hand(model, latents):
    rows = []
    for x in latents:
        audio = model.decode(torch.from_numpy(np.array(x))[None])[0].numpy().mean(axis=0)
        audio = soxr.resample(audio, 8000, 4000)
        starts = [*range(0, len(audio) - 400, 400), len(audio) - 400]
        rows.append(hearing.loud(np.stack([audio[s : s + 400] for s in starts]), 4000).mean(axis=0))
    return np.stack(rows)


def test_it_is_the_mean_over_windows_of_what_the_decoder_gives(world, rng, tmp_path, monkeypatch):
    model, tracks = world
    batch = tracks.batch(range(18), 10)
    latents = [x[:, :n].numpy() for x, n in zip(batch.latents, batch.valid.tolist(), strict=True)]
    long = [i for i, x in enumerate(latents) if x.shape[1] > 2]
    found = any_embedding(OWN, model, tracks, tmp_path)
    np.testing.assert_allclose(
        found.values[long], by_hand(model, [latents[i] for i in long]), rtol=1e-5, atol=1e-6
    )
    made = [rng.normal(size=(3, n)).astype(np.float32) for n in (4, 10, 7)]
    values = found.of_latents(made)
    np.testing.assert_allclose(values, by_hand(model, made), rtol=1e-5, atol=1e-6)
    # The third number counts samples, and may be the same.
    assert np.ptp(values[:, :2], axis=0).min() > 0
    # What is kept serves again, though the decoder is gone; a broken piece has no vector.
    made[1][0, 0] = np.nan
    lost = found.of_latents(made)
    assert np.isnan(lost[1]).all() and np.array_equal(lost[[0, 2]], values[[0, 2]])
    assert lost.shape == values.shape
    monkeypatch.setattr(hearing.Singer, "decode", None)
    again = any_embedding(OWN, model, tracks, tmp_path)
    assert np.array_equal(again.values, found.values) and again.fingerprint == found.fingerprint


def test_features_are_standardised_over_the_tracks(world, tmp_path):
    pytest.importorskip("librosa")
    model, tracks = world
    found = audio_embedding("features:window=0.2,short=repeat", model, tracks, tmp_path)
    assert found.values.shape == (18, 72)
    spread = found.values.std(axis=0)
    assert ((np.abs(spread - 1) < 1e-9) | (spread == 0)).all() and (spread > 0).sum() > 40
    assert np.abs(found.values.mean(axis=0)).max() < 1e-9
    batch = tracks.batch([4], 10)
    again = found.of_latents([batch.latents[0, :, : int(batch.valid[0])].numpy()])
    np.testing.assert_allclose(again[0], found.values[4], rtol=1e-9, atol=1e-9)


def test_an_interrupted_call_carries_on(world, tmp_path, monkeypatch):
    model, tracks = world
    name = OWN
    whole = audio_embedding(name, model, tracks, tmp_path / "whole").values
    calls, decode = [], hearing.Singer.decode

    def dying(self, latents):
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(hearing.Singer, "decode", dying)
    with pytest.raises(KeyboardInterrupt):
        audio_embedding(name, model, tracks, tmp_path / "cut")
    assert np.array_equal(audio_embedding(name, model, tracks, tmp_path / "cut").values, whole)
    assert len(calls) == 17 + 2  # sixteen were kept


def test_what_cannot_be_heard_is_refused(world, seed, rng, tmp_path, monkeypatch):
    model, tracks = world
    silent = helpers.ToyDenoiser(seed)
    for name, which, words in (
        ("ridge", model, "ridge is no embedding of audio: use one of clap, clews"),
        (OWN, silent, "the model has no autoencoder"),
        ("openl3:window=1", model, "openl3 needs weights: get torchopenl3_mel256_music_512.pth.tar"),
        ("embedding:path=x.npy", model, "x.npy holds vectors, and cannot embed audio"),
        ("embedding", model, "needs one of path"),
        ("clip", model, "unknown embedding 'clip'"),
        ("embedding:callable=hearing:loud,rate=4000,window=100", model, "lasts"),
    ):
        with pytest.raises(UserError, match=words):
            any_embedding(name, which, tracks, tmp_path)
    monkeypatch.setattr(model, "decode", lambda latents: latents.new_full((1, 1, 400), np.nan))
    with pytest.raises(UserError, match="the track 't0' decodes to audio that is not finite"):
        any_embedding(OWN, model, tracks, tmp_path / "other")
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(UserError, match=r"pip install 'attr-engine\[audio\]'"):
        decoder(model, 8000)


def test_a_removal_is_measured_in_it(world, seed, tmp_path):
    model, tracks = world
    how = Removal(
        draws=4, update_draws=4, fisher_draws=4, pieces=3, sampler_steps=1, checkpoints=False, rows=4, seed=seed,
        strengths=(0.1,), embedding=OWN,
    )  # fmt: skip
    rows = forget(model, tracks, [2], tmp_path, how)
    of = audio_embedding(how.embedding, model, tracks, tmp_path / "x")
    rng = np.random.default_rng([seed, 8])
    kept = [i for i in range(18) if i != 2]
    rng.choice([2], 3, replace=True)
    prompts = tracks.batch(rng.choice(kept, 3, replace=False).tolist(), 10).conditioning
    made = of.of_latents(pieces(model, list(prompts), seed, 1, 3.0))
    assert rows[0]["frechet"] == pytest.approx(frechet_distance(made, of.values[kept]), rel=1e-9)
    assert rows[1]["frechet"] != rows[0]["frechet"]
