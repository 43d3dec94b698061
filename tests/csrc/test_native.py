"""The functions of the C++ extension: checksums, casts, the search for NaN, copies; wrong arguments are exceptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attr_engine.latents import native

needs_native = pytest.mark.skipif(not native.available(), reason="the extension is not installed")
extension = native.reader() if native.available() else None

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "numpy"])
def crc32c(request):
    return {"native": native.crc32c, "numpy": native._crc32c}[request.param]


def octets(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


# crc32c


def test_crc32c_gives_the_published_values(crc32c):
    assert crc32c(b"123456789") == 0xE3069283  # check value of RFC 3720, as are the next
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0


@needs_native
def test_crc32c_native_equals_numpy(rng):
    for size in [*range(12), 255, 256, 257, 3071, 3072, 3073, *rng.integers(0, 40_000, 30)]:
        data, value = rng.bytes(int(size)), int(rng.integers(0, 2**32))
        assert native.crc32c(data, value) == native._crc32c(data, value), size


@needs_native
def test_crc32c_numpy_joins_its_blocks(rng):
    data = rng.bytes(native._BLOCK + int(rng.integers(1, 1000)))
    assert native.crc32c(data) == native._crc32c(data)


def test_crc32c_carries_on(crc32c, rng):
    data = rng.bytes(10_000)
    for cut in rng.integers(0, 10_000, 10):
        assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


def test_crc32c_takes_any_contiguous_buffer(crc32c, rng):
    values = rng.standard_normal((7, 5))
    expected = crc32c(values.tobytes())
    assert crc32c(values) == crc32c(memoryview(values)) == crc32c(bytearray(values)) == expected


def test_crc32c_refuses_with_one_voice():
    every_other = np.arange(10)[::2]
    for arguments in [("text",), (3,), (every_other,), (b"", -1), (b"", 2**32), (b"", 2**70), (b"", "1")]:
        errors = []
        for crc32c in (native.crc32c, native._crc32c):
            with pytest.raises((TypeError, ValueError)) as info:
                crc32c(*arguments)
            errors.append((type(info.value), str(info.value)))
        assert errors[0] == errors[1]


# cast


def every_value(name, rng):
    """All values of the 16-bit types; random bits, modest numbers and the edges of all formats for the others."""
    dtype = FLOATS[name]
    if dtype.itemsize == 2:
        return torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16)).view(dtype)
    edges = [0.0, 5e-324, 2.0**-149, 2.0**-150, 2.0**-133, 2.0**-134, 2.0**-126, 2.0**-24, 2.0**-25, 2.0**-14, 1.0,
             65504.0, 65519.996, 65520.0, 65535.0, 3.3895e38, 3.3961775e38, 3.4028235e38, 3.4028236e38, 1.7e308,
             float("inf"), float("nan")]  # fmt: skip
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).to(torch.float64)
    halves = halves[torch.isfinite(halves)]
    parts = [
        torch.tensor(edges, dtype=torch.float64),
        -torch.tensor(edges, dtype=torch.float64),
        (halves[1:] + halves[:-1]) / 2,  # where rounding to float16 is a tie
        torch.from_numpy(rng.standard_normal(5000) * 2.0 ** rng.integers(-30, 17, 5000)),
    ]
    values = torch.cat(parts).to(dtype)
    neighbours = [torch.nextafter(values, torch.full_like(values, to)) for to in (-torch.inf, torch.inf)]
    random_bits = torch.from_numpy(np.frombuffer(rng.bytes(40_000), dtype=np.uint8).copy()).view(dtype)
    return torch.cat([values, *neighbours, random_bits])


def cast(values, source, target):
    out = torch.empty(len(values), dtype=FLOATS[target])
    extension.cast(octets(out), target, octets(values), source)
    return out


def same(a, b):
    """Equal bit by bit, NaN as NaN."""
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return bool(((a.view(word) == b.view(word)) | (a.isnan() & b.isnan())).all())


@needs_native
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_casts_are_those_of_torch(source, target, rng):
    values = every_value(source, rng)
    assert same(cast(values, source, target), values.to(FLOATS[target]))


@needs_native
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_casts_of_any_length_and_alignment(source, target, rng):
    values = torch.from_numpy(rng.standard_normal(300)).to(FLOATS[source])
    expected = values.to(FLOATS[target])
    into, data = FLOATS[target].itemsize, octets(values)
    memory = np.zeros(300 * into + 100, dtype=np.uint8)
    shifted = np.zeros(len(data) + 8, dtype=np.uint8)
    for _ in range(150):
        n, skip, shift = (int(x) for x in rng.integers((0, 0, 0), (301, 40, 8)))
        source_bytes = shifted[shift : shift + n * FLOATS[source].itemsize]
        source_bytes[:] = data[: source_bytes.size]
        memory[:] = 0xEE
        extension.cast(memory[skip : skip + n * into], target, source_bytes, source)
        assert memory[skip : skip + n * into].tobytes() == octets(expected)[: n * into].tobytes()
        assert (memory[:skip] == 0xEE).all() and (memory[skip + n * into :] == 0xEE).all()


@needs_native
def test_cast_refuses_what_does_not_fit():
    out, frozen = bytearray(8), bytes(8)
    for arguments, kind in [
        ((out, "F32", bytes(3), "F16"), ValueError),
        ((out, "F32", bytes(6), "F16"), ValueError),
        ((out, "F33", bytes(4), "F16"), ValueError),
        ((out, "F32", bytes(4), "I16"), ValueError),
        ((out, "F32", bytes(4), ""), ValueError),
        ((frozen, "F32", bytes(4), "F16"), ValueError),
        ((None, "F32", bytes(4), "F16"), TypeError),
        ((out, None, bytes(4), "F16"), TypeError),
        ((out, "F32", None, "F16"), TypeError),
        ((np.zeros(8, dtype=np.uint8)[::2], "F16", bytes(4), "F16"), ValueError),
    ]:
        with pytest.raises(kind):
            extension.cast(*arguments)


# first_nonfinite and copy_nontemporal


@needs_native
@pytest.mark.parametrize("name", FLOATS)
def test_first_nonfinite_at_every_place(name, rng):
    count = 200
    values = torch.from_numpy(rng.uniform(-1, 1, count)).to(FLOATS[name])
    values[::3] = torch.finfo(FLOATS[name]).max
    size = FLOATS[name].itemsize
    memory = np.zeros(count * size + 8, dtype=np.uint8)
    for place in range(count):
        for bad in (float("inf"), -float("inf"), float("nan")):
            skip = int(rng.integers(8))
            spoiled = values.clone()
            spoiled[place] = bad
            spoiled[int(rng.integers(place, count))] = bad  # a later one changes nothing
            spoiled[place] = bad
            data = memory[skip : skip + count * size]
            data[:] = octets(spoiled)
            assert extension.first_nonfinite(data, name) == place
            assert extension.first_nonfinite(data[: place * size], name) == place  # there is none: the length


@needs_native
def test_first_nonfinite_takes_every_16_bit_value():
    for name in ("F16", "BF16"):
        values = every_value(name, None)
        for value in values[torch.randperm(65536)[:3000]]:
            assert extension.first_nonfinite(octets(value.reshape(1)), name) == int(torch.isfinite(value))
        bad = (~torch.isfinite(values)).nonzero()
        assert extension.first_nonfinite(octets(values), name) == int(bad[0])
    with pytest.raises(ValueError):
        extension.first_nonfinite(bytes(8), "U8")
    with pytest.raises(TypeError):
        extension.first_nonfinite(None, "F16")


@needs_native
def test_copy_nontemporal_copies(rng):
    data = np.frombuffer(rng.bytes(1100), dtype=np.uint8)
    out = np.zeros(1200, dtype=np.uint8)
    for _ in range(300):
        n, skip, shift = (int(x) for x in rng.integers((0, 0, 0), (1001, 70, 70)))
        out[:] = 0xEE
        extension.copy_nontemporal(out[skip : skip + n], data[shift : shift + n])
        assert (out[skip : skip + n] == data[shift : shift + n]).all()
        assert (out[:skip] == 0xEE).all() and (out[skip + n :] == 0xEE).all()
    for arguments in [(bytes(4), bytes(4)), (bytearray(4), bytes(5)), (out[::2], bytes(600))]:
        with pytest.raises(ValueError):
            extension.copy_nontemporal(*arguments)
    with pytest.raises(TypeError):
        extension.copy_nontemporal(None, b"")
