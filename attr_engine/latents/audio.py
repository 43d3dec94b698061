"""Reading audio files: any rate, any number of channels, to what an autoencoder takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
_MAX_SECONDS = 4 * 3600.0
_MAX_SAMPLES = 1 << 31  # over all channels: 8 GiB once decoded
# The first frame of an MP3 whose number of frames is known: frame header, empty side information, tag.
_COUNTED_MP3 = re.compile(rb"\xff[\xe0-\xff][\s\S]{2}\x00{9,34}(?:Xing|Info)")
# A program that writes into a pipe does not know the length and puts a number near 2^31 or 2^32.
_UNKNOWN_LENGTH = 0x7FFF0000


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


def _reason(error: Exception) -> str:
    """What libsndfile says, without the path that it may say too."""
    return str(getattr(error, "error_string", "") or error).strip().rstrip(".")


def _has_last_page(path: Path) -> bool:
    """Whether an Ogg file ends with a whole page that is marked as the last one."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 17)))  # a page has at most 65,307 bytes
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if not page.startswith(b"OggS") or len(page) < 27:
        return False
    segments = page[26]
    return bool(page[5] & 4) and len(page) >= 27 + segments + sum(page[27 : 27 + segments])


def _missing(path: Path, info: Any, samples: int) -> str:
    """What a file announces and does not hold, empty where all is there; libsndfile reads a cut file without a word."""
    if info.format == "OGG":
        return "" if _has_last_page(path) else "its last page"
    if info.format == "MP3":
        with open(path, "rb") as file:
            counted = _COUNTED_MP3.search(file.read(1 << 16))
        # Without a count, info.frames is an estimate.
        part = samples / max(info.frames, 1) if counted else 1.0
    else:
        found = re.search(r"^data : (\d+) \(should be (\d+)\)", info.extra_info, re.MULTILINE) or re.search(
            r"Chunk size (\d+) > file length (\d+)", info.extra_info
        )
        known = found is not None and 0 < int(found[1]) < _UNKNOWN_LENGTH
        part = int(found[2]) / int(found[1]) if found is not None and known else 1.0
    return f"{1 - part:.0%} of it" if part < 0.99 else ""


def read_audio(path: Path, sample_rate: int, channels: int) -> np.ndarray:
    """Read, mix to ``channels`` and resample.

    Args:
        path: the file.
        sample_rate: wanted, Hz.
        channels: wanted, 1 or 2. For 1 all channels are averaged; for 2 mono is doubled, and of
            more channels the first two are taken (as stable-audio-tools does).

    Returns:
        float32 ``[channels, samples]``.

    Raises:
        UserError: missing reader, unreadable, cut or endless file, no samples, NaN or infinity.
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
        if info.frames * info.channels > _MAX_SAMPLES:
            raise UserError(f"{path} has {info.channels} channels of {info.frames} samples, too many: cut it")
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as audio ({_reason(error)}): convert it to wav or flac, or leave it out"
        ) from error
    if len(audio) == 0:
        raise UserError(f"{path} holds no samples: leave it out")
    if missing := _missing(path, info, len(audio)):
        raise UserError(f"{path} is cut short ({missing} is missing): get the whole file, or leave it out")
    if not np.isfinite(audio).all():
        raise UserError(f"{path} holds NaN or infinity: convert it again, or leave it out")
    if channels == 1:
        audio = audio.mean(axis=1, keepdims=True)
    else:
        audio = np.repeat(audio, 2, axis=1) if audio.shape[1] == 1 else audio[:, :2]
    if rate != sample_rate:
        audio = soxr.resample(audio, rate, sample_rate)
    return np.ascontiguousarray(audio.T, dtype=np.float32)


def decoded_bytes(path: Path, sample_rate: int, channels: int) -> int:
    """Bytes that :func:`read_audio` takes for a file, both before and after resampling; 0 where it cannot be read."""
    try:
        import soundfile

        info = soundfile.info(path)
        seconds = info.frames / max(info.samplerate, 1)
        return int(4 * (info.frames * info.channels + seconds * sample_rate * channels))
    except (ImportError, OSError, RuntimeError, TypeError):  # read_audio says what is wrong
        return 0


def read_folder(
    source: Path, sample_rate: int, channels: int, progress: Callable[[int, int], None] | None = None
) -> list[np.ndarray]:
    """Every recording of a folder, as :func:`read_audio` gives it, in the order of :func:`find_audio`."""
    files, clips = find_audio(source), []
    for done, path in enumerate(files):
        clips.append(read_audio(path, sample_rate, channels))
        if progress is not None:
            progress(done + 1, len(files))
    return clips
