"""Target, masked squared error and its gradient in one pass, the noise never stored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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
def _v_loss_kernel(
    partial: tl.tensor,
    per_frame: tl.tensor,
    gradient: tl.tensor,
    prediction: tl.tensor,
    x: tl.tensor,
    keys: tl.tensor,
    factors: tl.tensor,
    scales: tl.tensor,
    counted: tl.tensor,
    channels: tl.tensor,
    frames: tl.tensor,
    stride_gb: tl.tensor,
    stride_gc: tl.tensor,
    stride_gf: tl.tensor,
    stride_pb: tl.tensor,
    stride_pc: tl.tensor,
    stride_pf: tl.tensor,
    stride_xb: tl.tensor,
    stride_xc: tl.tensor,
    stride_xf: tl.tensor,
    stride_mb: tl.tensor,
    stride_mf: tl.tensor,
    WORK: tl.constexpr,
    FRAMES: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One program: BLOCK_F frames of one row.

    ``partial`` is contiguous ``[B, blocks]`` float64, ``per_frame`` contiguous ``[B, F]`` float64, ``factors``
    contiguous ``[B, 2]`` in WORK (of noise and of minus x in the target), ``scales`` ``[B]`` in WORK: 2 / (n C).
    """
    row = tl.cast(tl.program_id(1), tl.int64)
    flat = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    f = flat[:, None]
    wide = f.to(tl.int64)
    key = tl.load(keys + row)
    of_noise = tl.load(factors + 2 * row)
    of_x = tl.load(factors + (2 * row + 1))
    scale = tl.load(scales + row)
    counts = (
        tl.load(counted + row * stride_mb + flat.to(tl.int64) * stride_mf, mask=flat < frames, other=0) != 0
    )
    total = tl.zeros((BLOCK_F,), dtype=tl.float64)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        far = c.to(tl.int64)
        keep = (f < frames) & (c < channels)
        e = normal(key, (wide * channels + c).to(tl.uint32)).to(WORK)
        clean = tl.load(x + row * stride_xb + far * stride_xc + wide * stride_xf, mask=keep, other=0.0).to(
            WORK
        )
        target = of_noise * e - of_x * clean
        place = prediction + row * stride_pb + far * stride_pc + wide * stride_pf
        difference = tl.load(place, mask=keep, other=0.0).to(WORK) - target
        difference = tl.where(keep & counts[:, None], difference, 0.0)  # what is not counted may be anything
        total += tl.sum((difference * difference).to(tl.float64), axis=1)
        if GRADIENT:
            place = gradient + row * stride_gb + far * stride_gc + wide * stride_gf
            tl.store(place, scale * difference, mask=keep)
    tl.store(partial + (row * tl.num_programs(0) + tl.program_id(0)), tl.sum(total, axis=0))
    if FRAMES:
        tl.store(per_frame + (row * frames + flat), total / channels, mask=flat < frames)


def _v_loss_torch(
    frames_total: Tensor,
    gradient: Tensor | None,
    prediction: Tensor,
    x: Tensor,
    keys: Tensor,
    factors: Tensor,
    scales: Tensor,
    counted: Tensor,
) -> None:
    """Fill ``frames_total`` ``[B, F]`` float64 with sums over channels, and the gradient."""
    _, channels, frames = x.shape
    work = factors.dtype
    for row, key in enumerate(keys):
        for begin, end in blocks(channels, frames):
            e = noise_block(key, begin * channels, (end - begin) * channels).view(end - begin, channels).T
            target = factors[row, 0] * e.to(work) - factors[row, 1] * x[row, :, begin:end].to(work)
            difference = prediction[row, :, begin:end].to(work) - target
            difference.masked_fill_(~counted[row, None, begin:end], 0.0)
            if gradient is not None:
                torch.mul(difference, scales[row], out=gradient[row, :, begin:end])
            frames_total[row, begin:end] = difference.square_().sum(dim=0, dtype=torch.float64)


def _run_v_loss(
    prediction: Tensor,
    x: Tensor,
    keys: Tensor,
    t: Tensor,
    counted: Tensor,
    objective: str,
    per_frame: bool,
    with_gradient: bool,
    triton_too: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels, frames = x.shape
    work = launch.accumulator(x.dtype)
    factors = mixing_factors(t, objective, True, x.device, work)
    elements = counted.sum(dim=1).double() * channels
    scales = torch.where(elements > 0, 2.0 / elements.clamp_min(1.0), 0.0).to(work)
    gradient = (
        torch.empty_like(prediction, dtype=work) if with_gradient else prediction.new_empty(0, dtype=work)
    )
    if x.numel() == 0:
        nothing = torch.zeros(rows, frames if per_frame else 0, dtype=torch.float64, device=x.device)
        return torch.full((rows,), math.nan, dtype=torch.float64, device=x.device), nothing, gradient
    if not triton_too:
        totals = torch.empty(rows, frames, dtype=torch.float64, device=x.device)
        _v_loss_torch(
            totals, gradient if with_gradient else None, prediction, x, keys, factors, scales, counted
        )
        loss = totals.sum(dim=1) / elements
        return loss, totals / channels if per_frame else totals.new_empty(rows, 0), gradient
    block_f, block_c = tile(channels)
    count = -(-frames // block_f)
    partial = torch.empty(rows, count, dtype=torch.float64, device=x.device)
    each = partial.new_empty(rows, frames if per_frame else 0)
    with torch.cuda.device_of(x):
        _v_loss_kernel[(count, rows)](
            partial,
            each,
            gradient,
            prediction,
            x,
            keys.contiguous(),
            factors,
            scales,
            counted.view(torch.uint8),
            channels,
            frames,
            *(gradient.stride() if with_gradient else (0, 0, 0)),
            *prediction.stride(),
            *x.stride(),
            *counted.stride(),
            WORK=constant(work),
            FRAMES=per_frame,
            GRADIENT=with_gradient,
            BLOCK_F=block_f,
            BLOCK_C=block_c,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return partial.sum(dim=1) / elements, each, gradient


@torch.library.custom_op("attr_engine::v_loss", mutates_args=(), device_types="cpu")
def _v_loss(
    prediction: Tensor,
    x: Tensor,
    keys: Tensor,
    t: Tensor,
    counted: Tensor,
    objective: str,
    per_frame: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (objective, per_frame, with_gradient, launch.interpreting())
    return _run_v_loss(prediction, x, keys, t, counted, *rest)


@_v_loss.register_kernel("cuda")
def _(
    prediction: Tensor,
    x: Tensor,
    keys: Tensor,
    t: Tensor,
    counted: Tensor,
    objective: str,
    per_frame: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (objective, per_frame, with_gradient, launch.supported(x.device))
    return _run_v_loss(prediction, x, keys, t, counted, *rest)


@_v_loss.register_fake
def _(
    prediction: Tensor,
    x: Tensor,
    keys: Tensor,
    t: Tensor,
    counted: Tensor,
    objective: str,
    per_frame: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, _, frames = x.shape
    loss = x.new_empty(rows, dtype=torch.float64)
    gradient = (
        torch.empty_like(prediction, dtype=launch.accumulator(x.dtype))
        if with_gradient
        else loss.new_empty(0, dtype=launch.accumulator(x.dtype))
    )
    return loss, loss.new_empty(rows, frames if per_frame else 0), gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, _, _, _, counted, _, per_frame, _ = inputs
    ctx.save_for_backward(output[2], counted)
    ctx.dtype, ctx.per_frame = prediction.dtype, per_frame
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, of_loss: Tensor | None, of_frames: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    gradient, counted = ctx.saved_tensors
    nothing = (None,) * 7
    if of_loss is None and of_frames is None:
        return (None, *nothing)
    if gradient.numel() == 0 and counted.numel():
        raise RuntimeError("v_loss was called with with_gradient=False and has no gradient to give")
    factor = torch.zeros((), dtype=torch.float64, device=gradient.device)
    if of_loss is not None:
        factor = factor + of_loss[:, None]
    if of_frames is not None and ctx.per_frame:  # a frame's share is n times its part of the mean
        factor = factor + of_frames * counted.sum(dim=1, keepdim=True)
    return ((gradient * factor[:, None].to(gradient.dtype)).to(ctx.dtype), *nothing)


_v_loss.register_autograd(_backward, setup_context=_save)


def v_loss(
    prediction: Tensor,
    x: Tensor,
    keys: Tensor,
    t: Tensor,
    counted: Tensor,
    objective: str,
    per_frame: bool = False,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared error of each row against its target, and the gradient, in one pass.

    ``loss[b] = 1 / (n_b C) sum over counted frames and channels of (prediction - target)^2`` with the target
    ``alpha e - sigma x`` (v) or ``e - x`` (rectified flow). Differences and squares are float32 (float64
    where ``x`` is float64), sums are float64 in a fixed order: against ``reference.per_draw_loss`` on the same
    device the relative error is below 1e-12, against float64 arithmetic throughout below 1e-6. Rows without
    a counted frame have the loss NaN, as a mean over nothing has, and the gradient 0.

    Differentiable with respect to ``prediction`` (through ``loss`` and the per-frame part) and nothing else.

    Args:
        prediction: ``[B, C, F]``, float32, float16, bfloat16 or float64, any strides.
        x: clean latents ``[B, C, F]``, likewise; its dtype need not be the prediction's.
        keys: int64 ``[B]``.
        t: timesteps ``[B]``.
        counted: bool ``[B, F]``.
        objective: ``"v"`` or ``"rectified_flow"``.
        per_frame: whether the second result is filled.
        with_gradient: whether the third result is filled; without it there is nothing to differentiate.

    Returns:
        loss: float64 ``[B]``.
        per frame: float64 ``[B, F]``, the mean over channels (0 where not counted), or ``[B, 0]``.
        gradient: d loss[b] / d prediction ``[B, C, F]`` in float32 (float64 where ``x`` is), or ``[0]``. It is not
            rounded to a 16-bit prediction's dtype: at 1 / (n C) it would be lost in float16.

    Raises:
        ValueError: shapes or devices that do not match, an unknown objective, an ``x`` that needs a gradient.
        TypeError: dtypes other than those above.
    """
    check(x, keys, t, objective, "v_loss")
    if prediction.shape != x.shape or counted.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"v_loss: prediction {tuple(prediction.shape)} and counted {tuple(counted.shape)} do not fit x {tuple(x.shape)}"
        )
    if prediction.dtype not in launch.TRITON_TYPES or counted.dtype != torch.bool:
        raise TypeError(
            f"v_loss: prediction is {prediction.dtype}, counted is {counted.dtype} (bool is needed)"
        )
    if not (prediction.device == x.device == counted.device):
        raise ValueError(
            f"v_loss: x is on {x.device}, prediction on {prediction.device}, counted on {counted.device}"
        )
    if x.requires_grad or t.requires_grad:
        raise ValueError("v_loss is differentiable with respect to the prediction only; detach x and t")
    return _v_loss(prediction, x, keys, t, counted, objective, per_frame, with_gradient)


def configurations() -> list[Configuration]:
    """The forms in which the kernel is shipped, for the compile gate."""
    constants = {"FRAMES": True, "GRADIENT": True, "stride_mf": 1}
    found = []
    for form in row_forms():
        types = {"partial": "fp64", "per_frame": "fp64", "gradient": form.work, "scales": form.work}
        types |= {"prediction": "bf16" if form.work == "fp32" else "fp64", "counted": "u8"}
        found.append(launch.row_configuration("v_loss", _v_loss_kernel, form, types, "gpx", constants))
    return found
