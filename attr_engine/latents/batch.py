"""A padded batch of tracks, and what a set of tracks has to offer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Tracks padded to one number of frames.

    Attributes:
        ids: stable ids, one a track.
        latents: ``[B, C, F]``; frames past the valid ones hold the padding (silence or zeros).
        valid: int64 ``[B]``, valid frames of each track.
        conditioning: one mapping a track, what the model's conditioners read.
    """

    ids: Sequence[str]
    latents: Tensor
    valid: Tensor
    conditioning: Sequence[Mapping[str, Any]]

    def mask(self) -> Tensor:
        """Bool ``[B, F]``: ``frame < valid frames``."""
        return torch.arange(self.latents.shape[2])[None, :] < self.valid[:, None]


T = TypeVar("T")


class Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for; equal to any sequence of equal items."""

    def item(self, index: int) -> T:
        """The item at a place from 0 up to the length."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.item(i) for i in range(*index.indices(len(self)))]
        return self.item(range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


class Tracks(Protocol):
    """A set of tracks: training data or queries.

    Attributes:
        ids: stable ids in storage order, unique.
        channels: C of every latent.
        lengths: int64 ``[N]``, valid frames.
        info: one mapping a track with whatever is known of it (title, artist, licence, ...).
        fingerprint: hex digest that changes when any latent, id or conditioning changes.
    """

    @property
    def ids(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def lengths(self) -> np.ndarray: ...  # noqa: D102
    @property
    def info(self) -> Sequence[Mapping[str, Any]]: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], frames: int) -> Batch:
        """Tracks at ``indices``, in that order, padded to ``frames``."""
        ...


class Chosen:
    """Some tracks of a set, as a set."""

    def __init__(self, tracks: Tracks, indices: Sequence[int]) -> None:
        self._tracks, self._indices = tracks, list(indices)

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the chosen tracks."""
        return [self._tracks.ids[i] for i in self._indices]

    @property
    def channels(self) -> int:
        """C."""
        return self._tracks.channels

    @property
    def lengths(self) -> np.ndarray:
        """Valid frames."""
        return self._tracks.lengths[self._indices]

    @property
    def info(self) -> Sequence[Mapping[str, Any]]:
        """Metadata."""
        return [self._tracks.info[i] for i in self._indices]

    @property
    def extra(self) -> Mapping[str, Any]:
        """What is known of the whole set, as where its audio lies."""
        return getattr(self._tracks, "extra", {})

    @cached_property
    def fingerprint(self) -> str:
        """Of the set and the choice."""
        return hashlib.sha256(json.dumps([self._tracks.fingerprint, self._indices]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Sequence[int], frames: int) -> Batch:
        """Tracks by their places in this set."""
        return self._tracks.batch([self._indices[i] for i in indices], frames)


def check_tracks(tracks: Tracks, channels: int, frames: int, what: str) -> None:
    """Refuse a set of tracks that the model cannot take, with the first track that is wrong.

    Args:
        tracks: the set.
        channels: C of the model.
        frames: F of the model.
        what: how to call the set in the message, e.g. ``"query"``.

    Raises:
        UserError: the set is empty, has other channels, or a track is empty or longer than the model.
    """
    if len(tracks) == 0:
        raise UserError(f"the {what} set is empty: ingest at least one track")
    if tracks.channels != channels:
        raise UserError(
            f"the {what} set has latents of {tracks.channels} channels, the model takes {channels}: "
            "encode it with the model's own autoencoder (attr-engine ingest --model ...)"
        )
    empty = np.flatnonzero(tracks.lengths < 1)
    if len(empty):
        raise UserError(f"{what} {tracks.ids[int(empty[0])]!r} has no valid frames: leave it out")
    too_long = np.flatnonzero(tracks.lengths > frames)
    if len(too_long):
        i = int(too_long[0])
        raise UserError(
            f"{what} {tracks.ids[i]!r} has {int(tracks.lengths[i])} frames, the model takes at most {frames}: "
            "cut it, or ingest it with --long window"
        )


def pad(latents: Sequence[np.ndarray], frames: int, padding: np.ndarray | None, dtype: torch.dtype) -> Tensor:
    """Frame-major latents ``[n_i, C]`` as one ``[B, C, frames]`` tensor (a view of frame-major memory)."""
    channels = latents[0].shape[1]
    out = torch.zeros(len(latents), frames, channels, dtype=dtype)
    if padding is not None:
        out[:] = torch.as_tensor(padding, dtype=dtype)
    for row, latent in zip(out, latents, strict=True):
        row[: len(latent)] = torch.as_tensor(np.ascontiguousarray(latent), dtype=dtype)
    return out.transpose(1, 2)


def stable_text(value: Any) -> str:
    """JSON that is the same for the same values: mappings sorted, arrays and tensors by their bytes."""
    return json.dumps(value, sort_keys=True, default=_array_text)


def _array_text(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    array = np.asarray(value)
    if array.dtype == object:
        return repr(value)
    return [str(array.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]
