"""Compressed per-sample weight gradients: ``(P_o g)^T (P_i a)``, the full gradient never formed.

A gradient ``sum_t g[t]^T a[t]`` projected on both sides is the gradient of the projected activations and output
gradients, so those are projected first and the products are small. Ordinary matrix products on every device.
The projections come from a seed and need not be kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attr_engine.kernels import launch, reference
from attr_engine.kernels.normal import CPU_BLOCK, noise_block

KINDS = ("gaussian", "rademacher", "identity")
SCRATCH = 2**22  # elements of the projected inputs held at a time: 16 MiB in float32


def projection(
    kind: str,
    rows: int,
    columns: int,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Projection matrix ``[rows, columns]`` of a seed: the same bits on every device.

    Entry (r, c) is made from the Philox counter ``r * columns + c`` under the key ``seed``. ``"gaussian"``
    and ``"rademacher"`` are scaled by ``1 / sqrt(rows)``, so that inner products are kept in expectation.

    Args:
        kind: ``"gaussian"``, ``"rademacher"`` (signs), or ``"identity"`` (the first ``rows`` coordinates).
        rows: dimension after projection.
        columns: dimension before; ``rows * columns`` at most 2^32.
        seed: any integer; its low 64 bits are the key.
        device: where the result lies. Gaussian matrices are made on the CPU, because log and cos differ.
        dtype: of the result; values are rounded from float32 (float64 results are not finer).

    Returns:
        ``[rows, columns]``.

    Raises:
        ValueError: an unknown kind, more rows than columns for ``"identity"``, or too many elements.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown projection {kind!r}; known: 'gaussian', 'rademacher', 'identity'")
    if rows < 1 or columns < 1 or rows * columns > 2**32:
        raise ValueError(f"a projection of {rows} x {columns} elements; there are 1 to 2^32 counters")
    if kind == "identity":
        if rows > columns:
            raise ValueError(f"'identity' keeps the first rows: {rows} of {columns} cannot be kept")
        return torch.eye(rows, columns, device=device, dtype=dtype)
    number = seed & (2**64 - 1)
    key = torch.tensor(number - 2**64 if number >= 2**63 else number)
    values = torch.empty(rows * columns)
    for first in range(0, rows * columns, CPU_BLOCK):
        count = min(CPU_BLOCK, rows * columns - first)
        if kind == "gaussian":
            values[first : first + count] = noise_block(key, first, count)
        else:
            word = reference.philox(torch.arange(first, first + count), key)[0]
            values[first : first + count] = (word & 1) * 2.0 - 1.0
    return values.mul_(1.0 / math.sqrt(rows)).view(rows, columns).to(device=device, dtype=dtype)


def _side(x: Tensor, matrix: Tensor | None, work: torch.dtype) -> Tensor:
    """``[n, T, N]`` to ``[n, T, R]`` in the work dtype, without rounding to 16 bits in between."""
    if matrix is None:
        return x.to(work)
    if launch.products_of_halves(x) and matrix.dtype == x.dtype:
        return torch.bmm(x, matrix.T.expand(len(x), -1, -1), out_dtype=torch.float32)
    return x.to(work) @ matrix.to(work).T


@torch.library.custom_op("attr_engine::project", mutates_args=())
def _operation(g: Tensor, a: Tensor, out_matrix: Tensor | None, in_matrix: Tensor | None) -> Tensor:
    work = launch.accumulator(g.dtype)
    rows = g.shape[2] if out_matrix is None else out_matrix.shape[0]
    columns = a.shape[2] if in_matrix is None else in_matrix.shape[0]
    out = torch.empty(g.shape[0], rows, columns, dtype=work, device=g.device)
    widest = max(1, g.shape[1] * max(g.shape[2], a.shape[2]))
    together = max(1, SCRATCH // widest)
    with launch.ieee(g.device):
        for first in range(0, g.shape[0], together):
            left = _side(g[first : first + together], out_matrix, work)
            right = _side(a[first : first + together], in_matrix, work)
            torch.bmm(left.transpose(1, 2), right, out=out[first : first + together])
    return out


@_operation.register_fake
def _(g: Tensor, a: Tensor, out_matrix: Tensor | None, in_matrix: Tensor | None) -> Tensor:
    rows = g.shape[2] if out_matrix is None else out_matrix.shape[0]
    columns = a.shape[2] if in_matrix is None else in_matrix.shape[0]
    return g.new_empty(g.shape[0], rows, columns, dtype=launch.accumulator(g.dtype))


def project(g: Tensor, a: Tensor, out_matrix: Tensor | None, in_matrix: Tensor | None) -> Tensor:
    """``sum_t (P_o g[b, t])^T (P_i a[b, t])``: per-sample gradients projected on both sides.

    Products and sums are float32 (float64 for float64 inputs); against a float64 evaluation of the same inputs the
    relative RMS error is below 5e-6. 16-bit inputs with matrices of their own dtype use tensor cores on a
    GPU (float32 results). A few samples are worked on at a time: scratch is bounded by ``SCRATCH`` elements, or by one
    sample's inputs.

    Args:
        g: gradients with respect to a layer's outputs ``[B, T, O]``: float32, float16, bfloat16, float64.
        a: the layer's inputs ``[B, T, I]``, dtype of ``g``.
        out_matrix: ``[Ro, O]``, or None for no projection of that side.
        in_matrix: ``[Ri, I]``, or None.

    Returns:
        ``[B, Ro, Ri]``: float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes or devices that do not match.
        TypeError: dtypes other than those above.
    """
    launch.check_layer(g, a, "project")
    for name, matrix, x in (("out_matrix", out_matrix, g), ("in_matrix", in_matrix, a)):
        if matrix is None:
            continue
        if matrix.dim() != 2 or matrix.shape[1] != x.shape[2]:
            raise ValueError(f"project: {name} {tuple(matrix.shape)} must be [R, {x.shape[2]}]")
        if matrix.dtype not in launch.TRITON_TYPES:
            raise TypeError(f"project: {name} is {matrix.dtype}; it must be floating")
        if matrix.device != x.device:
            raise ValueError(f"project: {name} is on {matrix.device}, inputs on {x.device}")
    return _operation(g, a, out_matrix, in_matrix)
