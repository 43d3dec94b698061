"""Harmony, timbre and rhythm of audio as an embedding that needs no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attr_engine.errors import UserError
from attr_engine.latents.batch import Tracks
from attr_engine.methods.base import Workspace, method, option
from attr_engine.methods.similarity import HOP, SHORT, WINDOW, FittedSimilarity, fit_similarity
from attr_engine.models.protocol import Denoiser
from attr_engine.runs import key_of

_FFT, _HOP, _MELS, _BINS = 2048, 512, 64, 12
_FLOOR = 1e-8  # of power, beside the loudest of a window: 80 dB
_TEMPI = np.geomspace(30.0, 480.0, 21)  # beats a minute: edges of 20 bins, five an octave


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise UserError(
            f"the method features needs {error.name}: pip install 'attr-engine[perturb]'"
        ) from error
    return librosa


class Features:
    """72 numbers a window: 24 of harmony, 24 of timbre and 24 of rhythm, none of which depends on loudness.

    Harmony: mean and standard deviation of the 12 pitch classes over the frames. Timbre: those of the mel-frequency cepstral
    coefficients 1 to 12. Rhythm: autocorrelation of the onset strength at lags of 30 to 480 beats a minute in 20 bins, and the
    onset strength's standard deviation, skewness, largest value and share of frames above their mean.

    Raises:
        UserError: librosa is missing.
    """

    name, rate, window, hop = "features", 22050, 6.0, 3.0

    def __init__(self) -> None:
        librosa = self._librosa = _librosa()
        self._chroma = librosa.filters.chroma(sr=self.rate, n_fft=_FFT, tuning=0.0)  # [12, bins]
        self._mel = librosa.filters.mel(sr=self.rate, n_fft=_FFT, n_mels=_MELS)  # [mels, bins]
        self.fingerprint = key_of("features 1", librosa.__version__)

    def embed(self, windows: np.ndarray) -> np.ndarray:
        """Float32 ``[n, 72]`` of windows ``[n, samples]``; of silence, zeros."""
        return np.stack([self._one(x) for x in windows]).astype(np.float32)

    def _one(self, x: np.ndarray) -> np.ndarray:
        """Of one window, float64 ``[72]``."""
        x = np.pad(x, (0, max(0, _FFT - len(x))))
        power = np.abs(self._librosa.stft(x, n_fft=_FFT, hop_length=_HOP)) ** 2  # [bins, frames]
        loudest = power.max()
        if not loudest > 0:
            return np.zeros(72)
        power = power / loudest
        chroma = self._chroma @ power
        chroma /= np.maximum(chroma.max(axis=0), _FLOOR)
        mel = 10 * np.log10(np.maximum(self._mel @ power, _FLOOR * self._mel.max()))  # dB [mels, frames]
        cepstrum = self._librosa.feature.mfcc(S=mel, n_mfcc=_BINS + 1)[1:]
        statistics = [f(part, axis=1) for part in (chroma, cepstrum) for f in (np.mean, np.std)]
        return np.concatenate([*statistics, self._rhythm(mel)])

    def _rhythm(self, mel: np.ndarray) -> np.ndarray:
        """Of the onset strength, the mean rise of all bands from frame to frame: float64 ``[24]``."""
        onset = np.maximum(np.diff(mel, axis=1), 0.0).mean(axis=0) if mel.shape[1] > 1 else np.zeros(1)
        centred = onset - onset.mean()
        power = np.fft.rfft(centred, 2 * len(centred))
        correlation = np.fft.irfft(np.abs(power) ** 2)[: len(centred)]
        correlation = correlation / correlation[0] if correlation[0] > 0 else np.zeros(len(centred))
        tempo = 60.0 * self.rate / _HOP / np.maximum(np.arange(len(centred)), 1)  # of every lag
        bins = [
            correlation[1:][(tempo[1:] >= low) & (tempo[1:] < high)]
            for low, high in zip(_TEMPI, _TEMPI[1:], strict=False)
        ]
        spread = centred.std()
        third = (centred**3).mean() / spread**3 if spread > 0 else 0.0
        shape = [spread, third, onset.max(), (onset > onset.mean()).mean()]
        return np.array([b.max() if len(b) else 0.0 for b in bins] + shape)


@method(
    "features",
    "black box",
    "cosine of chroma, timbre and rhythm statistics of windows (librosa); needs no weights",
)
@dataclass(frozen=True)
class FeatureSimilarity:
    """:class:`Features`, every one standardised over the windows of the training tracks."""

    window: float = option(0.0, WINDOW)
    hop: float = option(0.0, HOP)
    short: str = option("", SHORT)
    standardised: ClassVar[bool] = True

    def embedder(self, device: str = "cpu") -> Features:
        """See :class:`Features`, which needs no device."""
        return Features()

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedSimilarity:
        """Embed all windows of the tracks."""
        return fit_similarity(
            self.embedder(), tracks, work, self.window, self.hop, self.short, self.standardised
        )
