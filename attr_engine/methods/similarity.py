"""Similarity as attribution: the largest cosine of any window of the query with any window of the track.

Barnett et al. 2024 (arXiv 2401.14542); Choi et al. 2025 (arXiv 2506.18312) compare CLAP and CLEWS in this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attr_engine.jobs import Query
from attr_engine.latents.batch import Tracks
from attr_engine.latents.recordings import Recordings
from attr_engine.methods.base import Workspace
from attr_engine.methods.embedder import Embedder
from attr_engine.methods.search import Exact, Searcher, nearest_tracks, track_scores
from attr_engine.methods.windows import Cut, TrackWindows, cut_of, embed_audio, track_windows, unit

WINDOW = "seconds of a window; 0: the embedding's own"
HOP = "seconds from window to window; 0: the embedding's own, at most a window"
SHORT = "of audio shorter than a window: repeat or refuse; empty: refuse where window is given"


def fit_similarity(
    embedder: Embedder, tracks: Tracks, work: Workspace, window: float = 0.0, hop: float = 0.0, short: str = "",
    standardised: bool = False,
) -> FittedSimilarity:  # fmt: skip
    """Embed all windows of all tracks; they are kept in the workspace, and an interrupted call goes on.

    Args:
        embedder: of windows of audio.
        tracks: the training tracks, N, with audio.
        work: keeps the embeddings under a key of embedder, tracks, audio, window and hop.
        window: seconds; 0 for the embedder's own.
        hop: seconds from window to window; 0 for the embedder's own, at most a window.
        short: what becomes of audio that is shorter than a window: ``"repeat"`` plays it again until the window is full,
            ``"refuse"`` raises; the empty default refuses where ``window`` is given and repeats otherwise.
        standardised: whether every dimension gets mean 0 and standard deviation 1 over all windows of the tracks, and that of the
            queries the same way.

    Raises:
        UserError: a window or hop that cannot be; a track without audio or too short; an embedding that is not finite.
    """
    cut = cut_of(embedder, window, hop, short)
    kept = track_windows(
        embedder, tracks, cut, standardised, work.folder, work.progress("embedding", "track")
    )
    return FittedSimilarity(embedder, cut, kept)


@dataclass(frozen=True)
class FittedSimilarity:
    """The windows of the training tracks.

    Attributes:
        embedder: embeds the queries.
        cut: the windows, of tracks and queries.
        windows: of the tracks.
    """

    embedder: Embedder
    cut: Cut
    windows: TrackWindows

    @property
    def fingerprint(self) -> str:
        """Of the embedder, the audio and the windows."""
        return self.windows.key

    def vectors(self, query: Query) -> np.ndarray:
        """Unit embeddings float32 ``[n, E]`` of the windows of a query; of a group, of all its tracks."""
        recordings = Recordings(self.embedder.rate, what="query")
        rows = [
            embed_audio(self.embedder, recordings.audio(query.tracks, i)[0], self.cut, query.tracks.ids[i])
            for i in query.indices
        ]
        return unit(np.concatenate(rows), self.windows.centre, self.windows.scale)

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """Float64 ``[Q, N]``: the largest cosine of all windows of the query with all windows of the track."""
        return np.stack([track_scores(self.vectors(q), self.windows) for q in queries])

    def nearest(
        self, query: Query, k: int, searcher: Searcher | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best tracks of a query, int64, and their scores, float64, best first, at most k of each.

        The searcher is exact unless one of :func:`attr_engine.methods.search.approximate` is given.
        """
        return nearest_tracks(self.vectors(query), self.windows, k, searcher or Exact(self.windows.vectors))
