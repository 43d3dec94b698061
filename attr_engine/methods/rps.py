"""Representer points of the denoiser's last layer (Yeh et al. 2018, arXiv 1811.09720; compared in Choi et al. 2025, arXiv 2506.18312).

A last layer without bias that minimises ``1/n sum_p |W f_p - y_p|^2 + lambda |W|^2`` over n points is ``W = sum_p alpha_p f_p^T`` with
``alpha_p = -(Phi_p - y_p) / (lambda n)``: a prediction is a sum over the training points, ``Phi_q = sum_p alpha_p f_p^T f_q``. The
points are the tokens of the tracks' draws, for the layer is applied to each by itself. What a track adds to a query's prediction is a
number for every token and component of it; the score is their mean, with their signs::

    tau[q, i] = mean over tokens of q, mean over components of sum over tokens p of i of alpha_p f_p^T f_q

Both sums go inside: ``tau = (sum_p mean(alpha_p) f_p)^T (mean f_q)``, so that one vector of D numbers is kept of a track.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attr_engine import kernels
from attr_engine.diffusion import Noised, Purpose, noised_rows, predict
from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.latents.batch import Batch, Tracks
from attr_engine.methods.base import Workspace, method, option
from attr_engine.methods.hidden import counted_tokens, last_layer, token_states, tokens_of, watched
from attr_engine.methods.passes import Kept, by_set, check_model, keep, plan_of, rows_a_pass
from attr_engine.models.protocol import Denoiser
from attr_engine.settings import Settings


@dataclass(frozen=True)
class Points:
    """Makes the sums over the tokens of tracks, by the draws and masks of the settings."""

    model: Denoiser
    settings: Settings
    rows: int

    @torch.no_grad()
    def __call__(self, batch: Batch, purpose: Purpose) -> dict[str, Tensor]:
        """Sums over the draws and counted tokens of each track, float64 on the CPU.

        Args:
            batch: N tracks, padded to the model's frames.
            purpose: ``"score"`` for training tracks, ``"update"`` for queries; it chooses draws and mask.

        Returns:
            ``"weighted"`` ``[N, D]``, of ``f`` times the mean over components of the target less the prediction; ``"plain"`` ``[N, D]``,
            of ``f``; ``"points"`` ``[N]``, how many there are.
        """
        s, training = self.settings, purpose == "score"
        draws, masked = (s.score_draws, s.mask_score) if training else (s.update_draws, s.mask_update)
        pairs = [(i, d) for i in range(len(batch.ids)) for d in range(draws)]
        found = []
        for first in range(0, len(pairs), self.rows):
            some = pairs[first : first + self.rows]
            found.append(self._sums(noised_rows(self.model, batch, some, plan_of(s), purpose, masked)))
        each = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        return {name: x.unflatten(0, (len(batch.ids), draws)).sum(dim=1) for name, x in each.items()}

    def _sums(self, noised: Noised) -> dict[str, Tensor]:
        name, tokens = last_layer(self.model), tokens_of(self.model)
        with watched(self.model, [name], inputs=True) as seen:
            prediction = predict(self.model, noised)
            states = token_states(seen, name, tokens).double()
        counted = counted_tokens(noised.counted, tokens).double()
        residual = (target_of(noised) - prediction).double()
        # [B, C, tokens, frames of a patch]: the components of a token are the channels of all its frames.
        means = residual.unflatten(2, (tokens, -1)).mean(dim=(1, 3))
        return {
            "weighted": torch.einsum("bt,btd->bd", means * counted, states).cpu(),
            "plain": torch.einsum("bt,btd->bd", counted, states).cpu(),
            "points": counted.sum(dim=1).cpu(),
        }


def target_of(noised: Noised) -> Tensor:
    """What the model should predict, ``[B, C, F]``; made again where the loss kernel does without."""
    if noised.target is not None:
        return noised.target
    noise = kernels.noise(noised.keys, noised.x.shape[1], noised.x.shape[2])
    return kernels.v_target(noised.x, noise, noised.t, noised.objective)


@method(
    "rps", "representation", "representer points of the last layer (Yeh et al. 2018, as in Choi et al. 2025)"
)
@dataclass(frozen=True)
class Rps:
    """What the tokens of a track add to the query's prediction, if the last layer is the optimum."""

    damping: float = option(1e-3, "lambda, the weight of |W|^2 in the loss; it scales all scores alike")

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedRps:
        """Keep one vector of every track.

        Raises:
            UserError: damping that is not positive, or no last linear layer.
        """
        if not self.damping > 0:
            raise UserError(f"damping={self.damping:g} of rps: use a number above 0")
        check_model(model, tracks)
        s = work.settings
        for draws, what in ((s.score_draws, "score"), (s.update_draws, "update")):
            plan_of(s).check(draws, f"the number of {what} draws")
        points = Points(model, s, rows_a_pass(model, tracks, s))
        identity = [last_layer(model), s.seed, s.plan, s.replicates, s.score_draws, s.mask_score, points.rows]

        def make(unit: range) -> dict[str, Tensor]:
            found = points(tracks.batch(unit, model.frames), "score")
            return {name: found[name] for name in ("weighted", "points")}

        return FittedRps(points, keep(work, "rps", model, tracks, identity, make), self.damping)


@dataclass(frozen=True)
class FittedRps:
    """:class:`Rps` that knows the training tracks."""

    points: Points
    kept: Kept
    damping: float

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """The mean over the query's tokens and components of what every track adds to its prediction."""
        alphas = self.kept.all("weighted") / (self.damping * self.kept.all("points").sum())
        means = torch.empty(len(queries), alphas.shape[1], dtype=torch.float64)
        model = self.points.model
        for tracks, places in by_set(queries):
            check_model(model, tracks, "query")
            for i, place in enumerate(places):
                found = self.points(tracks.batch([i], model.frames), "update")
                means[place] = found["plain"][0] / found["points"][0]
        return (means @ alphas.T).numpy()
