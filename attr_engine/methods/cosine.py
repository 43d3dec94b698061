"""The cosine of latents as a method: the control that any other method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attr_engine.controls import raw_latent_cosine
from attr_engine.jobs import Query
from attr_engine.latents.batch import Tracks
from attr_engine.methods.base import Workspace, method
from attr_engine.models.protocol import Denoiser


@method("cosine", "representation", "cosine of the latents, frame by frame from the start: a control")
@dataclass(frozen=True)
class Cosine:
    """:func:`attr_engine.controls.raw_latent_cosine`."""

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedCosine:
        """Nothing is done beforehand, nothing is kept."""
        return FittedCosine(tracks, model.frames)


@dataclass(frozen=True)
class FittedCosine:
    """The tracks and the model's number of frames."""

    tracks: Tracks
    frames: int

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """Float64 ``[Q, N]``; of a group of tracks, the largest cosine of any of them."""
        members = [(q.tracks, i) for q in queries for i in q.indices]
        first = np.cumsum([0] + [len(q.indices) for q in queries])[:-1]
        return np.asarray(np.maximum.reduceat(raw_latent_cosine(self.tracks, members, self.frames), first))
