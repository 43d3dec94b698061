"""An index of projected gradients: built once a model and data set, asked in milliseconds.

A query's score for track i is that of kernel ridge regression in gradient space, ``phi_i^T (Phi^T Phi + lambda I)^-1 phi_q``
(TRAK, D-TRAK), solved in the d numbers of a feature, never over N tracks:
``(K + lambda I)^-1 Phi phi_q = Phi (Phi^T Phi + lambda I)^-1 phi_q``. With the eigenvalues ``l_k`` and eigenvectors ``v_k`` of
``Phi^T Phi`` the row of a track is ``v_k^T phi_i / sqrt(l_k + lambda)``, of the ``width`` largest ``l_k``: the solve is in the rows,
and a query is one product with them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine import progress
from attr_engine.diffusion import Purpose
from attr_engine.errors import UserError
from attr_engine.files import remove_leftovers, whole_file, write_json, writing_in
from attr_engine.index_numbers import NUMBERS, stored
from attr_engine.index_recall import Gradients, Sample, draw_sample, measure_recall, whole_gradient
from attr_engine.index_store import (
    FEATURES,
    FORMAT,
    IDS,
    META,
    SOLVER,
    Index,
    IndexSettings,
    Maker,
    finite,
)
from attr_engine.latents.batch import Tracks, check_tracks
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import Denoiser
from attr_engine.runs import key_of
from attr_engine.tensorfile import load_tensors, open_tensors, save_tensors
from attr_engine.units import held, once, run_units

__all__ = ["FEATURES", "IDS", "META", "SOLVER", "Index", "IndexSettings", "build_index"]

_BEGUN = "begun.json"  # the same of an index that is not finished, beside its units
_UNIT_TRACKS = 16  # so that several processes end together; more where there would be very many files
_MOST_UNITS = 4096
_NOISE = 1e-13  # of the largest eigenvalue: what is below is rounding


def _unit(tracks: int) -> int:
    """Tracks a unit."""
    return max(_UNIT_TRACKS, -(-tracks // _MOST_UNITS))


def _identity(model: Denoiser, tracks: Tracks, settings: IndexSettings) -> dict[str, Any]:
    """What an index is of: format, key, model, data, settings and dtype, as JSON values."""
    dtype = str(next(model.module.parameters()).dtype)
    key = key_of(FORMAT, model.fingerprint, tracks.fingerprint, asdict(settings), dtype, _unit(len(tracks)))
    values = {
        "format": FORMAT, "key": key, "model": model.fingerprint, "data": tracks.fingerprint,
        "settings": asdict(settings), "dtype": dtype,
    }  # fmt: skip
    return json.loads(json.dumps(values))


def _refuse_other(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to go on with an index of something else; what differs is named."""
    if there.get("key") == wanted["key"]:
        return
    old, new = there.get("settings") or {}, wanted["settings"]
    changed = [f"{name}: {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]]
    changed += [
        f"another {name}" for name in ("format", "model", "data", "dtype") if there.get(name) != wanted[name]
    ]
    raise UserError(
        f"{folder} is an index of another model, other data or other settings ({'; '.join(changed)}): "
        "use the same, or choose another folder"
    )


def build_index(
    model: Denoiser,
    tracks: Tracks,
    folder: str | Path,
    settings: IndexSettings | None = None,
    recall: bool = True,
) -> Index:
    """Build an index, or carry on with one; several processes of one ``torchrun`` share the work.

    Args:
        model: theta_0.
        tracks: the training tracks.
        folder: of the index.
        settings: see :class:`IndexSettings`.
        recall: whether to measure what projection and storage lose (:mod:`attr_engine.index_recall`), which on small sets takes
            longer than the index; not for an index that is there.

    Raises:
        UserError: unusable settings or tracks, a model whose per-sample gradients in a batch are not those of single
            rows, a folder that holds another index (what differs is named), or a file in it that cannot be written.
    """
    settings, folder = settings or IndexSettings(), Path(folder)
    check_tracks(tracks, model.channels, model.frames, "training")
    wanted, finished = _identity(model, tracks, settings), folder / META
    if finished.exists():
        _refuse_other(folder, read_json(finished, "index"), wanted)
        return Index.open(folder)
    maker = Maker(model, settings)
    maker.compare(tracks)
    with writing_in(folder):
        _build(maker, tracks, folder, wanted, recall)
    return Index.open(folder)


def _build(maker: Maker, tracks: Tracks, folder: Path, wanted: dict[str, Any], recall: bool) -> None:
    """Compute the units that nobody else computes; then one process puts them together."""
    finished, begun = folder / META, folder / "units" / _BEGUN
    with held(folder / "locks" / "begin.lock", wait=True):
        if begun.exists():
            _refuse_other(folder, read_json(begun, "index"), wanted)
        else:
            write_json(begun, wanted)
    size = _unit(len(tracks))
    units = [range(i, min(i + size, len(tracks))) for i in range(0, len(tracks), size)]
    paths = [folder / "units" / f"{i:06d}.safetensors" for i in range(len(units))]
    show = progress.bar(f"{maker.width} numbers a gradient", "unit")

    def compute(i: int) -> None:
        save_tensors(paths[i], {"features": maker(tracks, units[i], "score")}, {"key": wanted["key"]})

    run_units(paths, compute, finished, folder / "locks" / "index", lambda done: show(done, len(units)))
    sample = draw_sample(maker, len(tracks)) if recall else None
    gradients = _whole_gradients(maker, tracks, sample, folder, wanted["key"]) if sample else None
    with once(folder / "locks" / "index.lock", finished) as mine:
        if mine:
            remove_leftovers(folder)
            _finish(folder, maker, tracks, paths, wanted, sample, gradients)
    for name in ("units", "locks"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _whole_gradients(maker: Maker, tracks: Tracks, sample: Sample, folder: Path, key: str) -> Gradients:
    """What recall is measured against, in units like the rest where it is held all at a time."""
    if sample.method != "ridge":
        return partial(whole_gradient, maker, tracks)
    wanted: list[tuple[Purpose, int]] = [("update", int(sample.tracks[i])) for i in sample.probes]
    wanted += [("score", int(i)) for i in sample.tracks]
    units = [wanted[i : i + _UNIT_TRACKS] for i in range(0, len(wanted), _UNIT_TRACKS)]
    paths = [folder / "units" / f"recall-{i:03d}.safetensors" for i in range(len(units))]

    def compute(i: int) -> None:
        found = {
            f"{purpose}.{index}": whole_gradient(maker, tracks, index, purpose) for purpose, index in units[i]
        }
        save_tensors(paths[i], found, {"key": key})

    run_units(paths, compute, folder / META, folder / "locks" / "recall")
    place = {
        pair: path
        for pair, path in zip(wanted, (p for u, p in zip(units, paths, strict=True) for _ in u), strict=True)
    }
    return lambda index, purpose: open_tensors(place[purpose, index], key)[0][f"{purpose}.{index}"]


def _features(paths: Sequence[Path], tracks: Tracks, settings: IndexSettings, key: str) -> Iterator[Tensor]:
    """Features of the units in their order, float64, of length 1 if they are to be."""
    total = 0
    for path in paths:
        features = load_tensors(path, key)[0]["features"]
        names = tracks.ids[total : total + len(features)]
        yield finite(features, names, settings.normalised)
        total += len(features)


def spectrum(parts: Iterator[Tensor], tracks: int, width: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of ``Phi^T Phi`` that are not rounding, largest first.

    Args:
        parts: the rows of Phi, ``[n, width]`` float64 each.
        tracks: N, how many rows there are.
        width: d, of a row.

    Returns:
        Float64 ``[r]`` and ``[r, d]``, r at most ``min(N, d)``.

    Raises:
        UserError: all rows are zero.
    """
    if tracks < width:  # the same from the N x N products, which are fewer here
        phi = torch.cat(list(parts))
        values, vectors = torch.linalg.eigh(phi @ phi.T)
    else:
        gram = torch.zeros(width, width, dtype=torch.float64)
        for part in parts:
            gram.addmm_(part.T, part)
        values, vectors = torch.linalg.eigh(gram)
    if not float(values[-1]) > 0.0:
        raise UserError("every gradient is zero: the layers do not see the tracks")
    there = values > _NOISE * values[-1]
    values, vectors = values[there].flip(0), vectors[:, there].flip(1)
    if tracks < width:
        vectors = phi.T @ vectors / values.sqrt()
    return values, vectors.T.contiguous()


def _finish(
    folder: Path, maker: Maker, tracks: Tracks, paths: Sequence[Path], wanted: dict[str, Any],
    sample: Sample | None, gradients: Gradients | None,
) -> None:  # fmt: skip
    """Solve, put the rows of all units together, measure what was lost where that was asked for."""
    settings, n, key = maker.settings, len(tracks), wanted["key"]
    values, vectors = spectrum(_features(paths, tracks, settings, key), n, maker.width)
    # The sum of the eigenvalues is that of the squared norms, so this lambda is relative to their mean.
    ridge = settings.ridge * float(values.sum()) / n
    whole = vectors / (values + ridge).sqrt()[:, None]
    transform = whole[: settings.width] if settings.width else whole
    scales, total, kept = np.zeros(n), 0, []
    # Written, not mapped: where a disk is full, a write is refused, and a map ends the process.
    with whole_file(folder / FEATURES) as part, open(part, "wb") as out:
        dtype = np.lib.format.dtype_to_descr(np.dtype(NUMBERS[settings.numbers]))
        header = {"descr": dtype, "fortran_order": False, "shape": (n, len(transform))}
        np.lib.format.write_array_header_1_0(out, header)
        for features in _features(paths, tracks, settings, key):
            here = slice(total, total + len(features))
            rows, scales[here] = stored((features @ transform.T).numpy(), settings.numbers)
            out.write(rows.tobytes())
            if sample is not None:
                kept.append(features[[int(i) - total for i in sample.within(here)]])
            total = here.stop
    tensors = {"transform": transform, "scales": torch.from_numpy(scales)}
    save_tensors(folder / SOLVER, tensors, {"key": key})
    write_json(folder / IDS, list(tracks.ids))
    meta: dict[str, Any] = {**wanted, "tracks": n, "width": len(transform)}
    if sample is not None and gradients is not None:
        found = Sample(sample.tracks, sample.probes, sample.method, torch.cat(kept))
        meta["recall"] = measure_recall(maker, tracks, Index(folder, meta), found, whole, gradients)
    write_json(folder / META, meta)
