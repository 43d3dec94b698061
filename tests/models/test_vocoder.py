"""The closed-form autoencoder: what it keeps of a tone, of silence, and that its weights are the same each time."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("stable_audio_tools")

from attr_engine.errors import UserError  # noqa: E402
from attr_engine.models.autoencoder import load_autoencoder  # noqa: E402
from attr_engine.models.vocoder import band_tones, fit_autoencoder  # noqa: E402

RATE, HOP = 16000, 2048


def tone(hz: float, seconds: float = 2.0, level: float = 0.5) -> np.ndarray:
    time = np.arange(int(RATE * seconds) // HOP * HOP) / RATE
    return (level * np.sin(2 * np.pi * hz * time))[None].astype(np.float32)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    out = tmp_path_factory.mktemp("vocoder")
    rng = np.random.default_rng(0)
    clips = [
        tone(hz, level=float(rng.uniform(0.1, 0.6))) for hz in 440.0 * 2.0 ** (np.arange(-28, 27, 5) / 12)
    ]
    fit_autoencoder(clips, RATE, out, HOP)
    return load_autoencoder(out)


@pytest.mark.parametrize("note", [45, 57, 60, 69, 76, 88])
def test_a_note_is_loudest_in_its_own_band_and_comes_back_at_its_pitch_and_level(encoder, note):
    hz = 440.0 * 2.0 ** ((note - 69) / 12)
    audio = tone(hz)
    latent = encoder.encode(torch.from_numpy(audio)[None])
    silence = encoder.encode(torch.zeros(1, 1, audio.shape[1]))
    rise = ((latent - silence)[0, :, 4:-4]).mean(dim=1).numpy()
    # Latents are scaled band by band, so compare what the decoder plays.
    back = encoder.decode(latent)[0, 0].numpy()[4 * HOP : -4 * HOP]
    spectrum = np.abs(np.fft.rfft(back * np.hanning(len(back))))
    peak = np.fft.rfftfreq(len(back), 1 / RATE)[spectrum.argmax()]
    assert rise[note - 36] > 0
    assert abs(peak - hz) <= RATE / HOP / 2 + 1.0  # carriers are whole periods a frame
    assert 0.6 < np.sqrt((back**2).mean() * 2) / 0.5 < 1.4


def test_silence_comes_back_as_silence(encoder):
    back = encoder.decode(encoder.encode(torch.zeros(1, 1, 8 * HOP)))
    assert float(back.abs().max()) < 0.02


def test_the_latent_does_not_know_the_phase(encoder):
    a = encoder.encode(torch.from_numpy(tone(440.0))[None])[0, :, 4:-4]
    b = encoder.encode(torch.from_numpy(-tone(440.0))[None])[0, :, 4:-4]
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_same_clips_give_the_same_bytes_and_latents_of_about_unit_variance(tmp_path: Path):
    rng = np.random.default_rng(1)
    clips = [0.1 * rng.normal(size=(1, 8 * HOP)).astype(np.float32) for _ in range(3)]
    for name in ("a", "b"):
        fit_autoencoder(clips, RATE, tmp_path / name, HOP)
    for file in ("pretransform.json", "autoencoder.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    encoder = load_autoencoder(tmp_path / "a")
    latents = torch.cat([encoder.encode(torch.from_numpy(c)[None])[0] for c in clips], dim=1)
    assert abs(float(latents.mean())) < 1e-2 and 0.9 < float(latents.var()) < 1.1


def test_bands_are_semitones_and_stay_below_half_the_sample_rate():
    tones = band_tones(RATE)
    assert len(tones) == 64
    np.testing.assert_allclose(tones[33], [440.0])
    assert max(f.max() for f in tones) <= 0.45 * RATE + 1e-6


@pytest.mark.parametrize(("rate", "hop"), [(4000, 512), (16000, 0), (16000, 100_000)])
def test_unusable_numbers_are_refused(rate, hop, tmp_path):
    with pytest.raises(UserError, match="hop"):
        fit_autoencoder([tone(440.0)], rate, tmp_path / "x", hop)


def test_silence_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match="silence"):
        fit_autoencoder([np.zeros((1, RATE), dtype=np.float32)], RATE, tmp_path / "x", HOP)
    assert not (tmp_path / "x").exists()
