"""The C++ extension where it is installed, the same in Python where it is not.

Both read the same bytes, deliver the same batches and raise the same kinds of
:class:`attr_engine.latents.errors.ReadError`; ``csrc/stream.h`` is the C++ half and
:mod:`attr_engine.latents.pyreader` the Python half.
"""

from __future__ import annotations

import functools
import importlib
import operator
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    _native: ModuleType | None = importlib.import_module("attr_engine._native")
except ImportError:  # there was no compiler where it was installed
    _native = None

__all__ = ["available", "crc32c", "reader"]


def available() -> bool:
    """Return whether the C++ extension is installed; without it everything works, slower."""
    return _native is not None


def reader(name: str = "auto") -> Any:
    """Return the module that holds ``Shards`` and ``Stream``.

    Args:
        name: ``"native"``, ``"python"``, or ``"auto"`` for C++ where it is installed.

    Raises:
        ValueError: another name, or ``"native"`` where it is not installed.
    """
    from attr_engine.latents import pyreader

    if name not in ("auto", "native", "python"):
        raise ValueError(f"there is no reader {name!r}: use auto, native or python")
    if name == "native" and _native is None:
        raise ValueError("the C++ reader is not installed: attr-engine doctor says why")
    return pyreader if name == "python" or _native is None else _native


def crc32c(data: Any, value: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of a buffer.

    Args:
        data: A C-contiguous buffer of any type: bytes, memoryview, numpy array.
        value: The checksum of what came before, to carry on from.

    Raises:
        TypeError: ``data`` is not a buffer.
        ValueError: ``data`` is not contiguous, or ``value`` is not an unsigned 32-bit number.
    """
    return _crc32c(data, value) if _native is None else _native.crc32c(data, value)


# The fallback --------------------------------------------------------------------------------------------

_UINT32 = (0, 2**32 - 1)

# Checksummed in blocks of _BLOCK bytes; within a block, lanes of _STEPS bytes side by side.
_BLOCK = 1 << 22
_STEPS = 1 << 8

_Register = npt.NDArray[np.uint32]


def _integer(name: str, number: Any, bounds: tuple[int, int]) -> int:
    index = operator.index(number)
    low, high = bounds
    if not low <= index <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {index}")
    return index


def _buffer(name: str, data: Any) -> memoryview:
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(f"{name} must be a buffer, not {type(data).__name__}") from None
    if not view.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
    return view


@functools.cache
def _crc_table() -> _Register:
    """Return the register after each single byte, ``[256]``."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & np.uint32(1), np.uint32(0x82F63B78), np.uint32(0))
    return table


@functools.cache
def _crc_zeros(power: int) -> _Register:
    """Return the linear map of the register over ``2**power`` zero bytes: the image of each bit, ``[32]``."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if power == 0:
        return (bits >> np.uint32(8)) ^ _crc_table()[bits & np.uint32(0xFF)]
    half = _crc_zeros(power - 1)
    return _crc_apply(half, half)


def _crc_apply(columns: _Register, registers: _Register) -> _Register:
    """Apply a linear map, ``[32]`` images of the bits, to registers ``[n]``."""
    out = np.zeros_like(registers)
    for bit in range(32):
        out ^= columns[bit] * ((registers >> np.uint32(bit)) & np.uint32(1))
    return out


def _crc_block(data: npt.NDArray[np.uint8], register: int) -> int:
    """Run the register over ``data``, ``[n]``, n >= 1, by lanes of ``_STEPS`` bytes that are then joined."""
    lanes = -(-(data.size + 4) // _STEPS)
    padded = np.zeros(lanes * _STEPS, dtype=np.uint8)  # zeros in front leave a zero register as it is
    head = padded.size - data.size
    padded[head:] = data
    # A register that meets data is a zero register that meets the data XOR the register's bytes; what is left
    # of a register after fewer than four bytes is XORed in at the end.
    padded[head : head + 4] ^= np.array([register], dtype="<u4").view(np.uint8)[: data.size]
    late = register >> (8 * data.size) if data.size < 4 else 0

    table = _crc_table()
    registers = np.zeros(lanes, dtype=np.uint32)
    for column in np.ascontiguousarray(padded.reshape(lanes, _STEPS).T):  # [lanes] bytes
        registers = table[(registers ^ column) & np.uint32(0xFF)] ^ (registers >> np.uint32(8))
    power = _STEPS.bit_length() - 1
    while registers.size > 1:
        if registers.size % 2:
            registers = np.concatenate([np.zeros(1, dtype=np.uint32), registers])
        registers = _crc_apply(_crc_zeros(power), registers[0::2]) ^ registers[1::2]
        power += 1
    return int(registers[0]) ^ late


def _crc32c(data: Any, value: int = 0) -> int:
    """Do what :func:`crc32c` does, in numpy."""
    view = _buffer("data", data)
    register = _integer("value", value, _UINT32) ^ 0xFFFFFFFF
    octets = np.frombuffer(view, dtype=np.uint8) if view.nbytes else np.empty(0, dtype=np.uint8)
    for start in range(0, octets.size, _BLOCK):
        register = _crc_block(octets[start : start + _BLOCK], register)
    return register ^ 0xFFFFFFFF
