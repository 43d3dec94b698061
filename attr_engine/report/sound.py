"""What a track sounds like: from the audio that it was made from, else decoded from its latent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from attr_engine.errors import UserError
from attr_engine.latents.audio import SUFFIXES, read_audio
from attr_engine.latents.batch import Tracks
from attr_engine.latents.ingest import file_hash
from attr_engine.models.protocol import Denoiser
from attr_engine.report.audio import encode_clip, waveform_peaks
from attr_engine.report.data import Clip
from attr_engine.report.tables import number_of

_PEAKS = 160


class Sound:
    """The audio of tracks, mono.

    Attributes:
        rate: in Hz; 0 where the model names none, and then nothing has a sound.
    """

    def __init__(self, model: Denoiser) -> None:
        self._decode: Callable[[torch.Tensor], torch.Tensor] | None = getattr(model, "decode", None)
        self._frames = model.frames
        self.rate = int(getattr(model, "sample_rate", 0))

    def clip(self, tracks: Tracks, index: int) -> Clip | None:
        """The clip of a track, None where there is neither audio nor a decoder that gives any."""
        audio = self.from_file(tracks, index)
        if audio is None:
            audio = self.from_latent(tracks, index)
        if audio is None:
            return None
        peak = float(np.abs(audio).max())
        mime, data = encode_clip(audio / peak if peak > 1.0 else audio, self.rate)
        return Clip(mime, data, waveform_peaks(audio, _PEAKS))

    def from_file(self, tracks: Tracks, index: int) -> np.ndarray | None:
        """``[1, samples]`` float32 of the recording that was ingested; None where it is not there, is another one or is not finite."""
        info, root = tracks.info[index], getattr(tracks, "extra", {}).get("root")
        source, digest = info.get("source"), info.get("sha256")
        if not isinstance(root, str) or not isinstance(source, str) or not root or self.rate <= 0:
            return None
        # A manifest is data from outside, and a report is passed on: whoever made the manifest may name any
        # folder and file, but only of a file that was ingested does it have the hash.
        try:
            path = (Path(root) / source).resolve()
            if path.suffix.lower() not in SUFFIXES or Path(root).resolve() not in path.parents:
                return None
            if not path.is_file() or file_hash(path) != digest:
                return None
            audio = read_audio(path, self.rate, 1)
        except (UserError, OSError, ValueError):
            return None
        start = round(max(0.0, number_of(info, "start") or 0.0) * self.rate)
        stop = start + round(max(0.0, number_of(info, "seconds") or 1e9) * self.rate)
        return _finite(audio[:, start:stop]) if start < min(stop, audio.shape[1]) else None

    def from_latent(self, tracks: Tracks, index: int) -> np.ndarray | None:
        """``[1, samples]`` float32, decoded; None where the model has no decoder, or what it gives is not finite."""
        if self._decode is None or self.rate <= 0:
            return None
        batch = tracks.batch([index], self._frames)
        try:
            audio = self._decode(batch.latents[:, :, : int(batch.valid[0])]).detach().cpu().float()
        except UserError:
            return None
        return _finite(np.asarray(audio[0].mean(dim=0, keepdim=True).numpy()))


def _finite(audio: np.ndarray) -> np.ndarray | None:
    return audio if np.isfinite(audio).all() else None
