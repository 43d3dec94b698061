"""Scores of the methods that unlearn: the public pipeline, and updates by other curvatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine import Settings, attribute
from attr_engine.diffusion import DrawPlan
from attr_engine.effects import measure_effects
from attr_engine.jobs import Query
from attr_engine.latents.batch import Chosen
from attr_engine.models.protocol import select_parameters
from attr_engine.result import Attribution
from attr_engine.score import scores
from attr_engine.unlearn import unlearn_query
from attr_engine.updates import Update

FUNCTIONS = ("loss_change", "skew", "displacement")


def together(queries: Sequence[Query]) -> list[Chosen]:
    """Queries as sets, neighbours of one set together."""
    out: list[tuple[Any, list[int]]] = []
    for query in queries:
        if out and out[-1][0] is query.tracks:
            out[-1][1].append(query.index)
        else:
            out.append((query.tracks, [query.index]))
    return [Chosen(tracks, indices) for tracks, indices in out]


def run(model: Any, tracks: Any, queries: Sequence[Query], out: Path, **settings: Any) -> Attribution:
    """Scores by a run of the engine; targets among the queries are training tracks."""
    own = tuple(q.id for q in queries if q.kind == "training track")
    sets = together([q for q in queries if q.kind != "training track"])
    s = Settings(**{"functions": FUNCTIONS, "self_influence": own, "rows": 16, "threads": 1, **settings})
    return attribute(model, tracks, sets or None, s, out)


def matrices(result: Attribution, queries: Sequence[Query]) -> dict[str, np.ndarray]:
    """``"function at strength"`` to scores ``[Q, N]`` in the order of the queries."""
    strengths = list(dict.fromkeys(x for _, x in result.updates))
    return {
        f"{function} at {x:g}": np.stack([values[result.row(q.id, x)] for q in queries])
        for function, values in result.values.items() for x in strengths
    }  # fmt: skip


class ByKernel:
    """``(sum_i g_i g_i^T / N + lambda)^-1 g`` over whole gradients of tracks, by Woodbury's identity.

    Args:
        gradients: of the tracks, float32 ``[N, parameters]``.
        like: name to a tensor in the parameter's shape, in the order of the gradients.
    """

    def __init__(self, gradients: torch.Tensor, like: Mapping[str, torch.Tensor]) -> None:
        self._gradients, self._like = gradients, {n: torch.empty_like(p) for n, p in like.items()}
        self._kernel = (gradients @ gradients.T).double()

    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters."""
        return {n: p.shape for n, p in self._like.items()}

    def precondition(self, gradient: Mapping[str, torch.Tensor], damping: float) -> dict[str, torch.Tensor]:
        """The direction; damping relative to the mean squared length of a track's gradient."""
        count = len(self._gradients)
        ridge = damping * float(self._kernel.trace()) / count  # lambda N of the formula
        flat = torch.cat([gradient[n].flatten() for n in self._like]).float()
        damped = self._kernel + ridge * torch.eye(count, dtype=torch.float64)
        weights = torch.linalg.solve(damped, (self._gradients @ flat).double()).float()
        flat = (flat - self._gradients.T @ weights) * (count / ridge)
        out, first = {}, 0
        for name, p in self._like.items():
            out[name] = flat[first : first + p.numel()].reshape(p.shape)
            first += p.numel()
        return out


def _same(update: Update) -> Update:
    return update


def by_curvature(
    model: Any, tracks: Any, queries: Sequence[Query], curvature: Any, damping: float, size: float, draws: int,
    say: Callable[[str], None] = print,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Scores ``[Q, N]`` of updates by any curvature, all functions."""
    plan, found = DrawPlan(0), []
    select_parameters(model, ["transformer"])
    for n, query in enumerate(queries):
        update: Update = unlearn_query(
            model,
            query.tracks,
            query.index,
            curvature,
            plan,
            len(tracks),
            size,
            draws=64,
            damping=damping,
            rows=16,
        )
        parts = [
            measure_effects(model, tracks.batch(range(i, min(i + 32, len(tracks))), model.frames), [partial(_same, update)], plan, draws)
            for i in range(0, len(tracks), 32)
        ]  # fmt: skip
        each = [scores(p, FUNCTIONS, 4) for p in parts]
        found.append({f: np.concatenate([e[f][0][0] for e in each]) for f in FUNCTIONS})
        say(f"{type(curvature).__name__}, damping {damping:g}: {n + 1} of {len(queries)}")
    return {f: np.stack([row[f] for row in found]) for f in FUNCTIONS}
