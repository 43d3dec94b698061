"""A set of tracks held in memory, from arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError
from attr_engine.latents.batch import Batch, pad, stable_text


class MemoryTracks:
    """Tracks from arrays: for tests, notebooks and anything that fits in memory.

    Args:
        ids: unique, non-empty strings.
        latents: one ``[C, n]`` array a track, its valid frames only.
        conditioning: one mapping a track (default: empty mappings).
        info: one mapping a track (default: empty mappings).
        padding: ``[C]``, the latent of silence; default zeros.

    Raises:
        UserError: duplicate ids, differing channels, no frames, NaN or infinity, by item, or a padding
            that is no latent.
    """

    def __init__(
        self,
        ids: Sequence[str],
        latents: Sequence[np.ndarray],
        conditioning: Sequence[Mapping[str, Any]] | None = None,
        info: Sequence[Mapping[str, Any]] | None = None,
        padding: np.ndarray | None = None,
    ) -> None:
        self.ids = list(ids)
        self.conditioning = [dict(c) for c in conditioning] if conditioning is not None else [{} for _ in ids]
        self.info = [dict(i) for i in info] if info is not None else [{} for _ in ids]
        if not len(self.ids) == len(latents) == len(self.conditioning) == len(self.info):
            raise UserError("ids, latents, conditioning and info must have one entry a track")
        check_ids(self.ids)
        checked = [
            check_latent(x if isinstance(x, Tensor) else np.asarray(x), name)
            for x, name in zip(latents, self.ids, strict=True)
        ]
        # numpy has no bfloat16
        self._latents = [(x.float() if x.dtype == torch.bfloat16 else x).numpy() for x in checked]
        self.channels = self._latents[0].shape[1] if self._latents else 0
        for x, name in zip(self._latents, self.ids, strict=True):
            if x.shape[1] != self.channels:
                raise UserError(f"track {name!r} has {x.shape[1]} channels, the first one {self.channels}")
        self.lengths = np.array([len(x) for x in self._latents], dtype=np.int64)
        self._padding = padding
        if self._latents:
            check_padding(padding, self.channels, "the padding (latent of silence)")
        self.fingerprint = self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, x, c in zip(self.ids, self._latents, self.conditioning, strict=True):
            digest.update(stable_text([name, x.shape, str(x.dtype), c]).encode())
            digest.update(np.ascontiguousarray(x).tobytes())
        if self._padding is not None:
            digest.update(np.ascontiguousarray(self._padding).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int], frames: int) -> Batch:
        """Tracks at ``indices``, padded to ``frames``; latents float64 if any array is, else float32.

        Raises:
            UserError: a track is longer than ``frames``.
        """
        for i in indices:
            if self.lengths[i] > frames:
                raise UserError(
                    f"track {self.ids[i]!r} has {self.lengths[i]} frames, more than the {frames} asked for: cut it"
                )
        chosen = [self._latents[i] for i in indices]
        dtype = torch.float64 if any(x.dtype == np.float64 for x in self._latents) else torch.float32
        return Batch(
            ids=[self.ids[i] for i in indices],
            latents=pad(chosen, frames, self._padding, dtype),
            valid=torch.as_tensor(self.lengths[list(indices)]),
            conditioning=[self.conditioning[i] for i in indices],
        )


_MAX_PADDING = 65504.0  # the largest float16


def check_padding(padding: Any, channels: int, what: str) -> None:
    """Refuse a padding that is neither None nor one finite number a channel.

    Raises:
        UserError: starts with ``what``.
    """
    if padding is None:
        return
    try:
        values = np.asarray(padding, dtype=np.float64)
    except (ValueError, TypeError):
        values = np.empty(0)
    # NaN compares as False.
    if isinstance(padding, str) or values.shape != (channels,) or not (abs(values) <= _MAX_PADDING).all():
        raise UserError(
            f"{what} is not one finite number for each of the {channels} channels: encode silence again"
        )


def check_ids(ids: Sequence[str], seen: set[str] | None = None) -> None:
    """Refuse empty and duplicate ids by name.

    Args:
        ids: the ids.
        seen: ids that came before; the new ones are added.

    Raises:
        UserError: an id is empty, stands twice, or is not text that can be stored as UTF-8.
    """
    seen = set() if seen is None else seen
    for name in ids:
        if not isinstance(name, str):
            raise UserError(
                f"the id {name!r} is {type(name).__name__}, expected text: give every track a str"
            )
        if not name:
            raise UserError("a track has an empty id: give every track an id of its own")
        if not name.isascii() and any("\ud800" <= x <= "\udfff" for x in name):
            raise UserError(
                f"the id {name!r} is not valid Unicode: rename the file, or give it an id in the metadata"
            )
        if name in seen:
            raise UserError(f"the id {name!r} stands twice: ids must be unique, rename one of the two")
        seen.add(name)


def check_latent(latent: np.ndarray | Tensor, name: str) -> Tensor:
    """Check one ``[C, n]`` latent and return it frame-major, contiguous, ``[n, C]``.

    Args:
        latent: float16, bfloat16 (torch), float32 or float64 ``[C, n]``.
        name: how the message calls it.

    Raises:
        UserError: wrong rank or dtype, no frames, or a value that is not finite.
    """
    if latent.ndim != 2:
        raise UserError(f"the latent of {name!r} has shape {list(latent.shape)}, expected [channels, frames]")
    if isinstance(latent, np.ndarray) and latent.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"the latent of {name!r} is {latent.dtype}, expected float16, float32 or float64")
    if isinstance(latent, np.ndarray):
        frame_major = np.ascontiguousarray(latent.T, dtype=latent.dtype.newbyteorder("="))
        tensor = torch.from_numpy(frame_major if frame_major.flags.writeable else frame_major.copy())
    else:
        tensor = latent.detach().cpu().T.contiguous()
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(f"the latent of {name!r} is {tensor.dtype}, expected a floating-point type")
    if tensor.numel() == 0:
        raise UserError(f"the latent of {name!r} is empty (shape {list(latent.shape)}): leave the track out")
    finite = torch.isfinite(tensor)
    if not finite.all():
        frame = int(torch.nonzero(~finite.all(dim=1))[0])
        raise UserError(
            f"the latent of {name!r} holds NaN or infinity (first at frame {frame}): encode it again"
        )
    return tensor
