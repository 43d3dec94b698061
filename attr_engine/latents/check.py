"""``attr-engine shards``: what a data set holds, whether every byte of it is right, and putting it right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.errors import UserError, one_line
from attr_engine.latents import native
from attr_engine.latents.build import build_manifest, contents_of, shard_files, shared_of
from attr_engine.latents.errors import DatasetError, NewerFormat, OutsideFolder, ReadError, named
from attr_engine.latents.header import DTYPES, open_file, read_at, read_header
from attr_engine.latents.manifest import MANIFEST, TEXTS, Manifest, shard_path
from attr_engine.latents.memory import check_ids
from attr_engine.latents.shardfile import CONDITIONING, FILE_NAME, LATENTS, Contents
from attr_engine.latents.store import LatentDataset
from attr_engine.latents.writer import leftovers, lock_folder

_PIECE = 1 << 24
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: name of the exception that a reader would raise, or ``"note"`` for what harms no reader.
        file: the file.
        row: place of the track in its shard, -1 where it concerns no track.
        track: id of the track, "" where it concerns none.
        sentence: what is wrong.
    """

    kind: str
    file: str
    row: int
    track: str
    sentence: str


@dataclass
class Verdict:
    """What :func:`verify` found.

    Attributes:
        shards: how many were read.
        tracks: how many were read.
        bytes: how many were read.
        findings: what is wrong, in order of files.
    """

    shards: int = 0
    tracks: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def harmful(self) -> list[Finding]:
        """Findings that a reader would stumble over."""
        return [finding for finding in self.findings if finding.kind != "note"]

    def to_json(self) -> str:
        """All of it, for other programs."""
        return json.dumps(asdict(self), indent=2)


def info(folder: Path) -> dict[str, Any]:
    """What a data set holds, as JSON.

    Raises:
        UserError: there is no whole data set.
    """
    data = LatentDataset(folder)
    meta = data.manifest.meta
    lengths = data.lengths
    return {
        "format": meta["format"], "tracks": len(data), "frames": int(lengths.sum()),
        "shortest": int(lengths.min()) if len(lengths) else 0, "longest": int(lengths.max(initial=0)),
        "channels": data.channels, "dtype": meta["dtype"], "conditioning tensors": meta["fields"],
        "bytes": sum(shard[1] for shard in meta["shards"]), "shards": len(meta["shards"]),
        "padding": "zeros" if data.padding is None else "a latent of silence", "left out": len(meta["dropped"]),
        "fingerprint": data.fingerprint, "extra": data.extra,
    }  # fmt: skip


# -- verify ---------------------------------------------------------------------------------------


def verify(folder: Path, progress: Progress | None = None) -> Verdict:
    """Read every byte of a data set and compare it with its checksums, its sizes and the manifest.

    Without a manifest, or with a damaged one, the shards are checked against what they say of themselves.

    Raises:
        UserError: the folder holds neither a manifest nor a shard.
    """
    verdict, manifest = Verdict(), None
    found = shard_files(folder)
    try:
        manifest = Manifest(folder / MANIFEST)
        check_ids(manifest.texts("id"))
    except UserError as error:
        if not (folder / MANIFEST).exists() and not found:
            raise
        verdict.findings.append(_finding(error, MANIFEST))
    listed = [shard[0] for shard in manifest.meta["shards"]] if manifest else []
    left_out = {file for file, row, _ in (manifest.meta["dropped"] if manifest else []) if row < 0}
    if manifest:
        for file in sorted(set(found) - set(listed) - left_out):
            verdict.findings.append(
                Finding("note", file, -1, "", "it is not listed in the manifest: no reader sees it")
            )
    for part in leftovers(folder):
        verdict.findings.append(Finding("note", part.name, -1, "", "an interrupted writer left it"))
    _verify_shards(folder, listed if manifest else found, manifest, verdict, progress)
    return verdict


def _verify_shards(
    folder: Path, files: list[str], manifest: Manifest | None, verdict: Verdict, progress: Progress | None
) -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, part_of in enumerate(pool.map(lambda file: _verify_shard(folder, file, manifest), files)):
            verdict.shards += 1
            verdict.tracks += part_of.tracks
            verdict.bytes += part_of.bytes
            verdict.findings += part_of.findings
            if progress is not None:
                progress(done + 1, len(files))


def _finding(error: UserError, file: str) -> Finding:
    return Finding(type(error).__name__, file, -1, getattr(error, "track", None) or "", str(error))


def _verify_shard(folder: Path, file: str, manifest: Manifest | None) -> Verdict:
    """Check one shard, byte for byte."""
    verdict = Verdict()
    try:
        path = shard_path(folder, file)
        recorded = {name: size for name, size, *_ in manifest.meta["shards"]}[file] if manifest else 0
        if path.is_file() and path.stat().st_size < recorded:
            sizes = f"it has {path.stat().st_size} bytes, {recorded} were recorded"
            raise ReadError("truncated", -1, -1, sizes)
        contents = contents_of(folder, file)
        verdict.tracks, verdict.bytes = len(contents.rows), contents.size
        if manifest is not None:
            verdict.findings += _compare(folder, file, contents, manifest)
        gone = {row for name, row, _ in (manifest.meta["dropped"] if manifest else ()) if name == file}
        for row, error in _bad_tracks(path, contents):
            if row in gone:
                continue
            name = contents.rows[row][0]
            raised = named(error, folder / file, name)
            verdict.findings.append(Finding(type(raised).__name__, file, row, name, str(raised)))
    except DatasetError as error:
        verdict.findings.append(_finding(error, file))
    except ReadError as error:
        raised = named(error, folder / file, None)
        verdict.findings.append(Finding(type(raised).__name__, file, -1, "", str(raised)))
    except OSError as error:
        raised = named(
            ReadError("unreadable", -1, -1, error.strerror or one_line(error)), folder / file, None
        )
        verdict.findings.append(Finding(type(raised).__name__, file, -1, "", str(raised)))
    return verdict


def _compare(folder: Path, file: str, contents: Contents, manifest: Manifest) -> Iterator[Finding]:
    """Where the manifest says something else of a shard than the shard does."""

    def lie(row: int, track: str, sentence: str) -> Finding:
        where = f"shard {folder / file}" + (f", track {track!r}" if track else "")
        way_out = "restore the shard, or make the manifest again: attr-engine shards repair"
        return Finding("ManifestMismatch", file, row, track, f"{where}: {sentence}; {way_out}")

    index = next(i for i, shard in enumerate(manifest.meta["shards"]) if shard[0] == file)
    _, size, tracks, head = manifest.meta["shards"][index]
    if (size, tracks, head) != (contents.size, len(contents.rows), contents.head):
        yield lie(-1, "", "its size, number of tracks or header are not those that were recorded")
    shared = shared_of(contents)
    for key in shared:
        if shared[key] != manifest.meta[key]:
            yield lie(-1, "", f"its {key} is not the recorded one")
    columns = manifest.columns
    # The manifest lists the tracks in the order of their shards.
    first, last = np.searchsorted(columns["shard"], [index, index + 1]).tolist()
    texts = [manifest.texts(name, first, last) for name in TEXTS]
    for i, track, *values in zip(range(first, last), *texts, strict=True):
        row = int(columns["row"][i])
        if row >= len(contents.rows) or contents.rows[row][0] != track:
            yield lie(row, track, "the shard holds another track at its place")
            continue
        if values != [json.dumps(value) for value in contents.rows[row][1:]]:
            yield lie(row, track, "its recorded conditioning or info is not that of the shard")
        for name in contents.offsets:
            starts, sums = contents.offsets[name], contents.checksums[name]
            want = (starts[row], starts[row + 1] - starts[row], sums[row])
            prefix = f"{name}." if name else ""
            rows = "rows" if name else "frames"
            has = tuple(
                columns[column][i] for column in (f"{prefix}start", f"{prefix}{rows}", f"{prefix}crc32c")
            )
            if tuple(map(int, want)) != tuple(map(int, has)):
                yield lie(row, track, "the recorded place, length or checksum is not that of the shard")


def _bad_tracks(path: Path, contents: Contents) -> Iterator[tuple[int, ReadError]]:
    """(place, what is wrong) of the tracks of a shard whose bytes are not right."""
    fd, size = open_file(path)
    try:
        entries, data, _ = read_header(fd, size)
        for row in range(len(contents.rows)):
            for short, offsets in contents.offsets.items():
                name = CONDITIONING + short if short else LATENTS
                entry = entries[name]
                total = int(offsets[-1])
                if total == 0 or offsets[row] == offsets[row + 1]:
                    continue
                width = (entry.end - entry.begin) // total
                begin, end = int(offsets[row]) * width, int(offsets[row + 1]) * width
                value, finite = 0, True
                for at in range(begin, end, _PIECE):
                    octets = read_at(fd, min(_PIECE, end - at), data + entry.begin + at)
                    value = native.crc32c(octets, value)
                    finite = finite and bool(
                        torch.frombuffer(octets, dtype=DTYPES[entry.dtype]).isfinite().all()
                    )
                if value != int(contents.checksums[short][row]):
                    sentence = (
                        f"the {end - begin} bytes of its '{name}' do not have the CRC-32C that was recorded"
                    )
                    yield row, ReadError("checksum", -1, row, sentence)
                    break
                if not finite:
                    yield row, ReadError("nonfinite", -1, row, f"its '{name}' holds NaN or infinity")
                    break
    finally:
        os.close(fd)


# -- repair ---------------------------------------------------------------------------------------


def repair(folder: Path, drop: bool = False, progress: Progress | None = None) -> list[str]:
    """Make the manifest again from the shards, and remove what interrupted writers left.

    Shards are never changed. What was left out before stays left out. The old manifest is kept as
    ``manifest.parquet.old``.

    Args:
        folder: of the data set.
        drop: leave out damaged shards and tracks, by name; without it they are a reason to refuse.
        progress: called with (shards done, shards).

    Returns:
        What was done, a sentence each.

    Raises:
        UserError: nothing is there, or something is damaged and ``drop`` was not given.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of a data set")
    lock = lock_folder(folder)
    try:
        return _repair(folder, drop, progress)
    finally:
        os.close(lock)


def _repair(folder: Path, drop: bool, progress: Progress | None) -> list[str]:
    verdict = verify(folder, progress)
    for finding in verdict.harmful:
        if finding.kind == NewerFormat.__name__:
            raise NewerFormat(finding.sentence, folder / finding.file)
    files, dropped, left_out = _known(folder)
    unlisted = [x.file for x in verdict.findings if x.kind == "note" and x.file in files]
    _verify_shards(folder, unlisted, None, verdict, progress)
    bad_shards = {
        x.file for x in verdict.harmful if x.row < 0 and x.file in files and x.kind != "ManifestMismatch"
    }
    bad_tracks = [
        x for x in verdict.harmful if x.row >= 0 and x.file not in bad_shards and x.kind != "ManifestMismatch"
    ]
    if (bad_shards or bad_tracks) and not drop:
        first = next(x for x in verdict.harmful if x.file in bad_shards or x in bad_tracks)
        what = first.sentence.rpartition(";")[0] or first.sentence
        raise UserError(
            f"{len(bad_shards)} shards and {len(bad_tracks)} tracks are damaged: {what}; restore them from a copy, or "
            "leave them out with --drop"
        )
    done = [x.sentence for x in verdict.harmful if x.kind == OutsideFolder.__name__ and x.file not in files]
    for part in leftovers(folder):
        part.unlink()
        done.append(f"{part.name}, left by an interrupted writer, was removed")
    good = [file for file in files if file not in bad_shards]
    if not good:
        raise UserError(f"no shard of {folder} can be read: ingest again")
    gone = [*dropped, *((x.file, x.row, x.track) for x in bad_tracks)]
    for file in sorted(bad_shards):
        done.append(f"{file} was left out")
    done += [f"track {x.track!r} of {x.file} was left out" for x in bad_tracks]
    path = folder / MANIFEST
    old = path.read_bytes() if path.exists() else b""
    count = build_manifest(folder, good, gone, [*left_out, *sorted(bad_shards)])
    if old not in (b"", path.read_bytes()):
        path.with_name(f"{MANIFEST}.old").write_bytes(old)
    done.append(f"{path} was made from {len(good)} shards: {count} tracks")
    return done


def _known(folder: Path) -> tuple[list[str], list[tuple[str, int, str]], list[str]]:
    """(shards, tracks left out, shards left out) by the manifest where it can be read, else by the folder."""
    found = shard_files(folder)
    try:
        meta = Manifest(folder / MANIFEST).meta
    except DatasetError:
        return found, [], []
    left_out = [file for file, row, _ in meta["dropped"] if row < 0]
    listed = [shard[0] for shard in meta["shards"] if FILE_NAME.fullmatch(shard[0])]
    files = listed + [file for file in found if file not in listed and file not in left_out]
    return files, [(file, row, name) for file, row, name in meta["dropped"] if row >= 0], left_out
