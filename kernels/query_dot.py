"""Inner products of per-sample weight gradients with K directions, the gradients never stored.

``s[b, k] = sum_{o, i} (sum_t g[b, t, o] a[b, t, i]) deltas[k, o, i]``: to first order, what moving the weight
along ``deltas[k]`` does to the loss of sample ``b``.

The Triton program owns a tile of the weight and walks over the samples; a sample's tile of the gradient exists only in
registers, where it meets the K tiles of the directions. Each (tile, sample, direction) leaves one float32 number;
they are added in a fixed order, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attr_engine.kernels import launch, table
from attr_engine.kernels.launch import Configuration, jit

if TYPE_CHECKING:
    import triton.language as tl

CPU_SCRATCH = 2**20  # elements of the gradients that the CPU holds at a time: 4 MiB in float32
GPU_SCRATCH = 2**26  # the same for the path of many directions on a GPU: 256 MiB
PIECE = 2**14  # numbers of a product that are added in the work dtype
MANY = 32  # from here on a GPU multiplies a chunk of gradients with all directions as one product (counted)


@jit
def _query_dot_kernel(
    out: tl.tensor,
    g: tl.tensor,
    a: tl.tensor,
    deltas: tl.tensor,
    samples: tl.tensor,
    each: tl.tensor,
    queries: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride_gb: tl.tensor,
    stride_gt: tl.tensor,
    stride_go: tl.tensor,
    stride_ab: tl.tensor,
    stride_at: tl.tensor,
    stride_ai: tl.tensor,
    stride_dk: tl.tensor,
    stride_do: tl.tensor,
    stride_di: tl.tensor,
    DESCRIBED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """One program: one tile of the weight, ``each`` samples. ``out`` is contiguous ``[tiles, B, K]`` float32."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles_o = tl.cdiv(rows, BLOCK_O)
    tiles_i = tl.cdiv(columns, BLOCK_I)
    group = tile // (GROUP * tiles_i)
    height = tl.minimum(tiles_o - group * GROUP, GROUP)
    first_o = (group * GROUP + (tile % (GROUP * tiles_i)) % height) * BLOCK_O
    first_i = ((tile % (GROUP * tiles_i)) // height) * BLOCK_I

    o = first_o + tl.arange(0, BLOCK_O)
    i = first_i + tl.arange(0, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    keep = (o < rows)[:, None] & (i < columns)[None, :]
    if not DESCRIBED:
        g_tile = g + o[:, None].to(tl.int64) * stride_go + t[None, :].to(tl.int64) * stride_gt
        a_tile = a + t[:, None].to(tl.int64) * stride_at + i[None, :].to(tl.int64) * stride_ai
    d_tile = deltas + o[:, None].to(tl.int64) * stride_do + i[None, :].to(tl.int64) * stride_di

    begin = part * each
    for b in range(begin, tl.minimum(begin + each, samples)):
        gradient = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        for start in tl.range(0, tokens, BLOCK_T):
            if DESCRIBED:
                left = tl.trans(g.load([b, start, first_o]).reshape(BLOCK_T, BLOCK_O))
                right = a.load([b, start, first_i]).reshape(BLOCK_T, BLOCK_I)
            else:
                here = tl.cast(b, tl.int64)
                token = tl.cast(start, tl.int64)
                inside = start + t < tokens
                left = tl.load(
                    g_tile + (here * stride_gb + token * stride_gt),
                    mask=(o < rows)[:, None] & inside[None, :],
                    other=0.0,
                )
                right = tl.load(
                    a_tile + (here * stride_ab + token * stride_at),
                    mask=inside[:, None] & (i < columns)[None, :],
                    other=0.0,
                )
            if UPCAST:  # the interpreter's bfloat16 product is wrong without a word
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            gradient = tl.dot(left, right, gradient, input_precision="ieee")
        place = out + (tl.cast(tile, tl.int64) * samples + b) * queries
        for k in range(queries):
            delta = tl.load(d_tile + tl.cast(k, tl.int64) * stride_dk, mask=keep, other=0.0).to(tl.float32)
            tl.store(place + tl.cast(k, tl.int64), tl.sum(gradient * delta))


def run_triton(g: Tensor, a: Tensor, deltas: Tensor, row: table.Row, parts: int | None = None) -> Tensor:
    """Launch the kernel on CUDA tensors, or on CPU tensors under the interpreter.

    Args:
        g: ``[B, T, O]``.
        a: ``[B, T, I]``.
        deltas: ``[K, O, I]``, float32 or 16-bit.
        row: tiles, from the table.
        parts: into how many parts the batch is cut; None chooses. No bit depends on it.

    Returns:
        float32 ``[B, K]``.
    """
    samples, tokens, rows = g.shape
    columns, queries = a.shape[2], deltas.shape[0]
    read = launch.reading(g, a)
    row = table.fit(row, "query_dot", read, g.element_size())
    tiles = -(-rows // row.block_out) * -(-columns // row.block_in)
    parts = parts or launch.splits(tiles, samples, launch.processors(g.device))
    each = -(-samples // parts)
    partial = torch.empty(tiles, samples, queries, dtype=torch.float32, device=g.device)
    sources: tuple[Any, Any] = (g, a)
    if read == "descriptor":
        sources = launch.descriptors(g, a, row.block_tokens, row.block_out, row.block_in)
    with torch.cuda.device_of(g):
        _query_dot_kernel[(tiles, -(-samples // each))](
            partial,
            *sources,
            deltas,
            samples,
            each,
            queries,
            tokens,
            rows,
            columns,
            *g.stride(),
            *a.stride(),
            *deltas.stride(),
            DESCRIBED=read == "descriptor",
            UPCAST=launch.interpreting() and g.dtype == torch.bfloat16,
            BLOCK_O=row.block_out,
            BLOCK_I=row.block_in,
            BLOCK_T=row.block_tokens,
            GROUP=table.GROUP,
            num_warps=row.warps,
            num_stages=row.stages,
        )
    return ordered_sum(partial)


def ordered_sum(partial: Tensor) -> Tensor:
    """Add ``[N, B, K]`` over N in float64, in an order that depends on N alone: halves are folded together."""
    total = partial.double()
    while len(total) > 1:
        half = len(total) // 2
        folded = total[:half] + total[half : 2 * half]
        if len(total) % 2:
            folded[0] += total[-1]
        total = folded
    return total[0].float()


def run_products(g: Tensor, a: Tensor, deltas: Tensor, scratch: int) -> Tensor:
    """Gradients of a few samples in a bounded buffer, then one product with all directions; any device.

    With one token the directions are applied to ``a`` instead: ``sum_o g[o] (deltas[k] a)[o]``.

    Args:
        g: ``[B, T, O]``.
        a: ``[B, T, I]``.
        deltas: ``[K, O, I]``.
        scratch: elements of the buffer; it has at most ``max(scratch, I)``.

    Returns:
        ``[B, K]``; strips of rows are added in float64.
    """
    samples, tokens, rows = g.shape
    columns, queries = a.shape[2], deltas.shape[0]
    work = launch.accumulator(g.dtype)
    halves = launch.products_of_halves(g)
    out = torch.zeros(samples, queries, dtype=torch.float64, device=g.device)
    if tokens == 1:
        left, right = g[:, 0].to(work), a[:, 0].to(work)
        for k in range(queries):
            out[:, k] = (left.double() * (right @ deltas[k].to(work).T)).sum(1)
        return out.to(work)
    together = max(1, min(samples, scratch // (4 * rows * columns)))
    strip = min(rows, max(1, scratch // (columns * together)))
    for row in range(0, rows, strip):
        direction = deltas[:, row : row + strip].to(work)
        flat = direction.reshape(queries, -1).T if queries * strip * columns <= 4 * scratch else None
        for first in range(0, samples, together):
            left = g[first : first + together, :, row : row + strip].transpose(1, 2)
            right = a[first : first + together]
            if halves:
                product = torch.bmm(left, right, out_dtype=torch.float32)
            else:
                product = torch.bmm(left.to(work), right.to(work))
            target = out[first : first + together]
            if flat is not None:
                target += _long_products(product.flatten(1), flat)
            else:  # as many directions as this would need a copy of them that is larger than the buffer
                for k in range(queries):
                    target[:, k] += (product * direction[k]).flatten(1).sum(1)
    return out.to(work)


def _long_products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` over millions of numbers: pieces in the work dtype, their sum in float64."""
    whole = left.shape[1] // PIECE * PIECE
    pieces = torch.bmm(
        left[:, :whole].unflatten(1, (-1, PIECE)).transpose(0, 1), right[:whole].unflatten(0, (-1, PIECE))
    )
    return pieces.sum(dim=0, dtype=torch.float64) + left[:, whole:] @ right[whole:]


@torch.library.custom_op("attr_engine::query_dot", mutates_args=(), device_types="cpu")
def _operation(g: Tensor, a: Tensor, deltas: Tensor) -> Tensor:
    if g.numel() == 0 or a.numel() == 0 or deltas.numel() == 0:
        return g.new_zeros(g.shape[0], deltas.shape[0], dtype=launch.accumulator(g.dtype))
    if launch.interpreting() and torch.float64 not in (g.dtype, deltas.dtype):
        return run_triton(g, a, deltas, table.INTERPRETED)
    with launch.ieee(g.device):
        return run_products(g, a, deltas, CPU_SCRATCH)


@_operation.register_kernel("cuda")
def _(g: Tensor, a: Tensor, deltas: Tensor) -> Tensor:
    if g.numel() == 0 or a.numel() == 0 or deltas.numel() == 0:
        return g.new_zeros(g.shape[0], deltas.shape[0], dtype=launch.accumulator(g.dtype))
    row = table.choose(launch.architecture(g.device), g.shape[2], a.shape[2], g.dtype, g.shape[1])
    kernel = row.use == "triton" and len(deltas) < MANY and torch.float64 not in (g.dtype, deltas.dtype)
    if kernel and launch.supported(g.device):
        return run_triton(g, a, deltas, row)
    with launch.ieee(g.device):
        return run_products(g, a, deltas, GPU_SCRATCH)


@_operation.register_fake
def _(g: Tensor, a: Tensor, deltas: Tensor) -> Tensor:
    return g.new_empty(g.shape[0], deltas.shape[0], dtype=launch.accumulator(g.dtype))


def query_dot(g: Tensor, a: Tensor, deltas: Tensor) -> Tensor:
    """``s[b, k] = <sum_t g[b, t, :]^T a[b, t, :], deltas[k]>``.

    Gradients are accumulated in float32 (ieee products for float32 inputs), strips or tiles of the weight are
    added in float64. Against a float64 evaluation of the same inputs the relative RMS error over ``[B, K]``
    is below 5e-6 for directions that are not nearly orthogonal to every gradient. Any strides.

    Args:
        g: gradients with respect to a layer's outputs ``[B, T, O]``: float32, float16, bfloat16, float64.
        a: the layer's inputs ``[B, T, I]``, dtype of ``g``.
        deltas: directions ``[K, O, I]``, any floating dtype.

    Returns:
        ``[B, K]``: float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes or devices that do not match.
        TypeError: dtypes other than those above.
    """
    launch.check_layer(g, a, "query_dot")
    _check_directions(deltas, g.shape[2], a.shape[2], g.device)
    return _operation(g, a, deltas)


def query_dot_low_rank(g: Tensor, a: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """:func:`query_dot` with ``deltas[k] = u[k] v[k]^T``: ``sum_t (g[b, t] u[k]) . (a[b, t] v[k])``.

    Ordinary matrix products on every device, all directions of a sample at a time: scratch is two ``[T, K R]``.

    Args:
        g: ``[B, T, O]``, as in :func:`query_dot`.
        a: ``[B, T, I]``.
        u: ``[K, O, R]``.
        v: ``[K, I, R]``.

    Returns:
        ``[B, K]``: float64 for float64 inputs, else float32; samples' sums are taken in float64.

    Raises:
        ValueError: shapes or devices that do not match.
        TypeError: dtypes other than those of :func:`query_dot`.
    """
    launch.check_layer(g, a, "query_dot_low_rank")
    if u.dim() != 3 or v.dim() != 3 or u.shape[::2] != v.shape[::2]:
        raise ValueError(
            f"query_dot_low_rank: u {tuple(u.shape)} and v {tuple(v.shape)} must be [K, O, R], [K, I, R]"
        )
    _check_directions(u, g.shape[2], u.shape[2], g.device)
    _check_directions(v, a.shape[2], v.shape[2], g.device)
    return _low_rank(g, a, u, v)


def _check_directions(deltas: Tensor, rows: int, columns: int, device: torch.device) -> None:
    if deltas.dim() != 3 or deltas.shape[1:] != (rows, columns):
        raise ValueError(f"query_dot: directions {tuple(deltas.shape)} must be [K, {rows}, {columns}]")
    if deltas.dtype not in launch.TRITON_TYPES:
        raise TypeError(f"query_dot: directions are {deltas.dtype}; they must be floating")
    if deltas.device != device:
        raise ValueError(f"query_dot: directions are on {deltas.device}, gradients on {device}")


@torch.library.custom_op("attr_engine::query_dot_low_rank", mutates_args=())
def _low_rank(g: Tensor, a: Tensor, u: Tensor, v: Tensor) -> Tensor:
    with launch.ieee(g.device):
        return _run_low_rank(g, a, u, v)


def _run_low_rank(g: Tensor, a: Tensor, u: Tensor, v: Tensor) -> Tensor:
    work = launch.accumulator(g.dtype)
    queries, _, rank = u.shape
    out = torch.zeros(g.shape[0], queries, dtype=torch.float64, device=g.device)
    if g.numel() == 0 or a.numel() == 0 or u.numel() == 0:
        return out.to(work)
    left_side = u.permute(1, 0, 2).reshape(-1, queries * rank)
    right_side = v.permute(1, 0, 2).reshape(-1, queries * rank)
    halves = launch.products_of_halves(g) and u.dtype == v.dtype == g.dtype
    for b in range(g.shape[0]):
        if halves:
            left = torch.mm(g[b], left_side, out_dtype=torch.float32)
            right = torch.mm(a[b], right_side, out_dtype=torch.float32)
        else:
            left, right = g[b].to(work) @ left_side.to(work), a[b].to(work) @ right_side.to(work)
        out[b] = (left * right).sum(0, dtype=torch.float64).view(queries, rank).sum(1)
    return out.to(work)


@_low_rank.register_fake
def _(g: Tensor, a: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return g.new_empty(g.shape[0], u.shape[0], dtype=launch.accumulator(g.dtype))


def configurations() -> list[Configuration]:
    """Every form in which the kernel is shipped, for the compile gate."""
    return [
        launch.layer_configuration(
            "query_dot",
            _query_dot_kernel,
            form,
            {"out": "*fp32", "deltas": "*fp32", "queries": "i32", "stride_dk": "i32", "stride_do": "i32"},
            {"stride_di": 1, "GROUP": table.GROUP, "UPCAST": False},
        )
        for form in table.forms("query_dot")
    ]
