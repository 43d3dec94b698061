"""How a ranking is judged where the truth is planted: rank of oneself, recall and average precision."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from attr_engine.result import ranks


def self_rank(scores: np.ndarray, tracks: Sequence[str], cluster: Collection[str]) -> int:
    """Rank of an unlearned training track among all.

    Args:
        scores: ``[N]``.
        tracks: ids.
        cluster: the track and its exact copies; they count as one, so the best of them gives the rank.
    """
    place = ranks(scores)
    return int(min(place[i] for i, name in enumerate(tracks) if name in cluster))


def average_precision(scores: np.ndarray, tracks: Sequence[str], relevant: Collection[str]) -> float:
    """Mean over the relevant tracks of the precision at their rank; NaN where none is relevant."""
    place = np.sort([r for r, name in zip(ranks(scores), tracks, strict=True) if name in relevant])
    return float(np.mean(np.arange(1, len(place) + 1) / place)) if len(place) else float("nan")


def recall_at(k: int, scores: np.ndarray, tracks: Sequence[str], relevant: Collection[str]) -> float:
    """Part of the relevant tracks (at most k of them count) in the top k; NaN where none is relevant."""
    found = sum(1 for r, name in zip(ranks(scores), tracks, strict=True) if name in relevant and r <= k)
    return found / min(k, len(relevant)) if relevant else float("nan")


def parents_of(info: Mapping[str, Any]) -> frozenset[str]:
    """Ids that the metadata of a query names as its sources (``parents``, joined by ``;`` or a list)."""
    value = info.get("parents")
    names = value.split(";") if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
    return frozenset(str(x) for x in names if x)


def families_of(info: Mapping[str, Any]) -> frozenset[str]:
    """Families of a piece: a splice, whose family is ``"fam03+fam10"``, has two."""
    return frozenset(x for x in str(info.get("family") or "").split("+") if x)


def clusters(tracks: Sequence[str], info: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """Track to the set of its exact copies and itself, from ``family`` and ``relation`` in the metadata."""
    families: dict[str, set[str]] = {}
    for name, row in zip(tracks, info, strict=True):
        if row.get("family") and row.get("relation") in ("original", "exact copy"):
            families.setdefault(str(row["family"]), set()).add(name)
    out = {name: frozenset([name]) for name in tracks}
    for members in families.values():
        out.update({name: frozenset(members) for name in members})
    return out
