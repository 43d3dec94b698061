"""An index on disk, opened: the scores of all tracks for a query are one product (:mod:`attr_engine.index` builds it).

Row i of the file is ``y_i = T phi_i`` and a query is ``y_q = T phi_q`` with ``T^T T = (Phi^T Phi + lambda I)^-1``, so that
``y_i^T y_q`` is the score of kernel ridge regression in gradient space. Its errors are small beside ``|y_i| |y_q|`` in whatever format
the rows are stored, which is not so where ``phi_i`` is stored and only the query is solved for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.diffusion import ROW_FUNCTIONS, DrawPlan, noised_rows
from attr_engine.errors import UserError
from attr_engine.features import AVERAGING, Projector, track_features
from attr_engine.index_numbers import NUMBERS, largest, products
from attr_engine.latents.batch import Tracks, check_tracks
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.persample import check_against_loop
from attr_engine.result import Attribution
from attr_engine.tensorfile import load_tensors

META, IDS, FEATURES, SOLVER = "index.json", "tracks.json", "features.npy", "solver.safetensors"
FORMAT = "attr_engine.index/2"
_QUERIES = 16  # whose latents are in memory at a time
_SCORES = 2**25  # of them in memory at a time, where only the best are wanted


@dataclass(frozen=True)
class IndexSettings:
    """What decides an index, beside model and tracks; the defaults were chosen by ``bench/index.py`` (docs/index.md).

    Attributes:
        layers: layer groups or name patterns.
        function: whose gradients: ``"squared_norm"`` or ``"loss"``.
        draws: draws a track, a multiple of ``replicates``.
        averaging: of draws: ``"unit"``, each gradient at length 1, or ``"plain"``.
        projection: one of :data:`attr_engine.features.KINDS`.
        rank: a weight becomes at most rank x rank numbers.
        width: most numbers stored a track: the leading directions of all features; 0 for all of them.
        ridge: lambda, relative to the mean squared norm of a feature.
        normalised: whether features have length 1, of tracks and queries.
        masked: whether only valid frames of a track count.
        numbers: ``"float16"``, ``"int8"`` or ``"float32"``, on disk.
        seed: of draws, projections and the tracks that recall is measured on.
        replicates: of the timestep sequence. One: its points are spread over [0, 1), while four replicates of one
            point each are four timesteps by chance, which track and query may not share.
        plan: ``"track"`` or ``"shared"`` draws.
        rows: (track, draw) pairs a backward pass.
    """

    layers: tuple[str, ...] = ("transformer",)
    function: str = "squared_norm"
    draws: int = 8
    averaging: str = "unit"
    projection: str = "coordinates"
    rank: int = 8
    width: int = 1024
    ridge: float = 0.1
    normalised: bool = False
    masked: bool = False
    numbers: str = "float16"
    seed: int = 0
    replicates: int = 1
    plan: str = "track"
    rows: int = 16

    def check(self) -> None:
        """Refuse what cannot be built.

        Raises:
            UserError: names the setting.
        """
        if (
            self.numbers not in NUMBERS
            or self.function not in ROW_FUNCTIONS
            or self.averaging not in AVERAGING
        ):
            raise UserError(
                f"numbers {self.numbers!r} of the function {self.function!r} with averaging {self.averaging!r}: use one of "
                f"{', '.join(NUMBERS)}, of {', '.join(ROW_FUNCTIONS)}, and of {', '.join(AVERAGING)}"
            )
        if not 0.0 < self.ridge < float("inf") or self.rows < 1 or self.width < 0:
            raise UserError(
                f"ridge {self.ridge}, rows {self.rows}, width {self.width}: the ridge must be above 0, rows at least 1, the "
                "width at least 0"
            )
        self.draw_plan.check(self.draws, "the number of draws")

    @property
    def draw_plan(self) -> DrawPlan:
        """The draw plan."""
        return DrawPlan(self.seed, self.plan, self.replicates)


class Maker:
    """Makes features of tracks by the settings of an index.

    Attributes:
        parameters: with respect to which.
        width: numbers of a feature.
    """

    def __init__(self, model: Denoiser, settings: IndexSettings) -> None:
        settings.check()
        self.model, self.settings = model, settings
        self.parameters = select_parameters(model, settings.layers)
        self._projector = Projector(self.parameters, settings.projection, settings.rank, settings.seed)
        self.width = self._projector.width

    def compare(self, tracks: Tracks) -> None:
        """Compare the gradients of a few rows in a batch with those of single rows.

        Raises:
            UserError: they differ, by name of the parameter.
        """
        s = self.settings
        batch = tracks.batch(range(min(2, len(tracks))), self.model.frames)
        pairs = [(i, d) for i in range(len(batch.ids)) for d in range(min(2, s.draws))]
        make = partial(noised_rows, self.model, batch, plan=s.draw_plan, purpose="score", masked=s.masked)
        check_against_loop(self.model, self.parameters, make, pairs, ROW_FUNCTIONS[s.function])

    def __call__(
        self, tracks: Tracks, indices: Sequence[int], purpose: Any, draws: int = 0, masked: bool | None = None, replicates: int = 1
    ) -> Tensor:  # fmt: skip
        """Features ``[len(indices), width]``, or ``[len(indices), replicates, width]`` of several, in the work dtype.

        Draws and mask are those of the index where nothing else is said.
        """
        s = self.settings
        masked = s.masked if masked is None else masked
        return track_features(
            self.model, self.parameters, tracks.batch(indices, self.model.frames), s.draw_plan, purpose, draws or s.draws,
            masked, self._projector, s.function, s.rows, s.averaging, replicates,
        )  # fmt: skip


def finite(features: Tensor, names: Sequence[str], normalised: bool) -> Tensor:
    """Features in float64, of length 1 if they are to be; refuses what is not finite.

    Raises:
        UserError: by name of the track or query.
    """
    for name, row in zip(names, torch.isfinite(features).all(dim=1).tolist(), strict=True):
        if not row:
            raise UserError(f"a gradient of {name!r} is infinite or NaN: use --dtype float32")
    wide = features.double()
    return wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-300) if normalised else wide


@dataclass(frozen=True)
class Index:
    """An index on disk, opened; its rows stay in the file.

    Attributes:
        folder: where it is.
        meta: settings, hashes, sizes, and under ``"recall"`` what
            :func:`attr_engine.index_recall.measure_recall` found, where it was asked.
    """

    folder: Path
    meta: dict[str, Any]

    @staticmethod
    def open(folder: str | Path, key: str | None = None) -> Index:
        """Open what :func:`attr_engine.index.build_index` wrote.

        Raises:
            UserError: missing, damaged, of another version, or under another key than the one asked for.
        """
        folder = Path(folder)
        if not (folder / META).exists():
            raise UserError(f"{folder} holds no index: make one with attr-engine index")
        meta = read_json(folder / META, "index")
        if meta.get("format") != FORMAT:
            raise UserError(
                f"{folder} is an index of the format {meta.get('format')!r}, this version reads {FORMAT!r}: build it again"
            )
        if key is not None and meta.get("key") != key:
            raise UserError(
                f"{folder} is an index of another model, other data or other settings: choose another folder"
            )
        index = Index(folder, meta)
        index._check()
        return index

    def _check(self) -> None:
        try:
            rows = self.features
            kind: np.dtype[Any] = np.dtype(NUMBERS[self.settings.numbers])
            together = rows.shape == (self.meta["tracks"], self.meta["width"]) and rows.dtype == kind
            together = together and isinstance(self.ids, list) and len(self.ids) == len(rows)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.folder} cannot be read ({error}): build the index again") from error
        if not together:
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
        """Stored rows ``[N, width]``, memory-mapped."""
        # Copy on write: torch takes no arrays that it could not write to. Nothing is written.
        return np.load(self.folder / FEATURES, mmap_mode="c", allow_pickle=False)

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the tracks."""
        return json.loads((self.folder / IDS).read_text(encoding="utf-8"))

    @cached_property
    def _solver(self) -> tuple[Tensor, np.ndarray]:
        """T ``[width, numbers of a feature]`` and the scales of the rows ``[N]``."""
        tensors = load_tensors(self.folder / SOLVER, self.meta["key"])[0]
        return tensors["transform"], tensors["scales"].numpy()

    def score(self, features: Tensor) -> np.ndarray:
        """Scores of all tracks for queries given by their features ``[Q, numbers of a feature]``.

        Returns:
            float64 ``[Q, N]``, of products in float32.
        """
        transform, scales = self._solver
        asked = features.double()
        if self.settings.normalised:
            asked = asked / asked.norm(dim=1, keepdim=True).clamp_min(1e-300)
        asked = asked @ transform.T
        # At length 1 while in float32, as the rows are.
        length = asked.norm(dim=1, keepdim=True).clamp_min(1e-300)
        found = products(self.features, (asked / length).float()).numpy().astype(np.float64)
        found *= scales
        found *= length.numpy()
        return found

    def query_features(
        self,
        model: Denoiser,
        queries: Tracks,
        draws: int = 0,
        masked: bool | None = None,
        replicates: int = 1,
    ) -> Tensor:
        """Features of queries, by draws of the purpose ``update``.

        Args:
            model: the model of the index.
            queries: Q of them.
            draws: default as many as a track of the index has.
            masked: whether only valid frames count; default as for its tracks.
            replicates: how many means over a part of the draws.

        Returns:
            ``[Q, numbers of a feature]`` float64, or ``[Q, replicates, numbers of a feature]``.

        Raises:
            UserError: the model is not the index's, or a query cannot be used.
        """
        if model.fingerprint != self.meta["model"]:
            raise UserError(f"{self.folder} is an index of another model")
        check_tracks(queries, model.channels, model.frames, "query")
        maker, names = Maker(model, self.settings), list(queries.ids)
        parts = []
        for first in range(0, len(names), _QUERIES):
            some = range(first, min(first + _QUERIES, len(names)))
            found = maker(queries, some, "update", draws, masked, replicates)
            finite(found.flatten(1), names[first : some.stop], False)
            parts.append(found.double())
        return torch.cat(parts)

    def search(self, model: Denoiser, queries: Tracks) -> np.ndarray:
        """Scores of all tracks for every query of a set: float64 ``[Q, N]``.

        Raises:
            UserError: the model is not the index's, or a query cannot be used.
        """
        return self.score(self.query_features(model, queries))

    def candidates(self, model: Denoiser, queries: Tracks, count: int) -> np.ndarray:
        """The best tracks of every query, best first: what a slower method then looks at.

        Args:
            model: the model of the index.
            queries: Q of them.
            count: how many a query; all where there are fewer tracks.

        Returns:
            int64 ``[Q, min(count, N)]``, positions in :attr:`ids`; equal scores by position.

        Raises:
            UserError: the count is below 1, the model is not the index's, or a query cannot be used.
        """
        if count < 1:
            raise UserError(f"{count} candidates a query: ask for at least 1")
        features = self.query_features(model, queries)
        together = max(1, _SCORES // max(1, len(self.ids)))
        parts = [self.score(features[k : k + together]) for k in range(0, len(features), together)]
        return np.stack([largest(scores, count) for part in parts for scores in part])

    def attribute(self, model: Denoiser, queries: Tracks) -> Attribution:
        """:meth:`search` as a table with ranks; the function is ``"index"``, the strength the ridge, errors are NaN."""
        scores = self.search(model, queries)
        updates = [(name, self.settings.ridge) for name in queries.ids]
        nothing = np.full_like(scores, np.nan)
        base = np.full(len(self.ids), np.nan)
        draws = np.full(scores.shape, self.settings.draws)
        return Attribution(self.ids, updates, {"index": scores}, {"index": nothing}, base, self.meta, draws)
