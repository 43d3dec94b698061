"""From audio to latents on disk, through a model's autoencoder."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError
from attr_engine.latents.ahead import ahead
from attr_engine.latents.audio import decoded_bytes, find_audio, read_audio
from attr_engine.latents.build import contents_of
from attr_engine.latents.memory import check_ids
from attr_engine.latents.metadata import conditioning_of, read_metadata
from attr_engine.latents.writer import LatentWriter

Progress = Callable[[int, int], None]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Silence after the end of a track that the encoder may look at, in frames.
_CONTEXT = 16


class Encoder(Protocol):
    """What ingest needs of an autoencoder."""

    sample_rate: int
    audio_channels: int
    samples_per_frame: int
    fingerprint: str

    def encode(self, audio: Tensor) -> Tensor:
        """Latent means ``[B, C, F]`` of ``[B, channels, samples]``."""
        ...


@dataclass(frozen=True)
class Report:
    """What an ingest did.

    Attributes:
        tracks: written by this call.
        notes: sentences about what is worth knowing.
        there: tracks that the folder held already.
    """

    tracks: int
    notes: tuple[str, ...]
    there: int = 0


@dataclass(frozen=True)
class _File:
    """A recording: where it is, its name in the source, its id."""

    path: Path
    name: str
    id: str


@dataclass(frozen=True)
class _Cut:
    """How recordings become tracks."""

    encoder: Encoder
    frames: int
    long: str
    hop: float | None
    dtype: str

    def spans(self, samples: int, path: Path) -> list[tuple[int, int]]:
        """(start, stop) of a recording's windows, in samples."""
        rate, longest = self.encoder.sample_rate, self.frames * self.encoder.samples_per_frame
        if samples > longest and self.long == "error":
            raise UserError(
                f"{path} lasts {samples / rate:.1f} s, the model takes at most {longest / rate:.1f} s: "
                "cut it, or use --long window"
            )
        step = longest if self.hop is None else max(1, round(self.hop * rate))
        return windows(samples, longest, step, min(rate, longest))

    def encode(self, audio: np.ndarray) -> Tensor:
        """Latent ``[C, n]`` of one window, as stored."""
        return encode_piece(self.encoder, audio, self.frames).to(DTYPES[self.dtype])


def encode_piece(encoder: Encoder, audio: np.ndarray, frames: int) -> Tensor:
    """Latent ``[C, n]`` on the CPU of audio ``[channels, samples]``: encoded with silence after its end, then trimmed.

    Args:
        encoder: autoencoder; the latent is its mean.
        audio: float32, at the encoder's rate.
        frames: longest piece in frames (the model's).
    """
    size = encoder.samples_per_frame
    n = math.ceil(audio.shape[1] / size)
    padded = np.zeros((audio.shape[0], min(n + _CONTEXT, max(n, frames)) * size), dtype=np.float32)
    padded[:, : audio.shape[1]] = audio
    return encoder.encode(torch.from_numpy(padded)[None])[0, :, :n].cpu()


def silence_latent(encoder: Encoder) -> np.ndarray:
    """Latent of digital silence, ``[C]`` float32: the middle of a long silent stretch."""
    frames = 4 * _CONTEXT
    audio = torch.zeros(1, encoder.audio_channels, frames * encoder.samples_per_frame)
    return np.asarray(encoder.encode(audio)[0, :, frames // 2].cpu().numpy(), dtype=np.float32)


def windows(samples: int, longest: int, hop: int, shortest: int) -> list[tuple[int, int]]:
    """(start, stop) of the windows that cover a recording; a tail under ``shortest`` is left out."""
    if samples <= longest:
        return [(0, samples)]
    out = []
    for start in range(0, samples, hop):
        stop = min(start + longest, samples)
        if stop - start >= shortest:
            out.append((start, stop))
        if stop == samples:
            break
    return out


def ingest_audio(
    source: Path, out: Path, encoder: Encoder, frames: int, metadata: Path | None = None,
    condition: Sequence[str] = (), long: str = "window", hop: float | None = None, dtype: str = "float32",
    kind: str = "", progress: Progress | None = None, workers: int | None = None, append: bool = False,
) -> Report:  # fmt: skip
    """Encode audio into a data set.

    Files are read, mixed and resampled ahead in threads and encoded one after the other, so the result does not
    depend on the number of threads. Stopped at any moment, the same call goes on after the last whole shard.

    Args:
        source: a folder of audio, or one file.
        out: folder of the data set.
        encoder: autoencoder; latents are its mean.
        frames: longest track in frames (the model's).
        metadata: CSV or JSON (:func:`attr_engine.latents.metadata.read_metadata`).
        condition: metadata entries that the model is conditioned on; ``seconds_start`` and
            ``seconds_total`` are always there.
        long: ``"window"`` cuts longer recordings, ``"error"`` refuses them.
        hop: seconds from window to window; default the longest track, no overlap.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, as stored.
        kind: stored as ``info["kind"]`` where given, e.g. ``"held-out"``.
        progress: called with (files done, files).
        workers: threads that read; default the number of cores, at most 4.
        append: add recordings to a whole data set.

    Raises:
        UserError: anything unusable, by file; or what is in ``out`` was begun with other settings.
    """
    if hop is not None and not 0 < hop < math.inf:
        raise UserError(f"a hop of {hop} seconds makes no windows: give seconds above 0")
    rows = read_metadata(metadata, condition) if metadata is not None else {}
    files, root = _files(source, rows)
    names, notes = {file.name for file in files}, []
    absent = [name for name in rows if name not in names]
    if absent and source.is_dir():
        notes.append(f"{len(absent)} metadata rows name files that are not there, first {absent[0]!r}")
    extra = {
        "root": str(root.resolve()), "encoder": encoder.fingerprint, "sample_rate": encoder.sample_rate,
        "samples_per_frame": encoder.samples_per_frame, "from": "audio", "source": str(source.resolve()),
        "frames": frames, "hop": hop, "long": long, "condition": list(condition), "store_dtype": dtype, "kind": kind,
    }  # fmt: skip
    cut, count = _Cut(encoder, frames, long, hop, dtype), 0
    with LatentWriter(out, padding=padding_of(out, encoder), extra=extra, append=append) as writer:
        todo = [file for file in files if not (writer.has(file.id) or writer.has(f"{file.id}#000"))]
        done = len(files) - len(todo)
        if progress is not None and done:
            progress(done, len(files))
        if append and done:
            notes.append(f"{done} of {len(files)} files are in the data set already and were skipped")
        for file, (audio, digest) in ahead(todo, _loader(encoder), workers, _cost(encoder)):
            if not audio.any():
                notes.append(f"{file.name} is digital silence")
            row = rows.get(file.name, {})
            more = {"kind": kind} if kind else {}
            count += _add(writer, file, audio, row, cut, {"sha256": digest, **more}, condition)
            done += 1
            if progress is not None:
                progress(done, len(files))
    return Report(count, tuple(notes), writer.resumed)


def _files(source: Path, rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[_File], Path]:
    """The recordings of a source with their ids, checked, and the folder that their names are relative to."""
    paths = find_audio(source)
    root = source if source.is_dir() else source.parent
    names = [path.relative_to(root).as_posix() for path in paths]
    files = [
        _File(path, name, id_of(rows.get(name, {}), name)) for path, name in zip(paths, names, strict=True)
    ]
    ids = set[str]()
    check_ids([file.id for file in files], ids)
    for file in files:
        parent, _, number = file.id.rpartition("#")
        if parent in ids and re.fullmatch("[0-9]{3,}", number):
            raise UserError(
                f"the id {file.id!r} stands twice: it is that of {file.name} and of a window of {parent!r}, rename one"
            )
    return files, root


def id_of(row: Mapping[str, Any], name: str) -> str:
    """The id that the metadata give a file, else its name."""
    return name if row.get("id") in (None, "") else str(row["id"])


def padding_of(out: Path, encoder: Encoder) -> np.ndarray:
    """The padding of the shards that are there, else the latent of silence.

    With another number of threads the same encoder may round it otherwise; that the encoder is the same is checked
    by its fingerprint.
    """
    shards = sorted(out.glob("shard-*.safetensors"))
    known = contents_of(out, shards[0].name).meta.get("padding") if shards else None
    return silence_latent(encoder) if known is None else np.asarray(known, dtype=np.float64)


def _loader(encoder: Encoder) -> Callable[[_File], tuple[np.ndarray, str]]:
    def load(file: _File) -> tuple[np.ndarray, str]:
        audio = read_audio(file.path, encoder.sample_rate, encoder.audio_channels)
        return audio, file_hash(file.path)

    return load


def _cost(encoder: Encoder) -> Callable[[_File], int]:
    return lambda file: decoded_bytes(file.path, encoder.sample_rate, encoder.audio_channels)


def _add(
    writer: LatentWriter, file: _File, audio: np.ndarray, row: Mapping[str, Any], cut: _Cut,
    more_info: Mapping[str, Any], condition: Sequence[str],
) -> int:  # fmt: skip
    """Add the windows of one recording, which all lie in one shard, and return how many."""
    spans, rate, count = cut.spans(audio.shape[1], file.path), cut.encoder.sample_rate, 0
    given = conditioning_of(row, condition, file.name)
    for number, (start, stop) in enumerate(spans):
        name = file.id if len(spans) == 1 else f"{file.id}#{number:03d}"
        if writer.has(name):
            continue
        timing = {"seconds_start": start / rate, "seconds_total": audio.shape[1] / rate}
        info = {"title": file.path.stem, **row, "source": file.name, "seconds": (stop - start) / rate,
                "start": start / rate, "parent": file.id if len(spans) > 1 else "", **more_info}  # fmt: skip
        latent = cut.encode(audio[:, start:stop])
        writer.add(name, latent, {**timing, **given}, info, more=number + 1 < len(spans))
        count += 1
    return count


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex: a report only plays the very file that was ingested."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
