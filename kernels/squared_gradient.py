"""Sum of squared per-sample weight gradients, added to a Fisher in place.

``fisher[o, i] += sum_b w_b (sum_t g[b, t, o] a[b, t, i])^2``: ``a`` is what went into a linear layer, ``g`` the
gradient with respect to what came out, so the inner sum is the weight's gradient of sample ``b``.

On a GPU the Triton kernel never stores a per-sample gradient: a program owns a tile of the output, walks over the
samples and, inside, over the tokens, squares its float32 accumulator and adds it up. Where tiles are few the batch is cut
into parts that are added in a fixed order. No atomics: the same call gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attr_engine.kernels import launch, table
from attr_engine.kernels.launch import Configuration, jit

if TYPE_CHECKING:
    import triton.language as tl

CPU_SCRATCH = 2**20  # elements of the product that the CPU holds at a time: 4 MiB in float32
GPU_SCRATCH = 2**26  # the same for bmm + square on a GPU: 256 MiB


@jit
def _squared_gradient_kernel(
    out: tl.tensor,
    g: tl.tensor,
    a: tl.tensor,
    weights: tl.tensor,
    samples: tl.tensor,
    each: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride_ob: tl.tensor,
    stride_oo: tl.tensor,
    stride_oi: tl.tensor,
    stride_gb: tl.tensor,
    stride_gt: tl.tensor,
    stride_go: tl.tensor,
    stride_ab: tl.tensor,
    stride_at: tl.tensor,
    stride_ai: tl.tensor,
    stride_w: tl.tensor,
    add: tl.tensor,
    DESCRIBED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """One program: a tile of one part's sum. ``out`` is the Fisher (``add`` is 1) or the workspace ``[S, O, I]``."""
    # Programs that run together share rows of g and columns of a: tiles are numbered in groups of GROUP rows.
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
    if not DESCRIBED:  # offsets in 64 bits: b * stride passes 2^31 at the model's real sizes
        g_tile = g + o[:, None].to(tl.int64) * stride_go + t[None, :].to(tl.int64) * stride_gt
        a_tile = a + t[:, None].to(tl.int64) * stride_at + i[None, :].to(tl.int64) * stride_ai

    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    begin = part * each
    # One loop over (sample, step): nested loops would drain the pipeline of loads after every sample.
    steps = tl.cdiv(tokens, BLOCK_T)
    gradient = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for turn in tl.range(0, steps * tl.maximum(tl.minimum(each, samples - begin), 0)):
        b = begin + turn // steps
        start = (turn % steps) * BLOCK_T
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
        if start + BLOCK_T >= tokens:
            total += gradient * gradient * tl.load(weights + tl.cast(b, tl.int64) * stride_w)
            gradient = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)

    place = (
        out
        + tl.cast(part, tl.int64) * stride_ob
        + o[:, None].to(tl.int64) * stride_oo
        + i[None, :].to(tl.int64) * stride_oi
    )
    keep = (o < rows)[:, None] & (i < columns)[None, :]
    total += tl.load(place, mask=keep & (add != 0), other=0.0)
    tl.store(place, total, mask=keep)


@jit
def _add_parts_kernel(
    fisher: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride_fo: tl.tensor,
    stride_fi: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """``fisher += parts[0] + parts[1] + ...``, in that order; ``parts`` is contiguous ``[S, O, I]``."""
    place = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(rows, tl.int64) * columns
    keep = place < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(count):
        total += tl.load(parts + tl.cast(part, tl.int64) * size + place, mask=keep, other=0.0)
    target = fisher + (place // columns) * stride_fo + (place % columns) * stride_fi
    tl.store(target, tl.load(target, mask=keep, other=0.0) + total, mask=keep)


def run_triton(
    fisher: Tensor, g: Tensor, a: Tensor, weights: Tensor | None, row: table.Row, parts: int | None = None
) -> None:
    """Launch the kernel on CUDA tensors, or on CPU tensors under the interpreter.

    Args:
        fisher: float32 ``[O, I]``.
        g: ``[B, T, O]``.
        a: ``[B, T, I]``.
        weights: float32 ``[B]`` or None.
        row: tiles, from the table.
        parts: into how many parts the batch is cut; None chooses.
    """
    samples, tokens, rows = g.shape
    columns = a.shape[2]
    read = launch.reading(g, a)
    row = table.fit(row, "squared_gradient", read, g.element_size())
    tiles = -(-rows // row.block_out) * -(-columns // row.block_in)
    parts = parts or launch.splits(tiles, samples, launch.processors(g.device))
    each = -(-samples // parts)
    parts = -(-samples // each)
    if (
        weights is None
    ):  # a factor a sample costs nothing beside its products; two kernels would be to be kept
        weights = torch.ones(samples, dtype=torch.float32, device=g.device)
    workspace = fisher if parts == 1 else fisher.new_empty(parts, rows, columns)
    sources: tuple[Any, Any] = (g, a)
    if read == "descriptor":
        sources = launch.descriptors(g, a, row.block_tokens, row.block_out, row.block_in)
    with torch.cuda.device_of(g):
        _squared_gradient_kernel[(tiles, parts)](
            workspace,
            *sources,
            weights,
            samples,
            each,
            tokens,
            rows,
            columns,
            *((0, *fisher.stride()) if parts == 1 else workspace.stride()),
            *g.stride(),
            *a.stride(),
            weights.stride(0),
            int(parts == 1),
            DESCRIBED=read == "descriptor",
            UPCAST=launch.interpreting() and g.dtype == torch.bfloat16,
            BLOCK_O=row.block_out,
            BLOCK_I=row.block_in,
            BLOCK_T=row.block_tokens,
            GROUP=table.GROUP,
            num_warps=row.warps,
            num_stages=row.stages,
        )
        if parts > 1:
            _add_parts_kernel[(-(-rows * columns // 1024),)](
                fisher, workspace, parts, rows, columns, *fisher.stride(), BLOCK=1024
            )


def _one_token(fisher: Tensor, g: Tensor, a: Tensor, weights: Tensor | None) -> None:
    """T = 1: ``(g a)^2 = g^2 a^2``, so the whole sum is one matrix product of squares.

    Each sample's scale is moved from its larger to its smaller factor by a power of two, which changes no
    bit of the product and keeps the squares away from the ends of the range.
    """
    work = launch.accumulator(g.dtype)
    g, a = g.to(work), a.to(work)
    largest = torch.stack([g.abs().amax(1), a.abs().amax(1)]).clamp_min(torch.finfo(work).tiny)
    shift = ((largest[1].log2() - largest[0].log2()) / 2).round()[:, None]
    g, a = torch.ldexp(g, shift).square(), torch.ldexp(a, -shift).square()
    if weights is not None:
        a = a * weights.to(work)[:, None]
    fisher += g.T @ a


def run_products(fisher: Tensor, g: Tensor, a: Tensor, weights: Tensor | None, scratch: int) -> None:
    """Products into a bounded buffer, then square and add, in plain PyTorch on any device.

    Where a sample's gradient is small several samples share the buffer; where it is larger than the buffer
    it is made in strips of rows. The buffer has at most ``max(scratch, I)`` elements; beside it there is one
    chunk's input in the buffer's dtype where the inputs are 16-bit ones.

    Args:
        fisher: ``[O, I]``.
        g: ``[B, T, O]``.
        a: ``[B, T, I]``.
        weights: ``[B]`` or None.
        scratch: elements of the buffer.
    """
    samples, _, rows = g.shape
    columns = a.shape[2]
    work = launch.accumulator(g.dtype)
    halves = launch.products_of_halves(g)
    # Several samples share a quarter of the buffer (1 MiB stays in a core's cache); measured on a CPU: larger
    # chunks gain nothing, and strips of large gradients below the whole buffer cost up to 10 %.
    together = max(1, min(samples, scratch // (4 * rows * columns)))
    strip = min(rows, max(1, scratch // (columns * together)))
    buffer = torch.empty(0 if halves else together * strip * columns, dtype=work, device=g.device)
    for first in range(0, samples, together):
        n = min(together, samples - first)
        right = a[first : first + n] if halves else a[first : first + n].to(work)
        for row in range(0, rows, strip):
            height = min(strip, rows - row)
            left = g[first : first + n, :, row : row + height].transpose(1, 2)
            target = fisher[row : row + height]
            if halves:
                product = torch.bmm(left, right, out_dtype=torch.float32)
            else:
                product = buffer[: n * height * columns].view(n, height, columns)
                torch.bmm(left.to(work), right, out=product)
            if n == 1:
                if weights is None:
                    target.addcmul_(product[0], product[0])
                else:
                    target.add_(product[0].square_().mul_(weights[first]))
                continue
            product.square_()
            if weights is not None:
                product.mul_(weights[first : first + n, None, None])
            target.add_(product.sum(0))


def _run_cuda(fisher: Tensor, g: Tensor, a: Tensor, weights: Tensor | None) -> None:
    if g.shape[1] == 1:
        return _one_token(fisher, g[:, 0], a[:, 0], weights)
    row = table.choose(launch.architecture(g.device), g.shape[2], a.shape[2], g.dtype, g.shape[1])
    kernel = row.use == "triton" and g.dtype != torch.float64 and fisher.dtype == torch.float32
    if kernel and launch.supported(g.device):
        return run_triton(fisher, g, a, weights, row)
    return run_products(fisher, g, a, weights, GPU_SCRATCH)


@torch.no_grad()
def _run_cpu(fisher: Tensor, g: Tensor, a: Tensor, weights: Tensor | None) -> None:
    if g.numel() == 0 or a.numel() == 0:
        return
    if launch.interpreting() and g.dtype != torch.float64 and fisher.dtype == torch.float32:
        run_triton(fisher, g, a, weights, table.INTERPRETED)
        return
    with launch.ieee(g.device):
        if g.shape[1] == 1:
            _one_token(fisher, g[:, 0], a[:, 0], weights)
        else:
            run_products(fisher, g, a, weights, CPU_SCRATCH)


@torch.library.custom_op("attr_engine::squared_gradient_", mutates_args=("fisher",), device_types="cpu")
def _operation(fisher: Tensor, g: Tensor, a: Tensor, weights: Tensor | None = None) -> None:
    _run_cpu(fisher, g, a, weights)


@_operation.register_kernel("cuda")
def _(fisher: Tensor, g: Tensor, a: Tensor, weights: Tensor | None = None) -> None:
    if g.numel() and a.numel():
        with launch.ieee(g.device):
            _run_cuda(fisher, g, a, weights)


@_operation.register_fake
def _(fisher: Tensor, g: Tensor, a: Tensor, weights: Tensor | None = None) -> None:
    return None


def squared_gradient_(fisher: Tensor, g: Tensor, a: Tensor, weights: Tensor | None = None) -> Tensor:
    """``fisher[o, i] += sum_b w_b (sum_t g[b, t, o] a[b, t, i])^2``, in place.

    Products and sums are float32 (ieee products for float32 inputs, never TF32), float64 for float64 inputs.
    Against a float64 evaluation of the same inputs the relative RMS error is below 5e-6. With one token
    (T = 1) the sum is evaluated as one matrix product of squares. Inputs may have any strides.

    Args:
        fisher: ``[O, I]``, float32, or float64 (not through Triton); any strides.
        g: gradients with respect to a layer's outputs ``[B, T, O]``: float32, float16, bfloat16, float64.
        a: the layer's inputs ``[B, T, I]``, dtype of ``g``.
        weights: ``[B]`` factors of the samples, float32; None is 1 each.

    Returns:
        ``fisher``.

    Raises:
        ValueError: shapes or devices that do not match.
        TypeError: dtypes other than those above.
    """
    launch.check_layer(g, a, "squared_gradient_")
    if fisher.shape != (g.shape[2], a.shape[2]):
        raise ValueError(
            f"squared_gradient_: fisher {tuple(fisher.shape)} must be {(g.shape[2], a.shape[2])}"
        )
    if fisher.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"squared_gradient_: fisher is {fisher.dtype}; it must be float32 or float64")
    if g.dtype == torch.float64 and fisher.dtype != torch.float64:
        raise TypeError("squared_gradient_: float64 gradients need a float64 fisher")
    if weights is not None:
        if weights.shape != g.shape[:1]:
            raise ValueError(
                f"squared_gradient_: weights {tuple(weights.shape)} must be {tuple(g.shape[:1])}"
            )
        weights = weights.to(device=g.device, dtype=launch.accumulator(g.dtype))
    # An operator's way through the dispatcher takes longer than a small product.
    run = _run_cpu if launch.plain(fisher, g, a) else _operation
    run(fisher, g, a, weights)
    return fisher


def configurations() -> list[Configuration]:
    """Every form in which the kernels are shipped, for the compile gate."""
    found = [
        launch.layer_configuration(
            "squared_gradient",
            _squared_gradient_kernel,
            form,
            {
                "out": "*fp32",
                "weights": "*fp32",
                "stride_ob": "i32",
                "stride_oo": "i32",
                "stride_w": "i32",
                "add": "i32",
            },
            {"stride_oi": 1, "GROUP": table.GROUP, "UPCAST": False},
        )
        for form in table.forms("squared_gradient")
    ]
    types = {
        "fisher": "*fp32",
        "parts": "*fp32",
        "count": "i32",
        "rows": "i32",
        "columns": "i32",
        "stride_fo": "i32",
    }
    aligned = frozenset({"fisher", "parts", "columns", "rows", "stride_fo"})
    constants = {"stride_fi": 1, "BLOCK": 1024}
    found.append(
        Configuration(
            "add_parts", _add_parts_kernel, types, constants, aligned, {"num_warps": 4}, registers=64
        )
    )
    return found
