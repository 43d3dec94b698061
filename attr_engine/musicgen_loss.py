"""A MusicGen and tracks of codes as a :class:`attr_engine.track_loss.TrackLoss`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from attr_engine.errors import UserError
from attr_engine.latents.batch import Tracks, check_tracks
from attr_engine.models.musicgen import MusicGen
from attr_engine.models.protocol import select_parameters

_READ = 256  # tracks read at once for their texts


class MusicGenLoss:
    """The cross-entropy of each track's codes under its text.

    Args:
        model: the music model.
        tracks: codes as its own audio encoder makes them (``attr-engine ingest --autoencoder MUSICGEN_FOLDER``).
        layers: groups of layers, or patterns of parameter names, that are updated.
        text: name of the conditioning that holds the text.

    Attributes:
        ids: of the tracks.
        parameters: of the layers.
        ceiling: ``log V`` nats, the loss of a uniform predictor of V codes.
        labels: the texts.

    Raises:
        UserError: unknown layers; or a track that is empty, too long, of another model, or without text.
    """

    def __init__(
        self, model: MusicGen, tracks: Tracks, layers: Sequence[str] = ("all",), text: str = "prompt"
    ) -> None:
        check_tracks(tracks, model.channels, model.frames, "track")
        made = getattr(tracks, "extra", {}).get("encoder")
        if made not in (None, model.encoder.fingerprint):
            raise UserError(
                f"the tracks were encoded by another model than {model.folder}: ingest them with --autoencoder {model.folder}"
            )
        self._model, self._tracks, self.ids = model, tracks, list(tracks.ids)
        # Of a Denoiser only what a MusicGen has too is looked at.
        self.parameters = select_parameters(cast(Any, model), layers)
        self.ceiling = math.log(model.vocabulary)
        self.labels = _texts(tracks, text)

    def losses(self, indices: Sequence[int], step: int, labels: Sequence[int] | None = None) -> Tensor:
        """Loss of each track, float64 ``[B]``, differentiable; the same in every step."""
        longest = int(self._tracks.lengths[list(indices)].max())
        texts = [self.labels[i] for i in (indices if labels is None else labels)]
        return self._model.losses(self._tracks.batch(list(indices), longest), texts)


def _texts(tracks: Tracks, name: str) -> list[str]:
    found: list[str] = []
    for first in range(0, len(tracks), _READ):
        some = list(range(first, min(first + _READ, len(tracks))))
        batch = tracks.batch(some, int(tracks.lengths[some].max()))
        for track, row in zip(batch.ids, batch.conditioning, strict=True):
            text = row.get(name)
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"track {track!r} has no text {name!r}: ingest with --metadata FILE --condition {name}, or name another with --text"
                )
            found.append(text)
    return found
