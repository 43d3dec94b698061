"""What the Triton kernels share: compiled on first use, so that nothing here needs Triton to be installed.

A kernel is written as a plain function under :class:`jit`; ``triton`` and ``tl`` become names of its module
when it is launched or compiled for the first time. With ``TRITON_INTERPRET=1`` in the environment the
operations run their Triton kernels in Triton's interpreter on CPU tensors, instead of the plain-PyTorch
implementation: that is for tests, it is slow.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attr_engine.kernels.table import Form

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}
BUDGET = 240  # registers a thread may have: 8 warps of them fit a multiprocessor's 65536, with some to spare
WORKSPACE_TILES = 4096  # of all parts together: 256 MiB of 128 x 128 tiles
# Lengths and counts: a value of 1, or a multiple of 16, must not cause a compilation of its own.
_UNSPECIALISED = ("samples", "each", "queries", "tokens", "frames")
INTERPRETED_PROCESSORS = 4  # so that small shapes are split over the batch in the interpreter too


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def have_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=8)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def architecture(device: torch.device) -> str:
    """Return the entry of ``ARCHITECTURES`` whose kernels a GPU takes (CPU: ``"sm_90"``).

    Consumer cards, before and after Hopper, have the 100 KiB of shared memory that sm_80's tiles fit into.
    """
    if device.type != "cuda":
        return "sm_90"
    return {9: "sm_90", 10: "sm_100"}.get(_capability(device.index or 0)[0], "sm_80")


def supported(device: torch.device) -> bool:
    """Whether Triton is installed and the GPU is one that its kernels were compiled for: Ampere or later."""
    return have_triton() and _capability(device.index or 0)[0] >= 8


def plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors on a CPU in an ordinary call: no compiler or fake tensor has to see it."""
    return not torch.compiler.is_compiling() and all(
        type(x) is Tensor and x.device.type == "cpu" for x in tensors
    )


def fused(device: torch.device) -> bool:
    """Whether noise is made again inside the kernels that need it, instead of being stored."""
    return interpreting() if device.type != "cuda" else supported(device)


@contextmanager
def ieee(device: torch.device) -> Iterator[None]:
    """Float32 products in float32, whatever ``torch.set_float32_matmul_precision`` allows elsewhere."""
    backend: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn
    if device.type != "cuda":
        backend = getattr(backend, "matmul", backend)
    name, exact = ("fp32_precision", "ieee") if hasattr(backend, "fp32_precision") else ("allow_tf32", False)
    before = getattr(backend, name, exact)
    if before in (exact, "none"):
        yield
        return
    setattr(backend, name, exact)
    try:
        yield
    finally:
        setattr(backend, name, before)


@lru_cache(maxsize=8)
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the interpreter."""
    return INTERPRETED_PROCESSORS if device.type != "cuda" else _processors(device.index or 0)


class jit:  # noqa: N801 - stands where ``triton.jit`` would
    """``triton.jit`` that imports Triton when the kernel is first used.

    ``kernel[grid](...)`` launches it. Other kernels that it calls must be names of its own module.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__
        self._compiled: Any = None

    @property
    def __name__(self) -> str:
        """Name of the kernel."""
        return self.function.__name__

    def get(self) -> Any:
        """Return the function as Triton's ``jit`` leaves it."""
        if self._compiled is None:
            import triton
            import triton.language as tl

            names = self.function.__globals__
            names["triton"], names["tl"] = triton, tl
            sizes = [name for name in _UNSPECIALISED if name in inspect.signature(self.function).parameters]
            self._compiled = triton.jit(self.function, do_not_specialize=sizes)
            for name, value in list(names.items()):
                if isinstance(value, jit):  # Triton has to find its own kind when one kernel calls another
                    names[name] = value.get()
        return self._compiled

    def __call__(self, *arguments: Any) -> Any:
        """Call from inside another kernel; Triton replaces the name before it compiles one."""
        return self.get()(*arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.get()[grid]


def lazy(kernel: Any) -> Any:
    """Return Triton's function, whether or not the module's name was already replaced by it."""
    return kernel.get() if isinstance(kernel, jit) else kernel


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is launched, for the compile gate.

    Attributes:
        name: what the gate's table calls it.
        kernel: the kernel.
        types: Triton type of each argument that is not a constant (``"*fp32"``, ``"i32"``, ...).
        constants: values known at compile time, strides of 1 among them.
        aligned: arguments that are multiples of 16 in an ordinary launch.
        options: ``num_warps``, ``num_stages``, ...
        matrix: whether tensor-core instructions must be there.
        registers: the most registers a thread may have.
        architectures: where it is shipped.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    matrix: bool = False
    registers: int = 255
    architectures: tuple[str, ...] = ARCHITECTURES


def _describable(tensor: Tensor) -> bool:
    """Whether a ``[B, T, N]`` tensor can be read through a tensor descriptor (bulk copies of sm_90 and later)."""
    size = tensor.element_size()
    return (
        tensor.stride(2) == 1
        and all(s > 0 and s * size % 16 == 0 and s * size < 2**40 for s in tensor.stride()[:2])
        and tensor.data_ptr() % 16 == 0
    )


def _aligned(tensor: Tensor) -> bool:
    """Whether Triton reads a ``[B, T, N]`` tensor 16 bytes at a time: it looks for multiples of 16 elements."""
    even = all(n % 16 == 0 for n in (*tensor.stride()[:2], tensor.shape[2]))
    return even and tensor.stride(2) == 1 and tensor.data_ptr() % 16 == 0


def reading(g: Tensor, a: Tensor) -> str:
    """How a kernel reads this pair.

    ``"descriptor"``: 16-bit tensors that bulk copies can take, sm_90 and later; ``"pointer"``: 16 bytes at a
    time; ``"strided"``: any strides and sizes, element by element.
    """
    if architecture(g.device) != "sm_80" and g.element_size() == 2 and _describable(g) and _describable(a):
        return "descriptor"
    return "pointer" if _aligned(g) and _aligned(a) else "strided"


def descriptors(g: Tensor, a: Tensor, tokens: int, rows: int, columns: int) -> tuple[Any, Any]:
    """Descriptors of ``g`` and ``a`` for blocks of ``[1, tokens, rows]`` and ``[1, tokens, columns]``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    left = TensorDescriptor(g, list(g.shape), list(g.stride()), [1, tokens, rows])
    return left, TensorDescriptor(a, list(a.shape), list(a.stride()), [1, tokens, columns])


def splits(tiles: int, samples: int, programs: int, most: int = 8) -> int:
    """Into how many parts to cut the batch so that all multiprocessors have work.

    With S parts there are ``ceil(tiles S / programs)`` rounds of ``ceil(samples / S)`` samples each. The smallest S
    within 5 % of the fewest samples in a row is taken, because a part costs a workspace.

    Args:
        tiles: output tiles.
        samples: B.
        programs: multiprocessors.
        most: bound on S; S > 1 is also bounded by ``WORKSPACE_TILES / tiles``.
    """
    options = [s for s in range(1, max(1, min(most, samples)) + 1) if s == 1 or s * tiles <= WORKSPACE_TILES]
    cost = {s: -(-tiles * s // programs) * -(-samples // s) for s in options}
    return next(s for s in options if cost[s] <= 1.05 * min(cost.values()))


def check_layer(g: Tensor, a: Tensor, what: str) -> None:
    """Refuse output gradients and activations that do not belong together.

    Args:
        g: ``[B, T, O]``.
        a: ``[B, T, I]``.
        what: name of the operation, for the message.

    Raises:
        ValueError: shapes that do not match, or tensors on different devices.
        TypeError: a dtype that is not a floating one, or two different dtypes.
    """
    if g.dim() != 3 or a.dim() != 3 or g.shape[:2] != a.shape[:2]:
        raise ValueError(f"{what}: g {tuple(g.shape)} and a {tuple(a.shape)} must be [B, T, O] and [B, T, I]")
    if g.dtype != a.dtype or g.dtype not in TRITON_TYPES:
        raise TypeError(f"{what}: g is {g.dtype} and a is {a.dtype}; both must be the same floating dtype")
    if g.device != a.device:
        raise ValueError(f"{what}: g is on {g.device}, a on {a.device}")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which products of this dtype are added: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def products_of_halves(left: Tensor) -> bool:
    """Whether ``torch.bmm`` can multiply these 16-bit matrices into float32 (CUDA, torch 2.8 and later)."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return left.is_cuda and left.element_size() == 2 and version >= (2, 8)


def layer_configuration(
    name: str, kernel: Any, form: Form, types: Mapping[str, str], constants: Mapping[str, Any]
) -> Configuration:
    """Describe a kernel over ``g`` ``[B, T, O]`` and ``a`` ``[B, T, I]`` for the compile gate.

    Args:
        name: of the operation.
        kernel: the kernel.
        form: tiles, dtype and how the inputs are read.
        types: types of the arguments that the operation adds.
        constants: constants that the operation adds.
    """
    row, dtype = form.row, TRITON_TYPES[getattr(torch, form.dtype)]
    pointers = {"g": f"*{dtype}", "a": f"*{dtype}"}
    if form.read == "descriptor":
        pointers = {
            "g": f"tensordesc<{dtype}[1, {row.block_tokens}, {row.block_out}]>",
            "a": f"tensordesc<{dtype}[1, {row.block_tokens}, {row.block_in}]>",
        }
    sizes = dict.fromkeys(("samples", "each", "tokens", "rows", "columns"), "i32")
    strides = dict.fromkeys(("stride_gb", "stride_gt", "stride_ab", "stride_at"), "i32")
    inner = {"stride_go": 1, "stride_ai": 1}
    if form.read == "strided":
        strides, inner = {**strides, "stride_go": "i32", "stride_ai": "i32"}, {}
    matrix = form.dtype != "float32"
    blocks = {"BLOCK_O": row.block_out, "BLOCK_I": row.block_in, "BLOCK_T": row.block_tokens}
    all_types = {**types, **pointers, **sizes, **strides}
    uneven = {"samples", "each", "tokens", "queries", "add", "stride_w"}
    if form.read == "strided":
        uneven |= {*strides, "g", "a", "rows", "columns", "stride_ob", "stride_oo", "stride_dk", "stride_do"}
    uneven |= set(pointers) if form.read == "descriptor" else set()
    tile = f"{row.block_out}x{row.block_in}x{row.block_tokens}"
    return Configuration(
        f"{name} {form.dtype} {tile} {form.read}",
        kernel,
        all_types,
        {**constants, **inner, **blocks, "DESCRIBED": form.read == "descriptor"},
        frozenset(set(all_types) - uneven),
        {"num_warps": row.warps, "num_stages": row.stages},
        matrix=matrix,
        registers=BUDGET,
        architectures=(form.arch,),
    )


@dataclass(frozen=True)
class RowForm:
    """Form of a kernel over rows ``[B, C, F]``: channels, tile, the axis whose stride is 1, dtype of its arithmetic."""

    channels: int
    block_frames: int
    block_channels: int
    inner: str
    work: str
    warps: int


def row_configuration(
    name: str,
    kernel: Any,
    form: RowForm,
    pointers: Mapping[str, str],
    letters: str,
    constants: Mapping[str, Any],
) -> Configuration:
    """Describe a kernel over rows for the compile gate.

    Args:
        name: of the operation.
        kernel: the kernel.
        form: tile, strides, dtype.
        pointers: element types of the tensors that the operation adds to x, keys and factors.
        letters: the tensors whose strides are passed, as in ``stride_xb``.
        constants: constants that the operation adds.
    """
    tensors = {**pointers, "x": form.work, "keys": "i64", "factors": form.work}
    strides = {f"stride_{letter}{axis}" for letter in letters for axis in "bcf"}
    inner = {stride: 1 for stride in strides if stride.endswith(form.inner)}
    types = {tensor: f"*{kind}" for tensor, kind in tensors.items()}
    types |= dict.fromkeys({"channels", "frames", "stride_mb", *strides} - set(inner), "i32")
    blocks = {"BLOCK_F": form.block_frames, "BLOCK_C": form.block_channels, "WORK": form.work}
    return Configuration(
        f"{name} C={form.channels} {form.work} {'channels' if form.inner == 'c' else 'frames'} innermost",
        kernel,
        types,
        {**constants, **inner, **blocks},
        frozenset(tensors),
        {"num_warps": form.warps, "enable_fp_fusion": False},
        registers=128 if form.work == "fp32" else 192,
    )
