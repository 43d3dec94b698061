"""An index of projected gradients: built once a model and data set, asked in milliseconds.

A query's score for track i is that of kernel ridge regression in gradient space, ``phi_i^T (Phi^T Phi + lambda I)^-1 phi_q``
(TRAK, D-TRAK), solved in the d numbers of a feature, never over N
tracks: ``(K + lambda I)^-1 Phi phi_q = Phi (Phi^T Phi + lambda I)^-1 phi_q``. On disk the features are unit vectors and their
norms, so that 16 bits are enough for gradients of any size.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine import progress
from attr_engine.diffusion import ROW_FUNCTIONS, DrawPlan, noised_rows
from attr_engine.errors import UserError
from attr_engine.features import Projector, track_features
from attr_engine.files import whole_file, write_json
from attr_engine.latents.batch import Tracks, check_tracks
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.persample import check_against_loop
from attr_engine.result import Attribution
from attr_engine.runs import key_of
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.units import once, run_units

META, IDS, FEATURES, SOLVER = "index.json", "tracks.json", "features.npy", "solver.safetensors"
_UNIT_TRACKS = 64
_ROWS = 4096  # of features that are in memory at a time
NUMBERS = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class IndexSettings:
    """What decides an index, beside model and tracks.

    Attributes:
        layers: layer groups or name patterns.
        function: whose gradients: ``"squared_norm"`` or ``"loss"``.
        draws: draws a track, a multiple of ``replicates``.
        projection: ``"gaussian"``, ``"rademacher"`` or ``"identity"``.
        rank: a weight becomes at most rank x rank numbers.
        ridge: lambda, relative to the mean squared norm of a feature.
        normalised: whether features have length 1, of tracks and queries.
        masked: whether only valid frames of a track count.
        numbers: ``"float16"`` or ``"float32"``, on disk.
        seed: of draws and projections.
        replicates: of the timestep sequence.
        plan: ``"track"`` or ``"shared"`` draws.
        rows: (track, draw) pairs a backward pass.
    """

    layers: tuple[str, ...] = ("transformer",)
    function: str = "squared_norm"
    draws: int = 4
    projection: str = "gaussian"
    rank: int = 8
    ridge: float = 0.1
    normalised: bool = False
    masked: bool = False
    numbers: str = "float16"
    seed: int = 0
    replicates: int = 4
    plan: str = "track"
    rows: int = 16

    def check(self) -> None:
        """Refuse what cannot be built.

        Raises:
            UserError: names the setting.
        """
        if self.numbers not in NUMBERS or self.function not in ROW_FUNCTIONS:
            raise UserError(
                f"numbers {self.numbers!r} of the function {self.function!r}: use one of {', '.join(NUMBERS)}, "
                f"and of {', '.join(ROW_FUNCTIONS)}"
            )
        if not 0.0 < self.ridge < float("inf") or self.rows < 1:
            raise UserError(
                f"ridge {self.ridge}, rows {self.rows}: the ridge must be above 0, rows at least 1"
            )
        self.draw_plan.check(self.draws, "the number of draws")

    @property
    def draw_plan(self) -> DrawPlan:
        """The draw plan."""
        return DrawPlan(self.seed, self.plan, self.replicates)


class _Maker:
    """Makes features of tracks by the settings of an index."""

    def __init__(self, model: Denoiser, settings: IndexSettings) -> None:
        settings.check()
        self._model, self._settings = model, settings
        self._parameters = select_parameters(model, settings.layers)
        self._projector = Projector(self._parameters, settings.projection, settings.rank, settings.seed)
        self.width = self._projector.width

    def compare(self, tracks: Tracks) -> None:
        """Compare the gradients of a few rows in a batch with those of single rows.

        Raises:
            UserError: they differ, by name of the parameter.
        """
        s = self._settings
        batch = tracks.batch(range(min(2, len(tracks))), self._model.frames)
        pairs = [(i, d) for i in range(len(batch.ids)) for d in range(2)]
        make = partial(noised_rows, self._model, batch, plan=s.draw_plan, purpose="score", masked=s.masked)
        check_against_loop(self._model, self._parameters, make, pairs, ROW_FUNCTIONS[s.function])

    def __call__(self, tracks: Tracks, indices: Sequence[int], purpose: Any) -> Tensor:
        """``[len(indices), width]``, in the work dtype."""
        s = self._settings
        return track_features(
            self._model, self._parameters, tracks.batch(indices, self._model.frames), s.draw_plan, purpose, s.draws,
            s.masked, self._projector, s.function, s.rows,
        )  # fmt: skip


def _key(model: Denoiser, tracks: Tracks, settings: IndexSettings) -> str:
    dtype = str(next(model.module.parameters()).dtype)
    return key_of(model.fingerprint, tracks.fingerprint, asdict(settings), dtype)


def build_index(
    model: Denoiser, tracks: Tracks, folder: str | Path, settings: IndexSettings | None = None
) -> Index:
    """Build an index, or carry on with one; several processes of one ``torchrun`` share the work.

    Args:
        model: theta_0.
        tracks: the training tracks.
        folder: of the index.
        settings: see :class:`IndexSettings`.

    Raises:
        UserError: unusable settings or tracks, a model whose per-sample gradients in a batch are not those of single
            rows, or a folder that holds another index.
    """
    settings, folder = settings or IndexSettings(), Path(folder)
    check_tracks(tracks, model.channels, model.frames, "training")
    key, finished = _key(model, tracks, settings), folder / META
    if finished.exists():
        return Index.open(folder, key)
    maker = _Maker(model, settings)
    maker.compare(tracks)
    units = [range(i, min(i + _UNIT_TRACKS, len(tracks))) for i in range(0, len(tracks), _UNIT_TRACKS)]
    paths = [folder / "units" / f"{i:06d}.safetensors" for i in range(len(units))]
    show = progress.bar(f"{maker.width} numbers a track", "unit")

    def compute(i: int) -> None:
        save_tensors(paths[i], {"features": maker(tracks, units[i], "score")}, {"key": key})

    run_units(paths, compute, finished, folder / "locks" / "index", lambda done: show(done, len(units)))
    with once(folder / "locks" / "index.lock", finished) as mine:
        if mine:
            _finish(folder, tracks, settings, paths, key, maker.width, model.fingerprint)
    for name in ("units", "locks"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return Index.open(folder, key)


def _finish(
    folder: Path, tracks: Tracks, settings: IndexSettings, paths: Sequence[Path], key: str, width: int, model: str
) -> None:  # fmt: skip
    """Put the units' features together, and solve."""
    gram = torch.zeros(width, width, dtype=torch.float64)
    norms, total = np.zeros(len(tracks)), 0
    with whole_file(folder / FEATURES) as part:
        out = np.lib.format.open_memmap(
            part, mode="w+", dtype=NUMBERS[settings.numbers], shape=(len(tracks), width)
        )
        for path in paths:
            features = load_tensors(path, key)[0]["features"].double()
            if not torch.isfinite(features).all():
                raise UserError(
                    f"a gradient among the tracks of {path.name} is infinite or NaN: use --dtype float32"
                )
            length = features.norm(dim=1)
            unit = features / length.clamp_min(1e-300)[:, None]
            out[total : total + len(unit)] = unit.numpy()
            norms[total : total + len(unit)] = length.numpy()
            # What is stored is what is solved: rounding is then no mismatch of the two.
            kept = torch.from_numpy(out[total : total + len(unit)].astype(np.float64))
            kept = kept if settings.normalised else kept * length[:, None]
            gram += kept.T @ kept
            total += len(unit)
        out.flush()
        del out
    scale = float(gram.trace()) / len(tracks)
    if not scale > 0.0:
        raise UserError("every gradient is zero: the layers do not see the tracks")
    gram.diagonal().add_(settings.ridge * scale)
    tensors = {"cholesky": torch.linalg.cholesky(gram), "norms": torch.from_numpy(norms)}
    save_tensors(folder / SOLVER, tensors, {"key": key})
    write_json(folder / IDS, list(tracks.ids))
    meta = {"format": "attr_engine.index/1", "key": key, "model": model, "data": tracks.fingerprint,
            "tracks": len(tracks), "width": width, "settings": asdict(settings)}  # fmt: skip
    write_json(folder / META, meta)


@dataclass(frozen=True)
class Index:
    """An index on disk, opened; its features stay in the file.

    Attributes:
        folder: where it is.
        meta: settings, hashes, sizes.
    """

    folder: Path
    meta: dict[str, Any]

    @staticmethod
    def open(folder: str | Path, key: str | None = None) -> Index:
        """Open what :func:`build_index` wrote.

        Raises:
            UserError: missing, damaged, or under another key than the one asked for.
        """
        folder = Path(folder)
        if not (folder / META).exists():
            raise UserError(f"{folder} holds no index: make one with attr-engine index")
        meta = read_json(folder / META, "index")
        if key is not None and meta.get("key") != key:
            raise UserError(
                f"{folder} is an index of another model, other data or other settings: choose another folder"
            )
        index = Index(folder, meta)
        index._check()
        return index

    def _check(self) -> None:
        try:
            shape = self.features.shape
            _ = self.ids, self.settings
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.folder} cannot be read ({error}): build the index again") from error
        if shape != (self.meta.get("tracks"), self.meta.get("width")) or len(self.ids) != shape[0]:
            raise UserError(
                f"{self.folder} is damaged: its files do not belong together; build the index again"
            )

    @property
    def settings(self) -> IndexSettings:
        """What it was built with."""
        values = dict(self.meta["settings"])
        return IndexSettings(**{**values, "layers": tuple(values["layers"])})

    @cached_property
    def features(self) -> np.ndarray:
        """Unit vectors ``[N, width]``, memory-mapped."""
        return np.load(self.folder / FEATURES, mmap_mode="r", allow_pickle=False)

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the tracks."""
        import json

        return json.loads((self.folder / IDS).read_text(encoding="utf-8"))

    @cached_property
    def _solver(self) -> dict[str, Tensor]:
        return load_tensors(self.folder / SOLVER, self.meta["key"])[0]

    def score(self, features: Tensor) -> np.ndarray:
        """Scores of all tracks for queries given by their features ``[Q, width]``: float64 ``[Q, N]``."""
        queries = features.double()
        if self.settings.normalised:
            queries = queries / queries.norm(dim=1, keepdim=True)
        solved = torch.cholesky_solve(queries.T, self._solver["cholesky"]).numpy()  # [width, Q]
        out = np.empty((len(queries), len(self.features)))
        for first in range(0, len(self.features), _ROWS):
            rows = self.features[first : first + _ROWS].astype(np.float64)
            out[:, first : first + len(rows)] = (rows @ solved).T
        return out if self.settings.normalised else out * self._solver["norms"].numpy()

    def search(self, model: Denoiser, queries: Tracks) -> np.ndarray:
        """Scores of all tracks for every query of a set: float64 ``[Q, N]``.

        Raises:
            UserError: the model is not the index's, or a query cannot be used.
        """
        if model.fingerprint != self.meta["model"]:
            raise UserError(f"{self.folder} is an index of another model")
        check_tracks(queries, model.channels, model.frames, "query")
        return self.score(_Maker(model, self.settings)(queries, range(len(queries)), "update"))

    def attribute(self, model: Denoiser, queries: Tracks) -> Attribution:
        """:meth:`search` as a table with ranks; the function is ``"index"``, the strength the ridge, errors are NaN."""
        scores = self.search(model, queries)
        updates = [(name, self.settings.ridge) for name in queries.ids]
        nothing = np.full_like(scores, np.nan)
        base = np.full(len(self.ids), np.nan)
        draws = np.full(scores.shape, self.settings.draws)
        return Attribution(self.ids, updates, {"index": scores}, {"index": nothing}, base, self.meta, draws)
