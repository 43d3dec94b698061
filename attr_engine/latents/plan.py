"""In which order tracks are read, in which batches, by which rank."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from attr_engine.errors import UserError

ORDERS = ("sequential", "shuffle", "length")


@dataclass(frozen=True)
class Plan:
    """A plan of batches; the same values give the same batches on every machine.

    Attributes:
        batch: tracks a batch.
        order: ``"sequential"`` (as stored), ``"shuffle"`` (by seed and epoch) or ``"length"`` (shortest first, so
            that little is padded).
        seed: of the shuffle.
        epoch: of the shuffle.
        rank: this rank; it takes every ``ranks``-th batch, from its own number on.
        ranks: how many there are.

    Raises:
        UserError: a value that makes no plan.
    """

    batch: int = 32
    order: str = "sequential"
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "order" and (not isinstance(value, int) or isinstance(value, bool)):
                raise UserError(f"{name} is {value!r}: it must be a whole number")
        if self.order not in ORDERS:
            raise UserError(f"there is no order {self.order!r}: use one of {', '.join(ORDERS)}")
        if self.batch < 1 or not 0 <= self.rank < self.ranks:
            raise UserError(
                f"batches of {self.batch} tracks for rank {self.rank} of {self.ranks} make no plan: "
                "use at least one track, and ranks from 0"
            )
        if not (0 <= self.seed < 2**64 and 0 <= self.epoch < 2**64):
            raise UserError(f"seed {self.seed} and epoch {self.epoch} must be between 0 and 2^64 - 1")

    def batches(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tracks int64 ``[n]`` in the order in which this rank reads them, ends int64 ``[batches]``)."""
        order = self._order(lengths)
        begins = np.arange(0, len(order), self.batch)[self.rank :: self.ranks]
        sizes = np.minimum(begins + self.batch, len(order)) - begins
        if self.ranks == 1:
            return order, np.cumsum(sizes)
        chosen = [order[begin : begin + self.batch] for begin in begins]
        return np.concatenate(chosen) if chosen else order[:0], np.cumsum(sizes, dtype=np.int64)

    def _order(self, lengths: np.ndarray) -> np.ndarray:
        if self.order == "length":
            return np.argsort(lengths, kind="stable")
        tracks = np.arange(len(lengths), dtype=np.int64)
        if self.order == "shuffle":
            # Sorted by a hash rather than drawn by numpy, whose generators may change between versions.
            key = _mix(np.uint64(self.seed) ^ _mix(np.array([self.epoch], dtype=np.uint64)))
            return np.argsort(_mix(tracks.astype(np.uint64) ^ key), kind="stable")
        return tracks

    def digest(self, fingerprint: str) -> str:
        """Hex digest of the plan and of the data set that it is for."""
        return hashlib.sha256(json.dumps([fingerprint, asdict(self)]).encode()).hexdigest()[:32]


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014), uint64 to uint64, a bijection."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


def first_batch(position: Any, digest: str, batches: int) -> int:
    """The batch to go on with from a saved position.

    Raises:
        UserError: the position is of another plan or data set, or is none.
    """
    if not isinstance(position, dict) or type(position.get("batch")) is not int:
        raise UserError("the position is not one that a stream gave: use stream.position")
    if position.get("plan") != digest:
        raise UserError(
            "the position belongs to another plan or another data set: resume with the same data, order, seed, epoch, "
            "batch and ranks"
        )
    if not 0 <= position["batch"] <= batches:
        raise UserError(f"the position {position['batch']} is not within the {batches} batches of its plan")
    return int(position["batch"])
