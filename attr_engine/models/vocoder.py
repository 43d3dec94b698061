"""A small autoencoder in closed form: a channel vocoder (Dudley, 1939).

The latent is how loud each semitone is, frame by frame, and nothing else: no phase, so that a small diffusion
model can learn it. The encoder measures every band with sinusoids of three phases and takes magnitudes; the decoder
plays one sinusoid a semitone. Both are exactly a stable-audio-tools Oobleck autoencoder without strides (one
convolution, ELU, one convolution) behind its ``patched`` pretransform, with weights that are written down rather
than trained: seconds to make, the same bits every time. What it keeps is pitch, rhythm and loudness; what it
loses is timbre beyond the strength of partials, and everything between the semitones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.errors import UserError
from attr_engine.files import whole_file, write_json
from attr_engine.models.autoencoder import BLOCK_NAME, WEIGHTS_NAME, create_pretransform

_PHASES = 3
# elu(g x) + elu(-g x) is g |x| up to 1: with this gain the knee lies 60 dB below full scale.
_GAIN = 1000.0
_LOWEST_NOTE, _SEMITONES = 36, 60  # C2 to B6, as MIDI notes
_WIDE_BANDS, _TONES = 4, 4  # above them: wide bands of a few tones each, up to 0.45 of the sample rate


def config(hop: int = 2048) -> dict[str, Any]:
    """The pretransform's block of a stable-audio-tools model config: ``hop`` samples a frame, 64 channels."""
    bands = _SEMITONES + _WIDE_BANDS
    inner = 2 * _PHASES * (_SEMITONES + _WIDE_BANDS * _TONES)
    layers = {"c_mults": [], "strides": [], "use_snake": False, "latent_dim": bands}
    return {
        "type": "autoencoder",
        "scale": 1.0,
        "config": {
            "encoder": {"type": "oobleck", "config": {"in_channels": hop, "channels": inner, **layers}},
            "decoder": {
                "type": "oobleck",
                "config": {"out_channels": hop, "channels": bands, "final_tanh": False, **layers},
            },
            "latent_dim": bands,
            "downsampling_ratio": hop,
            "io_channels": 1,
            "pretransform": {"type": "patched", "config": {"channels": 1, "patch_size": hop}},
        },
    }


def band_tones(sample_rate: int) -> list[np.ndarray]:
    """The frequencies in Hz that make up each band."""
    notes = 440.0 * 2.0 ** ((np.arange(_LOWEST_NOTE, _LOWEST_NOTE + _SEMITONES) - 69) / 12)
    high = np.geomspace(notes[-1] * 1.1, 0.45 * sample_rate, _WIDE_BANDS * _TONES)
    return [*notes[:, None], *high.reshape(_WIDE_BANDS, _TONES)]


def _analysis(tones: Sequence[np.ndarray], sample_rate: int, hop: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the encoder: ``[inner, hop, 7]``, and ``[bands, inner]`` that sums magnitudes to amplitudes."""
    place = (np.arange(7 * hop) - 3.5 * hop + 0.5) / sample_rate  # seconds from the middle of the frame
    rows: list[np.ndarray] = []
    sums = np.zeros((len(tones), 2 * _PHASES * sum(map(len, tones))))
    for band, frequencies in enumerate(tones):
        for f in frequencies:
            # Long enough to tell a semitone from the next, at least a frame, at most what seven patches hold.
            length = float(
                np.clip(2.0 / (f * (2.0 ** (1 / 12) - 1.0)), hop / sample_rate, 6.0 * hop / sample_rate)
            )
            window = np.where(np.abs(place) < length / 2, 1.0 + np.cos(2 * np.pi * place / length), 0.0)
            for phase in np.arange(_PHASES) * np.pi / _PHASES:
                wave = window * np.cos(2 * np.pi * f * place + phase) * (2.0 * _GAIN / window.sum())
                for sign in (1.0, -1.0):
                    sums[band, len(rows)] = np.pi / 2 / _PHASES / _GAIN / np.sqrt(len(frequencies))
                    rows.append(sign * wave)
    return np.stack(rows).reshape(-1, 7, hop).transpose(0, 2, 1), sums


def _synthesis(tones: Sequence[np.ndarray], sample_rate: int, hop: int) -> np.ndarray:
    """Weights of the decoder, ``[hop, bands, 7]``: a sinusoid for each tone, faded from frame to frame.

    Frequencies are rounded to whole periods a frame, so that every frame carries on the phase of the last.
    """
    sample, rng = np.arange(hop), np.random.default_rng(0)
    out = np.zeros((hop, len(tones), 7))
    for band, frequencies in enumerate(tones):
        periods = np.round(frequencies * hop / sample_rate)
        phases = rng.uniform(0, 2 * np.pi, len(frequencies))
        wave = np.cos(2 * np.pi * periods[:, None] * sample[None] / hop + phases[:, None]).sum(axis=0)
        for tap, shift in ((2, 1.5), (3, 0.5), (4, -0.5)):  # the frame before, this one, the next
            position = sample / hop + shift
            fade = np.where((position >= 0) & (position < 2), 0.5 - 0.5 * np.cos(np.pi * position), 0.0)
            out[:, band, tap] = fade * wave / np.sqrt(len(frequencies))
    return out


def _set(conv: Any, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
    """Give a weight-normalised convolution this weight and bias."""
    value = torch.tensor(weight, dtype=torch.float32)
    with torch.no_grad():
        conv.weight_v.copy_(value)
        conv.weight_g.copy_(value.norm(dim=(1, 2), keepdim=True))
        if conv.bias is not None:
            conv.bias.copy_(
                torch.zeros(len(value)) if bias is None else torch.tensor(bias, dtype=torch.float32)
            )


def _tap(matrix: np.ndarray, taps: int) -> np.ndarray:
    """A matrix as a convolution over ``taps`` frames that looks at the middle one only."""
    out = np.zeros((*matrix.shape, taps))
    out[:, :, taps // 2] = matrix
    return out


def _write(
    model: Any, weights: tuple[np.ndarray, np.ndarray, np.ndarray], mean: np.ndarray, gain: np.ndarray
) -> None:
    """Write the weights into an Oobleck autoencoder: latent = (amplitude - mean) * gain."""
    analysis, sums, synthesis = weights
    first, _, last = model.encoder.layers
    _set(first, analysis)
    _set(last, _tap(gain[:, None] * sums, 3), -gain * mean)
    start, _, end, _ = model.decoder.layers
    _set(start, _tap(np.diag(_GAIN / gain), 7), _GAIN * mean)  # the ELU cuts negative amplitudes off
    _set(end, synthesis / _GAIN)


@torch.no_grad()
def _statistics(model: Any, clips: Sequence[np.ndarray], hop: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every band's amplitude over all clips."""
    frames = []
    for clip in clips:
        whole = -(-clip.shape[1] // hop) * hop
        padded = np.pad(clip.astype(np.float32), ((0, 0), (0, whole - clip.shape[1])))
        frames.append(model.encode(torch.from_numpy(padded)[None])[0].double().numpy())
    amplitudes = np.concatenate(frames, axis=1)
    return amplitudes.mean(axis=1), amplitudes.std(axis=1)


def fit_autoencoder(
    clips: Sequence[np.ndarray], sample_rate: int, out: Path, hop: int = 2048
) -> dict[str, float]:
    """Make a vocoder whose latents of these clips are centred and of variance about 1; write its folder.

    Args:
        clips: mono float32 ``[1, samples]``.
        sample_rate: Hz, at least 8000.
        out: folder for ``pretransform.json`` and the weights.
        hop: samples a latent frame; a semitone needs about 128 ms to be told from the next.

    Returns:
        ``frames_per_second`` and ``channels`` of its latents.

    Raises:
        UserError: unusable numbers, or nothing but silence.
    """
    from safetensors.torch import save_file

    if sample_rate < 8000 or not sample_rate // 64 <= hop <= sample_rate:
        raise UserError(
            f"sample rate {sample_rate} and hop {hop}: use at least 8000 Hz, and a hop of 16 ms to 1 s"
        )
    block, tones = config(hop), band_tones(sample_rate)
    weights = (*_analysis(tones, sample_rate, hop), _synthesis(tones, sample_rate, hop))
    model = create_pretransform(block, sample_rate, "autoencoder config").model
    _write(model, weights, np.zeros(len(tones)), np.ones(len(tones)))
    mean, spread = _statistics(model, clips, hop)
    if not spread.max() > 1e-6:
        raise UserError("the audio is all silence: there is nothing to fit an autoencoder to")
    # Half-way to unit variance: neither do the few loudest bands decide a model's whole loss, nor the faintest.
    gain = np.maximum(spread, spread.max() * 1e-3) ** -0.5
    _write(model, weights, mean, gain / np.sqrt(np.mean((spread * gain) ** 2)))
    with whole_file(out / WEIGHTS_NAME) as part:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, part)
    write_json(out / BLOCK_NAME, {"sample_rate": sample_rate, "pretransform": block})
    return {"frames_per_second": sample_rate / hop, "channels": float(len(tones))}
