"""A small autoencoder in closed form: principal components of a lapped transform.

Audio is cut into MDCT frames (sine window, perfect reconstruction), and the frames are projected onto their
principal components. Both steps are linear, so encoder and decoder are exactly one convolution each over
patches of audio: they are written as the weights of a stable-audio-tools Oobleck autoencoder behind its
``patched`` pretransform, and nothing but stable-audio-tools is needed to use them. No training, seconds to fit,
the same bits every time. MDCT: Princen & Bradley, 1986.
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

# Bins are weighted by frequency^_TILT before the components are taken: energy alone would spend them all on the bass.
_TILT = 0.25
# Of a Snake activation x + sin^2(alpha x) / beta, alpha = exp(_LINEAR): what it adds is below float32.
_LINEAR = -14.0
# Frames are thinned out evenly to about this many: enough for a covariance of a few hundred bins.
_MAX_FRAMES = 40_000


def mdct(hop: int) -> np.ndarray:
    """The MDCT of ``2 * hop`` samples as a matrix ``[hop, 2 * hop]``, with orthonormal overlap."""
    sample, bin_ = np.arange(2 * hop), np.arange(hop)
    window = np.sin(np.pi * (sample + 0.5) / (2 * hop))
    waves = np.cos(np.pi / hop * (sample[None] + 0.5 + hop / 2) * (bin_[:, None] + 0.5))
    return np.asarray(np.sqrt(2.0 / hop) * window[None] * waves)


def config(channels: int = 64, hop: int = 512) -> dict[str, Any]:
    """The pretransform's block of a stable-audio-tools model config: linear, ``hop`` samples a frame."""
    layers = {"channels": channels, "c_mults": [], "strides": [], "use_snake": True, "latent_dim": channels}
    return {
        "type": "autoencoder",
        "scale": 1.0,
        "config": {
            "encoder": {"type": "oobleck", "config": {"in_channels": hop, **layers}},
            "decoder": {"type": "oobleck", "config": {"out_channels": hop, "final_tanh": False, **layers}},
            "latent_dim": channels,
            "downsampling_ratio": hop,
            "io_channels": 1,
            "pretransform": {"type": "patched", "config": {"channels": 1, "patch_size": hop}},
        },
    }


def _coefficients(clip: np.ndarray, matrix: np.ndarray, step: int) -> np.ndarray:
    """MDCT coefficients ``[frames, hop]`` of every ``step``-th frame of a mono clip."""
    hop = len(matrix)
    whole = -(-len(clip) // hop) * hop
    padded = np.pad(clip.astype(np.float64), (hop, whole - len(clip)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * hop)[:: hop * step]
    return np.asarray(frames @ matrix.T)


def components(clips: Sequence[np.ndarray], channels: int, hop: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Analysis and synthesis matrices of the principal components.

    Args:
        clips: mono float32 ``[1, samples]``.
        channels: C, how many components.
        hop: samples a frame.

    Returns:
        Analysis ``[C, 2 * hop]``, synthesis ``[2 * hop, C]`` and the signal-to-noise ratio in dB of
        ``synthesis(analysis(clips))``.

    Raises:
        UserError: more channels than a frame has samples, or nothing but silence.
    """
    if not 1 <= channels <= hop:
        raise UserError(f"{channels} channels from frames of {hop} samples: use at most {hop} channels")
    matrix = mdct(hop)
    weight = np.arange(1, hop + 1, dtype=np.float64) ** _TILT
    covariance, count = np.zeros((hop, hop)), 0
    step = max(1, sum(clip.shape[1] for clip in clips) // hop // _MAX_FRAMES)
    for clip in clips:
        c = _coefficients(clip[0], matrix, step)
        covariance += c.T @ c
        count += len(c)
    if not covariance.any():
        raise UserError("the audio is all silence: there is nothing to fit an autoencoder to")
    variance, vectors = np.linalg.eigh(covariance * np.outer(weight, weight) / count)
    basis, variance = vectors[:, ::-1][:, :channels], variance[::-1][:channels]
    # The sign of an eigenvector is arbitrary: fix it, so that every machine gets the same latents.
    basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(channels)])
    # Half-way to unit variance: neither do the few loudest components decide a model's whole loss, nor the faintest.
    gain = np.clip(variance, variance.max() * 1e-6, None) ** -0.25
    gain /= np.sqrt((variance * gain**2).mean())
    analysis = (gain[:, None] * basis.T * weight[None]) @ matrix
    synthesis = matrix.T @ (basis / weight[:, None] / gain[None])
    kept = (basis.T * weight[None]).T @ (basis / weight[:, None]).T
    error = np.eye(hop) - kept
    noise = float(np.einsum("ij,ik,kj->", error, covariance, error))
    return analysis, synthesis, float(10.0 * np.log10(np.trace(covariance) / max(noise, 1e-12)))


def _set(conv: Any, weight: np.ndarray) -> None:
    """Give a weight-normalised convolution this weight, and no bias."""
    value = torch.tensor(weight, dtype=torch.float32)
    with torch.no_grad():
        conv.weight_v.copy_(value)
        conv.weight_g.copy_(value.norm(dim=(1, 2), keepdim=True))
        if conv.bias is not None:
            conv.bias.zero_()


def _make_linear(model: Any, analysis: np.ndarray, synthesis: np.ndarray) -> None:
    """Write the matrices into an Oobleck autoencoder without strides."""
    channels, hop = len(analysis), analysis.shape[1] // 2
    first, snake, last = model.encoder.layers
    taps = np.zeros((channels, hop, 7))
    taps[:, :, 2], taps[:, :, 3] = analysis[:, :hop], analysis[:, hop:]  # the patch before, this patch
    _set(first, taps)
    identity = np.zeros((channels, channels, 3))
    identity[:, :, 1] = np.eye(channels)
    _set(last, identity)
    start, snake_out, end, _ = model.decoder.layers
    identity = np.zeros((channels, channels, 7))
    identity[:, :, 3] = np.eye(channels)
    _set(start, identity)
    taps = np.zeros((hop, channels, 7))
    taps[:, :, 3], taps[:, :, 4] = (
        synthesis[hop:],
        synthesis[:hop],
    )  # this frame's second half, the next one's first
    _set(end, taps)
    with torch.no_grad():
        for activation in (snake, snake_out):
            activation.alpha.fill_(_LINEAR)


def fit_autoencoder(
    clips: Sequence[np.ndarray], sample_rate: int, out: Path, channels: int = 64, hop: int = 512
) -> float:
    """Fit an autoencoder to clips and write its folder.

    Args:
        clips: mono float32 ``[1, samples]``.
        sample_rate: Hz.
        out: folder for ``pretransform.json`` and the weights.
        channels: C of the latents.
        hop: samples a latent frame.

    Returns:
        Signal-to-noise ratio of its reconstruction of the clips, dB.

    Raises:
        UserError: as :func:`components`.
    """
    from safetensors.torch import save_file

    analysis, synthesis, ratio = components(clips, channels, hop)
    block = config(channels, hop)
    model = create_pretransform(block, sample_rate, "autoencoder config").model
    _make_linear(model, analysis, synthesis)
    with whole_file(out / WEIGHTS_NAME) as part:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, part)
    write_json(out / BLOCK_NAME, {"sample_rate": sample_rate, "pretransform": block})
    return ratio
