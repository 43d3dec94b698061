"""The slow, obvious definition of every operation, in plain PyTorch.

Layout, everywhere: ``B`` rows (one row is one (track, draw) pair), ``C`` channels, ``F`` frames;
latents and predictions are ``[B, C, F]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Philox-4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of the counters ``(counter, 0, 0, 0)`` under 64-bit keys.

    Args:
        counter: int64, values in [0, 2^32), broadcastable against ``key``.
        key: int64, the 64 bits of the key (sign bit included).

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    zero = torch.zeros_like(counter * key)
    c0, c1, c2, c3 = counter + zero, zero, zero, zero
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap modulo 2^64, so both halves are right although the sign is not.
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product_1 >> 32) & _LOW) ^ c1 ^ k0, ((product_0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product_1 & _LOW, product_0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """Map 32-bit words to [0, 1) as Triton's ``uint_to_uniform_float`` does."""
    signed = torch.where(word >= 2**31, word - 2**32, word)
    return torch.where(signed < 0, -signed - 1, signed).double() * 4.6566127342e-10


def noise(keys: Tensor, channels: int, frames: int) -> Tensor:
    """Standard normal noise of the draws that ``keys`` name.

    Element (channel c, frame f) is the Box-Muller transform of the first two Philox words of the
    counter ``f * channels + c``: it depends on the key and on its own place, never on the batch
    or on the padded length. Computed in float64 and rounded once, so that libraries whose log
    and cos differ in the last bit still agree.

    Args:
        keys: int64 ``[B]``, one 64-bit key a draw.
        channels: C.
        frames: F; ``C * F`` at most 2^32.

    Returns:
        float32 ``[B, C, F]`` on the device of ``keys``.
    """
    if channels * frames > 2**32:
        raise ValueError(f"{channels} x {frames} elements are more than the 2^32 counters of one draw")
    place = torch.arange(frames * channels, device=keys.device, dtype=torch.int64)
    out = torch.empty(len(keys), frames * channels, device=keys.device)
    for row, key in zip(out, keys, strict=True):  # row by row: what it works on stays in the cache
        first, second, _, _ = philox(place, key)
        radius = torch.sqrt(-2.0 * torch.log(_uniform(first).clamp_min(1e-7)))
        row.copy_(radius * torch.cos((2.0 * math.pi) * _uniform(second)))
    return out.view(len(keys), frames, channels).transpose(1, 2)


def _alpha_sigma(t: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    if objective == "v":
        return torch.cos(t * (math.pi / 2)), torch.sin(t * (math.pi / 2))
    if objective == "rectified_flow":
        return 1.0 - t, t
    raise ValueError(f"unknown objective {objective!r}; known: 'v', 'rectified_flow'")


def mix(x: Tensor, e: Tensor, t: Tensor, objective: str) -> Tensor:
    """Noised latent ``x_t``: ``alpha x + sigma e`` (v), ``(1 - t) x + t e`` (rectified flow).

    Args:
        x: clean latents ``[B, C, F]``.
        e: noise ``[B, C, F]``.
        t: timesteps ``[B]``, float64 (alpha and sigma are computed in float64, then cast).
        objective: ``"v"`` or ``"rectified_flow"``.

    Returns:
        ``[B, C, F]`` in the dtype of ``x``.
    """
    alpha, sigma = (a.to(x.dtype)[:, None, None] for a in _alpha_sigma(t, objective))
    return alpha * x + sigma * e.to(x.dtype)


def v_target(x: Tensor, e: Tensor, t: Tensor, objective: str) -> Tensor:
    """What the model has to predict: ``alpha e - sigma x`` (v), ``e - x`` (rectified flow).

    Arguments and result as in :func:`mix`.
    """
    if objective == "rectified_flow":
        return e.to(x.dtype) - x
    alpha, sigma = (a.to(x.dtype)[:, None, None] for a in _alpha_sigma(t, objective))
    return alpha * e.to(x.dtype) - sigma * x


def per_draw_loss(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean squared error of each row over its counted frames.

    Args:
        prediction: ``[B, C, F]``, any floating dtype.
        target: ``[B, C, F]``.
        counted: bool ``[B, F]``, the frames that count (at least one a row).

    Returns:
        float64 ``[B]``; squares are taken in the dtype of ``target`` and summed in float64,
        because scores are small differences of these numbers.
    """
    squared = (prediction.to(target.dtype) - target).square()
    total = (squared.sum(dim=1, dtype=torch.float64) * counted).sum(dim=1)
    return total / (counted.sum(dim=1).double() * prediction.shape[1])


def precondition(gradient: Tensor, fisher: Tensor, damping: float) -> Tensor:
    """``(F + damping)^-1 g``, element by element (METHOD, equation of the update).

    Args:
        gradient: any shape.
        fisher: same shape, non-negative.
        damping: absolute, in units of the Fisher.
    """
    return gradient / (fisher + damping)
