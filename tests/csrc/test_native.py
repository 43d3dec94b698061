"""The C++ extension against its numpy twin: same bytes, same exceptions, same messages."""

from __future__ import annotations

import array
import os
import pickle
import secrets
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from attr_engine.latents import native

OFFSET = 4096  # where shards start their data

FACES = {"native": (native.crc32c, native.gather), "numpy": (native._crc32c, native._gather)}
needs_native = pytest.mark.skipif(not native.available(), reason="the extension is not installed")


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "numpy"])
def face(request):
    return FACES[request.param]


@pytest.fixture
def rng():
    seed = secrets.randbits(64)
    print(f"seed {seed}")  # shown when the test fails
    return np.random.default_rng(seed)


class Shard:
    """A file of random rows, and calls that read random tracks of it."""

    def __init__(self, folder, rng, *, rows=700, row_bytes=24, tracks=5, frames=200):
        self.path = folder / "shard.bin"
        self.rows, self.row_bytes, self.frames = rows, row_bytes, frames
        self.data = rng.integers(0, 256, (rows, row_bytes), dtype=np.uint8)
        self.path.write_bytes(b" " * OFFSET + self.data.tobytes())
        self.fd = os.open(self.path, os.O_RDONLY)
        self.lengths = rng.integers(0, min(frames, rows) + 1, tracks)
        self.lengths[2] = max(1, self.lengths[2])
        self.starts = np.array([rng.integers(0, rows - n + 1) for n in self.lengths], dtype=np.int64)
        self.pad_row = rng.integers(0, 256, row_bytes, dtype=np.uint8)
        self.checksums = np.array(
            [native._crc32c(self.data[s : s + n]) for s, n in zip(self.starts, self.lengths, strict=True)],
            dtype=np.uint32,
        )

    def expected(self, pad_row):
        batch = np.zeros((len(self.starts), self.frames, self.row_bytes), dtype=np.uint8)
        if pad_row is not None:
            batch[:] = pad_row
        for i, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            batch[i, :length] = self.data[start : start + length]
        return batch

    def call(self, gather, **changes):
        arguments = {
            "fd": self.fd,
            "data_offset": OFFSET,
            "row_bytes": self.row_bytes,
            "starts": self.starts,
            "lengths": self.lengths,
            "out": np.full((len(self.starts), self.frames, self.row_bytes), 0xEE, dtype=np.uint8),
            "frames": self.frames,
            "pad_row": self.pad_row,
            "checksums": self.checksums,
        } | changes
        gather(**arguments)
        return arguments["out"]


@pytest.fixture
def shard(tmp_path, rng):
    shard = Shard(tmp_path, rng)
    yield shard
    os.close(shard.fd)


def changed(values, i, value):
    copy = values.copy()
    copy[i] = value
    return copy


# crc32c


def test_crc32c_gives_the_published_values(face):
    crc32c, _ = face
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


def test_crc32c_carries_on(face, rng):
    crc32c, _ = face
    data = rng.bytes(10_000)
    for cut in rng.integers(0, 10_000, 10):
        assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


def test_crc32c_takes_any_contiguous_buffer(face, rng):
    crc32c, _ = face
    values = rng.standard_normal((7, 5))
    assert (
        crc32c(values) == crc32c(values.tobytes()) == crc32c(memoryview(values)) == crc32c(bytearray(values))
    )


# gather: what it reads


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("checked", [True, False])
def test_gather_reads_and_pads(face, shard, padded, checked):
    pad_row = shard.pad_row if padded else None
    out = shard.call(face[1], pad_row=pad_row, checksums=shard.checksums if checked else None)
    np.testing.assert_array_equal(out, shard.expected(pad_row))


def test_gather_over_random_shapes(face, tmp_path, rng):
    for _ in range(20):
        sizes = {"rows": rng.integers(1, 3000), "row_bytes": rng.integers(1, 300)}
        counts = {"tracks": rng.integers(3, 20), "frames": rng.integers(1, 400)}
        shard = Shard(tmp_path, rng, **{name: int(n) for name, n in (sizes | counts).items()})
        np.testing.assert_array_equal(shard.call(face[1]), shard.expected(shard.pad_row))
        os.close(shard.fd)


def test_gather_of_no_tracks(face, shard):
    none = np.empty(0, dtype=np.int64)
    shard.call(face[1], starts=none, lengths=none, out=bytearray(), checksums=np.empty(0, dtype=np.uint32))


def test_gather_takes_other_buffers(face, shard):
    out = bytearray(len(shard.starts) * shard.frames * shard.row_bytes)
    starts, lengths = array.array("q", shard.starts), array.array("q", shard.lengths)
    shard.call(face[1], starts=starts, lengths=lengths, out=out, pad_row=shard.pad_row.tobytes())
    assert bytes(out) == shard.expected(shard.pad_row).tobytes()


def test_gather_leaves_the_file_position(face, shard):
    os.lseek(shard.fd, 17, os.SEEK_SET)
    shard.call(face[1])
    assert os.lseek(shard.fd, 0, os.SEEK_CUR) == 17


def test_gather_from_threads_that_share_a_file(face, shard):
    expected = shard.expected(shard.pad_row)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: shard.call(face[1]), range(40)):
            np.testing.assert_array_equal(out, expected)


def test_numpy_gather_carries_on_after_short_reads(shard, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    np.testing.assert_array_equal(shard.call(native._gather), shard.expected(shard.pad_row))


# gather: what it refuses


def failures(shard):
    """Return every kind of wrong call as (changed arguments, exception, part of the message)."""
    rows, size = shard.rows, OFFSET + shard.data.nbytes
    wide, out = 2**63 - 1, np.zeros((5, shard.frames, shard.row_bytes), dtype=np.uint8)
    frozen = out.copy()
    frozen.flags.writeable = False
    outside = f"track 2: {{}} rows from row {{}} lie outside the file, which has {rows} rows"
    track = int(np.flatnonzero(shard.lengths)[0])
    starts, lengths = shard.starts, shard.lengths
    return [
        # integers
        ({"fd": 2**31}, ValueError, "fd must be between"),
        ({"data_offset": 2**63}, ValueError, "data_offset must be between"),
        ({"data_offset": -1}, ValueError, "data_offset is -1: it must not be negative"),
        ({"data_offset": size + 1}, ValueError, f"but the file has {size} bytes"),
        ({"row_bytes": 0, "pad_row": None}, ValueError, "row_bytes is 0"),
        ({"row_bytes": -(2**63), "pad_row": None}, ValueError, "row_bytes is -9223372036854775808"),
        ({"row_bytes": 2.0}, TypeError, "'float' object cannot be interpreted as an integer"),
        ({"frames": 0}, ValueError, "frames is 0"),
        ({"frames": wide}, ValueError, "do not fit in 64 bits"),
        ({"row_bytes": wide, "pad_row": None}, ValueError, "do not fit in 64 bits"),
        ({"row_bytes": 2**40, "frames": 2**40, "pad_row": None}, ValueError, "do not fit in 64 bits"),
        ({"row_bytes": 2**31, "frames": 2**31, "pad_row": None}, ValueError, "do not fit in 64 bits"),
        # buffers
        ({"out": frozen}, ValueError, "out is read-only"),
        ({"out": bytes(out.nbytes)}, ValueError, "out is read-only"),
        ({"out": out[:, ::2]}, ValueError, "out must be C-contiguous"),
        ({"out": np.asfortranarray(out)}, ValueError, "out must be C-contiguous"),
        ({"out": out[1:]}, ValueError, f"out has {out[1:].nbytes} bytes but 5 tracks x"),
        ({"out": None}, TypeError, "out must be a buffer, not NoneType"),
        ({"starts": [1, 2]}, TypeError, "starts must be a buffer, not list"),
        ({"starts": starts.astype(np.int32)}, ValueError, "starts must be a one-dimensional buffer of int64"),
        ({"starts": starts.astype(np.float64)}, ValueError, "buffer of int64"),
        ({"starts": starts.astype(">i8")}, ValueError, "buffer of int64"),
        ({"starts": starts[:, None]}, ValueError, "buffer of int64"),
        ({"starts": starts.repeat(2)[::2]}, ValueError, "starts must be C-contiguous"),
        ({"lengths": lengths[1:]}, ValueError, "lengths has 4 items but starts has 5"),
        ({"checksums": shard.checksums[1:]}, ValueError, "checksums has 4 items but starts has 5"),
        ({"checksums": shard.checksums.astype(np.int32)}, ValueError, "buffer of uint32"),
        ({"pad_row": shard.pad_row[1:]}, ValueError, f"pad_row has {shard.row_bytes - 1} bytes"),
        # tracks
        ({"starts": changed(starts, 2, -1)}, ValueError, "track 2: its start is -1"),
        ({"lengths": changed(lengths, 2, -1)}, ValueError, "track 2: its length is -1"),
        (
            {"lengths": changed(lengths, 2, 201)},
            ValueError,
            "track 2: it has 201 rows but the batch has room for 200",
        ),
        ({"starts": changed(starts, 2, rows)}, ValueError, outside.format(lengths[2], rows)),
        ({"starts": changed(starts, 2, rows - lengths[2] + 1)}, ValueError, "track 2: "),
        ({"starts": changed(starts, 2, wide)}, ValueError, outside.format(lengths[2], wide)),
        ({"starts": changed(starts, 2, 2**62)}, ValueError, outside.format(lengths[2], 2**62)),
        (
            {"checksums": changed(shard.checksums, track, shard.checksums[track] ^ np.uint32(1))},
            native.ChecksumError,
            f"track {track}: ",
        ),
    ]


def raised(shard, gather, changes):
    with pytest.raises(Exception) as info:
        shard.call(gather, **changes)
    return info.value


def test_gather_refuses_with_one_voice(shard):
    for changes, kind, part in failures(shard):
        error = raised(shard, native._gather, changes)
        assert type(error) is kind, (changes, error)
        assert part in str(error)
        if native.available():
            twin = raised(shard, native.gather, changes)
            assert (type(twin), str(twin)) == (type(error), str(error)), changes


def test_a_refused_call_leaves_the_batch_alone(face, shard):
    out = np.full((5, shard.frames, shard.row_bytes), 0xEE, dtype=np.uint8)
    with pytest.raises(ValueError, match="track 4: "):
        shard.call(face[1], starts=changed(shard.starts, 4, shard.rows + 1), out=out)
    assert (out == 0xEE).all()


def test_truncated_file(face, shard):
    last = int(np.argmax(np.where(shard.lengths > 0, shard.starts + shard.lengths, -1)))
    end = OFFSET + int(shard.starts[last] + shard.lengths[last]) * shard.row_bytes
    os.truncate(shard.path, end - 1)
    with pytest.raises(ValueError, match=r"^track \d+: .* lie outside the file"):
        shard.call(face[1])
    os.truncate(shard.path, OFFSET - 1)
    with pytest.raises(ValueError, match=f"data_offset is {OFFSET} but the file has {OFFSET - 1} bytes"):
        shard.call(face[1])


def test_numpy_gather_says_that_the_file_shrank(shard, monkeypatch):
    # the C++ half of this, and EIO, EINTR and short reads, are in csrc/test/driver.cpp
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match=r"^track \d: the file ends at byte \d+, .* became shorter"):
        shard.call(native._gather)


def test_every_flipped_byte_is_found_and_names_its_track(face, shard, rng):
    content = bytearray(shard.path.read_bytes())
    for track in np.flatnonzero(shard.lengths):
        row = int(shard.starts[track]) + int(rng.integers(0, shard.lengths[track]))
        place = OFFSET + row * shard.row_bytes + int(rng.integers(0, shard.row_bytes))
        damaged = content.copy()
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        shard.path.write_bytes(damaged)
        changes = {
            "starts": np.array([0, shard.starts[track]]),
            "lengths": np.array([0, shard.lengths[track]]),
            "checksums": np.array([0, shard.checksums[track]], dtype=np.uint32),
            "out": np.zeros((2, shard.frames, shard.row_bytes), dtype=np.uint8),
        }
        with pytest.raises(native.ChecksumError, match="^track 1: .* the file is damaged"):
            shard.call(face[1], **changes)
        shard.call(face[1], **changes | {"checksums": None})  # unchecked, the damage goes through


def test_unreadable_descriptors(face, shard, tmp_path):
    closed = os.dup(shard.fd)
    os.close(closed)
    with pytest.raises(
        OSError, match=f"^asking for the size of file descriptor {closed} failed: Bad file"
    ) as info:
        shard.call(face[1], fd=closed)
    assert type(info.value) is OSError and info.value.errno == 9

    write_only = os.open(shard.path, os.O_WRONLY)
    with pytest.raises(OSError, match=r"^track \d: reading at byte \d+ failed: Bad file descriptor$") as info:
        shard.call(face[1], fd=write_only)
    assert type(info.value) is OSError and info.value.errno == 9
    os.close(write_only)

    for special in (os.open(tmp_path, os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)):
        with pytest.raises(ValueError, match=f"^file descriptor {special} is not a regular file$"):
            shard.call(face[1], fd=special)
        os.close(special)


def test_crc32c_refuses_with_one_voice():
    every_other = np.arange(10)[::2]
    for arguments in [("text",), (3,), (every_other,), (b"", -1), (b"", 2**32), (b"", 2**70), (b"", "1")]:
        errors = []
        for crc32c in (native.crc32c, native._crc32c):
            with pytest.raises((TypeError, ValueError)) as info:
                crc32c(*arguments)
            errors.append((type(info.value), str(info.value)))
        assert errors[0] == errors[1]


def test_checksum_error_is_one_picklable_class():
    assert issubclass(native.ChecksumError, ValueError)
    error = pickle.loads(pickle.dumps(native.ChecksumError("track 1: damaged")))
    assert type(error) is native.ChecksumError and str(error) == "track 1: damaged"
