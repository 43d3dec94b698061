"""Audio for the report: a compressed clip that a browser plays, and the outline of its waveform."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np

from attr_engine.errors import UserError

#: Sample rates of MPEG-1, 2 and 2.5 layer III, in Hz; at any other rate an MP3 cannot be written.
MP3_RATES = frozenset((8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000))

#: libsndfile's level of compression at a constant bit rate: 80 kbit/s at 16 kHz, 160 kbit/s at 44.1 kHz.
CONSTANT_LEVEL = 0.5

#: Samples handed to libsndfile at once: its Vorbis encoder overruns its stack on very long writes.
WRITE_SAMPLES = 1 << 16


def encode_clip(audio: np.ndarray, sample_rate: int, constant: bool = False) -> tuple[str, bytes]:
    """Encode a clip as MP3, where libsndfile can write it, else as OGG Vorbis, else as 16-bit WAV.

    soundfile is optional: without it, or without its library, the WAV is made with the standard library.

    Args:
        audio: ``[channels, samples]`` float32 in [-1, 1]; what is beyond is clipped.
        sample_rate: in Hz.
        constant: at a constant bit rate, so that clips of one length and rate are files of one size; OGG, which has none, is left out.

    Returns:
        ``(mime, data)``: "audio/mpeg", "audio/ogg" or "audio/wav", and the bytes of the file.

    Raises:
        UserError: audio of another shape, empty, or with a sample that is not finite; a rate below 1 Hz.
    """
    samples = np.clip(_checked(audio), -1.0, 1.0)
    if sample_rate < 1:
        raise UserError(f"the sample rate of a clip must be at least 1 Hz, not {sample_rate}")
    if samples.shape[0] <= 2 and sample_rate in MP3_RATES:
        data = _encode_sndfile(samples, sample_rate, "MP3", "MPEG_LAYER_III", constant)
        if data:
            return "audio/mpeg", data
    data = b"" if constant else _encode_sndfile(samples, sample_rate, "OGG", "VORBIS")
    if data:
        return "audio/ogg", data
    return "audio/wav", _encode_wav(samples, sample_rate)


def waveform_peaks(audio: np.ndarray, buckets: int) -> np.ndarray:
    """Return the smallest and the largest sample of each of ``buckets`` equal stretches, over all channels.

    Args:
        audio: ``[channels, samples]`` float32.
        buckets: at least 1; with fewer samples than buckets a sample serves several buckets.

    Returns:
        ``[buckets, 2]`` float32, (min, max).

    Raises:
        UserError: audio of another shape, empty, or with a sample that is not finite; buckets below 1.
    """
    samples = _checked(audio)
    if buckets < 1:
        raise UserError(f"a waveform needs at least 1 bucket, not {buckets}")
    # reduceat gives the sample itself where a start is not below the next: short audio needs no other case.
    starts = np.arange(buckets, dtype=np.int64) * samples.shape[1] // buckets
    low = np.minimum.reduceat(samples.min(axis=0), starts)
    high = np.maximum.reduceat(samples.max(axis=0), starts)
    return np.stack([low, high], axis=1).astype(np.float32)


def _checked(audio: np.ndarray) -> np.ndarray:
    """Return ``audio`` as ``[channels, samples]`` float32, or raise ``UserError``."""
    samples = np.asarray(audio, dtype=np.float32)
    if samples.ndim != 2 or samples.size == 0:
        raise UserError(
            f"a clip must be [channels, samples] and not empty, not an array of shape {samples.shape}"
        )
    if not np.isfinite(samples).all():
        channel, sample = np.argwhere(~np.isfinite(samples))[0]
        raise UserError(f"sample {sample} of channel {channel} of a clip is {samples[channel, sample]}")
    return samples


def _encode_sndfile(
    samples: np.ndarray, sample_rate: int, container: str, subtype: str, constant: bool = False
) -> bytes:
    """Encode ``[channels, samples]`` with libsndfile; empty where it is missing or cannot write this."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package is there, the library is not
        return b""
    if container not in soundfile.available_formats():
        return b""
    buffer = io.BytesIO()
    # Without a level soundfile does not pass the mode on.
    rate: dict[str, Any] = (
        {"bitrate_mode": "CONSTANT", "compression_level": CONSTANT_LEVEL} if constant else {}
    )
    try:
        with soundfile.SoundFile(
            buffer, "w", sample_rate, samples.shape[0], subtype=subtype, format=container, **rate
        ) as file:
            for start in range(0, samples.shape[1], WRITE_SAMPLES):
                file.write(np.ascontiguousarray(samples[:, start : start + WRITE_SAMPLES].T))
    except (RuntimeError, ValueError):  # a rate or a number of channels that the encoder does not know
        return b""
    return buffer.getvalue()


def _encode_wav(samples: np.ndarray, sample_rate: int) -> bytes:
    """Encode ``[channels, samples]`` in [-1, 1] as 16-bit PCM."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(np.round(samples.T * 32767.0).astype("<i2").tobytes())
    return buffer.getvalue()
