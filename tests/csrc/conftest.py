"""A small data set, and raw streams over it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attr_engine.latents import LatentDataset, LatentWriter, native

C, TRACKS = 4, 40


@pytest.fixture
def data(tmp_path, rng):
    """Tracks of 1 to 30 frames in several shards, padded with 1, 2, 3, 4."""
    writer = LatentWriter(tmp_path / "set", padding=np.arange(1, C + 1, dtype=np.float32), shard_bytes=2000)
    for i in range(TRACKS):
        latent = rng.normal(size=(C, int(rng.integers(1, 31)))).astype(np.float32)
        tokens = torch.arange(int(rng.integers(0, 5)))
        writer.add(f"t{i}", latent, {"tokens": tokens, "text": f"piece {i}"}, {})
    writer.close()
    return LatentDataset(tmp_path / "set")


@pytest.fixture
def call(data):
    """Make a raw stream of the tracks, two a batch, with some arguments changed."""
    reading = data.reading
    file, size = str(reading.paths[0]), reading.sizes[0]
    tracks = int((reading.shard == 0).sum())
    ends = np.minimum(np.arange(2, tracks + 2, 2), tracks).astype(np.int64)
    field = {
        "tensor": 0, "to": None, "starts": reading.tensors[0][3][:tracks].astype(np.int64),
        "rows": reading.tensors[0][4][:tracks].astype(np.int64), "checksums": None,
        "frames": np.full(len(ends), 30, dtype=np.int64), "pad_row": None, "refuse_nonfinite": True, "slot_offset": 0,
    }  # fmt: skip
    slot = 2 * 30 * C * 4
    defaults = {
        "files": [(file, size)], "tensors": [("latents", "F32", C)], "map": False,
        "shard_of": np.zeros(tracks, dtype=np.int32), "ends": ends, "ring": bytearray(2 * slot), "slot_bytes": slot,
        "threads": 1, "first": 0,
    }  # fmt: skip

    def make(**changes):
        own = {name: changes.pop(name) for name in list(changes) if name in field}
        values = {**defaults, "fields": [{**field, **own}], **changes}
        module = native.reader("native")
        shards = module.Shards(*(values.pop(name) for name in ("files", "tensors", "map")))
        return module.Stream(shards, **values)

    make.field, make.slot, make.tracks, make.file = field, slot, tracks, file
    return make
