"""Which implementation serves which shape on a GPU, and with which tiles.

``TABLE`` is keyed by (architecture, out, in, dtype, token class). A row says where it comes from:
``"counted"`` rows were chosen by counting arithmetic, traffic and registers and have not been timed; a
measurement replaces them. Shapes that are not listed take ``DEFAULTS`` of their architecture, dtype and
class. The number of tokens itself is never a key: a batch's length must not cause a compilation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

CONTEXT_TOKENS = 512  # fewer tokens than this (and more than one) are a "context"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        use: ``"triton"`` or ``"bmm"`` (products of a few samples, then square).
        block_out: rows of an output tile.
        block_in: columns of an output tile.
        block_tokens: tokens of one step.
        warps: warps of a program.
        stages: depth of the software pipeline.
        source: ``"counted"``, or the file in ``bench/results`` that holds the measurement.
    """

    use: str
    block_out: int
    block_in: int
    block_tokens: int
    warps: int
    stages: int
    source: str = "counted"


def token_class(tokens: int) -> str:
    """``"none"`` (one token), ``"context"`` or ``"sequence"``."""
    if tokens <= 1:
        return "none"
    return "context" if tokens < CONTEXT_TOKENS else "sequence"


GROUP = 8  # rows of tiles that run together and share what they read

INTERPRETED = Row("triton", 16, 32, 16, 4, 2)  # small tiles, so that small tests cross their borders

# 16-bit inputs: 128 x 128 tiles under 8 warps hold two float32 accumulators without spilling (4 warps, or 128 x 256
# tiles, spill by the hundreds). sm_80 has 164 KiB of shared memory a multiprocessor: three stages of 64 tokens.
# float32 inputs multiply in ieee arithmetic, without tensor cores; cuBLAS' own float32 product is faster there.
DEFAULTS: dict[tuple[str, str, str], Row] = {
    ("sm_80", "16", "context"): Row("triton", 128, 128, 64, 8, 3),
    ("sm_80", "16", "sequence"): Row("triton", 128, 128, 64, 8, 3),
    ("sm_80", "32", "context"): Row("triton", 64, 64, 16, 8, 2),
    ("sm_80", "32", "sequence"): Row("bmm", 64, 64, 16, 8, 2),
    ("sm_90", "16", "context"): Row("triton", 128, 128, 64, 8, 4),
    ("sm_90", "16", "sequence"): Row("triton", 128, 128, 64, 8, 4),
    ("sm_90", "32", "context"): Row("triton", 64, 64, 16, 8, 2),
    ("sm_90", "32", "sequence"): Row("bmm", 64, 64, 16, 8, 2),
    ("sm_100", "16", "context"): Row("triton", 128, 128, 64, 8, 4),
    ("sm_100", "16", "sequence"): Row("triton", 128, 128, 64, 8, 4),
    ("sm_100", "32", "context"): Row("triton", 64, 64, 16, 8, 2),
    ("sm_100", "32", "sequence"): Row("bmm", 64, 64, 16, 8, 2),
}

# What cannot be read 16 bytes at a time has an address for every element: larger tiles would spill. The query
# kernel holds a tile of a direction too; through pointers that is too much for 128 x 128.
STRIDED = Row("triton", 64, 64, 32, 8, 2)
QUERY_POINTER = Row("triton", 64, 128, 64, 8, 3)
QUERY_FLOAT = Row("triton", 64, 64, 16, 8, 3)
QUERY_FLOAT_STRIDED = Row("triton", 64, 32, 16, 4, 2)

# The layers of the 2.0 text-to-audio model (width 1536; tokens 768 wide pass through to_kv).
_MODEL = (
    (4608, 1536, "sequence"),  # self_attn.to_qkv
    (1536, 1536, "sequence"),  # to_out, cross_attn.to_q
    (1536, 768, "context"),  # cross_attn.to_kv
    (12288, 1536, "sequence"),  # ff.ff.0.proj
    (1536, 6144, "sequence"),  # ff.ff.2
)

TABLE: dict[tuple[str, int, int, str, str], Row] = {
    (arch, rows, columns, dtype, tokens): DEFAULTS[arch, "32" if dtype == "float32" else "16", tokens]
    for arch in ("sm_80", "sm_90", "sm_100")
    for rows, columns, tokens in _MODEL
    for dtype in ("bfloat16", "float16", "float32")
}


def choose(arch: str, rows: int, columns: int, dtype: torch.dtype, tokens: int) -> Row:
    """Return the row that serves a shape.

    Args:
        arch: ``"sm_80"``, ``"sm_90"`` or ``"sm_100"``.
        rows: out.
        columns: in.
        dtype: float32, float16, bfloat16 or float64.
        tokens: T; only its class is looked up.

    Returns:
        float64 is always served by products and squares: there is no kernel for it.
    """
    if dtype == torch.float64:
        return Row("bmm", 64, 64, 16, 8, 2)
    kind = token_class(tokens)
    if kind == "none":
        kind = "context"
    listed = TABLE.get((arch, rows, columns, str(dtype).removeprefix("torch."), kind))
    return listed or DEFAULTS[arch, str(8 * dtype.itemsize), kind]


def fit(row: Row, operation: str, read: str, size: int) -> Row:
    """Return the tiles that an operation really takes, given how it reads its inputs.

    Args:
        row: from :func:`choose`, or ``INTERPRETED``, which is returned as it is.
        operation: ``"squared_gradient"`` or ``"query_dot"``.
        read: ``"descriptor"``, ``"pointer"`` or ``"strided"``, from ``launch.reading``.
        size: bytes of an element.
    """
    if row == INTERPRETED:
        return row
    if operation == "query_dot" and size == 4:
        return QUERY_FLOAT_STRIDED if read == "strided" else QUERY_FLOAT
    if read == "strided":
        return STRIDED
    return QUERY_POINTER if operation == "query_dot" and read == "pointer" else row


@dataclass(frozen=True)
class Form:
    """A kernel's form as it is launched on one architecture: tiles, dtype, how the inputs are read."""

    arch: str
    row: Row
    dtype: str
    read: str


def forms(operation: str) -> list[Form]:
    """Every form of an operation that :func:`choose` and :func:`fit` can lead to, each once."""
    rows = {(key[0], row, key[3]) for key, row in TABLE.items()}
    for (arch, size, _), row in DEFAULTS.items():
        rows |= {(arch, row, dtype) for dtype in (("float32",) if size == "32" else ("bfloat16", "float16"))}
    found = set()
    for arch, row, dtype in rows:
        halves = dtype != "float32"
        reads = ("pointer", "strided", "descriptor") if halves and arch != "sm_80" else ("pointer", "strided")
        for read in reads:
            tiles = fit(replace(row, use="triton"), operation, read, 2 if halves else 4)
            found.add(Form(arch, tiles, dtype, read))
    return sorted(found, key=repr)
