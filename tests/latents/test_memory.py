"""Tracks in memory are padded, checked and fingerprinted like those on disk."""

import numpy as np
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, MemoryTracks
from attr_engine.latents.batch import check_tracks


def arrays(dtype=np.float32):
    rng = np.random.default_rng(1)
    return [rng.normal(size=(3, n)).astype(dtype) for n in (4, 2, 6)]


def test_memory_and_disk_give_the_same_batches(tmp_path):
    silence = np.array([1.0, -2.0, 0.5])
    ids, latents, conditioning = ["a", "b", "c"], arrays(), [{"x": i} for i in range(3)]
    memory = MemoryTracks(ids, latents, conditioning, padding=silence)
    writer = LatentWriter(tmp_path / "set", padding=silence)
    for name, latent, row in zip(ids, latents, conditioning, strict=True):
        writer.add(name, latent, row, {})
    writer.close()
    disk = LatentDataset(tmp_path / "set")
    for order in ([0, 1, 2], [2, 0], [1, 1, 2, 0]):
        a, b = memory.batch(order, 8), disk.batch(order, 8)
        assert torch.equal(a.latents, b.latents) and a.latents.dtype == b.latents.dtype
        assert torch.equal(a.valid, b.valid)
        assert (list(a.ids), list(a.conditioning)) == (list(b.ids), list(b.conditioning))
    assert (memory.channels, memory.lengths.tolist()) == (disk.channels, disk.lengths.tolist())


@pytest.mark.parametrize(("dtype", "as_tensor"), [(np.float16, torch.float32), (np.float64, torch.float64)])
def test_float64_stays_and_float16_becomes_float32(dtype, as_tensor):
    batch = MemoryTracks(["a", "b", "c"], arrays(dtype)).batch([1], 6)
    assert batch.latents.dtype == as_tensor
    assert np.array_equal(
        batch.latents[0, :, :2].numpy(), arrays(dtype)[1].astype(batch.latents.numpy().dtype)
    )
    assert not batch.latents[0, :, 2:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_taken_as_arrays_are(dtype):
    latent = torch.arange(6.0).reshape(3, 2).to(dtype).requires_grad_()
    batch = MemoryTracks(["a"], [latent]).batch([0], 3)
    assert batch.latents.dtype == torch.float32
    assert batch.latents[0].tolist() == [[0, 1, 0], [2, 3, 0], [4, 5, 0]]


def test_a_batch_shares_no_memory_with_the_tracks():
    tracks = MemoryTracks(["a", "b", "c"], arrays())
    tracks.batch([0], 6).latents.zero_()
    assert tracks.batch([0], 6).latents.any()


def test_a_track_longer_than_the_batch_is_refused_by_name_as_on_disk():
    with pytest.raises(UserError, match="track 'c' has 6 frames, more than the 5 asked for"):
        MemoryTracks(["a", "b", "c"], arrays()).batch([0, 2], 5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ids": ["a", "b"]}, "one entry a track"),
        ({"ids": ["a", "b", "a"]}, "'a' stands twice"),
        ({"ids": ["a", "", "c"]}, "empty id"),
        ({"ids": [1, 2, 3]}, "id 1"),
        ({"conditioning": [{}]}, "one entry a track"),
        ({"info": []}, "one entry a track"),
        ({"latents": [np.ones((3, 2)), np.ones((4, 2)), np.ones((3, 2))]}, "'b' has 4 channels"),
        ({"latents": [np.ones((3, 2)), np.ones((3, 0)), np.ones((3, 2))]}, "'b' is empty"),
        ({"latents": [np.ones((3, 2)), np.full((3, 2), np.nan), np.ones((3, 2))]}, "'b' holds NaN"),
        ({"latents": [np.ones((3, 2)), np.ones((3, 2)), np.ones((3, 2), dtype=int)]}, "'c' is int64"),
        ({"latents": [np.ones((3, 2)), np.ones((3, 2)), np.ones(3)]}, r"'c' has shape \[3\]"),
        ({"padding": np.zeros(4)}, "padding"),
        ({"padding": np.full(3, np.inf)}, "padding"),
    ],
)
def test_what_cannot_be_used_is_refused_by_item(options, says):
    with pytest.raises(UserError, match=says):
        MemoryTracks(**{"ids": ["a", "b", "c"], "latents": arrays(), **options})


def test_the_fingerprint_changes_with_everything_that_a_model_sees():
    def fingerprint(**options):
        conditioning = [{"x": 1}, {"x": 2}, {"x": 3}]
        return MemoryTracks(
            **{"ids": ["a", "b", "c"], "latents": arrays(), "conditioning": conditioning, **options}
        ).fingerprint

    longer = arrays()
    longer[0][0, 0] = np.nextafter(longer[0][0, 0], 9, dtype=np.float32)
    seen = {
        fingerprint(),
        fingerprint(ids=["a", "b", "d"]),
        fingerprint(latents=longer),
        fingerprint(latents=[x.astype(np.float64) for x in arrays()]),
        fingerprint(conditioning=[{"x": 1}, {"x": 2}, {"x": 4}]),
        fingerprint(padding=np.ones(3)),
        fingerprint(padding=np.zeros(3)),
    }
    assert len(seen) == 7
    assert fingerprint(info=[{"title": "x"}] * 3) == fingerprint()


def test_the_fingerprint_sees_every_value_of_a_long_array_in_the_conditioning():
    def fingerprint(values):
        return MemoryTracks(["a"], [np.ones((3, 2))], [{"clap": values}]).fingerprint

    base = np.zeros(5000, dtype=np.float32)
    other = base.copy()
    other[2500] = 1.0
    assert fingerprint(base) != fingerprint(other)
    assert fingerprint(torch.from_numpy(base)) != fingerprint(torch.from_numpy(other))
    assert fingerprint(base) == fingerprint(base.copy())


@pytest.mark.parametrize(
    ("channels", "frames", "says"),
    [(4, 8, "3 channels, the model takes 4"), (3, 5, "query 'c' has 6 frames")],
)
def test_a_set_that_the_model_cannot_take_is_refused_by_track(channels, frames, says):
    tracks = MemoryTracks(["a", "b", "c"], arrays())
    check_tracks(tracks, 3, 6, "query")
    with pytest.raises(UserError, match=says):
        check_tracks(tracks, channels, frames, "query")


def test_an_empty_set_is_refused():
    with pytest.raises(UserError, match="query set is empty"):
        check_tracks(MemoryTracks([], []), 3, 6, "query")
