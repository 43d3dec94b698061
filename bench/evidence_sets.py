"""What the evidence is about: a finished demo, its larger sets of queries, and the targets of self-influence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine import LatentDataset, load_model
from attr_engine.evaluate import clusters
from attr_engine.jobs import Query

TARGETS = 40


@dataclass(frozen=True)
class Sets:
    """The demo at ``demo`` and everything made from it at ``out``."""

    demo: Path
    out: Path

    @cached_property
    def model(self) -> Any:
        """theta_0."""
        return load_model(self.demo / "model")

    @cached_property
    def tracks(self) -> Any:
        """The training tracks."""
        return LatentDataset(self.demo / "latents")

    @cached_property
    def known(self) -> Any:
        """Queries with known parents: eight kinds of relatives."""
        return LatentDataset(self.out / "queries" / "known")

    @cached_property
    def unknown(self) -> Any:
        """Queries that no training track made: four kinds."""
        return LatentDataset(self.out / "queries" / "unknown")

    @cached_property
    def generated(self) -> Any:
        """Pieces of the model's own sampler."""
        return LatentDataset(self.out / "generated")

    @cached_property
    def targets(self) -> list[int]:
        """Training tracks to unlearn: none has an exact copy, a quarter is under 10 s, half of what is left for choices."""
        copies = clusters(self.tracks.ids, self.tracks.info)
        order = [int(i) for i in np.random.default_rng(6).permutation(len(self.tracks))]
        single = [i for i in order if len(copies[self.tracks.ids[i]]) == 1]
        short = [i for i in single if float(self.tracks.info[i]["seconds"]) < 10.0]
        return sorted(
            [*short[: TARGETS // 4], *[i for i in single if i not in short][: TARGETS - TARGETS // 4]]
        )

    @cached_property
    def choosing_targets(self) -> list[int]:
        """Other training tracks, on which settings are chosen."""
        copies = clusters(self.tracks.ids, self.tracks.info)
        order = [int(i) for i in np.random.default_rng(7).permutation(len(self.tracks))]
        return sorted(
            [i for i in order if i not in self.targets and len(copies[self.tracks.ids[i]]) == 1][:TARGETS]
        )

    def kernels(self, function: str, plan: str, masks: str) -> Path:
        """The file of inner products of whole gradients."""
        return self.out / "kernels" / f"{function}_{plan}_{masks}.npz"

    @property
    def made_of(self) -> list[str]:
        """What files that are kept depend on: the model and the training tracks."""
        return [self.model.fingerprint, self.tracks.fingerprint]

    @property
    def quarters(self) -> Path:
        """The file of products by quarters of the timesteps."""
        return self.out / "quarters.npz"

    def queries(self, *names: str) -> list[Query]:
        """Queries of some sets, in order; ``targets`` are training tracks."""
        out: list[Query] = []
        for name in names:
            if name in ("targets", "choosing_targets"):
                out += [Query(self.tracks, i, "training track") for i in getattr(self, name)]
            else:
                data = getattr(self, name)
                out += [Query(data, i, str(data.info[i].get("kind") or "query")) for i in range(len(data))]
        return out


def part_of(query: Query) -> str:
    """``"choose"`` or ``"judge"``: settings are chosen on the one and judged on the other."""
    info = query.tracks.info[query.index]
    return str(info.get("part") or ("choose" if query.index % 2 == 0 else "judge"))


def relation_of(query: Query) -> str:
    """What a query is."""
    info = query.tracks.info[query.index]
    return str(info.get("relation") or info.get("kind") or query.kind)
