"""Reading audio files: any rate, any number of channels, to what an autoencoder takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from attr_engine.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
_MAX_SECONDS = 4 * 3600.0


def find_audio(source: Path) -> list[Path]:
    """Audio files of a folder (with its subfolders, sorted), or the one file.

    Raises:
        UserError: nothing there.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source} does not exist: check the path")
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{source} holds no audio ({', '.join(SUFFIXES)}): check the path")
    return files


def read_audio(path: Path, sample_rate: int, channels: int) -> np.ndarray:
    """Read, mix to ``channels`` and resample.

    Args:
        path: the file.
        sample_rate: wanted, Hz.
        channels: wanted; stereo is averaged to mono, mono is doubled to stereo, of more channels
            the first two are taken.

    Returns:
        float32 ``[channels, samples]``.

    Raises:
        UserError: missing reader, unreadable or endless file, no samples, NaN or infinity.
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise UserError(f"reading audio needs {error.name}: pip install 'attr-engine[audio]'") from error
    try:
        info = soundfile.info(path)
        if info.frames / max(info.samplerate, 1) > _MAX_SECONDS:
            raise UserError(f"{path} is longer than {_MAX_SECONDS / 3600:.0f} hours: cut it")
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be read as audio ({error}): convert it to wav or flac, or leave it out"
        ) from error
    if len(audio) == 0:
        raise UserError(f"{path} holds no samples: leave it out")
    if not np.isfinite(audio).all():
        raise UserError(f"{path} holds NaN or infinity: convert it again, or leave it out")
    if channels == 1:
        audio = audio.mean(axis=1, keepdims=True)
    else:
        audio = np.repeat(audio, 2, axis=1) if audio.shape[1] == 1 else audio[:, :2]
    if rate != sample_rate:
        audio = soxr.resample(audio, rate, sample_rate)
    return np.ascontiguousarray(audio.T, dtype=np.float32)
