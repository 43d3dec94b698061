"""The operations in float64 loops and einsums, on inputs that are rounded already, and how inputs are made."""

import math

import naive
import numpy as np
import torch

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
BOUND = 5e-6  # relative RMS error that every float32-accumulating path has to stay below


def normal(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape)).to(dtype)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values under other strides."""
    if how == "contiguous":
        return x.contiguous()
    if how == "transposed":  # the innermost axis is not the last
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "sliced":  # columns of something wider, as the parts of a fused weight are
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"))
        wide[..., 1 : 1 + x.shape[-1]] = x
        return wide[..., 1 : 1 + x.shape[-1]]
    assert how == "gapped"  # no stride is 1
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


STRIDES = ("contiguous", "transposed", "sliced", "gapped")


def per_sample(g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """float64 ``[B, O, I]``, asserted to be non-zero in every sample."""
    out = torch.einsum("bto,bti->boi", g.double(), a.double())
    assert (out.flatten(1).norm(dim=1) > 0).all(), "zeros would be compared with zeros"
    return out


def squared_gradient(g: torch.Tensor, a: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    squares = per_sample(g, a).square()
    return squares.sum(0) if weights is None else torch.einsum("b,boi->oi", weights.double(), squares)


def query_dot(g: torch.Tensor, a: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    return torch.einsum("boi,koi->bk", per_sample(g, a), deltas.double())


def directions(rng: np.random.Generator, count: int, g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """``[K, O, I]`` that are not orthogonal to the gradients: a score of nearly 0 has no relative error to speak of."""
    gradient = per_sample(g, a)[0]
    out = normal(rng, count, *gradient.shape).to(g.device) / 2 + gradient / gradient.square().mean().sqrt()
    return out.to(torch.float64 if g.dtype == torch.float64 else torch.float32)


def error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative RMS error; the reference must not be zero."""
    assert wanted.norm() > 0
    return float((out.double() - wanted).norm() / wanted.norm())


def loss(prediction, x, keys, t, counted, objective):
    """Loss ``[B]``, per frame ``[B, F]`` and gradient ``[B, C, F]`` in float64, one row at a time, from numpy."""
    losses, frames, gradients = [], [], []
    for row in range(len(x)):
        clean, out = x[row].double().numpy(), prediction[row].detach().double().numpy()
        e = naive.normals(int(keys[row]) % 2**64, *clean.shape)
        angle = math.pi / 2 * float(t[row])
        target = math.cos(angle) * e - math.sin(angle) * clean if objective == "v" else e - clean
        kept = counted[row].numpy()
        difference = np.where(kept, out - target, 0.0)
        n = kept.sum() * len(clean)
        losses.append((difference**2).sum() / n if n else math.nan)
        frames.append((difference**2).mean(0))
        gradients.append(2 * difference / max(n, 1))
    return tuple(torch.from_numpy(np.stack(values)) for values in (np.array(losses), frames, gradients))


def mixed(x, keys, t, objective):
    """x_t ``[B, C, F]`` in float64, from numpy."""
    rows = []
    for row in range(len(x)):
        clean, angle = x[row].double().numpy(), math.pi / 2 * float(t[row])
        e = naive.normals(int(keys[row]) % 2**64, *clean.shape)
        first, second = (
            (math.cos(angle), math.sin(angle)) if objective == "v" else (1 - float(t[row]), float(t[row]))
        )
        rows.append(first * clean + second * e)
    return torch.from_numpy(np.stack(rows))


def keys(rng: np.random.Generator, rows: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 2**64, rows, dtype=np.uint64).view(np.int64))
