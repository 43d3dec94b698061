"""Clips can be played wherever soundfile can or cannot write, and waveforms show every sample."""

import io
import sys
import wave

import numpy as np
import pytest

from attr_engine.report import encode_clip, waveform_peaks


@pytest.fixture
def tone():
    time = np.arange(22050) / 22050
    return (0.5 * np.stack([np.sin(1382.3 * time), np.cos(1382.3 * time)])).astype(np.float32)


def test_a_clip_that_libsndfile_wrote_decodes_to_what_went_in(tone):
    soundfile = pytest.importorskip("soundfile")
    mime, data = encode_clip(tone, 22050)
    assert mime == ("audio/mpeg" if "MP3" in soundfile.available_formats() else "audio/ogg")
    assert len(data) < tone.size  # 16-bit PCM would take twice as many bytes as there are samples
    back, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 22050
    assert np.sqrt(np.mean(back**2)) == pytest.approx(np.sqrt(np.mean(tone**2)), rel=0.1)


def test_a_rate_that_mp3_lacks_is_written_as_vorbis(tone):
    pytest.importorskip("soundfile")
    mime, data = encode_clip(tone, 22051)
    assert (mime, data[:4]) == ("audio/ogg", b"OggS")


def test_without_mp3_the_clip_is_vorbis(tone, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": "", "OGG": ""})
    assert encode_clip(tone, 22050)[0] == "audio/ogg"


def test_without_soundfile_the_clip_is_16_bit_wav(tone, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    mime, data = encode_clip(tone, 22050)
    assert mime == "audio/wav"
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 22050, tone.shape[1])
        samples = np.frombuffer(file.readframes(tone.shape[1]), "<i2").reshape(-1, 2).T / 32767
    np.testing.assert_allclose(samples, tone, atol=1 / 32767)


def test_more_than_two_channels_are_kept(tone):
    soundfile = pytest.importorskip("soundfile")
    _, data = encode_clip(np.concatenate([tone] * 3), 22050)
    assert soundfile.info(io.BytesIO(data)).channels == 6


def test_samples_beyond_full_scale_are_clipped_not_wrapped(tone, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    _, data = encode_clip(np.full((1, 4), 3.0, dtype=np.float32), 8000)
    with wave.open(io.BytesIO(data)) as file:
        assert (np.frombuffer(file.readframes(4), "<i2") == 32767).all()


def test_a_long_clip_is_encoded_in_pieces():
    pytest.importorskip("soundfile")
    audio = np.zeros((1, 400_000), dtype=np.float32)
    assert encode_clip(audio, 22051)[0] == "audio/ogg"


def test_peaks_are_the_extremes_of_each_stretch_over_all_channels(rng):
    audio = rng.normal(size=(2, 1000)).astype(np.float32)
    peaks = waveform_peaks(audio, 7)
    assert (peaks.shape, peaks.dtype) == ((7, 2), np.float32)
    edges = [bucket * 1000 // 7 for bucket in range(8)]
    for bucket, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        assert tuple(peaks[bucket]) == (audio[:, start:end].min(), audio[:, start:end].max())


def test_audio_shorter_than_the_buckets_fills_them_all():
    peaks = waveform_peaks(np.array([[0.5, -0.5]], dtype=np.float32), 4)
    np.testing.assert_array_equal(peaks[:, 0], [0.5, 0.5, -0.5, -0.5])


@pytest.mark.parametrize(
    "function", [lambda audio: encode_clip(audio, 22050), lambda audio: waveform_peaks(audio, 4)]
)
def test_audio_of_the_wrong_shape_or_value_is_refused(function):
    for shape in [(0,), (5,), (2, 0), (0, 5), (1, 2, 3)]:
        with pytest.raises(ValueError, match=r"\[channels, samples\]"):
            function(np.zeros(shape, dtype=np.float32))
    broken = np.zeros((2, 9), dtype=np.float32)
    broken[1, 3] = np.nan
    with pytest.raises(ValueError, match="sample 3 of channel 1"):
        function(broken)


def test_no_buckets_and_no_rate_are_refused(tone):
    with pytest.raises(ValueError, match="bucket"):
        waveform_peaks(tone, 0)
    with pytest.raises(ValueError, match="sample rate"):
        encode_clip(tone, 0)
