"""Conditioning tensors come back bit for bit, with the shape that each track had."""

import numpy as np
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, native
from attr_engine.latents.check import repair, verify
from attr_engine.latents.manifest import Manifest

READERS = [("python", "pread"), ("native", "pread"), ("native", "map")]
READERS = READERS if native.available() else READERS[:1]
GOOD = np.zeros((4, 3), dtype=np.float32)

ROWS = {
    "a vector": lambda i: torch.randn(512),
    "token sequences, some empty": lambda i: torch.randn((3, 0, 7, 1, 0)[i], 16).half(),
    "nothing but empty sequences": lambda i: torch.zeros(0, 16),
    "sequences of one length": lambda i: torch.randn(5, 16).to(torch.bfloat16),
    "numbers": lambda i: torch.arange(i) - 2**60,
    "no numbers": lambda i: torch.zeros(0, dtype=torch.int64),
    "flags": lambda i: torch.arange(i + 1) % 2 == 0,
    "flags of every other type": lambda i: np.arange(i, dtype=np.int16),
    "bytes": lambda i: np.arange(250, 251 + i, dtype=np.uint8),
    "many axes": lambda i: np.random.default_rng(i).normal(size=(i, 1, 2, 3, 1, 2, 1)),
    "one axis of one": lambda i: np.array([i], dtype=np.int32),
    "a view with steps": lambda i: np.arange(60.0).reshape(6, 10)[::-2, ::3],
    "a transposed tensor": lambda i: torch.arange(12.0).reshape(3, 4).T,
    "a tensor with a gradient": lambda i: torch.ones(3, requires_grad=True),
    "read-only": lambda i: np.broadcast_to(np.float32(i), (4, 2)),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_conditioning_tensor_comes_back_bit_for_bit(tmp_path, row):
    torch.manual_seed(0)
    given = [row(i) for i in range(5)]
    writer = LatentWriter(tmp_path / "set", shard_bytes=1)
    for i, value in enumerate(given):
        writer.add(f"t{i}", np.full((4, i + 1), i, dtype=np.float32), {"x": value, "n": i}, {}, more=i == 2)
    writer.close()
    expected = [
        torch.as_tensor(np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.detach()) for x in given
    ]
    data = LatentDataset(tmp_path / "set")
    assert data.conditioning == [{"n": i} for i in range(5)]
    batches = [data.batch(range(5), 5)]
    batches += [next(data.stream(5, 5, reader=reader, source=source)) for reader, source in READERS]
    for batch in batches:
        for i, (values, want) in enumerate(zip(batch.conditioning, expected, strict=True)):
            assert set(values) == {"x", "n"} and values["n"] == i
            assert values["x"].dtype == want.dtype and values["x"].shape == want.shape
            assert torch.equal(values["x"], want)
    assert batches[0].conditioning[3:0:-2][0]["n"] == 3
    assert verify(tmp_path / "set").findings == []
    repair(tmp_path / "set")
    assert LatentDataset(tmp_path / "set").fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "name", ["latents", "offsets", "crc32c", "tracks", "id", "start", "__metadata__", "-", "a" * 64]
)
def test_names_that_the_format_uses_itself_are_no_trouble(tmp_path, name):
    writer = LatentWriter(tmp_path / "set")
    for i in range(3):
        writer.add(f"t{i}", GOOD, {name: torch.full((i, 2), float(i)), "other": torch.ones(2)}, {})
    writer.close()
    assert list(Manifest(tmp_path / "set" / "manifest.parquet").meta["fields"]) == sorted([name, "other"])
    rows = LatentDataset(tmp_path / "set").batch(range(3), 3).conditioning
    assert [row[name].tolist() for row in rows] == [[], [[1.0, 1.0]], [[2.0, 2.0]] * 2]
    assert verify(tmp_path / "set").findings == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a b",
        "a.b",
        "x.offsets",
        "../x",
        "/",
        "ä",
        "a\n",
        "a\x00",
        "\x1b[2J",
        '"',
        "\\",
        "a" * 65,
        3,
        None,
        (1,),
    ],
    ids=repr,
)
def test_a_hostile_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="of 'song'.*use letters, digits") as caught:
        LatentWriter(tmp_path / "set").add("song", GOOD, {name: np.zeros(3)}, {})
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.zeros(()), "axes"),
        (torch.tensor(1), "axes"),
        (np.zeros((3, 0)), "axes"),
        (np.zeros((1,) * 8), "axes"),
        (np.array(["a"]), "<U1"),
        (np.array([object()]), "object"),
        (np.array([1j]), "complex128"),
        (np.zeros(3, dtype=np.uint16), "uint16"),
        (np.zeros(3, dtype=np.uint64), "uint64"),
        (np.zeros(3, dtype=">f4"), ">f4"),
        (np.zeros(3, dtype="datetime64[s]"), "datetime64"),
        (np.zeros(3, dtype=[("a", "f4")]), "'a'"),
        (torch.zeros(3).to_sparse(), "cannot be stored"),
        (torch.zeros(3, device="meta"), "cannot be stored"),
        (np.array([1.0, np.nan]), "NaN or infinity"),
        (torch.tensor([[torch.inf]]).half(), "NaN or infinity"),
    ],
)
def test_a_tensor_that_cannot_be_stored_is_refused_by_name_and_track(tmp_path, value, says):
    writer = LatentWriter(tmp_path / "set")
    with pytest.raises(UserError, match="conditioning tensor 'clap' of 'song'") as caught:
        writer.add("song", GOOD, {"clap": value}, {})
    assert says in str(caught.value) and "\n" not in str(caught.value)
    writer.add("song", GOOD, {"clap": np.zeros(3)}, {})
    writer.close()
    assert LatentDataset(tmp_path / "set").ids == ["song"]


@pytest.mark.parametrize(
    "tensors",
    [{}, {"clap": np.zeros((3, 5))}, {"clap": np.zeros((3, 4), np.float32)}, {"clap": np.zeros(3)},
     {"clip": np.zeros((3, 4))}, {"clap": np.zeros((3, 4)), "t5": np.zeros(2)}],
    ids=["none", "other width", "other dtype", "fewer axes", "other name", "one more"],
)  # fmt: skip
def test_tracks_whose_tensors_differ_are_refused_by_name(tmp_path, tensors):
    writer = LatentWriter(tmp_path / "set", shard_bytes=1)
    writer.add("first", GOOD, {"clap": np.zeros((2, 4))}, {})
    with pytest.raises(UserError, match="track 'second' has the fields"):
        writer.add("second", GOOD, tensors, {})
    writer.add("third", GOOD, {"clap": np.zeros((7, 4))}, {})
    writer.close()
    assert LatentDataset(tmp_path / "set").ids == ["first", "third"]
