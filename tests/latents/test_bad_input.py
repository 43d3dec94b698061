"""Whatever is wrong with a data set is refused by file, track and way out, whoever reads, and kills nobody."""

import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, native
from attr_engine.latents.build import build_manifest
from attr_engine.latents.check import verify
from attr_engine.latents.errors import (
    ChecksumMismatch,
    DamagedHeader,
    DatasetError,
    ManifestMismatch,
    MissingShard,
    NonFiniteLatent,
    TruncatedShard,
    UnreadableShard,
)
from attr_engine.latents.shardfile import Track, read_contents, write_shard

SHARD = "shard-00000.safetensors"
READERS = [("python", "pread"), ("native", "pread"), ("native", "map")]
READERS = READERS if native.available() else READERS[:1]
every_reader = pytest.mark.parametrize(("reader", "source"), READERS)


def in_child(work, user=None):
    """What ``work`` returns, or the exception that it raises, in a forked process that no signal may end."""
    import pickle

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            found = work()
        except BaseException as error:
            found = error
        try:
            os.write(write, pickle.dumps(found))
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"killed by {signal.Signals(-status).name}" if status < 0 else status
    return pickle.loads(said)


@pytest.fixture
def large(tmp_path):
    """A data set of 64 tracks of 1000 frames in one shard of 1 MB."""
    writer = LatentWriter(tmp_path / "large")
    for i in range(64):
        writer.add(f"t{i}", np.full((4, 1000), i, dtype=np.float32), {}, {})
    writer.close()
    return tmp_path / "large"


# -- files that are too short ---------------------------------------------------------------------


def test_a_shard_cut_anywhere_is_refused_by_name(folder, shard, refused):
    data = shard.read_bytes()
    for size in range(0, len(data), 100):
        shard.write_bytes(data[:size])
        refused(folder, TruncatedShard, SHARD, f"{size} bytes", "exclude=", "shards repair --drop")


@every_reader
def test_a_shard_cut_after_the_data_set_was_opened_is_refused(folder, shard, reader, source):
    data = LatentDataset(folder)
    whole = shard.read_bytes()
    for size in (*range(0, len(whole), 500), len(whole) - 1):
        shard.write_bytes(whole[:size])
        with pytest.raises(TruncatedShard, match=SHARD):
            next(LatentDataset.stream(data, 6, reader=reader, source=source))


@every_reader
@pytest.mark.parametrize("keep", [0, 8, 4096, 300_000, 500_123, 1_028_000])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_shard_that_shrinks_while_it_is_streamed_is_refused_and_kills_nobody(
    large, reader, source, keep, threads
):
    def work():
        stream = LatentDataset(large).stream(
            4, 1000, reader=reader, source=source, threads=threads, buffers=2
        )
        seen = [float(batch.latents[0, 0, 0]) for batch in [next(stream)]]
        os.truncate(large / SHARD, keep)
        try:
            for batch in stream:
                first = int(batch.ids[0][1:])
                assert torch.equal(
                    batch.latents, torch.arange(first, first + 4.0)[:, None, None].expand(4, 4, 1000)
                )
                seen.append(first)
        except DatasetError as error:
            return seen, error
        return seen, None

    seen, error = in_child(work)
    assert seen == [4 * i for i in range(len(seen))] and len(seen) < 17
    assert type(error) is TruncatedShard and SHARD in str(error) and "\n" not in str(error)
    assert error.track in (f"t{i}" for i in range(4 * len(seen), 64)) and repr(error.track) in str(error)


@every_reader
def test_what_is_held_stays_as_it_was_when_the_file_shrinks(large, reader, source):
    def work():
        stream = LatentDataset(large).stream(4, 1000, reader=reader, source=source)
        batch = next(stream)
        os.truncate(large / SHARD, 0)
        return batch.latents[:, 0, -1].tolist()

    assert in_child(work) == [0.0, 1.0, 2.0, 3.0]


def test_a_shard_that_shrinks_between_two_batches_is_refused_by_track(large):
    def work():
        data = LatentDataset(large)
        data.batch([0], 1000)
        os.truncate(large / SHARD, 500_000)
        data.batch([0], 1000)
        return data.batch([0, 63], 1000)

    error = in_child(work)
    assert type(error) is TruncatedShard and SHARD in str(error)


def test_bytes_after_the_end_of_a_shard_are_refused(folder, shard, refused):
    shard.write_bytes(shard.read_bytes() + b"\0")
    refused(folder, ManifestMismatch, SHARD)


def test_a_data_set_that_was_opened_before_a_fork_is_read_after_it(folder):
    data = LatentDataset(folder)
    expected = data.batch([1], 10).latents.sum().item(), data.lengths.tolist()

    def work():
        found = data.batch([1], 10).latents.sum().item(), data.lengths.tolist()
        return (
            found,
            data.ids,
            [x["title"] for x in data.info],
            data.fingerprint,
            len(list(data.stream(2, threads=2))),
        )

    titles = [f"piece {i}" for i in range(6)]
    fingerprint = LatentDataset(folder).fingerprint
    assert in_child(work) == (expected, [f"t{i}" for i in range(6)], titles, fingerprint, 3)


# -- files that are not what they should be -------------------------------------------------------


@pytest.mark.parametrize(
    "start", [b"PK\x03\x04", b"\x93NUMPY\x01\0", b"\x80\x04\x95", b"ARROW1\0\0", b"\0" * 8, b"\xff" * 9]
)
def test_a_file_of_another_kind_is_refused_by_name(folder, shard, refused, start):
    shard.write_bytes(start.ljust(shard.stat().st_size, b"\x01"))
    refused(folder, DamagedHeader, SHARD)


def test_a_missing_shard_is_refused_by_name(write, tmp_path, refused):
    write(tmp_path / "set", shard_bytes=100)
    (tmp_path / "set" / "shard-00001.safetensors").unlink()
    refused(
        tmp_path / "set",
        MissingShard,
        "shard-00001.safetensors is missing",
        "exclude=",
        "shards repair --drop",
    )


@every_reader
def test_a_shard_that_goes_missing_is_refused_by_name(write, tmp_path, reader, source):
    write(tmp_path / "set", shard_bytes=1)
    data = LatentDataset(tmp_path / "set")
    (tmp_path / "set" / "shard-00003.safetensors").unlink()
    stream = data.stream(2, reader=reader, source=source)
    assert next(stream).ids == ["t0", "t1"]
    with pytest.raises(MissingShard, match="shard-00003.safetensors"):
        next(stream)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may not be long
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, make_socket])
def test_what_is_no_file_in_place_of_a_shard_is_refused_by_name(folder, shard, refused, make):
    shard.unlink()
    make(shard)
    refused(folder, UnreadableShard, SHARD, "check the file and its permissions")
    assert [finding.kind for finding in verify(folder).harmful] == ["UnreadableShard"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@every_reader
def test_a_shard_that_may_not_be_read_is_refused_by_name(write, reader, source):
    import shutil
    import tempfile

    top = Path(tempfile.mkdtemp())  # the folders of pytest are closed to other users
    try:
        top.chmod(0o755)
        if not all(parent.stat().st_mode & 0o001 for parent in top.resolve().parents):
            pytest.skip("other users do not reach the temporary folder")
        write(top / "set", shard_bytes=1)
        (top / "set" / "shard-00002.safetensors").chmod(0)
        stream = in_child(
            lambda: list(LatentDataset(top / "set").stream(6, reader=reader, source=source)), user=65534
        )
        assert type(stream) is UnreadableShard
        assert "shard-00002.safetensors: Permission denied" in str(stream)
        (found,) = in_child(lambda: verify(top / "set").harmful, user=65534)
        assert (found.kind, found.file) == ("UnreadableShard", "shard-00002.safetensors")
        (top / "set" / "manifest.parquet").chmod(0)
        error = in_child(lambda: LatentDataset(top / "set"), user=65534)
        assert (
            isinstance(error, DatasetError)
            and "manifest.parquet" in str(error)
            and "permission" in str(error)
        )
    finally:
        shutil.rmtree(top)


def test_shards_in_each_others_place_are_refused(write, tmp_path, refused):
    write(tmp_path / "set", shard_bytes=1)
    a, b = (tmp_path / "set" / f"shard-0000{i}.safetensors" for i in (0, 2))
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    refused(tmp_path / "set", ManifestMismatch, "shard-00000.safetensors")
    assert verify(tmp_path / "set").harmful


# -- payload --------------------------------------------------------------------------------------


@every_reader
def test_every_byte_of_the_payload_is_guarded_by_its_track(folder, shard, reader, source):
    data, starts = shard.read_bytes(), read_contents(shard).offsets[""] * 16
    first = data.index(LatentDataset(folder).batch([0], 5).latents[0].T.contiguous().numpy().tobytes())
    for position in range(0, int(starts[-1]), 7):
        damaged = bytearray(data)
        damaged[first + position] ^= 1 << position % 8
        shard.write_bytes(damaged)
        name = f"t{np.searchsorted(starts, position, 'right') - 1}"
        with pytest.raises(
            ChecksumMismatch, match=f"{SHARD}, track '{name}'.*CRC-32C.*repair --drop"
        ) as caught:
            list(LatentDataset(folder).stream(6, reader=reader, source=source))
        assert caught.value.track == name and caught.value.path == shard


def test_a_damaged_track_leaves_the_others_readable(folder, shard, everything):
    data = bytearray(shard.read_bytes())
    whole = LatentDataset(folder).batch(range(6), 10).latents
    data[bytes(data).index(whole[2, :, :9].T.contiguous().numpy().tobytes())] ^= 1
    shard.write_bytes(data)
    opened = LatentDataset(folder)
    assert torch.equal(opened.batch([0, 1, 3, 4, 5], 10).latents, whole[[0, 1, 3, 4, 5]])
    with pytest.raises(ChecksumMismatch, match="'t2'"):
        opened.batch([0, 1, 2, 3], 10)
    for reader, source in READERS:
        stream = opened.stream(1, 10, reader=reader, source=source)
        assert [next(stream).ids, next(stream).ids] == [["t0"], ["t1"]]
        for _ in range(2):
            with pytest.raises(ChecksumMismatch, match="'t2'"):
                next(stream)
        unchecked = everything(folder, reader, source=source, checksums=False)
        assert len(unchecked[-2]) == 6


# -- NaN and infinity -----------------------------------------------------------------------------


def write_unchecked(folder, latents, tensors=None):
    """A data set with checksums that are right, whatever the values."""
    folder.mkdir()
    tracks = [
        Track(f"t{i}", latent, (tensors or [{}] * 9)[i], "{}", "{}") for i, latent in enumerate(latents)
    ]
    write_shard(folder / SHARD, tracks, {"padding": None, "extra": {}})
    build_manifest(folder, [SHARD])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_infinity_are_refused_by_track_unless_allowed(tmp_path, refused, dtype, value):
    latents = [torch.ones(7, 4, dtype=dtype) for _ in range(3)]
    latents[1][5, 2] = value
    write_unchecked(tmp_path / "set", latents)
    message = refused(tmp_path / "set", NonFiniteLatent, SHARD, "track 't1'", "nonfinite='allow'")
    assert "row 5" in message
    with pytest.raises(NonFiniteLatent, match="'t1'"):
        LatentDataset(tmp_path / "set").batch([0, 1], 7)
    assert LatentDataset(tmp_path / "set").batch([0, 2], 7).latents.isfinite().all()
    for reader, source in READERS:
        (batch,) = LatentDataset(tmp_path / "set").stream(
            3, 7, reader=reader, source=source, nonfinite="allow"
        )
        assert torch.equal(batch.latents.transpose(1, 2), torch.stack(latents)) or np.isnan(value)
        assert (
            int(batch.latents.isfinite().logical_not().sum()) == 1 and not batch.latents[1, 2, 5].isfinite()
        )
    (found,) = verify(tmp_path / "set").harmful
    assert (found.kind, found.file, found.row, found.track) == ("NonFiniteLatent", SHARD, 1, "t1")


def test_nan_in_a_conditioning_tensor_is_refused_by_track(tmp_path, refused):
    tensors = [{"clap": torch.tensor([1.0, value])} for value in (1.0, torch.nan, 2.0)]
    write_unchecked(tmp_path / "set", [torch.ones(2, 4)] * 3, tensors)
    refused(tmp_path / "set", NonFiniteLatent, "track 't1'", "conditioning.clap")
    assert [(x.kind, x.track) for x in verify(tmp_path / "set").harmful] == [("NonFiniteLatent", "t1")]


def test_a_value_that_does_not_fit_into_the_dtype_asked_for_is_refused(tmp_path, refused):
    write_unchecked(tmp_path / "set", [torch.full((3, 4), value) for value in (1.0, 1e6)])
    refused(tmp_path / "set", NonFiniteLatent, "track 't1'", dtype=torch.float16)
    assert verify(tmp_path / "set").findings == []


# -- leaving out what is bad ----------------------------------------------------------------------

BREAK = {
    "cut": lambda path: os.truncate(path, 4000),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "flipped": lambda path: path.write_bytes(
        path.read_bytes()[:4112] + b"\xff" * 4 + path.read_bytes()[4116:]
    ),
    "other header": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "link": lambda path: (
        path.rename(path.parent.parent / "out"),
        path.symlink_to(path.parent.parent / "out"),
    ),
}


@pytest.mark.parametrize("damage", BREAK.values(), ids=BREAK)
def test_one_bad_shard_is_left_out_when_that_is_asked_for_and_only_then(write, tmp_path, damage):
    write(tmp_path / "set", shard_bytes=1)
    expected = LatentDataset(tmp_path / "set").batch([0, 1, 2, 4, 5], 10).latents
    damage(tmp_path / "set" / "shard-00003.safetensors")
    for reader, source in READERS:
        with pytest.raises(DatasetError, match="shard-00003.safetensors"):
            list(LatentDataset(tmp_path / "set").stream(2, reader=reader, source=source))
        data = LatentDataset(tmp_path / "set", exclude=["shard-00003.safetensors"])
        assert (data.excluded, data.ids) == (["t3"], ["t0", "t1", "t2", "t4", "t5"])
        batches = list(data.stream(2, 10, reader=reader, source=source))
        assert torch.equal(torch.cat([batch.latents for batch in batches]), expected)


def test_every_error_of_a_data_set_is_a_user_error_that_survives_pickling():
    import pickle

    from attr_engine.latents import errors

    kinds = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, DatasetError)]
    assert len(kinds) > 12
    for kind in kinds:
        error = pickle.loads(pickle.dumps(kind("a: b", "x/y", "t")))
        assert isinstance(error, UserError) and (str(error), error.path, error.track) == (
            "a: b",
            Path("x/y"),
            "t",
        )
