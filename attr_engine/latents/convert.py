"""From latents that exist already to a data set: pre-encoded folders, webdataset tars, arrays."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError, one_line
from attr_engine.latents.ahead import ahead
from attr_engine.latents.audio import SUFFIXES as AUDIO
from attr_engine.latents.ingest import DTYPES, Progress, Report, id_of
from attr_engine.latents.manifest import MANIFEST
from attr_engine.latents.memory import check_ids, check_latent
from attr_engine.latents.metadata import conditioning_of, read_metadata
from attr_engine.latents.npy import find_arrays, read_npy, read_npy_file
from attr_engine.latents.tars import SUFFIXES as TARS
from attr_engine.latents.tars import Sample, find_tars, read_samples
from attr_engine.latents.writer import LatentWriter
from attr_engine.models.checkpoint import read_json

_INFO_KEYS = ("title", "artist", "licence", "license", "album", "collection", "source", "caption", "prompt")


@dataclass(frozen=True)
class _Track:
    """A track on its way.

    Attributes:
        latent: ``[n, C]``, as stored; None where the data set has it already.
        conditioning: JSON values.
        info: JSON values.
        origin: what another track must not share, empty where that is not known.
    """

    latent: Tensor | None
    conditioning: dict[str, Any]
    info: dict[str, Any]
    origin: str = ""


@dataclass(frozen=True)
class _Item:
    """Something to be loaded: its id, whether it is there already, how, its bytes, progress when it is done."""

    id: str
    there: bool
    load: Callable[[bool], _Track]
    size: int
    done: int


@dataclass(frozen=True)
class _Rules:
    """How latents become tracks."""

    scale: float
    dtype: str
    condition: Sequence[str]

    def check(self) -> None:
        """Refuse a scale that cannot divide."""
        if not 0 < abs(self.scale) < math.inf:
            raise UserError(
                f"a scale of {self.scale} cannot divide latents: give the pretransform's scale from its config"
            )

    def settings(self, kind: str, source: Path) -> dict[str, Any]:
        """What an interrupted data set has to agree on with the call that goes on with it."""
        return {"from": kind, "source": str(source.resolve()), "scale": self.scale, "condition": list(self.condition),
                "store_dtype": self.dtype or "as in the source"}  # fmt: skip

    def latent(self, latent: Tensor) -> Tensor:
        """``latent`` over the scale, divided in at least float32, in the dtype to store."""
        wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
        return (wide / self.scale).to(DTYPES[self.dtype] if self.dtype else latent.dtype)

    def described(
        self, array: np.ndarray | None, row: dict[str, Any], name: str, files: tuple[str, str]
    ) -> _Track:
        """A track from a latent ``[C, n]`` and the JSON that stable-audio-tools writes beside it; names of both."""
        latent, mask = None, row.pop("padding_mask", None)
        if array is not None:
            latent = check_latent(array, files[0])
            latent = latent if mask is None else latent[: valid_frames(mask, len(latent), files[1])]
            latent = self.latent(latent)
        timing: dict[str, Any] = {key: row[key] for key in ("seconds_start", "seconds_total") if key in row}
        where = row.get("path") or row.get("relpath")
        origin = json.dumps([where, row.get("timestamps"), row.get("seconds_start")]) if where else ""
        info = {"title": str(row.get("prompt") or name), **{key: row[key] for key in _INFO_KEYS if key in row},
                "source": str(row.get("relpath") or row.get("path") or name)}  # fmt: skip
        return _Track(latent, {**timing, **conditioning_of(row, self.condition, name)}, info, origin)


def _write(
    writer: LatentWriter, items: Iterable[_Item], total: int, progress: Progress | None, workers: int | None,
    what: str, append: bool,
) -> Report:  # fmt: skip
    """Write items in their order, without those that are there and those that repeat another."""
    origins, doubles, skipped, count, done = set[str](), 0, 0, 0, -1
    for item, track in ahead(items, lambda item: item.load(item.there), workers, lambda item: item.size):
        # An error while encoding puts another track's latent there: the same path and timestamps twice.
        if track.origin and track.origin in origins:
            doubles += 1
        elif item.there:
            skipped += 1
        elif track.latent is not None:
            writer.add(item.id, track.latent.T, track.conditioning, track.info)
            count += 1
        origins.add(track.origin)
        if progress is not None and item.done != done:
            progress(item.done, total)
        done = item.done
    if progress is not None and done != total:
        progress(total, total)
    notes = []
    if doubles:
        notes.append(f"{doubles} {what} repeat the path and timestamps of another and were left out")
    if append and skipped:
        notes.append(f"{skipped} {what} are in the data set already and were skipped")
    return Report(count, tuple(notes), writer.resumed)


# -- stable-audio-tools' pre-encoded folders ------------------------------------------------------


def ingest_pre_encoded(
    source: Path, out: Path, condition: Sequence[str] = (), scale: float = 1.0, progress: Progress | None = None,
    dtype: str = "", workers: int | None = None, append: bool = False,
) -> Report:  # fmt: skip
    """Take over a stable-audio-tools pre-encoded folder (``.npy [C, n]`` + ``.json``), ids are the files' names.

    A track is as long as the last 1 in its ``padding_mask``. Stopped at any moment, the same call goes on after the
    last whole shard.

    Args:
        source: the folder, with its rank subfolders or flat; ``silence.npy`` becomes the padding.
        out: folder of the data set.
        condition: keys of the JSON that the model is conditioned on.
        scale: the pretransform's scale; latents are stored unscaled there and divided by it here.
        progress: called with (files done, files).
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, as stored; default as in the source.
        workers: threads that read; default the number of cores, at most 4.
        append: add files to a whole data set.

    Raises:
        UserError: anything unusable, by file; or what is in ``out`` was begun with other settings.
    """
    rules = _Rules(scale, dtype, condition)
    rules.check()
    paths = sorted(path for path in source.rglob("*.npy") if path.name != "silence.npy")
    if not paths:
        raise UserError(f"{source} holds no .npy latents: check the path")
    settings, padding = rules.settings("pre-encoded", source), _silence(source, scale)
    with LatentWriter(out, padding=padding, extra=settings, append=append) as writer:
        items = _pre_encoded(source, paths, rules, writer.has)
        return _write(writer, items, len(paths), progress, workers, "files", append)


def _pre_encoded(
    source: Path, paths: Sequence[Path], rules: _Rules, has: Callable[[str], bool]
) -> Iterator[_Item]:
    for done, path in enumerate(paths):
        name = path.relative_to(source).with_suffix("").as_posix()

        def load(there: bool, path: Path = path, name: str = name) -> _Track:
            described = path.with_suffix(".json")
            if not described.is_file():
                raise UserError(
                    f"{path} has no {described.name} beside it: it is not a pre-encoded folder, or use --kind arrays"
                )
            row = read_json(described, "description")
            array = None if there else read_npy_file(path)
            return rules.described(array, row, name, (str(path), str(described)))

        there = has(name)
        yield _Item(name, there, load, 0 if there else path.stat().st_size, done + 1)


def valid_frames(mask: Any, frames: int, described: str) -> int:
    """Place of the last 1 in a mask of 0 and 1 (int, not bool): a list, a list in a list, or for one frame a number.

    Raises:
        UserError: it is no such mask, masks every frame, or is longer than the latent; starts with ``described``.
    """
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
    array = read_npy_file(path)
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    array = array[:, None] if array.ndim == 1 else array
    return np.asarray(check_latent(array, str(path)).double().mean(dim=0).numpy() / scale)


# -- webdataset tars ------------------------------------------------------------------------------


def ingest_webdataset(
    source: Path, out: Path, condition: Sequence[str] = (), scale: float = 1.0, progress: Progress | None = None,
    dtype: str = "", workers: int | None = None, append: bool = False,
) -> Report:  # fmt: skip
    """Take over webdataset tars: samples of ``KEY.npy`` (``[C, n]`` or ``[1, C, n]``), ``KEY.json``, ``KEY.txt``.

    The JSON is read as in a pre-encoded folder (:func:`ingest_pre_encoded`), and may be missing; the text is the
    prompt where the JSON has none. Tars are streamed, plain or compressed; one sample after the other is in memory.
    Stopped at any moment, the same call goes on after the last whole shard.

    Args:
        source: a tar, or a folder of tars, read in order of their names.
        out: folder of the data set.
        condition: keys of the JSON that the model is conditioned on.
        scale: the pretransform's scale; latents are divided by it.
        progress: called with (MB done, MB).
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, as stored; default as in the source.
        workers: threads that decode; default the number of cores, at most 4.
        append: add samples to a whole data set.

    Raises:
        UserError: anything unusable, by tar and sample; or what is in ``out`` was begun with other settings.
    """
    rules = _Rules(scale, dtype, condition)
    rules.check()
    tars = find_tars(source)
    total = sum(tar.stat().st_size for tar in tars) >> 20
    with LatentWriter(out, extra=rules.settings("webdataset", source), append=append) as writer:
        items = _webdataset(tars, rules, writer.has)
        return _write(writer, items, total, progress, workers, "samples", append)


def _webdataset(tars: Sequence[Path], rules: _Rules, has: Callable[[str], bool]) -> Iterator[_Item]:
    keys, before = dict[str, Path](), 0
    for tar in tars:
        for sample in read_samples(tar, has):
            if sample.key in keys:
                raise UserError(
                    f"the tar {tar} has the sample {sample.key!r}, which stood before in {keys[sample.key]}: "
                    "the members of a sample have to follow one another, and keys to be unique"
                )
            keys[sample.key] = tar
            size = sum(map(len, sample.parts.values()))
            load = partial(_load_sample, sample, rules)
            yield _Item(sample.key, sample.there, load, 2 * size, (before + sample.position) >> 20)
        before += tar.stat().st_size


def _load_sample(sample: Sample, rules: _Rules, there: bool) -> _Track:
    what = f"the tar {sample.tar}, sample {sample.key!r}"
    row, parts = _row(sample, what), sample.parts
    if not there and "npy" not in parts:
        has = ", ".join(f".{name}" for name in sorted(sample.names)[:5])
        raise UserError(
            f"{what} has no .npy, only {has}: pack its latent as {sample.key}.npy, or leave it out"
        )
    array = None
    if not there:
        array = read_npy(io.BytesIO(parts["npy"]), len(parts["npy"]), f"{what}: its .npy")
        array = array[0] if array.ndim == 3 and len(array) == 1 else array
    return rules.described(array, row, sample.key, (f"{sample.key} in {sample.tar}", f"{what}: its .json"))


def _row(sample: Sample, what: str) -> dict[str, Any]:
    """The JSON of a sample, with its text as the prompt where it has none."""
    try:
        row = json.loads(sample.parts.get("json", b"{}").decode("utf-8-sig"))
        text = sample.parts.get("txt", b"").decode("utf-8-sig").strip()
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{what} has a .json or .txt that cannot be read ({one_line(error)}): pack it again"
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"{what} has a .json that holds {type(row).__name__}, expected an object: pack it again"
        )
    return row if not text or row.get("prompt") else {**row, "prompt": text}


# -- arrays ---------------------------------------------------------------------------------------


def ingest_arrays(
    source: Path, out: Path, metadata: Path | None = None, condition: Sequence[str] = (),
    progress: Progress | None = None, scale: float = 1.0, dtype: str = "", workers: int | None = None,
    append: bool = False,
) -> Report:  # fmt: skip
    """Take over arrays ``[C, n]``; ids are their names. Stopped at any moment, the same call goes on.

    Args:
        source: a folder of ``.npy`` and ``.safetensors``, one of these files, or one ``.npz``. In a folder a
            ``.safetensors`` holds one tensor, ``latent`` or ``latents``; one file holds a tensor a track.
        out: folder of the data set.
        metadata: CSV or JSON (:func:`attr_engine.latents.metadata.read_metadata`).
        condition: metadata entries that the model is conditioned on.
        progress: called with (arrays done, arrays).
        scale: the pretransform's scale; latents are divided by it.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, as stored; default as in the source.
        workers: threads that read; default the number of cores, at most 4.
        append: add arrays to a whole data set.

    Raises:
        UserError: anything unusable, by file; or what is in ``out`` was begun with other settings.
    """
    rules = _Rules(scale, dtype, condition)
    rules.check()
    rows = read_metadata(metadata, condition) if metadata is not None else {}
    arrays = find_arrays(source)
    ids = [id_of(_row_of(rows, name), name) for name, _, _ in arrays]
    check_ids(ids)

    def items(has: Callable[[str], bool]) -> Iterator[_Item]:
        for done, (track, (name, read, size)) in enumerate(zip(ids, arrays, strict=True)):
            load, there = partial(_load_array, name, read, _row_of(rows, name), rules), has(track)
            yield _Item(track, there, load, 0 if there else size, done + 1)

    with LatentWriter(out, extra=rules.settings("arrays", source), append=append) as writer:
        return _write(writer, items(writer.has), len(arrays), progress, workers, "arrays", append)


def _row_of(rows: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return rows.get(name) or rows.get(f"{name}.npy") or rows.get(f"{name}.safetensors") or {}


def _load_array(
    name: str, read: Callable[[], np.ndarray | Tensor], row: Mapping[str, Any], rules: _Rules, there: bool
) -> _Track:
    latent = None if there else rules.latent(check_latent(read(), name))
    return _Track(latent, conditioning_of(row, rules.condition, name), {"title": name, **row, "source": name})


# -- what a source is -----------------------------------------------------------------------------


def guess_kind(source: Path) -> str:
    """``"audio"``, ``"pre-encoded"``, ``"webdataset"`` or ``"arrays"``, by what lies there.

    Raises:
        UserError: the source does not exist, or is a data set already.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist: check the path")
    if (source / MANIFEST).is_file():
        raise UserError(f"{source} is a data set already: use it as it is")
    if source.is_file():
        if source.name.lower().endswith(TARS):
            return "webdataset"
        return "arrays" if source.suffix in (".npz", ".npy", ".safetensors") else "audio"
    if next(source.rglob("*.npy"), None) is not None:
        return "pre-encoded" if next(source.rglob("*.json"), None) is not None else "arrays"
    names = [path.name.lower() for path in source.rglob("*.*")]
    if any(name.endswith(AUDIO) for name in names):
        return "audio"
    if any(name.endswith(TARS) for name in names):
        return "webdataset"
    return "arrays" if any(name.endswith(".safetensors") for name in names) else "audio"
