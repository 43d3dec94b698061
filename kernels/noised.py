"""Noised latents, the noise never stored: ``alpha x + sigma e`` (v), ``(1 - t) x + t e`` (rectified flow)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attr_engine.kernels import launch
from attr_engine.kernels.launch import Configuration, jit
from attr_engine.kernels.normal import (
    WARPS,
    blocks,
    check,
    constant,
    mixing_factors,
    noise_block,
    normal,
    row_forms,
    tile,
)

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _noised_kernel(
    out: tl.tensor,
    x: tl.tensor,
    keys: tl.tensor,
    factors: tl.tensor,
    channels: tl.tensor,
    frames: tl.tensor,
    stride_ob: tl.tensor,
    stride_oc: tl.tensor,
    stride_of: tl.tensor,
    stride_xb: tl.tensor,
    stride_xc: tl.tensor,
    stride_xf: tl.tensor,
    WORK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One program: BLOCK_F frames of one row. ``factors`` is contiguous ``[B, 2]`` in WORK: of x and of noise."""
    row = tl.cast(tl.program_id(1), tl.int64)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[:, None]
    key = tl.load(keys + row)
    of_x = tl.load(factors + 2 * row)
    of_noise = tl.load(factors + (2 * row + 1))
    wide = f.to(tl.int64)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        keep = (f < frames) & (c < channels)
        e = normal(key, (wide * channels + c).to(tl.uint32)).to(WORK)
        clean = tl.load(
            x + row * stride_xb + c.to(tl.int64) * stride_xc + wide * stride_xf, mask=keep, other=0.0
        )
        value = of_x * clean.to(WORK) + of_noise * e
        place = out + row * stride_ob + c.to(tl.int64) * stride_oc + wide * stride_of
        tl.store(place, value.to(out.dtype.element_ty), mask=keep)


def _noised_torch(out: Tensor, x: Tensor, keys: Tensor, factors: Tensor) -> None:
    _, channels, frames = x.shape
    for row, key in enumerate(keys):
        for begin, end in blocks(channels, frames):
            e = noise_block(key, begin * channels, (end - begin) * channels).view(end - begin, channels).T
            e = e.to(factors.dtype)
            out[row, :, begin:end] = (
                factors[row, 0] * x[row, :, begin:end].to(factors.dtype) + factors[row, 1] * e
            )


def _run_noised(x: Tensor, keys: Tensor, t: Tensor, objective: str, triton_too: bool) -> Tensor:
    out = torch.empty_like(x)
    factors = mixing_factors(t, objective, False, x.device, launch.accumulator(x.dtype))
    if x.numel() == 0:
        return out
    if not triton_too:
        _noised_torch(out, x, keys, factors)
        return out
    block_f, block_c = tile(x.shape[1])
    with torch.cuda.device_of(x):
        _noised_kernel[(-(-x.shape[2] // block_f), x.shape[0])](
            out,
            x,
            keys.contiguous(),
            factors,
            *x.shape[1:],
            *out.stride(),
            *x.stride(),
            WORK=constant(launch.accumulator(x.dtype)),
            BLOCK_F=block_f,
            BLOCK_C=block_c,
            num_warps=WARPS,
            enable_fp_fusion=False,  # so that a GPU rounds as a CPU does
        )
    return out


@torch.library.custom_op("attr_engine::noised", mutates_args=(), device_types="cpu")
def _noised(x: Tensor, keys: Tensor, t: Tensor, objective: str) -> Tensor:
    return _run_noised(x, keys, t, objective, launch.interpreting())


@_noised.register_kernel("cuda")
def _(x: Tensor, keys: Tensor, t: Tensor, objective: str) -> Tensor:
    return _run_noised(x, keys, t, objective, launch.supported(x.device))


@_noised.register_fake
def _(x: Tensor, keys: Tensor, t: Tensor, objective: str) -> Tensor:
    return torch.empty_like(x)


def noised(x: Tensor, keys: Tensor, t: Tensor, objective: str) -> Tensor:
    """``x_t = alpha x + sigma e`` (v) or ``(1 - t) x + t e`` (rectified flow), the noise ``e`` never stored.

    Args:
        x: clean latents ``[B, C, F]``, float32, float16, bfloat16 or float64, any strides.
        keys: int64 ``[B]``, the 64-bit key of each row's noise.
        t: timesteps ``[B]``; alpha and sigma are computed in float64, then rounded once.
        objective: ``"v"`` or ``"rectified_flow"``.

    Returns:
        ``[B, C, F]`` in the dtype and memory order of ``x``; computed in float32 (float64 for float64). Equal to
        ``reference.mix`` of ``reference.noise``, on a GPU up to one rounding of the noise.

    Raises:
        ValueError: shapes or devices that do not match, an unknown objective, more than 2^32 elements a row.
        TypeError: dtypes other than those above.
    """
    check(x, keys, t, objective, "noised")
    return _noised(x, keys, t, objective)


def configurations() -> list[Configuration]:
    """The forms in which the kernel is shipped, for the compile gate."""
    return [
        launch.row_configuration("noised", _noised_kernel, form, {"out": form.work}, "ox", {})
        for form in row_forms()
    ]
