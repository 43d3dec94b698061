"""What embeddings by a network with published weights share: batches, checks, and the options of their methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError
from attr_engine.latents.batch import Tracks
from attr_engine.methods.base import Workspace, option
from attr_engine.methods.checkpoints import SOURCES
from attr_engine.methods.embedder import Embedder
from attr_engine.methods.similarity import HOP, SHORT, WINDOW, FittedSimilarity, fit_similarity
from attr_engine.models.protocol import Denoiser

_ROWS = 8  # windows that go through a network at a time


@dataclass(frozen=True)
class TorchEmbedder:
    """An :class:`~attr_engine.methods.embedder.Embedder` by a torch function.

    Attributes:
        name: as users call it.
        rate: Hz.
        window: seconds.
        hop: seconds.
        fingerprint: hex digest of weights and options.
        forward: windows float32 ``[b, samples]`` to ``[b, E]``, on the device of the network.
        longest: samples of a window at most; 0 for any.
    """

    name: str
    rate: int
    window: float
    hop: float
    fingerprint: str
    forward: Callable[[np.ndarray], Tensor] = field(repr=False)
    longest: int = 0

    def embed(self, windows: np.ndarray) -> np.ndarray:
        """Embeddings float32 ``[n, E]`` of windows float32 ``[n, samples]``, eight at a time.

        Raises:
            UserError: a window that is empty, longer than the network takes, or not finite.
        """
        if windows.ndim != 2 or not windows.size or not np.isfinite(windows).all():
            raise UserError(
                f"{self.name} embeds finite windows [n, samples], not {list(windows.shape)} or NaN"
            )
        if self.longest and windows.shape[1] > self.longest:
            raise UserError(
                f"{self.name} takes windows of at most {self.longest / self.rate:g} s, not {windows.shape[1] / self.rate:g} s: "
                f"use window={self.window:g}"
            )
        with torch.inference_mode():
            rows = [
                self.forward(np.ascontiguousarray(windows[i : i + _ROWS], dtype=np.float32)).float().cpu()
                for i in range(0, len(windows), _ROWS)
            ]
        return torch.cat(rows).numpy()


@dataclass(frozen=True)
class Pretrained:
    """Similarity (:func:`~attr_engine.methods.similarity.fit_similarity`) in a published embedding."""

    method: ClassVar[str]
    checkpoint: str = option("", "the published weights; they are not downloaded")
    window: float = option(0.0, WINDOW)
    hop: float = option(0.0, HOP)
    short: str = option("", SHORT)

    def embedder(self, device: str = "cpu") -> Embedder:
        """The embedder, its weights on a device.

        Raises:
            UserError: weights or a package are missing, restricted or wrong.
        """
        raise NotImplementedError

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedSimilarity:
        """Embed the windows of all tracks, once; the model is not looked at."""
        embedder = self.embedder(work.settings.device)
        return fit_similarity(embedder, tracks, work, self.window, self.hop, self.short)


@dataclass(frozen=True)
class Restricted(Pretrained):
    """The same, of weights whose licence a user has to name."""

    licence: str = option("", "of the weights, named by a user whose use it allows, such as CC-BY-NC-4.0")


def missing_package(method: str, package: str, error: ImportError) -> UserError:
    """What to say where an optional package cannot be imported."""
    return UserError(
        f"{method} needs the package {package} ({error}): pip install {package}; its weights are {SOURCES[method].text}"
    )
