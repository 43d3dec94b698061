"""The damped step of one or several queries, in place: ``theta += step * g / (fisher + damping)``.

The operation is bound by memory. For one query plain PyTorch already moves the minimum, so the Triton kernel pays where
several queries share one Fisher, which is then read once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attr_engine.kernels import launch
from attr_engine.kernels.launch import Configuration, jit

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024  # elements of a Triton program
SCRATCH = 2**18  # elements of the temporary of the plain path: 1 MiB in float32


@jit
def _precondition_kernel(
    theta: tl.tensor,
    gradient: tl.tensor,
    fisher: tl.tensor,
    damping: tl.tensor,
    step: tl.tensor,
    size: tl.tensor,
    queries: tl.tensor,
    stride_tk: tl.tensor,
    stride_gk: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program: BLOCK elements of all queries; each query's tensors are contiguous."""
    place = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = place < size
    damped = tl.load(fisher + place, mask=keep, other=1.0) + damping
    for k in range(queries):
        query = tl.cast(k, tl.int64)
        g = tl.load(gradient + query * stride_gk + place, mask=keep, other=0.0).to(tl.float32)
        target = theta + query * stride_tk + place
        tl.store(target, tl.load(target, mask=keep, other=0.0) + step * tl.div_rn(g, damped), mask=keep)


def run_triton(theta: Tensor, gradient: Tensor, fisher: Tensor, damping: float, step: float) -> None:
    """Launch the kernel: ``theta`` float32 and ``gradient`` ``[K, ...]``, ``fisher`` float32, as :func:`flat` asks."""
    size = fisher.numel()
    with torch.cuda.device_of(theta):
        _precondition_kernel[(-(-size // BLOCK),)](
            theta,
            gradient,
            fisher,
            damping,
            step,
            size,
            len(theta),
            theta.stride(0),
            gradient.stride(0),
            BLOCK=BLOCK,
            num_warps=4,
        )


def flat(theta: Tensor, gradient: Tensor, fisher: Tensor) -> bool:
    """Whether the kernel can walk these: each query's tensors and the Fisher are contiguous."""
    return fisher.is_contiguous() and theta[0].is_contiguous() and gradient[0].is_contiguous()


def run_torch(theta: Tensor, gradient: Tensor, fisher: Tensor, damping: float, step: float) -> None:
    """The same in plain PyTorch, on any device and strides, in blocks of at most ``max(SCRATCH, a row)`` elements."""
    if fisher.dim() == 0:
        theta, gradient, fisher = theta[:, None], gradient[:, None], fisher[None]
    strip = max(1, SCRATCH // max(1, fisher[0].numel())) if len(fisher) else 1
    for first in range(0, len(fisher), strip):
        damped = fisher[first : first + strip].to(theta.dtype) + damping
        for k in range(len(theta)):
            quotient = gradient[k, first : first + strip].to(theta.dtype) / damped
            theta[k, first : first + strip].add_(quotient, alpha=step)


@torch.library.custom_op("attr_engine::precondition_", mutates_args=("theta",), device_types="cpu")
def _operation(theta: Tensor, gradient: Tensor, fisher: Tensor, damping: float, step: float) -> None:
    _run(theta, gradient, fisher, damping, step, launch.interpreting())


@_operation.register_kernel("cuda")
def _(theta: Tensor, gradient: Tensor, fisher: Tensor, damping: float, step: float) -> None:
    _run(theta, gradient, fisher, damping, step, launch.supported(theta.device))


@_operation.register_fake
def _(theta: Tensor, gradient: Tensor, fisher: Tensor, damping: float, step: float) -> None:
    return None


def _run(
    theta: Tensor, gradient: Tensor, fisher: Tensor, damping: float, step: float, triton_too: bool
) -> None:
    if theta.numel() == 0:
        return
    if theta.dim() == fisher.dim():
        theta, gradient = theta[None], gradient[None]
    single = (
        theta.dtype == torch.float32 and fisher.dtype == torch.float32 and gradient.dtype != torch.float64
    )
    if triton_too and single and flat(theta, gradient, fisher):
        run_triton(theta, gradient, fisher, damping, step)
    else:
        run_torch(theta, gradient, fisher, damping, step)


def precondition_(theta: Tensor, gradient: Tensor, fisher: Tensor, damping: float, step: float) -> Tensor:
    """``theta[k] += step * gradient[k] / (fisher + damping)``, in place, element by element.

    Evaluated in the dtype of ``theta``: sum, correctly rounded quotient, product, sum; against float64
    arithmetic the relative error of the increment is below 4e-7 for float32.

    Args:
        theta: float32 or float64, the shape of ``fisher``, or ``[K, ...]`` for K queries; any strides.
        gradient: the shape of ``theta``; float32, float16, bfloat16 or float64.
        fisher: non-negative, float32 or float64; read once for all queries on a GPU.
        damping: absolute, in units of the Fisher.
        step: factor of every query.

    Returns:
        ``theta``.

    Raises:
        ValueError: shapes or devices that do not match.
        TypeError: dtypes other than those above.
    """
    if gradient.shape != theta.shape or fisher.shape not in (theta.shape, theta.shape[1:]):
        raise ValueError(
            f"precondition_: theta {tuple(theta.shape)}, gradient {tuple(gradient.shape)}, fisher {tuple(fisher.shape)}"
        )
    masters = (torch.float32, torch.float64)
    if theta.dtype not in masters or fisher.dtype not in masters or gradient.dtype not in launch.TRITON_TYPES:
        raise TypeError(
            f"precondition_: theta is {theta.dtype} and fisher {fisher.dtype} (float32 or float64), "
            f"gradient {gradient.dtype} (a floating dtype)"
        )
    if not (theta.device == gradient.device == fisher.device):
        raise ValueError(f"precondition_: devices {theta.device}, {gradient.device} and {fisher.device}")
    _operation(theta, gradient, fisher, damping, step)
    return theta


def configurations() -> list[Configuration]:
    """The forms in which the kernel is shipped, for the compile gate."""
    types = {
        "theta": "*fp32",
        "fisher": "*fp32",
        "damping": "fp32",
        "step": "fp32",
        "size": "i32",
        "queries": "i32",
    }
    types |= {"stride_tk": "i32", "stride_gk": "i32"}
    aligned = frozenset({"theta", "fisher", "gradient", "size", "stride_tk", "stride_gk"})
    return [
        Configuration(
            f"precondition {dtype}",
            _precondition_kernel,
            {**types, "gradient": f"*{dtype}"},
            {"BLOCK": BLOCK},
            aligned,
            {"num_warps": 4},
            registers=64,
        )
        for dtype in ("fp32", "bf16")
    ]
