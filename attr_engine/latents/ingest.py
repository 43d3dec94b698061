"""From what people have to latents on disk: audio, stable-audio-tools' pre-encoded folders, arrays."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError, one_line
from attr_engine.latents.audio import find_audio, read_audio
from attr_engine.latents.memory import check_ids, check_latent
from attr_engine.latents.metadata import conditioning_of, read_metadata
from attr_engine.latents.store import LatentWriter
from attr_engine.models.checkpoint import read_json

Progress = Callable[[int, int], None]
# Silence after the end of a track that the encoder may look at, in frames.
_CONTEXT = 16
_INFO_KEYS = ("title", "artist", "licence", "license", "album", "collection", "source", "caption", "prompt")


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
    """What an ingest did: tracks written, and sentences about what is worth knowing."""

    tracks: int
    notes: tuple[str, ...]


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
    kind: str = "", progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Encode audio into a data set.

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
        dtype: ``"float32"`` or ``"float16"``, as stored.
        kind: stored as ``info["kind"]`` where given, e.g. ``"held-out"``.
        progress: called with (files done, files).

    Raises:
        UserError: anything unusable, by file.
    """
    if hop is not None and not 0 < hop < math.inf:
        raise UserError(f"a hop of {hop} seconds makes no windows: give seconds above 0")
    rows = read_metadata(metadata, condition) if metadata is not None else {}
    files = find_audio(source)
    root = source if source.is_dir() else source.parent
    names = [p.relative_to(root).as_posix() for p in files]
    ids = [_id_of(rows.get(name, {}), name) for name in names]
    check_ids(ids)
    notes = []
    absent = [name for name in rows if name not in set(names)]
    if absent and source.is_dir():
        notes.append(f"{len(absent)} metadata rows name files that are not there, first {absent[0]!r}")
    extra = {"root": str(root.resolve()), "encoder": encoder.fingerprint, "sample_rate": encoder.sample_rate,
             "samples_per_frame": encoder.samples_per_frame}  # fmt: skip
    writer = LatentWriter(out, padding=silence_latent(encoder), extra=extra)
    count = 0
    for done, (path, name, track) in enumerate(zip(files, names, ids, strict=True)):
        audio, digest = read_audio(path, encoder.sample_rate, encoder.audio_channels), file_hash(path)
        if not audio.any():
            notes.append(f"{name} is digital silence")
        spans = _spans(audio.shape[1], frames, encoder, long, hop, path)
        row = rows.get(name, {})
        for number, (start, stop) in enumerate(spans):
            window_id = track if len(spans) == 1 else f"{track}#{number:03d}"
            seconds = audio.shape[1] / encoder.sample_rate
            timing = {"seconds_start": start / encoder.sample_rate, "seconds_total": seconds}
            conditioning = {**timing, **conditioning_of(row, condition, name)}
            info = {"title": path.stem, **row, "source": name, "seconds": (stop - start) / encoder.sample_rate,
                    "start": start / encoder.sample_rate, "parent": track if len(spans) > 1 else "",
                    "sha256": digest}  # fmt: skip
            if kind:
                info["kind"] = kind
            writer.add(
                window_id, _encode(audio[:, start:stop], encoder, frames).astype(dtype), conditioning, info
            )
            count += 1
        if progress is not None:
            progress(done + 1, len(files))
    writer.close()
    return Report(count, tuple(notes))


def _id_of(row: Mapping[str, Any], name: str) -> str:
    """The id that the metadata give a file, else its name."""
    return name if row.get("id") in (None, "") else str(row["id"])


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex: a report only plays the very file that was ingested."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _spans(
    samples: int, frames: int, encoder: Encoder, long: str, hop: float | None, path: Path
) -> list[tuple[int, int]]:
    longest = frames * encoder.samples_per_frame
    if samples > longest and long == "error":
        limit = longest / encoder.sample_rate
        raise UserError(
            f"{path} lasts {samples / encoder.sample_rate:.1f} s, the model takes at most {limit:.1f} s: cut it, or use --long window"
        )
    step = longest if hop is None else max(1, round(hop * encoder.sample_rate))
    return windows(samples, longest, step, min(encoder.sample_rate, longest))


def _encode(audio: np.ndarray, encoder: Encoder, frames: int) -> np.ndarray:
    """Latent ``[C, n]`` of one window: encoded with silence after its end, then trimmed."""
    size = encoder.samples_per_frame
    n = math.ceil(audio.shape[1] / size)
    padded = np.zeros((audio.shape[0], min(n + _CONTEXT, max(n, frames)) * size), dtype=np.float32)
    padded[:, : audio.shape[1]] = audio
    return np.asarray(encoder.encode(torch.from_numpy(padded)[None])[0, :, :n].cpu().numpy())


# -- latents that exist already -------------------------------------------------------------------


def _load_array(path: Path) -> np.ndarray:
    try:
        # The map checks the size in the header against the file before memory is taken.
        mapped = np.lib.format.open_memmap(path, mode="r")
        return np.array(mapped)
    except Exception as error:  # a damaged header is parsed as Python and raises what the parser raises
        raise UserError(
            f"{path} cannot be read as a latent ({one_line(error)}): save it with numpy.save, without pickle"
        ) from error


def _pre_encoded(source: Path) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """(name, latent ``[C, n]``, JSON) of a pre-encoded folder, in order of file names."""
    for path in sorted(source.rglob("*.npy")):
        if path.name == "silence.npy":
            continue
        name = path.relative_to(source).with_suffix("").as_posix()
        described = path.with_suffix(".json")
        if not described.is_file():
            raise UserError(
                f"{path} has no {described.name} beside it: it is not a pre-encoded folder, or use --kind arrays"
            )
        row = read_json(described, "description")
        latent = _load_array(path)
        check_latent(latent, str(path))
        mask = row.pop("padding_mask", None)
        if mask is not None:
            latent = latent[:, : _valid_frames(mask, latent.shape[1], described)]
        yield name, latent, row


def _valid_frames(mask: Any, frames: int, described: Path) -> int:
    """Place of the last 1 in a mask of 0 and 1 (int, not bool): a list, a list in a list, or for one frame a number."""
    while isinstance(mask, list) and len(mask) == 1 and isinstance(mask[0], list):
        mask = mask[0]
    entries = mask if isinstance(mask, list) else [mask]
    if not all(isinstance(x, int | float) and x in (0, 1) for x in entries):
        raise UserError(f"{described} has a padding_mask that is not a list of 0 and 1: encode again")
    valid = max((i + 1 for i, x in enumerate(entries) if x), default=0)
    if valid == 0:
        raise UserError(f"{described} masks every frame: leave the track out")
    if valid > frames:
        raise UserError(
            f"{described} has a padding_mask with {valid} valid frames, the latent has {frames}: encode again"
        )
    return valid


def _silence(source: Path, scale: float) -> np.ndarray | None:
    """Latent of silence ``[C]`` of a pre-encoded folder, None where it has none."""
    path = next(iter(sorted(source.rglob("silence.npy"))), None)
    if path is None:
        return None
    array = _load_array(path)
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    array = array[:, None] if array.ndim == 1 else array
    return np.asarray(check_latent(array, str(path)).astype(np.float64).mean(axis=0) / scale)


def ingest_pre_encoded(
    source: Path,
    out: Path,
    condition: Sequence[str] = (),
    scale: float = 1.0,
    progress: Progress | None = None,
) -> Report:
    """Take over a stable-audio-tools pre-encoded folder (``.npy`` + ``.json``).

    Args:
        source: the folder, with its rank subfolders or flat; ``silence.npy`` becomes the padding.
        out: folder of the data set.
        condition: keys of the JSON that the model is conditioned on.
        scale: the pretransform's scale; latents are stored unscaled there and divided by it here.
        progress: called with (files done, files).

    Raises:
        UserError: anything unusable, by file.
    """
    total = sum(1 for p in source.rglob("*.npy") if p.name != "silence.npy")
    if total == 0:
        raise UserError(f"{source} holds no .npy latents: check the path")
    if not 0 < abs(scale) < math.inf:
        raise UserError(
            f"a scale of {scale} cannot divide latents: give the pretransform's scale from its config"
        )
    writer, seen, doubles, count = LatentWriter(out, padding=_silence(source, scale)), set[str](), 0, 0
    for done, (name, latent, row) in enumerate(_pre_encoded(source)):
        # An error while encoding puts another track's latent there: the same path and timestamps twice.
        origin = json.dumps(
            [row.get("path") or row.get("relpath"), row.get("timestamps"), row.get("seconds_start")]
        )
        if (row.get("path") or row.get("relpath")) and origin in seen:
            doubles += 1
        else:
            seen.add(origin)
            timing: dict[str, Any] = {k: row[k] for k in ("seconds_start", "seconds_total") if k in row}
            info = {k: row[k] for k in _INFO_KEYS if k in row}
            info = {
                "title": str(row.get("prompt") or name),
                **info,
                "source": str(row.get("relpath") or row.get("path") or name),
            }
            writer.add(
                name,
                (latent.astype(np.promote_types(latent.dtype, np.float32)) / scale).astype(latent.dtype),
                {**timing, **conditioning_of(row, condition, name)},
                info,
            )
            count += 1
        if progress is not None:
            progress(done + 1, total)
    writer.close()
    notes = (
        (f"{doubles} files repeat the path and timestamps of another and were left out",) if doubles else ()
    )
    return Report(count, notes)


def _members(path: Path) -> list[str]:
    """Names of the arrays of an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an archive ({error}): save it with numpy.savez") from error


def _load_member(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return np.asarray(archive[name])
    except Exception as error:  # zip, zlib, or a damaged header that is parsed as Python
        raise UserError(
            f"{path}: the array {name!r} cannot be read ({one_line(error)}): save it with numpy.savez, without pickle"
        ) from error


def ingest_arrays(
    source: Path,
    out: Path,
    metadata: Path | None = None,
    condition: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Take over arrays ``[C, n]``: a folder of ``.npy``, one ``.npy`` or one ``.npz``; ids are their names.

    Raises:
        UserError: anything unusable, by file.
    """
    rows = read_metadata(metadata, condition) if metadata is not None else {}
    items: list[tuple[str, Callable[[], np.ndarray]]]
    if source.suffix == ".npz":
        items = [(name, partial(_load_member, source, name)) for name in _members(source)]
    elif source.is_file():
        items = [(source.stem, partial(_load_array, source))]
    else:
        files = sorted(source.rglob("*.npy"))
        items = [(p.relative_to(source).with_suffix("").as_posix(), partial(_load_array, p)) for p in files]
    if not items:
        raise UserError(f"{source} holds no arrays: give a folder of .npy or one .npz")
    writer = LatentWriter(out)
    for done, (name, load) in enumerate(items):
        row = rows.get(name, rows.get(f"{name}.npy", {}))
        writer.add(
            _id_of(row, name),
            load(),
            conditioning_of(row, condition, name),
            {"title": name, **row, "source": name},
        )
        if progress is not None:
            progress(done + 1, len(items))
    writer.close()
    return Report(len(items), ())


def guess_kind(source: Path) -> str:
    """``"audio"``, ``"pre-encoded"`` or ``"arrays"``, by what lies there.

    Raises:
        UserError: the source does not exist.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist: check the path")
    if source.suffix in (".npz", ".npy"):
        return "arrays"
    if source.is_dir():
        first = next(source.rglob("*.npy"), None)
        if first is not None:
            return "pre-encoded" if next(source.rglob("*.json"), None) is not None else "arrays"
    return "audio"
