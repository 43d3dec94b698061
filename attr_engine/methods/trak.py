"""Kernel ridge regression over projected gradients, as TRAK and its kin for diffusion models have it: on :mod:`attr_engine.index`.

With ``phi`` a track's projected gradient of a function, the mean over its draws, and ``A = Phi^T Phi + lambda I``:

- ``trak``: ``phi_i^T A^-1 phi_q`` of the loss (Park et al. 2023, arXiv 2303.14186; their factor dL/df is 1 where f is the loss);
- ``dtrak``: the same of the squared norm of the prediction (Zheng et al. 2024, arXiv 2311.00500);
- ``das``: ``(phi_i^T A^-1 phi_q r_i / (1 - h_i))^2`` with the residual ``r_i`` of a track and ``h_i = phi_i^T A^-1 phi_i``: the squared
  change of a query's prediction if the track were left out, by one Newton step (Lin et al. 2025, arXiv 2410.18639).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from attr_engine.diffusion import losses, noised_rows
from attr_engine.errors import UserError
from attr_engine.index import SOLVER, Index, IndexSettings, build_index
from attr_engine.jobs import Query
from attr_engine.latents.batch import Batch, Tracks
from attr_engine.methods.base import Fitted, Workspace, method, option
from attr_engine.methods.passes import Kept, by_set, check_model, keep, rows_a_pass
from attr_engine.models.protocol import Denoiser
from attr_engine.runs import key_of
from attr_engine.tensorfile import load_tensors


@dataclass(frozen=True)
class _Projected:
    function: ClassVar[str]
    averaging: ClassVar[str] = "plain"
    width: ClassVar[int] = 1024
    damping: float = option(0.3, "lambda, relative to the mean squared length of the tracks' gradients")
    rank: int = option(16, "rows and columns that every weight's gradient is projected to")

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> Fitted:
        """Build the index of the tracks' gradients.

        Raises:
            UserError: an option or setting that cannot be, or gradients of a batch that are not those of single rows.
        """
        return FittedTrak(model, self.index(model, tracks, work), work.settings.update_draws)

    def index(self, model: Denoiser, tracks: Tracks, work: Workspace) -> Index:
        """Build the index, or take the one that is there."""
        check_model(model, tracks)
        s = work.settings
        settings = IndexSettings(
            layers=s.layers, function=self.function, draws=s.score_draws, averaging=self.averaging, projection="gaussian",
            rank=self.rank, width=self.width, ridge=self.damping, masked=s.mask_fisher, numbers="float32", seed=s.seed, plan=s.plan,
            rows=rows_a_pass(model, tracks, s),
        )  # fmt: skip
        key = key_of(model.fingerprint, tracks.fingerprint, vars(settings))
        return build_index(model, tracks, work.folder / f"index-{key}", settings, recall=False)


@method("trak", "gradient", "kernel ridge regression, loss gradients, projected: TRAK (Park et al. 2023)")
@dataclass(frozen=True)
class Trak(_Projected):
    """``phi_i^T (Phi^T Phi + lambda I)^-1 phi_q`` of gradients of the loss."""

    function: ClassVar[str] = "loss"


@method("dtrak", "gradient", "the same of the squared norm of the prediction: D-TRAK (Zheng et al. 2024)")
@dataclass(frozen=True)
class DTrak(_Projected):
    """As :class:`Trak`, of gradients of the squared norm; what the method ``ridge`` is, but for the lengths of draws' gradients."""

    function: ClassVar[str] = "squared_norm"


@dataclass(frozen=True)
class FittedTrak:
    """An index that is asked, by so many draws a query."""

    model: Denoiser
    index: Index
    draws: int

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """Scores of kernel ridge regression."""
        scores = np.empty((len(queries), len(self.index.ids)))
        for tracks, places in by_set(queries):
            scores[places] = self.index.score(self.index.query_features(self.model, tracks, self.draws))
        return scores


@method("das", "gradient", "squared change of the query's prediction without a track: DAS (Lin et al. 2025)")
@dataclass(frozen=True)
class Das(_Projected):
    """Gradients of the squared norm of the prediction, each draw's at length 1, and the tracks' residuals.

    The paper's function is the prediction itself, whose gradient is a matrix; its code takes a number of the prediction, too.
    """

    function: ClassVar[str] = "squared_norm"
    averaging: ClassVar[str] = "unit"
    width: ClassVar[int] = 0  # the leverage is over all directions
    squared: bool = option(True, "as in the paper; otherwise the change itself, with its sign")

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> Fitted:
        """Build the index of the tracks' gradients; keep their residuals.

        Raises:
            UserError: as of ``trak``; or a loss that is not finite.
        """
        index = self.index(model, tracks, work)
        s = index.settings

        @torch.no_grad()
        def make(unit: range) -> dict[str, Tensor]:
            batch = tracks.batch(unit, model.frames)
            return {"residuals": _residuals(model, batch, s)}

        kept = keep(work, "residuals", model, tracks, [s.draws, s.seed, s.plan, s.masked, s.rows], make)
        return FittedDas(FittedTrak(model, index, work.settings.update_draws), kept, self.squared)


def _residuals(model: Denoiser, batch: Batch, s: IndexSettings) -> Tensor:
    """``r_i``: mean over draws of the roots of the losses, at length 1 over the draws; float64 ``[N]``.

    Raises:
        UserError: a loss that is not finite, by name of the track.
    """
    pairs = [(i, d) for i in range(len(batch.ids)) for d in range(s.draws)]
    found = []
    for first in range(0, len(pairs), s.rows):
        some = pairs[first : first + s.rows]
        found.append(losses(model, noised_rows(model, batch, some, s.draw_plan, "score", s.masked)).cpu())
    roots = torch.cat(found).unflatten(0, (len(batch.ids), s.draws)).sqrt()
    for name, row in zip(batch.ids, roots, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise UserError(f"a loss of {name!r} is infinite or NaN: use --dtype float32")
    return (roots / roots.norm(dim=1, keepdim=True).clamp_min(1e-300)).mean(dim=1)


@dataclass(frozen=True)
class FittedDas:
    """:class:`Das` that knows the training tracks."""

    trak: FittedTrak
    residuals: Kept
    squared: bool

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """The change of a query's function without each track, by one Newton step, squared or not."""
        index = self.trak.index
        # A row is T phi_i with T^T T = A^-1, kept as its length and direction: its squared length is the leverage.
        lengths = load_tensors(index.folder / SOLVER, index.meta["key"])[0]["scales"].numpy()
        weights = self.residuals.all("residuals").numpy() / (1.0 - lengths**2)
        changes = self.trak.score(queries) * weights
        return changes**2 if self.squared else changes
