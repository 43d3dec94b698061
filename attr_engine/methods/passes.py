"""What the methods that look into the model share: how many rows a pass has, and what is kept of every track, in durable units."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attr_engine.diffusion import DrawPlan
from attr_engine.errors import UserError
from attr_engine.files import writing_in
from attr_engine.jobs import Query
from attr_engine.latents.batch import Chosen, Tracks, check_tracks
from attr_engine.memory import fit_rows
from attr_engine.methods.base import Workspace
from attr_engine.models.protocol import Denoiser, check_inference, select_parameters
from attr_engine.runs import key_of
from attr_engine.settings import Settings
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.units import run_units

_UNIT_TRACKS = 16  # so that several processes end together, and a killed one loses little
_MOST_UNITS = 4096
_UNIT_BYTES = 2**28  # of a unit, which is in memory at a time


def plan_of(s: Settings) -> DrawPlan:
    """The draw plan of the settings."""
    return DrawPlan(s.seed, s.plan, s.replicates)


def check_model(model: Denoiser, tracks: Tracks, what: str = "training") -> None:
    """Refuse tracks that the model cannot take, and a model that is in training mode.

    Raises:
        UserError: names the track, or says what to call.
    """
    check_tracks(tracks, model.channels, model.frames, what)
    check_inference(model)


def rows_a_pass(model: Denoiser, tracks: Tracks, s: Settings) -> int:
    """(track, draw) pairs a pass: as the settings say, or what is fast and fits (:func:`attr_engine.memory.fit_rows`)."""
    if s.rows and s.memory == 0.0:
        return s.rows
    rows = fit_rows(
        model, select_parameters(model, s.layers), tracks.batch([0], model.frames), plan_of(s), s.memory,
        s.unit_tracks * s.score_draws, 0, s.gradients,
    )  # fmt: skip
    return min(rows, s.rows or rows)


def check_single(queries: Sequence[Query]) -> None:
    """Refuse groups of tracks.

    Raises:
        UserError: names the first one.
    """
    groups = [q.id for q in queries if q.members]
    if groups:
        raise UserError(
            f"{groups[0]!r} is a group of tracks, and this method scores single pieces: ask for its tracks one by one"
        )


def by_set(queries: Sequence[Query]) -> list[tuple[Tracks, list[int]]]:
    """Every set that queries are of, as a set of those queries alone, and their places among ``queries``.

    Raises:
        UserError: a query is a group of tracks.
    """
    check_single(queries)
    places: dict[int, list[int]] = {}
    for place, query in enumerate(queries):
        places.setdefault(id(query.tracks), []).append(place)
    return [(Chosen(queries[p[0]].tracks, [queries[i].index for i in p]), p) for p in places.values()]


@dataclass(frozen=True)
class Kept:
    """Tensors of every track, on disk.

    Attributes:
        paths: the units' files, in the order of the tracks.
        key: that each of them carries.
    """

    paths: Sequence[Path]
    key: str

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of one unit after the other; the first axis of each is its tracks."""
        for path in self.paths:
            yield load_tensors(path, self.key)[0]

    def all(self, name: str) -> Tensor:
        """One tensor of all tracks ``[N, ...]``."""
        return torch.cat([unit[name] for unit in self])


def keep(
    work: Workspace,
    name: str,
    model: Denoiser,
    tracks: Tracks,
    identity: Sequence[Any],
    make: Callable[[range], Mapping[str, Tensor]],
    track_bytes: int = 0,
) -> Kept:
    """Compute tensors of every track, in units that are not computed again; several processes share them.

    Args:
        work: whose folder they are kept in, in a folder of their own.
        name: of what is kept.
        model: theta_0.
        tracks: N of them.
        identity: whatever else decides the tensors; anything JSON can hold.
        make: tensors of some tracks, whose first axis they are.
        track_bytes: about how much is kept of a track.

    Raises:
        UserError: a file that is damaged or cannot be written.
    """
    total = len(tracks)
    fits = max(1, _UNIT_BYTES // max(1, track_bytes))
    size = min(fits, max(_UNIT_TRACKS, -(-total // _MOST_UNITS)))
    dtype = str(next(model.module.parameters()).dtype)
    key = key_of(name, model.fingerprint, tracks.fingerprint, dtype, size, *identity)
    folder = work.folder / f"{name}-{key}"
    units = [range(i, min(i + size, total)) for i in range(0, total, size)]
    paths = [folder / f"{i:06d}.safetensors" for i in range(len(units))]
    show = work.progress(name, "track")

    def compute(i: int) -> None:
        save_tensors(paths[i], make(units[i]), {"key": key})

    with writing_in(work.folder):
        run_units(
            paths, compute, None, folder / "locks" / "unit", lambda done: show(min(done * size, total), total)
        )
        shutil.rmtree(folder / "locks", ignore_errors=True)
    return Kept(paths, key)
