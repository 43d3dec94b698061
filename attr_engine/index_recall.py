"""How much of the exhaustive answer an index gives back, measured on some of its own tracks whenever one is built.

Some training tracks, the probes, are queries, by draws that the index has not seen. Three things are asked of them, within
a sample of the tracks:

* ``projection``: recall@k of the answer from projected gradients against that from whole ones, by autograd alone, for the
  same draws, both solved over the sample: ``(K + lambda I)^-1 K_q``. Where the gradients of a sample do not fit in
  :data:`BYTES`, inner products ``g_i^T g_q`` are ranked instead, without the solve, which the result says (``method``):
  those forgive more.
* ``numbers``: recall@k of what is stored (``width`` directions, 16 or 8 bits) against all directions in float64, both
  solved over all tracks.
* ``self_rank``: where a probe ranks itself. Noise of the draws shows here, and in neither recall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.diffusion import ROW_FUNCTIONS, Purpose, noised_rows
from attr_engine.errors import UserError
from attr_engine.index_numbers import largest
from attr_engine.index_store import Index, Maker, finite
from attr_engine.latents.batch import Tracks
from attr_engine.persample import summed_gradient
from attr_engine.result import Attribution, ranks

TRACKS, PROBES, K = 128, 16, 10
BYTES = 2**32  # of whole gradients that are held at a time
_LEAST = 64  # tracks that a solve is worth making over
_COLUMNS = 2**16  # of gradients made float64 at a time


@dataclass(frozen=True)
class Sample:
    """On what recall is measured.

    Attributes:
        tracks: positions in the index, ascending, S of them.
        probes: positions in ``tracks``.
        method: ``"ridge"`` or ``"inner product"``, of the whole gradients.
        features: projected, as solved, float64 ``[S, numbers of a feature]``.
    """

    tracks: np.ndarray
    probes: np.ndarray
    method: str
    features: Tensor

    def within(self, here: slice) -> np.ndarray:
        """The sampled positions in a range."""
        return self.tracks[(self.tracks >= here.start) & (self.tracks < here.stop)]


def draw_sample(maker: Maker, tracks: int) -> Sample:
    """Choose tracks and probes by the seed of the index; the features are not there yet.

    Args:
        maker: of the index.
        tracks: N.
    """
    size = 4 * sum(p.numel() for p in maker.parameters.values())
    count, room = min(tracks, TRACKS), max(1, BYTES // size)
    method = "ridge" if room >= min(count, _LEAST) else "inner product"
    count, probes = (min(count, room), PROBES) if method == "ridge" else (count, min(PROBES, room))
    rng = np.random.default_rng(maker.settings.seed)
    chosen = np.sort(rng.choice(tracks, count, replace=False))
    return Sample(
        chosen, np.sort(rng.choice(count, min(probes, count), replace=False)), method, torch.zeros(0)
    )


Gradients = Callable[[int, Purpose], Tensor]
"""Of a track, by its position, on the draws of a purpose; nothing projected."""


def whole_gradient(maker: Maker, tracks: Tracks, index: int, purpose: Purpose) -> Tensor:
    """The gradient of a track, nothing projected, ``[parameters]`` float32 or float64: the same draws, by autograd alone."""
    s, batch = maker.settings, tracks.batch([index], maker.model.frames)
    together = 1 if s.averaging == "unit" else s.rows
    total: Tensor | None = None
    for first in range(0, s.draws, together):
        pairs = [(0, d) for d in range(first, min(first + together, s.draws))]
        rows = noised_rows(maker.model, batch, pairs, s.draw_plan, purpose, s.masked)
        found = summed_gradient(maker.model, maker.parameters, rows, ROW_FUNCTIONS[s.function])
        parts = [
            torch.zeros_like(p) if (g := found[name]) is None else g for name, p in maker.parameters.items()
        ]
        flat = torch.cat([p.detach().flatten().to(rows.x.dtype) for p in parts])
        flat /= s.draws * (max(float(flat.norm()), 1e-30) if s.averaging == "unit" else 1.0)
        total = flat if total is None else total.add_(flat)
    assert total is not None
    return total / total.norm().clamp_min(1e-30) if s.normalised else total


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` summed in float64, without a float64 copy of either."""
    out = torch.zeros(len(left), len(right), dtype=torch.float64)
    for c in range(0, left.shape[1], _COLUMNS):
        out += (left[:, c : c + _COLUMNS].double() @ right[:, c : c + _COLUMNS].double().T).cpu()
    return out


def whole_scores(sample: Sample, gradients: Gradients, ridge: float) -> np.ndarray:
    """Scores of the sample for every probe, from whole gradients: float64 ``[P, S]``."""
    asked = torch.stack([gradients(int(sample.tracks[i]), "update") for i in sample.probes])
    if sample.method == "ridge":
        held = torch.stack([gradients(int(i), "score") for i in sample.tracks])
        return _solved(_dots(held, held), _dots(held, asked), ridge)
    return torch.cat([_dots(gradients(int(i), "score")[None], asked) for i in sample.tracks]).T.numpy()


def _solved(kernel: Tensor, asked: Tensor, ridge: float) -> np.ndarray:
    """``(K + lambda I)^-1 K_q`` of ``K`` ``[S, S]`` and ``K_q`` ``[S, P]``: float64 ``[P, S]``."""
    least = ridge * float(kernel.trace()) / len(kernel)
    full = kernel + least * torch.eye(len(kernel), dtype=torch.float64)
    return torch.linalg.solve(full, asked).T.numpy()


def recall(found: np.ndarray, expected: np.ndarray, k: int) -> float:
    """Part of the k largest of ``expected`` that are among the k largest of ``found``, the mean over rows ``[P, S]``."""
    both = zip(found, expected, strict=True)
    return float(np.mean([len(np.intersect1d(largest(a, k), largest(b, k))) / k for a, b in both]))


def measure_recall(
    maker: Maker, tracks: Tracks, index: Index, sample: Sample, transform: Tensor, gradients: Gradients
) -> dict[str, Any]:  # fmt: skip
    """What this module is about, of an index whose files are there.

    Args:
        maker: of its features.
        tracks: the training tracks.
        index: the index.
        sample: with features.
        transform: T of all directions, ``[r, numbers of a feature]``.
        gradients: whole ones.

    Returns:
        ``projection``, ``numbers``, ``self_rank`` (of the index and of whole gradients: mean and worst), and on what:
        ``k``, ``tracks``, ``probes``, ``method``. Equal for equal seeds.

    Raises:
        UserError: the gradient of a probe is infinite or NaN.
    """
    own = sample.tracks[sample.probes]
    names = [tracks.ids[int(i)] for i in own]
    asked = finite(maker(tracks, [int(i) for i in own], "update"), names, maker.settings.normalised)
    k = max(1, min(K, len(sample.tracks) // 4))
    whole = whole_scores(sample, gradients, maker.settings.ridge)
    inner = sample.features @ asked.T
    projected = (
        _solved(sample.features @ sample.features.T, inner, maker.settings.ridge)
        if sample.method == "ridge"
        else inner.T.numpy()
    )
    exact = ((asked @ transform.T) @ (sample.features @ transform.T).T).numpy()
    kept = index.score(asked)[:, sample.tracks]
    rows, places = np.arange(len(own)), {"index": ranks(kept), "whole gradients": ranks(whole)}
    own_ranks = {name: place[rows, sample.probes] for name, place in places.items()}
    return {
        "k": k, "tracks": len(sample.tracks), "probes": len(own), "method": sample.method,
        "projection": recall(projected, whole, k), "numbers": recall(kept, exact, k),
        "self_rank": {n: {"mean": float(r.mean()), "worst": int(r.max())} for n, r in own_ranks.items()},
    }  # fmt: skip


def sentences(found: Mapping[str, Any], numbers: str) -> list[str]:
    """What :func:`measure_recall` found, as it is printed: what is compared with what.

    Args:
        found: its result.
        numbers: format of the index.
    """
    k, ranked = found["k"], found["self_rank"]
    how = "kernel ridge" if found["method"] == "ridge" else "inner products, without the ridge,"
    rank = ", ".join(f"{name} mean {r['mean']:.1f}, worst {r['worst']}" for name, r in ranked.items())
    return [
        f"recall@{k} of projected against whole gradients, {how} over {found['tracks']} tracks, {found['probes']} of them as queries "
        f"by other draws: {found['projection']:.3f}",
        f"recall@{k} of the stored {numbers} numbers against all directions in float64, same queries and tracks: {found['numbers']:.3f}",
        f"rank of these queries' own tracks among {found['tracks']} (copies may rank before them): {rank}",
    ]


def recall_against(
    index: Index,
    candidates: np.ndarray,
    queries: Sequence[str],
    attribution: Attribution,
    k: int,
    function: str | None = None,
    strength: float | None = None,
) -> np.ndarray:
    """Which part of the k best tracks of an exhaustive run an index has among its candidates.

    Args:
        index: the index.
        candidates: ``[Q, count]`` from :meth:`Index.candidates`.
        queries: ids of the Q queries.
        attribution: scores of an exhaustive run that has these queries.
        k: how many of its best tracks a query.
        function: score function of that run; default its first.
        strength: of that run; default its first.

    Returns:
        float64 ``[Q]``, in [0, 1].

    Raises:
        UserError: the run is of other tracks, or lacks a query, the function or the strength; k is not within the tracks.
    """
    if list(attribution.tracks) != list(index.ids):
        raise UserError(
            f"the run and {index.folder} are not of the same tracks in the same order: build the index of its data"
        )
    if not 1 <= k <= len(index.ids) or len(candidates) != len(queries):
        raise UserError(
            f"recall of the best {k} of {len(index.ids)} tracks, {len(candidates)} rows of candidates of {len(queries)} queries: "
            "ask for 1 to all tracks, and a row a query"
        )
    out = []
    for row, query in zip(candidates, queries, strict=True):
        best = {scored.track for scored in attribution.top(k, query, function, strength)}
        out.append(len(best & {index.ids[int(i)] for i in row}) / k)
    return np.array(out)
