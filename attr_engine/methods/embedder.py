"""What a black-box method needs of an embedding of audio."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Embedder(Protocol):
    """An embedding of windows of audio.

    Attributes:
        name: as users call it.
        rate: Hz of the audio that it takes; it takes one channel.
        window: seconds of a window that it was made for, the default of ``--window``.
        hop: seconds from window to window, the default.
        fingerprint: hex digest that changes when weights or options change.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def rate(self) -> int: ...  # noqa: D102
    @property
    def window(self) -> float: ...  # noqa: D102
    @property
    def hop(self) -> float: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def embed(self, windows: np.ndarray) -> np.ndarray:
        """Embeddings float32 ``[n, E]``, finite, of windows of audio float32 ``[n, samples]`` at ``rate``."""
        ...
