"""From score matrices and retrained models to the tables of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attr_engine import judge
from attr_engine.counterfactuals import Truth
from attr_engine.jobs import Query

Matrix = np.ndarray


def lds_rows(methods: Mapping[str, Matrix], queries: Sequence[Query], truth: Truth) -> dict[str, Any]:
    """LDS of every method per query, and the ceiling; what :func:`table` needs for paired intervals."""
    kept, losses = truth.halves()
    losses = losses[:, :, truth.columns([q.id for q in queries])]
    top = judge.ceiling(losses)
    return {
        "halves": len(kept), "seeds": len(losses), "queries": [q.id for q in queries],
        "methods": {name: judge.lds(s, kept, losses.mean(axis=0)).tolist() for name, s in methods.items()},
        "split_half": top.seeds.tolist(), "attainable": top.attainable.tolist(),
    }  # fmt: skip


def text(found: judge.Estimate, digits: int = 2) -> str:
    """A mean with its interval."""
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def lds_table(found: Mapping[str, Any], first: str) -> str:
    """Methods by their mean, with the paired difference of the default to each."""
    values = {name: np.array(v) for name, v in found["methods"].items()}
    rows = []
    for name, each in sorted(values.items(), key=lambda item: -np.nanmean(item[1])):
        gap = "" if name == first else text(judge.bootstrap(values[first] - each))
        rows.append([f"**{name}**" if name == first else name, text(judge.bootstrap(each)), gap])
    rows.append(["retraining with another seed (split half)", text(judge.bootstrap(np.array(found["split_half"]))), ""])
    rows.append(["attainable (noise ceiling)", text(judge.bootstrap(np.array(found["attainable"]))), ""])
    return markdown(["method", "LDS", "default minus this, paired"], rows)
