"""Noise of a row, made where it is needed: the Triton function, the CPU's blocks, and what noising and loss share.

The noise of a row is Philox-4x32-10 of its key at the counter ``frame * C + channel`` and a Box-Muller
transform (``reference.noise``): in registers on a GPU, in cache-sized blocks on a CPU, the same for every
batch, padding and set of weights.

On a GPU log and cos are float64, as in the reference, so that noise agrees with a CPU's except where the last bit
of a float64 decides how a float32 is rounded (about one element in 10^8). The arithmetic is some 20 MFLOP a row of
64 x 2584, nothing beside a model's 10^12. ``tl.cos`` is not used: its range reduction needs local memory, and
the angles here lie in [0, 2 pi).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attr_engine.kernels import launch, reference
from attr_engine.kernels.launch import RowForm, jit

if TYPE_CHECKING:
    import triton.language as tl

OBJECTIVES = ("v", "rectified_flow")
CPU_BLOCK = 2**15  # elements whose noise the CPU makes at a time: 256 KiB a float64 temporary
WARPS = 4
TILE = 512  # elements of a Triton program's tile


@jit
def uniform(word: tl.tensor) -> tl.tensor:
    """32 random bits to [0, 1): ``reference._uniform``, in float64."""
    bits = word.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, -bits - 1, bits)
    return bits.to(tl.float64) * 4.6566127342e-10


@jit
def normal(key: tl.tensor, place: tl.tensor) -> tl.tensor:
    """Standard normal noise at the uint32 counters ``place`` under a 64-bit key: float32."""
    first, second, _, _ = tl.randint4x(key, place)
    u = uniform(first)
    floor = u * 0.0 + 1e-7  # a float64 constant; tl.maximum would round it to float32
    radius = tl.sqrt(-2.0 * tl.log(tl.where(u < floor, floor, u)))
    # cos(angle): angle = r + n pi/2 with |r| <= pi/4, then the polynomials of fdlibm's k_sin.c and k_cos.c.
    angle = uniform(second) * 6.283185307179586
    n = (angle * 0.6366197723675814 + 0.5).to(tl.int32)
    turns = n.to(tl.float64)
    r = angle - turns * 1.57079632673412561417
    r = r - turns * 6.07710050650619224932e-11
    z = r * r
    cosine = z * -1.13596475577881948265e-11 + 2.08757232129817482790e-09
    cosine = z * cosine + -2.75573143513906633035e-07
    cosine = z * cosine + 2.48015872894767294178e-05
    cosine = z * cosine + -1.38888888888741095749e-03
    cosine = z * cosine + 4.16666666666666019037e-02
    cosine = 1.0 - (0.5 * z - z * z * cosine)
    sine = z * 1.58969099521155010221e-10 + -2.50507602534068634195e-08
    sine = z * sine + 2.75573137070700676789e-06
    sine = z * sine + -1.98412698298579493134e-04
    sine = z * sine + 8.33333333332248946124e-03
    sine = z * sine + -1.66666666666666324348e-01
    sine = r + r * z * sine
    value = tl.where((n & 1) == 1, sine, cosine)  # n = 0..4: cos, -sin, -cos, sin, cos
    value = tl.where(((n + 1) & 2) == 2, -value, value)
    return (radius * value).to(tl.float32)


def tile(channels: int) -> tuple[int, int]:
    """Frames and channels of a program's tile."""
    columns = min(64, max(4, 1 << (channels - 1).bit_length()))
    return TILE // columns, columns


def mixing_factors(
    t: Tensor, objective: str, target: bool, device: torch.device, work: torch.dtype
) -> Tensor:
    """``[B, 2]``: factors of x and noise in x_t, or of noise and minus x in the target; from float64."""
    alpha, sigma = reference._alpha_sigma(t.double(), objective)
    if target and objective == "rectified_flow":
        alpha = sigma = torch.ones_like(sigma)
    return torch.stack([alpha, sigma], dim=1).to(device=device, dtype=work)


def noise_block(key: Tensor, first: int, count: int) -> Tensor:
    """Noise at the counters ``first`` to ``first + count - 1`` of one key, bit for bit ``reference.noise``.

    Args:
        key: int64 scalar tensor.
        first: first counter.
        count: how many.

    Returns:
        float32 ``[count]``.
    """
    low, (m0, m1) = reference._LOW, reference._MULTIPLIERS
    number = int(key) & (2**64 - 1)
    steps = zip(*(range(0, 10 * step, step) for step in reference._KEY_STEPS), strict=True)
    keys = [(((number & low) + s0) & low, ((number >> 32) + s1) & low) for s0, s1 in steps]
    # The first round meets (counter, 0, 0, 0) and the second a constant: half of both falls away.
    p0 = torch.arange(first, first + count, dtype=torch.int64, device=key.device).mul_(m0)
    constant = keys[0][0] * m0
    c2 = (p0 >> 32).bitwise_and_(low).bitwise_xor_(keys[0][1])
    c1 = c2 * m1
    c0 = (c1 >> 32).bitwise_and_(low).bitwise_xor_(keys[1][0])
    c2 = p0.bitwise_and_(low).bitwise_xor_((constant >> 32) ^ keys[1][1])
    c3: int | Tensor = constant & low
    for k0, k1 in keys[2:]:  # c1 and c3 keep bits above the 32nd: they are cut off after the exclusive or
        p0, p1 = c0.mul_(m0), c2.mul_(m1)
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_and_(low).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_and_(low).bitwise_xor_(k1)
        c1, c3 = p1, p0
    radius = _folded(c0).clamp_min_(1e-7).log_().mul_(-2.0).sqrt_()
    return radius.mul_(_folded(c1.bitwise_and_(low)).mul_(2.0 * math.pi).cos_()).float()


def noise(keys: Tensor, channels: int, frames: int) -> Tensor:
    """Noise of a few rows, stored: for a CPU, where making it again costs more than keeping it.

    Args:
        keys: int64 ``[B]``.
        channels: C.
        frames: F; ``C * F`` at most 2^32.

    Returns:
        float32 ``[B, C, F]`` on the device of ``keys``, bit for bit ``reference.noise``.
    """
    if channels * frames > 2**32:
        raise ValueError(f"{channels} x {frames} elements are more than the 2^32 counters of one draw")
    out = torch.empty(len(keys), frames, channels, device=keys.device)
    for row, key in zip(out, keys, strict=True):
        for begin, end in blocks(channels, frames):
            row[begin:end] = noise_block(key, begin * channels, (end - begin) * channels).view(-1, channels)
    return out.transpose(1, 2)


def _folded(word: Tensor) -> Tensor:
    """``reference._uniform``: -x - 1 of a negative word is its complement, the smaller one of the two."""
    return torch.minimum(word, word ^ reference._LOW).double().mul_(4.6566127342e-10)


def blocks(channels: int, frames: int) -> list[tuple[int, int]]:
    """Stretches of frames whose noise fits ``CPU_BLOCK``: (first, end)."""
    step = max(1, CPU_BLOCK // channels)
    return [(f, min(f + step, frames)) for f in range(0, frames, step)]


def constant(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    import triton.language

    return {torch.float32: triton.language.float32, torch.float64: triton.language.float64}[dtype]


def check(x: Tensor, keys: Tensor, t: Tensor, objective: str, what: str) -> None:
    """Refuse rows whose parts do not belong together; ``what`` names the operation."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; known: 'v', 'rectified_flow'")
    if x.dim() != 3 or keys.shape != x.shape[:1] or t.shape != x.shape[:1]:
        raise ValueError(
            f"{what}: x {tuple(x.shape)}, keys {tuple(keys.shape)}, t {tuple(t.shape)} must be [B, C, F], [B], [B]"
        )
    if x.shape[1] * x.shape[2] > 2**32:
        raise ValueError(f"{x.shape[1]} x {x.shape[2]} elements are more than the 2^32 counters of one draw")
    if keys.dtype != torch.int64 or x.dtype not in launch.TRITON_TYPES:
        raise TypeError(f"{what}: keys are {keys.dtype} (int64 is needed), x is {x.dtype} (a floating dtype)")
    if keys.device != x.device:
        raise ValueError(f"{what}: x is on {x.device}, keys on {keys.device}")


def row_forms() -> list[RowForm]:
    """Forms of the kernels over rows for the compile gate: the model's 64 channels in either memory order, 8, float64."""
    shapes = ((64, "c", "fp32"), (64, "f", "fp32"), (8, "c", "fp32"), (64, "c", "fp64"))
    return [RowForm(channels, *tile(channels), inner, work, WARPS) for channels, inner, work in shapes]
