"""What cannot be stored is refused by name; whatever stops a writer, the next one finishes the same data set."""

import os
import resource
import signal
import time

import numpy as np
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter
from attr_engine.latents.errors import DatasetError, DiskFull
from attr_engine.latents.manifest import MANIFEST

GOOD = np.zeros((4, 3), dtype=np.float32)


def write_forty(folder, stop=None):
    """Write 40 tracks, those that are not there yet, and close; before track ``stop`` wait to be killed."""
    writer = LatentWriter(folder, shard_bytes=150, extra={"rate": 1})
    for i in range(40):
        while i == stop:
            signal.pause()
        rng = np.random.default_rng(i)
        if not writer.has(f"t{i}"):
            latent = rng.normal(size=(4, 1 + i % 7)).astype(np.float16)
            writer.add(f"t{i}", latent, {"tempo": i, "clap": rng.normal(size=(i % 3, 2))}, {"title": str(i)})
    writer.close()


def in_child(work, kill_after=None):
    """Run ``work`` in a forked process; what it raised ("" for nothing), or None where it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = b""
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}".encode()
        finally:
            os.write(write, b"done " + said)
            os._exit(0)
    os.close(write)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with open(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said[5:].decode() if said else None


def contents(folder):
    """Bytes of every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent", "says"),
    [
        (np.zeros(3, dtype=np.float32), "shape"),
        (np.zeros((1, 2, 3), dtype=np.float32), "shape"),
        (np.zeros((4, 0), dtype=np.float32), "empty"),
        (np.zeros((0, 4), dtype=np.float32), "empty"),
        (np.zeros((4, 3), dtype=np.int16), "int16"),
        (np.zeros((4, 3), dtype=np.complex64), "complex64"),
        (np.zeros((4, 3), dtype=">f4"), ">f4"),
        (torch.zeros((4, 3), dtype=torch.int8), "int8"),
        (np.array([["x"]], dtype=object), "object"),
        (np.full((4, 3), np.nan, dtype=np.float32), "frame 0"),
        (np.array([[0, 0, np.inf]], dtype=np.float16), "frame 2"),
        (torch.full((4, 3), -torch.inf, dtype=torch.bfloat16), "frame 0"),
        (np.zeros((5, 3), dtype=np.float32), "channels 5, expected 4"),
        (np.zeros((4, 3), dtype=np.float16), 'dtype "F16", expected "F32"'),
    ],
)
def test_an_unusable_latent_is_refused_by_its_track(tmp_path, latent, says):
    writer = LatentWriter(tmp_path / "set")
    writer.add("good", GOOD, {}, {})
    with pytest.raises(UserError, match=f"'bad one'.*{says}"):
        writer.add("bad one", latent, {}, {})
    writer.close()
    assert LatentDataset(tmp_path / "set").ids == ["good"]


@pytest.mark.parametrize(
    ("name", "says"), [("a", "'a' stands twice"), ("", "empty id"), ("\udc80", "Unicode"), (3, "int")]
)
def test_an_unusable_id_is_refused_when_it_is_added(tmp_path, name, says):
    writer = LatentWriter(tmp_path / "set")
    writer.add("a", GOOD, {}, {})
    with pytest.raises(UserError, match=says):
        writer.add(name, GOOD, {}, {})


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    ("conditioning", "info"),
    [
        ({"tempo": float("nan")}, {}),
        ({"tempo": float("inf")}, {}),
        ({}, {"x": object()}),
        ({}, {"x": b"bytes"}),
        ({}, {(1, 2): "x"}),
        ({}, {"x": 10**5000}),
        *(({}, nested(depth)) for depth in (450, 490, 495, 5000)),
        *((nested(depth), {}) for depth in (450, 490, 495, 5000)),
    ],
)
def test_what_json_cannot_hold_is_refused_by_track_and_leaves_the_set_whole(tmp_path, conditioning, info):
    writer = LatentWriter(tmp_path / "set")
    writer.add("good", GOOD, {}, nested(100))
    with pytest.raises(UserError, match="'song'"):
        writer.add("song", GOOD, conditioning, info)
    writer.close()
    data = LatentDataset(tmp_path / "set")
    assert data.ids == ["good"] and data.info == [nested(100)]


@pytest.mark.parametrize("extra", [{"x": float("nan")}, {"x": object()}, nested(5000)])
def test_settings_that_json_cannot_hold_are_refused(tmp_path, extra):
    with pytest.raises(UserError, match="extra cannot be stored"):
        LatentWriter(tmp_path / "set", extra=extra)


def test_a_header_that_no_reader_would_take_is_not_written(tmp_path):
    writer = LatentWriter(tmp_path / "set", extra={"x": "a" * (1 << 20)})
    writer.add("a", GOOD, {}, {})
    with pytest.raises(UserError, match="put less into extra"):
        writer.close()
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize(
    "padding",
    [np.zeros(3), np.zeros(5), np.zeros((4, 1)), np.array([0, 0, 0, np.nan]), np.array([0, 0, 0, 1e9])],
    ids=str,
)
def test_padding_that_is_no_latent_of_this_set_is_refused(write, tmp_path, padding):
    with pytest.raises(UserError, match="padding"):
        write(tmp_path / "set", padding=padding)
    assert not (tmp_path / "set" / MANIFEST).exists()


def test_a_set_of_no_tracks_is_refused(tmp_path):
    with pytest.raises(UserError, match="no track"):
        LatentWriter(tmp_path / "set").close()


def test_a_whole_data_set_is_never_overwritten(folder):
    before = contents(folder)
    with pytest.raises(UserError, match="already holds"):
        LatentWriter(folder)
    assert contents(folder) == before


def test_a_closed_writer_takes_no_more_tracks_and_closes_once(tmp_path):
    writer = LatentWriter(tmp_path / "set")
    writer.add("a", GOOD, {}, {})
    writer.close()
    before = contents(tmp_path / "set")
    writer.close()
    with pytest.raises(UserError, match="closed"):
        writer.add("b", GOOD, {}, {})
    assert contents(tmp_path / "set") == before


def test_arrays_may_be_used_again_once_they_are_added(tmp_path):
    latent, clap = np.zeros((1, 3), dtype=np.float32), np.zeros(2)
    frames = torch.zeros(3, 1)
    writer = LatentWriter(tmp_path / "set")
    for i in range(3):
        latent[:], clap[:], frames[:] = i, i, i
        writer.add(f"n{i}", latent, {"clap": clap}, {})
        writer.add(f"t{i}", frames.T, {"clap": clap}, {})
    writer.close()
    batch = LatentDataset(tmp_path / "set").batch(range(6), 3)
    assert batch.latents[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert [row["clap"].tolist() for row in batch.conditioning] == [[i, i] for i in (0, 0, 1, 1, 2, 2)]


def test_a_shard_is_written_once_texts_and_tensors_have_its_size(tmp_path):
    writer = LatentWriter(tmp_path / "set", shard_bytes=1000)
    for i in range(4):
        writer.add(f"t{i}", GOOD, {}, {"lyrics": "x" * 500})
    writer.close()
    assert len(list((tmp_path / "set").glob("*.safetensors"))) == 2


# -- interrupted ----------------------------------------------------------------------------------


def test_a_writer_killed_anywhere_is_finished_by_the_same_writer_run_again(tmp_path, rng):
    write_forty(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    begun = time.monotonic()
    assert in_child(lambda: write_forty(tmp_path / "timed")) == ""
    needed = time.monotonic() - begun
    kills = 0
    for number in range(25):
        folder = tmp_path / str(number)
        folder.mkdir()
        for attempt in range(3):
            # Any run can be done before its moment comes, but not one that waits to be killed.
            stop = int(rng.integers(40)) if number % 5 == attempt == 0 else None
            kills += in_child(lambda: write_forty(folder, stop), rng.uniform(0, needed)) is None  # noqa: B023
            before = contents(folder)
            if MANIFEST in before:
                break
            with pytest.raises(DatasetError, match="manifest.parquet is missing"):
                LatentDataset(folder)
            assert all(whole[name] == data for name, data in before.items() if not name.endswith(".part"))
        else:
            assert in_child(lambda: write_forty(folder)) == ""  # noqa: B023
        assert contents(folder) == whole
    assert kills >= 5


def test_a_writer_takes_over_whole_shards_and_nothing_else(write, tmp_path):
    write(tmp_path / "set", shard_bytes=100)
    whole = contents(tmp_path / "set")
    (tmp_path / "set" / MANIFEST).unlink()
    for name in ("shard-00001.safetensors.part", "manifest.parquet.part", "mine.part", "notes.txt"):
        (tmp_path / "set" / name).write_bytes(b"half")
    writer = LatentWriter(tmp_path / "set")
    assert writer.resumed == 6 and writer.has("t3") and not writer.has("t6")
    writer.close()
    assert contents(tmp_path / "set") == {**whole, "mine.part": b"half", "notes.txt": b"half"}


@pytest.mark.parametrize("options", [{"padding": np.ones(4)}, {"extra": {"rate": 2}}])
def test_shards_that_were_written_with_other_settings_are_not_taken_over(write, tmp_path, options):
    write(tmp_path / "set", shard_bytes=100)
    (tmp_path / "set" / MANIFEST).unlink()
    before = contents(tmp_path / "set")
    with pytest.raises(UserError, match=r"shard-00000.safetensors.*another --out"):
        LatentWriter(tmp_path / "set", **options)
    assert contents(tmp_path / "set") == before
    LatentWriter(tmp_path / "set").close()  # the folder is free


def test_a_damaged_shard_is_not_taken_over(write, tmp_path):
    write(tmp_path / "set", shard_bytes=100)
    (tmp_path / "set" / MANIFEST).unlink()
    os.truncate(tmp_path / "set" / "shard-00001.safetensors", 4000)
    with pytest.raises(DatasetError, match=r"shard-00001.safetensors"):
        LatentWriter(tmp_path / "set")


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_disk_that_is_full_is_told_and_the_writer_can_be_closed_again(
    write, tmp_path, monkeypatch, failing
):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    writer = LatentWriter(tmp_path / "set")
    writer.add("a", GOOD, {}, {})
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(DiskFull, match=r"shard-00000.safetensors.*make room") as caught:
        writer.close()
    assert caught.value.path == tmp_path / "set" / "shard-00000.safetensors"
    monkeypatch.undo()
    assert list((tmp_path / "set").iterdir()) == []
    writer.close()
    assert LatentDataset(tmp_path / "set").ids == ["a"]


def test_a_disk_that_is_full_keeps_whole_shards_and_the_rerun_finishes(tmp_path):
    def write_with_files_up_to(size, folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        write_forty(folder)

    write_forty(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    shards = {name: data for name, data in whole.items() if name != MANIFEST}
    largest = max(map(len, shards.values()))
    assert len(whole[MANIFEST]) > largest  # all shards fit, the manifest does not
    said = in_child(lambda: write_with_files_up_to(largest, tmp_path / "set"))
    assert said.startswith(f"DiskFull: there is no room for {tmp_path / 'set' / MANIFEST}")
    assert contents(tmp_path / "set") == shards
    said = in_child(lambda: write_with_files_up_to(largest - 1, tmp_path / "small"))
    assert said.startswith("DiskFull: there is no room for") and ".safetensors" in said
    assert all(shards[name] == data for name, data in contents(tmp_path / "small").items())
    for folder in (tmp_path / "set", tmp_path / "small"):
        write_forty(folder)
        assert contents(folder) == whole


# -- append, and two at once ----------------------------------------------------------------------


def test_tracks_are_appended_and_the_old_shards_stay_as_they_are(write, tmp_path):
    latents = write(tmp_path / "set", shard_bytes=100)
    before = contents(tmp_path / "set")
    writer = LatentWriter(tmp_path / "set", append=True)
    assert writer.resumed == 6
    with pytest.raises(UserError, match="'t5' stands twice"):
        writer.add("t5", GOOD, {}, {})
    writer.add("new", GOOD + 1, {"seconds_total": 9}, {})
    writer.close()
    after = contents(tmp_path / "set")
    assert all(after[name] == data for name, data in before.items() if name != MANIFEST)
    data = LatentDataset(tmp_path / "set")
    assert data.ids == [*(f"t{i}" for i in range(6)), "new"]
    batch = data.batch([6, 2], 9)
    assert batch.latents[0, 0].tolist() == [1.0] * 3 + [0.0] * 6
    assert np.array_equal(batch.latents[1].numpy(), latents[2])


def test_an_interrupted_append_leaves_the_old_set_and_is_finished_later(write, tmp_path):
    write(tmp_path / "set", shard_bytes=1)
    writer = LatentWriter(tmp_path / "set", append=True, shard_bytes=1)
    writer.add("a", GOOD, {}, {})
    writer.release()
    assert len(LatentDataset(tmp_path / "set")) == 6
    writer = LatentWriter(tmp_path / "set", append=True)
    assert writer.has("a")
    writer.close()
    assert LatentDataset(tmp_path / "set").ids[6:] == ["a"]


@pytest.mark.parametrize(
    ("latent", "options"),
    [
        (GOOD[:3], {}),
        (GOOD.astype(np.float16), {}),
        (GOOD, {"extra": {"x": 1}}),
        (GOOD, {"padding": np.ones(4)}),
    ],
)
def test_what_does_not_fit_the_set_is_not_appended(write, tmp_path, latent, options):
    write(tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(UserError, match="another --out"):
        LatentWriter(tmp_path / "set", append=True, **options).add("a", latent, {}, {})
    assert contents(tmp_path / "set") == before


def test_of_two_writers_at_once_the_second_is_refused(tmp_path):
    first = LatentWriter(tmp_path / "set", shard_bytes=1)
    first.add("a", GOOD, {}, {})
    with pytest.raises(UserError, match="another process writes to"):
        LatentWriter(tmp_path / "set")
    assert "another process writes to" in in_child(lambda: write_forty(tmp_path / "set"))
    first.close()
    with pytest.raises(UserError, match="already holds"):
        LatentWriter(tmp_path / "set")
    assert LatentDataset(tmp_path / "set").ids == ["a"]
