"""How faithful generated pieces are: similarity to tracks, Frechet distance, divergence of label distributions, CLAP score.

All of them look at embeddings or posteriors that somebody else made; see :mod:`attr_engine.embed` for what is there without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from attr_engine.embed import Embedding, k_means
from attr_engine.errors import UserError
from attr_engine.frechet import frechet_distance

_FLOOR = 1e-6  # of a probability, so that a logarithm is finite


def nearest(made: np.ndarray, tracks: np.ndarray) -> np.ndarray:
    """Largest cosine of each embedding ``[n, E]`` with any of ``[m, E]``: ``[n]``; 0 with rows that are zero."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (made, tracks))
    return np.asarray((a @ b.T).max(axis=1))


def frechet(made: Sequence[np.ndarray], of: Embedding, tracks: Sequence[int] | None = None) -> float:
    """Frechet distance of pieces from tracks in an embedding (:func:`attr_engine.frechet.frechet_distance`).

    Args:
        made: latents ``[C, n]``.
        of: embedding of the tracks, and of pieces too.
        tracks: which of its tracks; default all.

    Raises:
        UserError: the embedding is of the tracks only, or there are fewer than 2 pieces or tracks.
    """
    values = of.values if tracks is None else of.values[list(tracks)]
    return frechet_distance(embedded(made, of), values)


def embedded(made: Sequence[np.ndarray], of: Embedding) -> np.ndarray:
    """Pieces ``[C, n]`` in the space of an embedding, ``[M, E]``.

    Raises:
        UserError: the embedding is of the tracks only.
    """
    if of.of_latents is None:
        raise UserError(
            f"the embedding {of.name} is of the training tracks only, not of generated pieces: use another one, or no pieces "
            "(--pieces 0)"
        )
    return of.of_latents(made)


def posterior_kl(
    posterior: Callable[[Sequence[np.ndarray]], np.ndarray], reference: Sequence[np.ndarray], made: Sequence[np.ndarray]
) -> float:  # fmt: skip
    """Mean of :func:`divergences` of a classifier's label posteriors, in nats.

    The text-to-music figure (Kreuk et al., arXiv 2209.15352; there the classifier is PaSST): p of a piece, q of the piece made in its place
    from the same prompt. :class:`attr_engine.passt.Passt` is such a classifier, where its package and a checkpoint are there.

    Args:
        posterior: n pieces to probabilities ``[n, K]``; rows are made to sum to 1, and probabilities to be at least 1e-6.
        reference: p's pieces.
        made: q's, in the same order.

    Raises:
        UserError: numbers that do not fit, or posteriors that are negative, zero everywhere or not finite.
    """
    return float(divergences(posterior(reference), posterior(made)).mean())


def divergences(reference: np.ndarray, made: np.ndarray) -> np.ndarray:
    """``KL(p_i || q_i) = sum_k p_ik log(p_ik / q_ik)`` of posteriors p and q ``[n, K]`` in pairs: ``[n]``, in nats.

    Raises:
        UserError: as :func:`posterior_kl`.
    """
    p, q = _normalised(reference), _normalised(made)
    if p.shape != q.shape:
        raise UserError(
            f"posteriors {list(p.shape)} and {list(q.shape)}: give as many pieces as references, in pairs"
        )
    return np.asarray((p * np.log(p / q)).sum(axis=1))


def cluster_kl(tracks: np.ndarray, made: np.ndarray, clusters: int, seed: int = 0) -> float:
    """``KL(p || q)`` of the parts that tracks (p) and pieces (q) have in the clusters of the tracks' embedding, in nats.

    A stand-in for :func:`posterior_kl` without a classifier: k-means on the tracks' embeddings; each part is counted with one more,
    so that none is zero.

    Args:
        tracks: ``[n, E]``.
        made: ``[m, E]``.
        clusters: K.
        seed: of k-means.
    """
    centres = k_means(tracks, clusters, seed)

    def parts(values: np.ndarray) -> np.ndarray:
        distances = np.square(values[:, None] - centres[None]).sum(axis=-1)
        counts = np.bincount(distances.argmin(axis=1), minlength=clusters) + 1.0
        return np.asarray(counts / counts.sum())

    p, q = parts(tracks), parts(made)
    return float((p * np.log(p / q)).sum())


def clap_score(texts: np.ndarray, audio: np.ndarray) -> float:
    """Mean cosine of text and audio embeddings ``[n, E]`` in pairs (CLAP score; Wu et al., arXiv 2211.06687).

    Raises:
        UserError: other shapes, or an embedding that is zero or not finite.
    """
    if texts.ndim != 2 or texts.shape != audio.shape or not len(texts):
        raise UserError(f"texts {list(texts.shape)} and audio {list(audio.shape)}: give embeddings in pairs")
    lengths = np.linalg.norm(texts, axis=1) * np.linalg.norm(audio, axis=1)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UserError("an embedding of a text or of audio is zero or not finite: embed it again")
    return float(((texts * audio).sum(axis=1) / lengths).mean())


def _normalised(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    usable = values.ndim == 2 and np.isfinite(values).all() and (values >= 0).all()
    if not usable or not (values.sum(axis=1) > 0).all():
        raise UserError(
            "a posterior is negative, not finite or zero everywhere: the classifier has to give probabilities [n, K]"
        )
    values = np.maximum(values / values.sum(axis=1, keepdims=True), _FLOOR)
    return np.asarray(values / values.sum(axis=1, keepdims=True))
