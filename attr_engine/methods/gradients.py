"""Inner products of whole gradients at the trained weights: TracIn at its last checkpoint (Pruthi et al. 2020, arXiv 2002.08484).

``tau[q, i] = <mean over draws of grad L_d(z_q), mean over draws of grad L_d(z_i)>``, nothing projected: a query's gradient is held, and
each backward pass through tracks meets those of all queries (:mod:`attr_engine.influence`, with no curvature in between).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from attr_engine.diffusion import losses, noised_rows, work_dtype
from attr_engine.errors import UserError
from attr_engine.influence import DIRECTION_BYTES, measure_influence
from attr_engine.jobs import Query
from attr_engine.latents.batch import Batch, Tracks
from attr_engine.methods.base import Workspace, method, option
from attr_engine.methods.passes import Kept, check_model, keep, plan_of, rows_a_pass
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.persample import check_against_loop, summed_gradient
from attr_engine.unlearn import group_gradient
from attr_engine.updates import Directions, Update, norm


@method("tracin", "gradient", "inner product of loss gradients, one checkpoint: TracIn (Pruthi et al. 2020)")
@dataclass(frozen=True)
class TracIn:
    """Whole gradients against whole gradients."""

    normalised: bool = option(False, "cosines of the gradients instead (GradCos)")

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedTracIn:
        """Check the model; for cosines keep the length of every track's gradient.

        Raises:
            UserError: an unusable number of draws, or gradients of a batch that are not those of single rows.
        """
        check_model(model, tracks)
        s, plan = work.settings, plan_of(work.settings)
        for draws, what in ((s.score_draws, "score"), (s.update_draws, "update")):
            plan.check(draws, f"the number of {what} draws")
        parameters = select_parameters(model, s.layers)
        rows = rows_a_pass(model, tracks, s)
        if s.gradients == "batch":
            batch = tracks.batch(range(min(2, len(tracks))), model.frames)
            make = partial(noised_rows, model, batch, plan=plan, purpose="score", masked=s.mask_score)
            check_against_loop(
                model, parameters, make, [(i, d) for i in range(len(batch.ids)) for d in range(2)]
            )
        fitted = FittedTracIn(model, tracks, work, parameters, rows, None)
        if not self.normalised:
            return fitted

        def lengths(unit: range) -> dict[str, Tensor]:
            return {"lengths": fitted.lengths_of(tracks.batch(unit, model.frames))}

        kept = keep(work, "lengths", model, tracks, fitted.identity, lengths)
        return FittedTracIn(model, tracks, work, parameters, rows, kept)


@dataclass(frozen=True)
class FittedTracIn:
    """:class:`TracIn` of a model; ``kept`` holds the lengths of the tracks' gradients, for cosines."""

    model: Denoiser
    tracks: Tracks
    work: Workspace
    parameters: dict[str, nn.Parameter]
    rows: int
    kept: Kept | None

    @property
    def identity(self) -> list[object]:
        """The settings that decide the tracks' gradients."""
        s = self.work.settings
        return [list(s.layers), s.seed, s.plan, s.replicates, s.score_draws, s.mask_score, self.rows, s.gradients]  # fmt: skip

    def lengths_of(self, batch: Batch) -> Tensor:
        """Length of the mean gradient over draws of each track, float64 ``[N]``."""
        s, found = self.work.settings, []
        for i in range(len(batch.ids)):
            pairs = [(i, d) for d in range(s.score_draws)]
            total = {n: torch.zeros_like(p, dtype=work_dtype(self.model)) for n, p in self.parameters.items()}
            for first in range(0, len(pairs), self.rows):
                some = pairs[first : first + self.rows]
                rows = noised_rows(self.model, batch, some, plan_of(s), "score", s.mask_score)
                for name, g in summed_gradient(self.model, self.parameters, rows).items():
                    if g is not None:
                        total[name] += g
            found.append(norm(total) / len(pairs))
        return torch.tensor(found, dtype=torch.float64)

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """Inner products, or cosines; as many queries at a time as there is room for their gradients."""
        size = sum(p.numel() for p in self.parameters.values()) * work_dtype(self.model).itemsize
        together = max(1, DIRECTION_BYTES // size)
        blocks = [queries[i : i + together] for i in range(0, len(queries), together)]
        return np.concatenate([self._block(block) for block in blocks])

    def _block(self, queries: Sequence[Query]) -> np.ndarray:
        s, asked = self.work.settings, [self._asked(query) for query in queries]
        directions = Directions(
            self.parameters, [partial(_same, update) for update in asked], DIRECTION_BYTES
        )

        def make(unit: range) -> dict[str, Tensor]:
            found, _ = measure_influence(
                self.model, self.parameters, self.tracks.batch(unit, self.model.frames), directions, plan_of(s), s.score_draws,
                s.mask_score, self.rows, losses, s.gradients,
            )  # fmt: skip
            return {"scores": torch.from_numpy(found.mean(axis=2).T)}

        identity = [*self.identity, s.update_draws, s.mask_update, [(q.tracks.fingerprint, q.indices) for q in queries]]  # fmt: skip
        scores = keep(self.work, "products", self.model, self.tracks, identity, make).all("scores").T.numpy()
        if self.kept is None:
            return scores
        lengths = np.array([norm(u.delta) for u in asked])[:, None] * self.kept.all("lengths").numpy()
        return scores / np.maximum(lengths, 1e-300)

    def _asked(self, query: Query) -> Update:
        """The mean gradient of a query, in the place of an update."""
        s = self.work.settings
        check_model(self.model, query.tracks, "query")
        gradient = group_gradient(
            self.model, self.parameters, query.tracks, query.indices, range(s.update_draws), plan_of(s), s.mask_update, self.rows
        )  # fmt: skip
        if not math.isfinite(norm(gradient)):
            raise UserError(f"the gradient of {query.id!r} is infinite or NaN: use --dtype float32")
        return Update(query.id, 1.0, "size", gradient, math.nan, math.nan)


def _same(update: Update) -> Update:
    return update
